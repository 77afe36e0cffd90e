"""The data study's sets of pairs: rejected and chosen responses, prompts and sizes of different kinds.

Each set is DPO data for one seed's SFT model, with the recipe's budget of steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import DataConfig, SamplingConfig, generate
from mllm_align.files import new_file
from mllm_align.generation.bdhs_job import bdhs
from mllm_align.testbed.annotators import f1
from mllm_align.testbed.hallucination import count
from mllm_align.testbed.scenes import builder
from mllm_align.testbed.scenes.corrupt import corrupt
from mllm_align.testbed.scenes.language import parse
from mllm_align.training.loop import train
from scenes_study.variants import SAMPLING, VARIANTS, Study, Variant

SIZES = (250, 500, 1000, 2000, 4000)
SIZE = 1000  # of every set that is not about sizes
SAMPLES = 8
BETTER = "sft_unbiased"  # the variant whose model stands for a better one

Row = dict[str, Any]


@dataclass(frozen=True)
class PairSet:
    """title: for tables. make: pairs of the first `count` training pictures."""

    title: str
    make: Callable[[Sets, int], Iterator[Row]]
    count: int = SIZE


def _rng(sets: Sets, number: int) -> np.random.Generator:
    """A record's own, so that a smaller set is the beginning of a larger one."""
    return np.random.default_rng([sets.seed, number])


def _false(example: builder.Example, text: str, rng: np.random.Generator, **changes: int) -> str | None:
    """The text with facts made false; None if it claims nothing."""
    try:
        return corrupt(example.scene, text, rng, **changes)
    except ValueError:
        return None


# ---- rejected responses ----------------------------------------------------------------------------


def _corrupted(sets: Sets, size: int, **changes: int) -> Iterator[Row]:
    """Facts of the chosen caption are made false."""
    for number, (example, row) in enumerate(sets.rows(size)):
        yield row | {"rejected": _false(example, row["chosen"], _rng(sets, number), **changes)}


def _other_picture(sets: Sets, size: int) -> Iterator[Row]:
    """The caption of the next picture."""
    rows = [row for _, row in sets.rows(size)]
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        yield row | {"rejected": other["chosen"]}


def _bdhs(sets: Sets, size: int) -> Iterator[Row]:
    yield from (json.loads(line) for line in sets.bdhs_pairs().read_text().splitlines()[:size])


# ---- chosen responses ------------------------------------------------------------------------------


def _best(sets: Sets, size: int, rejected: str) -> Iterator[Row]:
    """The policy's best sample by the oracle's F1, against its own corrupted form or the worst sample."""
    for number, ((example, row), texts) in enumerate(zip(sets.rows(size), sets.samples(size), strict=True)):
        ranked = sorted(texts, key=lambda text: f1(count(example.scene, text)))
        worst, best = ranked[0], ranked[-1]
        other = worst if rejected == "worst" else _false(example, best, _rng(sets, number))
        yield row | {"chosen": best, "rejected": other}


def _better_model(sets: Sets, size: int) -> Iterator[Row]:
    """A better model's caption, against its own corrupted form."""
    for number, ((example, row), (text,)) in enumerate(
        zip(sets.rows(size), sets.better(size), strict=True)
    ):
        yield row | {"chosen": text, "rejected": _false(example, text, _rng(sets, number))}


# ---- prompts ---------------------------------------------------------------------------------------


def _questions(sets: Sets, size: int) -> Iterator[Row]:
    """One question of each picture that is no request for a caption, with a false answer."""
    for number, (example, row) in enumerate(sets.rows(size, qa=1)):
        answer = _opposite(row["chosen"]) or _false(example, row["chosen"], _rng(sets, number))
        yield row | {"rejected": answer}


def _opposite(answer: str) -> str | None:
    """No for yes, and yes for no; None for an answer that is neither."""
    first, _, rest = answer.partition(", ")
    if first == "Yes":
        return f"No, there is no {parse(rest).mentions[0].kind}."
    if first == "No":
        kind = rest.rstrip(".").split(" no ", 1)[1]
        return f"Yes, there is {'an' if kind[0] in 'aeiou' else 'a'} {kind}."
    return None


def _both(sets: Sets, size: int) -> Iterator[Row]:
    """Captions of half the pictures, questions about the others."""
    for number, (one, other) in enumerate(zip(_corrupted(sets, size), _questions(sets, size), strict=True)):
        yield other if number % 2 else one


