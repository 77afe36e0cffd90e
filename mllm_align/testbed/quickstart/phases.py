"""The phases of the quickstart: pretraining, SFT, BDHS, DPO, further SFT, evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.align.pairwise import DPO
from mllm_align.align.sft import SFT
from mllm_align.config import BDHSConfig, Config, DataConfig, OptimConfig, SamplingConfig
from mllm_align.data.records import parse_record
from mllm_align.errors import refusal
from mllm_align.evaluation.base import Item
from mllm_align.evaluation.run import evaluate
from mllm_align.files import json_text, new_file, new_folder, read_json
from mllm_align.generation.bdhs_job import bdhs
from mllm_align.models.bundle import Bundle, load
from mllm_align.testbed.demo import make_model
from mllm_align.testbed.evaluators import Captions, Questions
from mllm_align.testbed.hallucination import pope_questions
from mllm_align.testbed.scenes import builder, draw, world
from mllm_align.training.loop import train
from mllm_align.training.run_model import export_run

MODELS = {"sft": "sft", "sft_control": "control", "aligned": "aligned"}  # in results.json: their folder
OTHERS = ("unbiased", "held_out")  # splits that are looked at beside `broken`
ASKED = ("broken", "unbiased")  # splits with POPE's questions
BOTH = ("caption", "presence")
# Name, split, records and learning rate. The same thing in every cell shows what a word means, first in
# captions, then in questions; then come places, then pairs.
LESSONS = (
    ("words", "everywhere", ("caption",), 1.2e-3),
    ("questions", "everywhere", BOTH, 1.5e-3),
    ("places", "regions", BOTH, 1.2e-3),
    ("pairs", "pairs", BOTH, 1.2e-3),
)
MEASURED = {"captions": "response", "counts": "counts"}  # in measured.json: fields of lines
REMOVE = "remove it, and it is made again"
PROMPT = "Describe the picture."


@dataclass(frozen=True)
class Recipe:
    """Numbers of steps and records; model sizes and learning rates are fixed in the code."""

    scenes: world.Settings = world.Settings(grain=30.0, fog=0.7, train=4000, lessons=1600)
    batch: int = 32
    seeing: tuple[int, int, int, int] = (150, 700, 300, 1000)
    """Steps of each of LESSONS."""
    sft: int = 1700
    dpo: int = 120
    """Steps of DPO, and of further SFT for the control."""
    pairs: int = 1000
    """Captions that BDHS rewrites."""
    mask_rate: float = 0.99
    beta: float = 0.3
    sft_weight: float = 1.0
    """Without it, DPO lowers the log-probs of the chosen responses too, and captions get broken words."""


class Clock:
    """Duration of each phase, over all seeds and runs."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = {}
        if file.exists():
            self.seconds = read_json(file, REMOVE)
            if not all(type(seconds) in (int, float) for seconds in self.seconds.values()):
                raise refusal(str(file), "holds no seconds", REMOVE)

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        finally:  # an interrupted phase counts, too
            took = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.seconds[name] = round(took, 1)
            with new_file(self.file) as file:
                file.write(json.dumps(self.seconds) + "\n")


class Pictures:
    """The splits of Scenes, drawn at the first access."""

    def __init__(self, folder: Path, settings: world.Settings):
        self.folder, self.settings = folder, settings
        self._cached: dict[str, list[builder.Example]] = {}

    @cached_property
    def drawn(self) -> Any:
        return builder.prepare(self.folder, self.settings)

    def __call__(self, split: str) -> list[builder.Example]:
        if split not in self._cached:  # parsing takes longer than any use of the examples
            self._cached[split] = list(builder.read(self.drawn, split))
        return self._cached[split]


class _Phases:
    """Phases that train models in a folder; a phase is skipped if its result exists."""

    def __init__(self, out: Path, seed: int, recipe: Recipe, read: Pictures, clock: Clock):
        self.out, self.seed, self.recipe, self.read, self.clock = out, seed, recipe, read, clock

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        print(f"== {self.out.name}: {name}", flush=True)
        return self.clock(name, work)

    def _train(self, config: Config, start: Path, data: Callable[[], Any], name: str) -> None:
        """Train from the model folder `start`; the result is the Hugging Face folder `name`."""
        if not (self.out / name).exists():
            train(config, start, data(), self.out / "runs" / name)
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

    def _rows(self) -> list[dict[str, Any]]:
        """Training records, and the captions once more without pictures, so that text-only use is
        retained."""
        return builder.sft_rows(self.read("train")) + self._blind()

    def _blind(self) -> list[dict[str, Any]]:
        """Training captions without their picture.

        LLaVA's language model was pretrained on text without images. A model that was not babbles as soon
        as the image is hidden, and its rejected responses are useless for training.
        """
        rows = builder.sft_rows(self.read("train"), {"caption"})
        return [
            {"id": f"{row['id']}-blind", "prompt": row["prompt"], "completion": row["completion"]}
            for row in rows
        ]


