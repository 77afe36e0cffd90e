"""The method on a testbed that the program draws itself: SFT, BDHS, DPO, before and after.

A small LLaVA learns to see and to speak from scratch, on pictures whose captions have a language bias. It
then makes its own rejected responses (BDHS) and is aligned to them. What it says of pictures that break
the bias is counted exactly, before, after, and against as many further steps of SFT.

OUT/recipe.json   what OUT was made with
OUT/seed-S        one seed: pictures in scenes/, pairs in data/, model folders (start, seeing, sft, control,
                  aligned), their training in runs/, and what was counted in measured.json
OUT/results.json  the figures; OUT/report.html shows them
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.align.objectives import DPO, SFT
from mllm_align.config import BDHSConfig, Config, DataConfig, OptimConfig, SamplingConfig
from mllm_align.config import to_json as config_json
from mllm_align.data.demo import make_model
from mllm_align.data.scenes import builder, draw, world
from mllm_align.data.scenes.language import yes_or_no
from mllm_align.errors import refusal
from mllm_align.evaluate.hallucination import Counts, count, hallucinated_spans, intervals, pope_questions
from mllm_align.evaluate.intervals import bootstrap, over_seeds
from mllm_align.files import new_file, new_folder
from mllm_align.generate.pairs import bdhs
from mllm_align.generate.respond import generate
from mllm_align.models.bundle import Bundle, load
from mllm_align.report.page import Curve, Example, Marked, Report, write
from mllm_align.training.loop import train
from mllm_align.training.run import export_run

MODELS = {"sft": "sft", "sft_control": "control", "aligned": "aligned"}  # in results.json: their folder
OTHERS = ("unbiased", "held_out")  # splits that are looked at beside `broken`
PROMPT = "Describe the picture."


@dataclass(frozen=True)
class Recipe:
    """How much of everything; sizes of the model and rates of learning stand in the code."""

    scenes: world.Settings = world.Settings(grain=30.0, fog=0.8, train=4000, lessons=2000)
    batch: int = 32
    seeing: tuple[int, int, int] = (200, 200, 250)
    """Steps on captions of each lesson: one thing everywhere, one in each region, one in each half."""
    speaking: int = 400
    """Steps on captions without pictures."""
    sft: int = 1300
    dpo: int = 120
    """Steps of DPO, and of further SFT for the control."""
    pairs: int = 1000
    """Captions that BDHS rewrites."""
    mask_rate: float = 0.99
    beta: float = 1.0


def run(out: Path, seeds: int = 1, recipe: Recipe | None = None) -> dict[str, Any]:
    """Make everything under `out`; what is there from an earlier run of the same recipe is kept.

    Returns what results.json holds. Raises InputError if `out` holds something else.
    """
    recipe = recipe or Recipe()
    _take(out, seeds, recipe)
    runs = [_Seed(out / f"seed-{seed}", seed, recipe) for seed in range(seeds)]
    measured = [each() for each in runs]
    results = summary(measured, recipe.mask_rate)
    with new_file(out / "results.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    write(report(runs[0], measured, results), out / "report.html")
    for sentence in verdict(results):
        print(sentence)
    print(f"report: {out / 'report.html'}")
    return results


def _take(out: Path, seeds: int, recipe: Recipe) -> None:
    """Say in recipe.json what `out` is for. Raises InputError if that is something else already."""
    stamp, said = out / "recipe.json", json.dumps({"seeds": seeds, "recipe": asdict(recipe)}, indent=2)
    if out.exists() and not out.is_dir():
        raise refusal(str(out), "is a file", "name a new folder")
    if out.exists() and any(out.iterdir()):
        try:
            there = json.loads(stamp.read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refusal(str(out), "holds something else", "name a new folder") from error
        if there != json.loads(said)["recipe"]:
            raise refusal(str(out), "holds a run of another recipe", "name a new folder")
    with new_file(stamp) as file:
        file.write(said + "\n")


# ---- one seed --------------------------------------------------------------------------------------


class _Seed:
    """All phases of one seed, each skipped where its result is there."""

    def __init__(self, out: Path, seed: int, recipe: Recipe):
        self.out, self.seed, self.recipe = out, seed, recipe
        self.scenes = replace(recipe.scenes, seed=seed)
        self._kept: dict[str, list[builder.Example]] = {}
        self.seconds: dict[str, float] = {}  # of each phase, in this and earlier processes

    def __call__(self) -> dict[str, Any]:
        done, times = self.out / "measured.json", self.out / "seconds.json"
        if done.exists():
            return json.loads(done.read_text())
        if times.exists():
            self.seconds = json.loads(times.read_text())
        self._phase("draw pictures", lambda: self.data)
        self._phase("SFT", self._sft)
        summary = self._phase("BDHS", self._pairs)
        self._phase("DPO", self._dpo)
        self._phase("further SFT", self._control)
        measured = self._phase("evaluate", self._evaluate)
        measured |= {"pairs": summary, "seconds": self.seconds}
        with new_file(done) as file:
            file.write(json.dumps(measured) + "\n")
        return measured

    @cached_property
    def data(self) -> Any:
        return builder.prepare(self.out / "scenes", self.scenes)

    def read(self, split: str) -> list[builder.Example]:
        if split not in self._kept:  # parsing takes longer than anything that is done with them
            self._kept[split] = list(builder.read(self.data, split))
        return self._kept[split]

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        print(f"== seed {self.seed}: {name}", flush=True)
        began = time.perf_counter()
        try:
            return work()
        finally:  # a phase that is stopped took its time, too
            took = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.seconds[name] = round(took, 1)
            with new_file(self.out / "seconds.json") as file:
                file.write(json.dumps(self.seconds) + "\n")

    def _train(self, config: Config, start: str, data: Any, name: str) -> None:
        """Train from the folder `start`; the result is the Hugging Face folder `name`."""
        if not (self.out / name).exists():
            train(config, self.out / start, data, self.out / "runs" / name)
            export_run(self.out / "runs" / name, self.out / name)

    def _config(self, steps: int, rate: float, **fields: Any) -> Config:
        c = Config(
            objective=SFT(),
            lora=None,
            freeze=(),
            optim=OptimConfig(learning_rate=rate, warmup=0.05),
            data=DataConfig(shapes=1, multiple=8, threads=2),
            batch_size=self.recipe.batch,
            steps=steps,
            seed=self.seed,
            remat="none",
            log_every=50,
            save_every=steps,
        )
        return replace(c, **fields)

    def _sft(self) -> None:
        rows = self._rows()
        if not (self.out / "start").exists():
            corpus = (f"USER: \n{r['prompt']} ASSISTANT: {r['completion']}" for r in rows)
            with new_folder(self.out / "start") as folder:
                make_model(
                    folder,
                    seed=self.seed,
                    image_size=world.SIDE * draw.CELL,
                    patch_size=draw.CELL,
                    vision_hidden=64,
                    vision_mlp=128,
                    vision_layers=3,
                    hidden=96,
                    mlp=192,
                    head_dim=24,
                    kv_heads=4,
                    corpus=corpus,
                )
        self._train(self._pretrain(sum(self.recipe.seeing)), "start", self._lessons(), "seeing")
        self._train(self._pretrain(self.recipe.speaking), "seeing", self._blind(), "speaking")
        # Captions, answers and captions without a picture differ much in length.
        by_length = DataConfig(shapes=3, multiple=8, threads=2)
        self._train(self._config(self.recipe.sft, 2e-3, data=by_length), "speaking", rows, "sft")

    def _pretrain(self, steps: int) -> Config:
        """Settings of what stands for LLaVA's pretrained parts; records come in order."""
        c = self._config(steps, 3e-3)
        steady = replace(c.optim, schedule="constant", warmup=0.1)
        return replace(c, optim=steady, data=replace(c.data, shuffle=False))

    def _lessons(self) -> list[dict[str, Any]]:
        """Captions of the lessons, one after the other, as many as the steps take.

        Where one thing is everywhere, every patch tells what the words mean; then come places, then
        relations.
        """
        rows: list[dict[str, Any]] = []
        for lesson, steps in zip(world.LESSONS, self.recipe.seeing, strict=True):
            captions = builder.sft_rows(self.read(lesson), {"caption"})
            rows += islice(cycle(captions), steps * self.recipe.batch)
        return [row | {"id": f"lesson-{number}"} for number, row in enumerate(rows)]

    def _rows(self) -> list[dict[str, Any]]:
        """Training records; captions come without their picture, too, lest that be forgotten."""
        return builder.sft_rows(self.read("train")) + self._blind()

    def _blind(self) -> list[dict[str, Any]]:
        """Training captions without their picture.

        LLaVA's language model has read much text without images. One that has not babbles as soon as
        the image is hidden, and its rejected responses teach nothing.
        """
        rows = builder.sft_rows(self.read("train"), {"caption"})
        return [
            {"id": f"{row['id']}-blind", "prompt": row["prompt"], "completion": row["completion"]}
            for row in rows
        ]

    def _pairs(self) -> dict[str, Any]:
        captions = self.read("train")[: self.recipe.pairs]
        folder = self.out / "data"
        if not (folder / "sft.jsonl").exists():
            builder.write_files((replace(e, qas=e.qas[:1]) for e in captions), folder, "sft")
        config = BDHSConfig(
            mask_rate=self.recipe.mask_rate,
            similarity="lexical",
            sampling=SamplingConfig(max_tokens=96),
            sentence_tokens=32,
            batch_size=64,
            seed=self.seed,
        )
        return bdhs(config, load(self.out / "sft"), folder / "sft.jsonl", folder / "pairs.jsonl")

    def _dpo(self) -> None:
        config = self._config(
            self.recipe.dpo,
            3e-4,
            objective=DPO(beta=self.recipe.beta),
            freeze=("vision_tower",),
        )
        self._train(config, "sft", self.out / "data" / "pairs.jsonl", "aligned")

    def _control(self) -> None:
        self._train(self._config(self.recipe.dpo, 5e-4), "sft", self._further(), "control")

    def _further(self) -> list[dict[str, Any]]:
        """As many of the records of SFT, drawn by lot, as the control takes."""
        rows = self._rows()
        some = np.random.default_rng(self.seed).permutation(len(rows))[
            : self.recipe.dpo * self.recipe.batch
        ]
        return [rows[i] for i in some]

    # ---- evaluation --------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        models: dict[str, Any] = {}
        for name, folder in MODELS.items():
            bundle = load(self.out / folder)
            models[name] = {split: self._measure(bundle, split) for split in ("broken", *OTHERS)}
        return {"models": models}

    def _measure(self, bundle: Bundle, split: str) -> dict[str, Any]:
        """Captions of a split and what was counted in each; on `broken` also answers of yes or no."""
        examples = self.read(split)
        captions = [texts[0].strip() for texts in _ask(bundle, [(e.png, PROMPT) for e in examples], 96)]
        counts = [count(e.scene, text) for e, text in zip(examples, captions, strict=True)]
        measured = {"captions": captions, "counts": [asdict(c) for c in counts]}
        if split != "broken":
            return measured
        rng = np.random.default_rng(self.seed)
        popular = [kind for e in self.read("train") for kind in e.scene.kinds]
        ranked = sorted(world.KINDS, key=popular.count, reverse=True)
        asked = [(e, q) for e in examples for q in pope_questions(e.scene, rng, ranked)]
        answers = _ask(bundle, [(e.png, q.question) for e, q in asked], 2)
        right = [
            (q.mode, yes_or_no(text[0]) is q.answer) for (_, q), text in zip(asked, answers, strict=True)
        ]
        return measured | {"pope": right}


