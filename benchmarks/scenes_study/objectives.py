"""The objectives' study: one budget, one grid for all, pairs of corrupted captions.

A method's scale and rate are those with the lowest CHAIR_i on pictures of no reported split, on a seed that
is not reported, among those that keep SFT's recall.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import BCO, DPO, IPO, KTO, MDPO, MRPO, ORPO, RDPO, SFT, DataConfig, Part, SimPO, SLiC, Sum
from mllm_align.align.contract import Objective
from mllm_align.align.visual import CHiP
from mllm_align.config import Config
from mllm_align.curation.retrieve import retrieve
from mllm_align.data.encode import Encoded
from mllm_align.files import new_file
from mllm_align.models.bundle import Bundle
from mllm_align.prepare import prepare
from mllm_align.scoring import response_logps
from mllm_align.testbed.scenes import builder
from mllm_align.testbed.scenes.draw import picture
from mllm_align.testbed.scenes.world import KINDS, Scene
from scenes_study.rows import figure
from scenes_study.variants import Study, Variant, _oracle, _ranked

Row = dict[str, Any]
Setting = tuple[float, float]
"""Scale and learning rate."""

SEED = 3
"""Of tuning: none of those reported."""
SCALES, RATES = (0.1, 0.3, 1.0), (2e-4, 5e-4)
PICTURES = 200
"""Tuning measures on so many."""
LOST = 0.02
"""Recall below SFT's that a setting may have to be chosen."""
SHARES = {"online": 0.0, "mixed": 0.5}
"""Of groups whose responses are the data's, in online and mixed training."""
COMPARED = ("dpo", "ipo", "slic")
"""Losses that are trained offline, online and mixed."""


def _with_sft(objective: Objective) -> Objective:
    return Sum((Part(objective), Part(SFT())))


def _mpo(beta: float) -> Objective:
    return Sum((Part(DPO(beta), 0.8), Part(BCO(beta), 0.2), Part(SFT(), 1.0)))


@dataclass(frozen=True)
class Method:
    """made: the objective for a scale, one of `scales`. pairs: data, as of `Variant`, or `retrieved`."""

    title: str
    made: Callable[[float], Objective]
    scales: tuple[float, ...] = SCALES
    pairs: str = "corrupted"

    @property
    def grid(self) -> list[Setting]:
        return [(scale, rate) for scale in self.scales for rate in RATES]


METHODS = {
    "dpo": Method("DPO", lambda scale: DPO(scale, sft_weight=1.0)),
    "ipo": Method("IPO", lambda scale: _with_sft(IPO(scale))),
    "slic": Method("SLiC", lambda scale: _with_sft(SLiC(scale))),
    "mdpo": Method("mDPO, a crop", lambda scale: _with_sft(MDPO(scale))),
    "rdpo": Method("rDPO, a retrieved picture", lambda scale: _with_sft(RDPO(scale)), pairs="retrieved"),
    "chip": Method("CHiP, a noisy picture", CHiP),
    "mpo": Method("MPO", _mpo),
    "mrpo": Method("MRPO, two references", lambda scale: MRPO(scale, sft_weight=1.0)),
    "simpo": Method(
        "SimPO", lambda scale: _with_sft(SimPO(scale, gamma=scale / 2)), scales=(1.0, 2.0, 5.0)
    ),
    "orpo": Method("ORPO", ORPO),
    "kto": Method("KTO", lambda scale: _with_sft(KTO(scale))),
}
TITLES = {"sft": "SFT"} | {name: method.title for name, method in METHODS.items()}
TITLES |= {f"{how}_{name}": f"{how}, {METHODS[name].title}" for how in SHARES for name in COMPARED}


def base_of(name: str) -> str:
    """The method whose setting a row takes: `dpo` of `mixed_dpo`."""
    return name.rpartition("_")[2]


# ---- tuning ------------------------------------------------------------------------------------------


def tuning_name(method: str, setting: Setting) -> str:
    """Of the row of one setting."""
    scale, rate = setting
    return f"tune_{method}_{scale:g}_{rate:g}"


def tuning_names(methods: list[str]) -> list[str]:
    """Rows that decide the settings of these; SFT's says which recall is to be kept."""
    return ["tune_sft", *(tuning_name(m, setting) for m in methods for setting in METHODS[m].grid)]


def chosen(rows: dict[str, Row]) -> dict[str, Setting]:
    """Method -> its setting, of the methods whose whole grid is there. rows: of tuning, by name."""
    found: dict[str, Setting] = {}
    for name, method in METHODS.items():
        each = {setting: rows.get(tuning_name(name, setting)) for setting in method.grid}
        if "tune_sft" in rows and None not in each.values():
            found[name] = _best({setting: row for setting, row in each.items() if row}, rows["tune_sft"])
    return found