SETS = {
    "facts_1": PairSet("one fact is false", partial(_corrupted, max_changes=1)),
    "facts_3": PairSet("three facts are false", partial(_corrupted, min_changes=3)),
    "facts_all": PairSet("every fact is false", partial(_corrupted, min_changes=99, max_changes=99)),
    "other_picture": PairSet("caption of another picture", _other_picture),
    "chosen_best": PairSet("the policy's best of 8, corrupted", partial(_best, rejected="corrupted")),
    "best_and_worst": PairSet("the policy's best and worst of 8", partial(_best, rejected="worst")),
    "chosen_better": PairSet("a better model's, corrupted", _better_model),
    "questions": PairSet("questions, false answers", _questions),
    "both_prompts": PairSet("captions and questions, half each", _both),
    **{f"corrupted_{n}": PairSet(f"one to three facts are false, {n} pairs", _corrupted, n) for n in SIZES},
    **{f"bdhs_{n}": PairSet(f"BDHS, {n} pairs", _bdhs, n) for n in SIZES},
}


class Sets(Study):
    """One seed of the data study; its folders may be those of `study.py`."""

    variants = {"sft": Variant("sft")} | {name: Variant(name, name) for name in SETS}

    def stamp(self, name: str) -> Row:
        made = super().stamp(name)
        if name in SETS:
            made["settings"]["pairs"] = SETS[name].count
        return made

    def _data(self, variant: Variant) -> tuple[Path, Row]:
        if variant.name not in SETS:
            return super()._data(variant)
        path = self.data / f"set-{variant.name}.jsonl"
        if not path.exists():
            made = SETS[variant.name]
            # A rejected response that is missing, empty (as a sample may be) or the chosen one is no use.
            every = made.make(self, made.count)
            usable = [r for r in every if (r["rejected"] or "").strip() and r["rejected"] != r["chosen"]]
            with new_file(path) as file:
                file.writelines(json.dumps(row) + "\n" for row in usable)
        return path, {"pairs": self._described(path)}

    def rows(self, size: int, qa: int = 0) -> Iterator[tuple[builder.Example, Row]]:
        """Pictures with the record of one of their questions; number 0 asks for a caption."""
        path, examples = self.data / "every.jsonl", self.read("train")
        if not path.exists():
            builder.write_files(examples, self.data, "every")
        lines = (json.loads(line) for line in path.read_text().splitlines())
        found = {row["id"]: row for row in lines}
        return ((e, found[f"{e.id}-{qa}"]) for e in examples[:size])

    def bdhs_pairs(self) -> Path:
        """As many as the largest set takes; the smaller ones are its beginning."""
        captions, path = self.data / "captions.jsonl", self.data / "bdhs-every.jsonl"
        if not path.exists():
            with new_file(captions) as file:
                file.writelines(json.dumps(row) + "\n" for _, row in self.rows(max(SIZES)))
            bdhs(self.writer(), self.sft, captions, path)
        return path

    def samples(self, size: int) -> list[list[str]]:
        return self._generated("samples", self.sft, size, SAMPLING, SAMPLES)

    def better(self, size: int) -> list[list[str]]:
        variant = VARIANTS[BETTER]
        config = self.config(variant, self.unbiased.folder, self.out / "runs")
        data, _ = super()._data(variant)
        model = train(config, self.sft, data, self.out / "runs" / BETTER)
        greedy = SamplingConfig(temperature=0.0, max_tokens=SAMPLING.max_tokens)
        return self._generated("better", model, size, greedy, 1)

    def _generated(
        self, name: str, model: Any, size: int, sampling: SamplingConfig, samples: int
    ) -> list[list[str]]:
        """Responses to the requests for captions, kept in a file."""
        path = self.data / f"{name}.jsonl"
        if not path.exists():
            rows = [{k: v for k, v in row.items() if k != "chosen"} for _, row in self.rows(size)]
            data = DataConfig(image_root=self.data)
            options: Row = {"samples": samples, "seed": self.seed, "batch_size": 64, "config": data}
            generate(model, rows, sampling, out=path, **options)
        return [json.loads(line)["responses"] for line in path.read_text().splitlines()]


def groups() -> Sequence[tuple[str, str, tuple[str, ...]]]:
    """Heading, note and sets of each table."""
    return (
        (
            "Rejected responses, nearer and farther (the paper's Table 4, rejected)",
            "The chosen response is the true caption. From the nearest to the farthest.\n\n",
            ("sft", "facts_1", "corrupted_1000", "facts_3", "facts_all", "bdhs_1000", "other_picture"),
        ),
        (
            "Chosen responses of other origin (Table 4, chosen)",
            "The rejected response is the chosen one, corrupted, but for the last line.\n\n",
            ("sft", "corrupted_1000", "chosen_best", "chosen_better", "best_and_worst"),
        ),
        (
            "Prompts of one kind and of many (Table 4, prompts)",
            "Questions are about presence, place, colour and size.\n\n",
            ("sft", "corrupted_1000", "questions", "both_prompts"),
        ),
        (
            "Number of pairs",
            "The number of steps is the same: 250 pairs are seen fifteen times, 4,000 not quite once.\n\n",
            ("sft", *(f"corrupted_{n}" for n in SIZES), *(f"bdhs_{n}" for n in SIZES)),
        ),
    )