def _ask(bundle: Bundle, asked: Sequence[tuple[bytes, str]], tokens: int) -> list[list[str]]:
    rows = [{"images": [{"bytes": png}], "prompt": prompt} for png, prompt in asked]
    return generate(bundle, rows, SamplingConfig(temperature=0.0, max_tokens=tokens), batch_size=64)


# ---- figures ---------------------------------------------------------------------------------------


def figures(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure of one model on one split, with its interval over images (POPE: over questions)."""
    out = {name: i.to_json() for name, i in intervals([Counts(**c) for c in measured["counts"]]).items()}
    if "pope" not in measured:
        return out
    modes = [mode for mode, _ in measured["pope"]]
    right = np.array([good for _, good in measured["pope"]], float)
    out["pope_accuracy"] = bootstrap(right).to_json()
    for mode in sorted(set(modes)):
        chosen = right[[m == mode for m in modes]]
        out[f"pope_{mode}"] = bootstrap(chosen).to_json()
    return out


def summary(measured: Sequence[dict[str, Any]], mask_rate: float) -> dict[str, Any]:
    """What results.json holds: intervals over images, or over seeds where there are several."""
    seeds = len(measured)
    each = [
        {name: {split: figures(m) for split, m in splits.items()} for name, splits in one["models"].items()}
        for one in measured
    ]

    def joined(name: str, split: str) -> dict[str, Any]:
        if seeds == 1:
            return each[0][name][split]
        names = each[0][name][split]
        return {key: over_seeds([one[name][split][key]["mean"] for one in each]).to_json() for key in names}

    others = {split: {name: joined(name, split) for name in MODELS} for split in OTHERS}
    pairs = [one["pairs"] for one in measured]
    differ = np.mean([p["differ_after"] for p in pairs], axis=0).tolist()
    return {
        "interval": "95% bootstrap over images" if seeds == 1 else f"95% Student t over {seeds} seeds",
        "seeds": list(range(seeds)),
        "split": "broken",
        **{name: joined(name, "broken") for name in MODELS},
        "other_splits": others,
        "pairs": {
            "count": sum(p["pairs"] for p in pairs),
            "differ_after_iteration": {f"{mask_rate:g}": differ},
        },
        "seconds": {
            phase: round(sum(one["seconds"][phase] for one in measured), 1)
            for phase in measured[0]["seconds"]
        },
    }


def verdict(results: dict[str, Any]) -> list[str]:
    """The outcome in plain sentences, whichever it is."""
    said = []
    after = results["aligned"]["chair_i"]
    for name, words in (("sft", "the SFT model"), ("sft_control", "as many further steps of SFT")):
        before = results[name]["chair_i"]
        change = f"from {before['mean']:.1%} to {after['mean']:.1%}"
        if after["high"] < before["low"]:
            said.append(
                f"Fewer hallucinated things than {words}: CHAIR_i {change}; intervals do not overlap."
            )
        elif after["low"] > before["high"]:
            said.append(
                f"More hallucinated things than {words}: CHAIR_i {change}; intervals do not overlap."
            )
        else:
            said.append(f"No clear effect against {words}: CHAIR_i {change}, and the intervals overlap.")
    gained = round(100 * (results["aligned"]["recall"]["mean"] - results["sft"]["recall"]["mean"]), 1)
    if gained:
        said.append(f"Recall is {'higher' if gained > 0 else 'lower'} by {abs(gained):.1f} points.")
    else:
        said.append("Recall is the same.")
    return said


# ---- report ----------------------------------------------------------------------------------------


def report(one: _Seed, measured: Sequence[dict[str, Any]], results: dict[str, Any]) -> Report:
    """The page: figures of all seeds, curves and pictures of the first."""
    recipe, seconds = one.recipe, results["seconds"]
    bias, count = one.scenes.bias, results["pairs"]["count"]
    steps = [
        (
            "Pictures",
            f"{one.scenes.train} training pictures were drawn. In {bias:.0%} of their pairs the second "
            "thing is the usual partner of the first; the bias-breaking split has no partners at all.",
        ),
        (
            "Supervised fine-tuning",
            f"A small LLaVA 1.6 learned from scratch: {sum(recipe.seeing)} steps on clear pictures of "
            f"repeated things, {recipe.speaking} on text alone, then {recipe.sft} on captions, questions "
            f"and answers ({seconds['SFT']:.0f} s).",
        ),
        (
            "Rejected responses",
            f"The model rewrote {count} training captions with {recipe.mask_rate:.0%} of the image hidden "
            f"(BDHS, {seconds['BDHS']:.0f} s). No annotator, no other model.",
        ),
        (
            "Alignment",
            f"{recipe.dpo} steps of DPO on those pairs ({seconds['DPO']:.0f} s). The control is the same "
            f"SFT model after {recipe.dpo} further steps of SFT.",
        ),
    ]
    return Report(
        title="mllm-align quickstart",
        verdict=verdict(results),
        steps=steps,
        results=results,
        curves=_curves(one.out / "runs"),
        pairs=_pair_examples(one),
        examples=_caption_examples(one, measured[0]),
        settings={"recipe": config_json(recipe)},
    )


def _curves(runs: Path) -> list[Curve]:
    def series(name: str, value: str) -> list[tuple[float, float]]:
        lines = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
        # A run that was stopped and begun again has logged some steps twice.
        points = {line["step"]: line[value] for line in lines if line["event"] == "train"}
        return sorted(points.items())

    return [
        Curve("SFT loss", "step", "nats per token", {"SFT": series("sft", "loss")}),
        Curve("DPO loss", "step", "loss per pair", {"DPO": series("aligned", "loss")}),
        Curve(
            "DPO margin",
            "step",
            "reward, chosen less rejected",
            {"DPO": series("aligned", "rewards/margin")},
        ),
    ]


def _pair_examples(one: _Seed, most: int = 6) -> list[Example]:
    scenes = {f"{e.id}-0": e for e in one.read("train")[:200]}
    lines = (one.out / "data" / "pairs.jsonl").read_text().splitlines()
    examples = []
    for row in map(json.loads, lines):
        example = scenes.get(row["id"])
        if example is not None and row["bdhs"]["guided"] and len(examples) < most:
            text = row["rejected"]
            spans = written_spans(row)
            rejected = Marked(text, tuple(hallucinated_spans(example.scene, text)), tuple(spans))
            examples.append(Example(example.id, example.png, PROMPT, row["chosen"], rejected))
    return examples


def written_spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Where the rejected response of an output record was written anew, in its characters."""
    spans, moved = [], 0
    for each in row["bdhs"]["sentences"]:
        _, stop = each["sentence"]
        old, new = each["swapped"] or ("", "")
        moved += len(new) - len(old)
        start = each["cut"] + moved
        spans.append((start, start + len(each["written"])))
        moved += len(each["written"]) - (stop - each["cut"])
    return spans


def _caption_examples(one: _Seed, measured: dict[str, Any], most: int = 12) -> list[Example]:
    models = measured["models"]
    examples = []
    for i, e in enumerate(one.read("broken")[:most]):
        before, control, after = (
            Marked(text, tuple(hallucinated_spans(e.scene, text)))
            for text in (models[name]["broken"]["captions"][i] for name in MODELS)
        )
        truth = e.qas[0].answer
        examples.append(Example(e.id, e.png, PROMPT, truth, None, before, control, after))
    return examples