class Base(_Phases):
    """The counterpart of LLaVA's pretrained parts: a model that has learnt vision and language."""

    @property
    def model(self) -> Path:
        return self.out / LESSONS[-1][0]

    def __call__(self) -> None:
        if not self.model.exists():
            self._phase("draw pictures", lambda: self.read.drawn)
            self._phase("pretraining", self._learn)

    def _learn(self) -> None:
        start = self.out / "start"
        if not start.exists():
            corpus = (f"USER: \n{r['prompt']} ASSISTANT: {r['completion']}" for r in self._rows())
            with new_folder(start) as folder:
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
                    embedding=0.1,  # of norm 1, questions were not learnt in this time
                    corpus=corpus,
                )
        for (name, split, kinds, rate), steps in zip(LESSONS, self.recipe.seeing, strict=True):
            c = self._config(steps, rate)
            steady = replace(c, optim=replace(c.optim, schedule="constant", warmup=0.1))
            self._train(steady, start, partial(self._lesson, split, kinds), name)
            start = self.out / name

    def _lesson(self, split: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        return builder.sft_rows(self.read(split), kinds)


class Seed(_Phases):
    """SFT and the phases after it; the seed determines the order of records and the sampling."""

    def __call__(self, base: Base) -> dict[str, Any]:
        done = self.out / "measured.json"
        if done.exists():
            return read_json(done, REMOVE)
        base()
        self._phase("SFT", lambda: self._sft(base.model))
        summary = self._phase("BDHS", self._pairs)
        self._phase("DPO", self._dpo)
        self._phase("further SFT", self._control)
        measured = self._phase("evaluate", self._evaluate)
        measured |= {"pairs": summary}
        with new_file(done) as file:
            file.write(json_text(measured) + "\n")
        return measured

    def _sft(self, base: Path) -> None:
        # Captions, answers and captions without a picture have very different lengths.
        by_length = DataConfig(shapes=3, multiple=8, threads=2)
        config = self._config(self.recipe.sft, 1.5e-3, data=by_length)
        self._train(config, base, self._rows, "sft")

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
            objective=DPO(beta=self.recipe.beta, sft_weight=self.recipe.sft_weight),
            freeze=("vision_tower",),
            log_every=5,  # so few steps need more points for a curve
        )
        pairs = self.out / "data" / "pairs.jsonl"
        self._train(config, self.out / "sft", lambda: pairs, "aligned")

    def _control(self) -> None:
        self._train(self._config(self.recipe.dpo, 5e-4), self.out / "sft", self._further, "control")

    def _further(self) -> list[dict[str, Any]]:
        """A random sample of the SFT records, as many as the control needs."""
        rows, count = self._rows(), self.recipe.dpo * self.recipe.batch
        return [rows[i] for i in np.random.default_rng(self.seed).permutation(len(rows))[:count]]

    # ---- evaluation --------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        models: dict[str, Any] = {}
        for name, folder in MODELS.items():
            bundle = load(self.out / folder)
            models[name] = {split: self._measure(bundle, split) for split in ("broken", *OTHERS)}
        return {"models": models}

    def _measure(self, bundle: Bundle, split: str) -> dict[str, Any]:
        """Captions of a split and the counts of each; on those of ASKED also the correctness of POPE
        answers."""
        examples = self.read(split)
        measured = self._captioned(bundle, examples)
        if split not in ASKED:
            return measured
        rng = np.random.default_rng(self.seed)
        popular = [kind for e in self.read("train") for kind in e.scene.kinds]
        ranked = sorted(world.KINDS, key=popular.count, reverse=True)
        asked = [(e, q) for e in examples for q in pope_questions(e.scene, rng, ranked)]
        questions = [
            _item(e, q.question, "yes" if q.answer else "no", {"mode": q.mode}, f"-{number}")
            for number, (e, q) in enumerate(asked)
        ]
        lines = evaluate(bundle, questions, Questions(), batch_size=64).lines
        right = [(q.mode, line["right"]) for (_, q), line in zip(asked, lines, strict=True)]
        return measured | {"pope": right}

    def _captioned(self, bundle: Bundle, examples: Sequence[builder.Example]) -> dict[str, Any]:
        """Captions of pictures and the counts of each."""
        captions = [_item(e, PROMPT, "", {"scene": e.scene}) for e in examples]
        lines = evaluate(bundle, captions, Captions(), batch_size=64).lines
        return {name: [line[key] for line in lines] for name, key in MEASURED.items()}


def _item(
    example: builder.Example, prompt: str, answer: str, labels: dict[str, Any], number: str = ""
) -> Item:
    row = {"id": example.id + number, "images": [{"bytes": example.png}], "prompt": prompt}
    row |= {"chosen": answer} if answer else {}
    record = parse_record(row, index=0, where=example.id, root=None, responses=0)
    return Item(record, labels)
