"""The study's models: how each is trained from the SFT model of its seed, and its metrics."""

from __future__ import annotations

import difflib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import (
    PPO,
    RLOO,
    BDHSConfig,
    Config,
    Distorted,
    JudgeConfig,
    OnlineBDHS,
    OnlinePairs,
    OnlineRewards,
    RewardModel,
    SamplingConfig,
    SceneOracle,
    SceneQuestions,
)
from mllm_align.align.contract import Objective
from mllm_align.align.pairwise import DPO, Averaged
from mllm_align.align.sft import SFT
from mllm_align.config import AnnotatorConfig, Online
from mllm_align.config import to_json as config_json
from mllm_align.evaluation.accuracy import accuracy
from mllm_align.files import new_file
from mllm_align.generation.bdhs_job import bdhs
from mllm_align.models.bundle import Bundle, load
from mllm_align.testbed.hallucination import Counts, count, intervals
from mllm_align.testbed.quickstart.phases import Base, Clock, Pictures, Recipe, Seed
from mllm_align.testbed.scenes import builder
from mllm_align.training.loop import train
from scenes_study import rewards
from scenes_study.rows import JUDGE, REWARDS

SPLITS = ("broken", "unbiased")
EACH = ("mentions", "hallucinated", "present", "recalled")  # kept for every picture
JUDGED = 300  # pairs that the self judge is tested on
SAMPLING = SamplingConfig(temperature=1.0, max_tokens=96)
MADE = {"similarity": "lexical", "sampling": SAMPLING, "sentence_tokens": 32}


Annotators = Callable[[Path, Path], AnnotatorConfig]
"""Folders of the pictures and of the seed's runs -> who ranks or rewards."""


@dataclass(frozen=True)
class Variant:
    """pairs: data of the training, `captions`, `corrupted`, those that BDHS writes as `bdhs` says, or
    `unbiased`, captions of as many other pictures, in which things are no usual partners.

    online: the responses that are made while training, given the folders of the pictures and of the seed's
    runs. objective: None for DPO with the recipe's beta.
    """

    name: str
    pairs: str = ""
    bdhs: dict[str, Any] | None = None
    online: Callable[[Path, Path], Online] | None = None
    averaged: bool = False
    objective: Objective | None = None
    rate: float = 3e-4


def _offline(name: str, **fields: Any) -> Variant:
    return Variant(name, "bdhs", fields)


def _oracle(scenes: Path, _: Path) -> AnnotatorConfig:
    return SceneOracle(scenes)


def _oracle_f1(scenes: Path, _: Path) -> AnnotatorConfig:
    return SceneOracle(scenes, order="f1")


def _self_judge(*_: Path) -> AnnotatorConfig:
    return SceneQuestions()


def _reward_model(_: Path, runs: Path) -> AnnotatorConfig:
    return RewardModel(model=str(runs / REWARDED["rloo_reward"]))


def _ranked(annotator: Annotators, share: float) -> Callable[[Path, Path], Online]:
    return lambda *places: OnlinePairs(annotator(*places), offline_share=share, sampling=SAMPLING)


def _policy_gradient(
    name: str, objective: Objective, annotator: Annotators, pairs: str = "captions", **rounds: int
) -> Variant:
    """As configs/rloo_scenes.py and ppo_scenes.py have it."""

    def online(*places: Path) -> Online:
        return OnlineRewards(annotator(*places), sampling=SAMPLING, reward_samples=512, **rounds)

    return Variant(name, pairs, online=online, objective=objective, rate=6e-4)


def _distorted(*_: Path) -> Online:
    return Distorted()


def _bdhs(*_: Path) -> Online:
    return OnlineBDHS(**MADE)


VARIANTS = {
    v.name: v
    for v in (
        Variant("sft"),
        Variant("sft_control"),
        Variant("sft_unbiased", "unbiased", objective=SFT(), rate=5e-4),
        Variant("dpo_corrupted", "corrupted"),
        _offline("bdhs_attn_0.99"),
        Variant("bdhs_online", "captions", online=_bdhs),
        Variant("online_dpo_oracle", "captions", online=_ranked(_oracle, 0.0)),
        Variant("mixed_dpo_oracle", "corrupted", online=_ranked(_oracle, 0.5)),
        Variant("online_dpo_f1", "captions", online=_ranked(_oracle_f1, 0.0)),
        _policy_gradient("rloo_f1", RLOO(responses=4, beta=0.02), _oracle_f1),
        _policy_gradient("rloo_f1_unbiased", RLOO(responses=4, beta=0.02), _oracle_f1, "unbiased"),
        _policy_gradient("rloo_reward", RLOO(responses=4, beta=0.02), _reward_model),
        _policy_gradient("ppo_f1", PPO(beta=0.02), _oracle_f1, minibatches=2, epochs=2),
        _offline("bdhs_noise", distortion="noise"),
        _offline("bdhs_unguided", guided=False),
        Variant("povid_style", "captions", online=_distorted),
        Variant("averaged_povid", "corrupted", online=_distorted, averaged=True),
        Variant("averaged_bdhs_online", "corrupted", online=_bdhs, averaged=True),
        Variant("online_dpo_self", "captions", online=_ranked(_self_judge, 0.0)),
        Variant("mixed_dpo_self", "corrupted", online=_ranked(_self_judge, 0.5)),
        _offline("bdhs_attn_0.9", mask_rate=0.9),
        _offline("bdhs_attn_0.5", mask_rate=0.5),
        _offline("bdhs_attn_0", mask_rate=0.0),
    )
}
REWARDED = {"rloo_reward": "reward_corrupted"}
JUDGED_BY_SELF = {name for name in VARIANTS if name.endswith("_self")}