def _best(rows: dict[Setting, Row], sft: Row) -> Setting:
    """The lowest CHAIR_i of those whose recall is kept; where none keeps it, the highest recall."""
    recall = {setting: figure(row, "recall", "tuning") for setting, row in rows.items()}
    kept = [setting for setting in rows if recall[setting] >= figure(sft, "recall", "tuning") - LOST]
    if not kept:
        return max(rows, key=lambda setting: recall[setting])
    return min(kept, key=lambda setting: figure(rows[setting], "chair_i", "tuning"))


# ---- rows --------------------------------------------------------------------------------------------


def tuning_variants() -> dict[str, Variant]:
    made = {"tune_sft": Variant("tune_sft")}
    for name, method in METHODS.items():
        for scale, rate in method.grid:
            row = tuning_name(name, (scale, rate))
            made[row] = Variant(row, method.pairs, objective=method.made(scale), rate=rate)
    return made


def variants(settings: dict[str, Setting]) -> dict[str, Variant]:
    """The reported rows. settings: of `chosen`."""
    made = {"sft": Variant("sft")}
    for name, (scale, rate) in settings.items():
        method = METHODS[name]
        how: Row = {"objective": method.made(scale), "rate": rate}
        made[name] = Variant(name, method.pairs, **how)
        for kind, share in SHARES.items() if name in COMPARED else ():
            row, pairs = f"{kind}_{name}", "corrupted" if share else "captions"
            made[row] = Variant(row, pairs, online=_ranked(_oracle, share), **how)
    return made


class Objectives(Study):
    """One seed of the objectives' study; its folders may be those of `study.py`."""

    def __init__(self, *places: Any, variants: dict[str, Variant]):
        super().__init__(*places)
        self.variants = variants

    def config(self, variant: Variant, *places: Path) -> Config:
        """MRPO's second reference is SFT's control, which the seed's other runs lie beside."""
        config = super().config(variant, *places)
        if not isinstance(config.objective, MRPO):
            return config
        second = (str(places[1].parent / "control"),)
        return replace(config, objective=replace(config.objective, references=second))

    def _data(self, variant: Variant) -> tuple[Path, Row]:
        if isinstance(variant.objective, MRPO):
            self._control()
        if variant.pairs != "retrieved":
            return super()._data(variant)
        path = self.data / "retrieved_pairs.jsonl"
        if not path.exists():
            retrieve([self.corrupted()], path, self.sft, neighbours=1, batch_size=64)
        return path, {"pairs": self._described(path)}

    def measured(self, name: str, bundle: Bundle) -> Row:
        if name.startswith("tune_"):
            return {"splits": {"tuning": self._counted(bundle, "tuning")}}
        return super().measured(name, bundle) | {"visual": self._visual(bundle)}

    def _measure(self, bundle: Bundle, split: str) -> Row:
        if split == "tuning":
            return self._captioned(bundle, self.unbiased("unbiased")[:PICTURES])
        return super()._measure(bundle, split)

    def _visual(self, bundle: Bundle) -> Row:
        """How many of the held-out captions are likelier under their picture than under the same with one
        thing of another kind, and by how many nats a caption."""
        data = DataConfig(shapes=1, multiple=8)
        encoder, records, _ = prepare(bundle, self.edited(), data, responses=1, rejected_image="record")

        def logps(parts: list[Encoded], what: str) -> np.ndarray:
            found = response_logps(bundle, encoder, parts, data, 64, what=what)
            return np.array([answer.sum() for (answer,) in found])

        own = logps([record.alone for record in records], "own picture")
        margin = own - logps([record.second for record in records if record.second], "edited picture")
        return {
            "right": int((margin > 0).sum()),
            "pairs": len(records),
            "margin": round(float(margin.mean()), 3),
        }

    def edited(self) -> Path:
        """The held-out captions, each with its picture and the edited one."""
        path = self.data / "edited_held_out.jsonl"
        if not path.exists():
            examples = [replace(e, qas=e.qas[:1]) for e in self.read("held_out")]
            captions = builder.write_files(examples, self.data, "held_out")
            rows = [json.loads(line) for line in captions.read_text().splitlines()]
            scenes = self.recipe.scenes
            with new_file(path) as file:
                for example, row in zip(examples, rows, strict=True):
                    image = f"images/{example.id}-edited.png"
                    scene = with_another(example.scene)
                    picture(scene, scenes.grain, scenes.seed, scenes.fog).save(self.data / image)
                    file.write(json.dumps(row | {"rejected_image": image}) + "\n")
        return path


def with_another(scene: Scene) -> Scene:
    """The scene with one thing replaced by one of a kind that is not in it; the same for the same scene, so
    that noise and fog of the two pictures are equal."""
    rng = np.random.default_rng(zlib.crc32(scene.id.encode()))
    old = scene.things[rng.integers(len(scene.things))]
    new = replace(old, kind=str(rng.choice([kind for kind in KINDS if kind not in scene.kinds])))
    groups = tuple(tuple(new if thing is old else thing for thing in group) for group in scene.groups)
    return replace(scene, groups=groups)


def read_tuning(results: Path) -> dict[str, Row]:
    """The rows of tuning, by name."""
    files = sorted(results.glob(f"tune_*-{SEED}.json"))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {row["variant"]: row for row in rows}