class Study(Seed):
    """One seed: the quickstart's folders, and runs and pairs of each variant in them."""

    variants = VARIANTS

    def __init__(self, out: Path, seed: int, recipe: Recipe, read: Pictures, clock: Clock):
        super().__init__(out, seed, recipe, read, clock)
        self.data = out / "data"

    def begin(self, base: Base) -> None:
        """Pretraining and SFT, where they are not there yet."""
        base()
        if not (self.out / "sft").exists():
            self._phase("SFT", lambda: self._sft(base.model))

    @cached_property
    def sft(self) -> Bundle:
        return load(self.out / "sft")

    def row(self, name: str) -> dict[str, Any]:
        """Make a variant, a reward model or the self judge; what was measured of it."""
        if name == JUDGE:
            return self.stamp(name) | self.judged()
        return self.stamp(name) | (rewards.row(self, name) if name in REWARDS else self.variant(name))

    def variant(self, name: str) -> dict[str, Any]:
        began, facts = time.perf_counter(), {}
        bundle, variant = self.sft, self.variants[name]
        if name == "sft_control":
            self._control()
            bundle = load(self.out / "control")
        elif variant.pairs:
            data, facts = self._data(variant)
            made = time.perf_counter()
            scenes = self.unbiased if variant.pairs == "unbiased" else self.read
            config = self.config(variant, scenes.folder, self.out / "runs")
            if name in REWARDED:
                rewards.model(self, REWARDED[name])
            bundle = train(config, self.sft, data, self.out / "runs" / name)
            facts |= {"training": _log(self.out / "runs" / name)}
            facts["training"]["seconds"] = round(time.perf_counter() - made, 1)
        measuring = time.perf_counter()
        found = self.measured(name, bundle)
        ended = time.perf_counter()
        seconds = {"measuring": round(ended - measuring, 1), "whole": round(ended - began, 1)}
        return {**found, **facts, "seconds": seconds}

    def measured(self, name: str, bundle: Bundle) -> dict[str, Any]:
        """What a row says of its model."""
        return {"splits": {split: self._counted(bundle, split) for split in SPLITS}}

    def stamp(self, name: str) -> dict[str, Any]:
        """What decides a row: one that says something else is made anew."""
        settings: dict[str, Any] = {"recipe": asdict(self.recipe)}
        if name == JUDGE:
            settings |= {"judge": config_json(_judge()), "pairs": JUDGED}
        elif name in REWARDS:
            settings |= {"train": config_json(rewards.settings(self)), "pairs": REWARDS[name]}
        else:
            variant = self.variants[name]
            places = Path("scenes"), Path("runs")
            settings["train"] = config_json(self.config(variant, *places)) if variant.pairs else None
            settings["bdhs"] = config_json(self.writer(variant)) if variant.bdhs is not None else None
        plain = json.loads(json.dumps(settings, default=str))
        return {"variant": name, "seed": self.seed, "version": version("mllm-align"), "settings": plain}

    def judged(self) -> dict[str, Any]:
        """How often the self judge prefers a caption to its corrupted form."""
        rows = [json.loads(line) for line in self.corrupted().read_text().splitlines()[:JUDGED]]
        for row in rows:
            row["image"] = str(self.data / row["image"])
        config = replace(_judge(), data=replace(_judge().data, image_root=self.data, allow_outside=True))
        summary, _ = accuracy(config, rows, self.sft)
        return {"judged": summary, "seconds": {"whole": summary["seconds"]}}

    # ---- data ----------------------------------------------------------------------------------------

    def config(self, variant: Variant, *places: Path) -> Config:
        pair = DPO(beta=self.recipe.beta, sft_weight=self.recipe.sft_weight)
        averaged = Averaged(pair=pair, gamma=0.5) if variant.averaged else pair
        return self._config(
            self.recipe.dpo,
            variant.rate,
            objective=variant.objective or averaged,
            online=variant.online and variant.online(*places),
            freeze=("vision_tower",),
            log_every=20,
        )

    def _data(self, variant: Variant) -> tuple[Path, dict[str, Any]]:
        if variant.pairs == "captions":
            return self.captions(), {}
        if variant.pairs == "unbiased":
            examples = (replace(e, qas=e.qas[:1]) for e in self.unbiased("unbiased"))
            return builder.write_files(examples, self.data / "unbiased", "sft"), {}
        if variant.pairs == "corrupted":
            path, facts = self.corrupted(), {}
        else:
            path = self.data / f"{variant.name}.jsonl"
            facts = bdhs(self.writer(variant), self.sft, self.captions(), path)
            facts |= {"left_out": len(facts["left_out"]), "over_long": len(facts["over_long"])}
        return path, {"pairs": facts | self._described(path)}

    def writer(self, variant: Variant | None = None) -> BDHSConfig:
        fields = {"mask_rate": self.recipe.mask_rate} | ((variant and variant.bdhs) or {})
        return BDHSConfig(**MADE, batch_size=64, seed=self.seed, **fields)

    @cached_property
    def chosen(self) -> list[builder.Example]:
        return self.read("train")[: self.recipe.pairs]

    @cached_property
    def unbiased(self) -> Pictures:
        """Pictures that nothing else is trained or measured on."""
        few = dict.fromkeys(("train", "held_out", "broken", "lessons"), 1)
        scenes = self.recipe.scenes
        settings = replace(scenes, seed=scenes.seed + 1, unbiased=self.recipe.pairs, **few)
        return Pictures(self.read.folder.with_name("scenes-unbiased"), settings)

    def captions(self) -> Path:
        path = self.data / "sft.jsonl"
        if not path.exists():
            builder.write_files((replace(e, qas=e.qas[:1]) for e in self.chosen), self.data, "sft")
        return path

    def corrupted(self) -> Path:
        path = self.data / "corrupted.jsonl"
        if not path.exists():
            rows = [json.loads(line) for line in self.captions().read_text().splitlines()]
            made = rewards.corrupted(rows, self.chosen, self.seed)
            with new_file(path) as file:
                for row, rejected in zip(rows, made, strict=True):
                    file.write(json.dumps(row | {"rejected": rejected}) + "\n")
        return path

    def _described(self, path: Path) -> dict[str, Any]:
        """How much the rejected responses differ from the chosen, and what is wrong with them."""
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        scenes = {e.id: e.scene for e in self.read("train")}
        changed = [
            1 - difflib.SequenceMatcher(None, r["chosen"].split(), r["rejected"].split(), False).ratio()
            for r in rows
        ]
        counts = _sum([count(scenes[r["id"].rsplit("-", 1)[0]], r["rejected"]) for r in rows])
        return {"count": len(rows), "words_changed": round(float(np.mean(changed)), 4), "rejected": counts}

    # ---- measuring -----------------------------------------------------------------------------------

    def _counted(self, bundle: Bundle, split: str) -> dict[str, Any]:
        measured = self._measure(bundle, split)
        counts = [Counts(**each) for each in measured["counts"]]
        found: dict[str, Any] = {
            "counts": _sum(counts),
            "over_pictures": {name: i.to_json() for name, i in intervals(counts).items()},
            "each": {name: [getattr(c, name) for c in counts] for name in EACH},
        }
        if "pope" in measured:
            asked = Counter(mode for mode, _ in measured["pope"])
            right = Counter(mode for mode, good in measured["pope"] if good)
            found["pope"] = {mode: [right[mode], asked[mode]] for mode in asked}
        return found


def _judge() -> JudgeConfig:
    return JudgeConfig(annotator=SceneQuestions())


def _sum(counts: list[Counts]) -> dict[str, int]:
    total = np.array([astuple(c) for c in counts]).sum(0).tolist()
    return dict(zip((f.name for f in fields(Counts)), total, strict=True))


def _log(run: Path) -> dict[str, Any]:
    """Loss of the last steps, and what a step took once everything was compiled."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = list({e["step"]: e for e in events if e["event"] == "train"}.values())
    later = [line for line in lines if line["step"] > lines[-1]["step"] / 3] or lines
    names = {
        n for line in lines for n in line if n.split("/")[0] in ("rollout", "annotate", "bdhs", "update")
    }
    names |= {"seconds_per_step", "groups_used", "rejected_usable", "online_share"} & set(lines[-1])
    means = {
        n: float(np.mean([line[n] for line in later if line.get(n) is not None])) for n in sorted(names)
    }
    last = {n: lines[-1][n] for n in ("loss", "rewards/margin", "rewards/accuracy") if n in lines[-1]}
    return {"last_steps": last, "means": {n: round(value, 4) for n, value in means.items()}}
