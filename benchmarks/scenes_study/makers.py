"""Each maker of training data against a random choice of the same size: one SFT model, one budget."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import JudgeConfig, SamplingConfig, SceneOracle
from mllm_align.align.contract import Objective
from mllm_align.align.pairwise import DPO
from mllm_align.align.sft import SFT
from mllm_align.curation.pair import pair
from mllm_align.curation.retrieve import retrieve
from mllm_align.curation.select import Measured, select
from mllm_align.files import json_text, new_file
from mllm_align.generation.bdhs_job import bdhs
from mllm_align.generation.respond import generate
from mllm_align.testbed.scenes import builder
from mllm_align.training.loop import train
from scenes_study import rewards
from scenes_study.variants import SPLITS, Study, _log

CANDIDATES = SamplingConfig(temperature=1.0, max_tokens=96)
SAMPLES = 4  # candidates of a prompt
NEIGHBOURS = 5
KEPT = 0.25  # of the pool, by cascade and domains
DOMAINS = 8
Row = dict[str, Any]
Made = tuple[list[Row], dict[str, Any]]
"""Rows to train on, and what is told of them."""


class Makers(Study):
    """One seed: data of each maker, and runs on them."""

    def row(self, name: str) -> dict[str, Any]:
        began = time.perf_counter()
        rows, facts = MAKERS[name](self)
        path = self.data / f"maker_{name}.jsonl"
        _write(path, rows)
        bundle = train(self.training(name), self.sft, path, self.out / "runs" / f"maker_{name}")
        facts |= {"count": len(rows), "training": _log(self.out / "runs" / f"maker_{name}")}
        splits = {split: self._counted(bundle, split) for split in SPLITS}
        seconds = {"whole": round(time.perf_counter() - began, 1)}
        return self.stamp(name) | {"splits": splits, "facts": facts, "seconds": seconds}

    def stamp(self, name: str) -> dict[str, Any]:
        settings = {"samples": SAMPLES, "neighbours": NEIGHBOURS, "kept": KEPT, "domains": DOMAINS}
        settings |= {"scenes": repr(self.recipe), "objective": type(_objective(self, name)).__name__}
        return {"variant": name, "seed": self.seed, "version": version("mllm-align"), "settings": settings}

    def training(self, name: str) -> Any:
        objective = _objective(self, name)
        rate = 5e-4 if isinstance(objective, SFT) else 3e-4
        frozen = ("vision_tower",)
        return self._config(self.recipe.dpo, rate, objective=objective, freeze=frozen, log_every=20)

    def rng(self, *more: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *more))


def _objective(study: Study, name: str) -> Objective:
    if name.startswith(("cascade", "domains")):
        return SFT()
    return DPO(beta=study.recipe.beta, sft_weight=study.recipe.sft_weight)


# ---- retrieval ---------------------------------------------------------------------------------------


def _retrieved(study: Makers, random: bool) -> Made:
    """BDHS under the nearest other pictures of the set, or under as many drawn at random."""
    found, out = study.data / "neighbours.jsonl", study.data / f"retrieved{'_random' * random}.jsonl"
    retrieve([study.captions()], found, study.sft, neighbours=NEIGHBOURS, batch_size=64)
    rows = _read(found)
    if random:
        rng = study.rng(1)
        for i, row in enumerate(rows):
            others = rng.choice(len(rows) - 1, NEIGHBOURS, replace=False)
            row["neighbour_images"] = [rows[j + (j >= i)]["images"][0] for j in others]
            row["rejected_images"] = row["neighbour_images"][:1]
            del row["neighbour_similarity"]
        found = _write(study.data / "neighbours_random.jsonl", rows)
    config = replace(study.writer(), distortion="retrieved")
    facts = bdhs(config, study.sft, found, out)
    cosines = [row["neighbour_similarity"][0] for row in rows if "neighbour_similarity" in row]
    told = {"differ_after": facts["differ_after"], "cosine": float(np.mean(cosines)) if cosines else None}
    return _read(out), told | {"pairs": study._described(out)}


# ---- pairs by a reward -------------------------------------------------------------------------------


def _pairs(study: Makers, random: bool) -> Made:
    """The best candidate against the worst, or two that are drawn at random, of the same records."""
    answers, out = study.data / "candidates.jsonl", study.data / "best_worst.jsonl"
    if not answers.exists():
        settings: dict[str, Any] = {"samples": SAMPLES, "seed": study.seed, "batch_size": 64}
        generate(study.sft, study.captions(), CANDIDATES, out=answers, **settings)
    config = JudgeConfig(SceneOracle(study.read.folder, order="f1"))
    counts = pair(study.captions(), out, config, responses=[answers])
    rows, told = _read(out), {"scores": counts["scores"], "left_out": counts["left_out"]}
    if not random:
        return rows, told
    rng = study.rng(2)
    for row in rows:
        texts = [row["chosen"], row["rejected"], *row.pop("responses", ())]
        two = sorted(rng.choice(len(texts), 2, replace=False), key=lambda i: -row["scores"][i])
        row["chosen"], row["rejected"] = (texts[i] for i in two)
    return rows, told


# ---- cascaded curation -------------------------------------------------------------------------------


def _noisy(study: Makers) -> Path:
    """All captions of the training pictures, half of them corrupted."""
    path = study.data / "noisy.jsonl"
    if not path.exists():
        clean = rewards._pairs(study, "corrupted", "train")
        wrong = study.rng(3).random(len(rows := _read(clean))) < 0.5
        for row, bad in zip(rows, wrong, strict=True):
            rejected = row.pop("rejected")
            row |= {"chosen": rejected, "wrong": True} if bad else {"wrong": False}
        _write(path, rows)
    return path


def _cascade(study: Makers, random: bool) -> Made:
    """Captions that two reward models take for good, half after half, or as many drawn at random."""
    rows = _read(_noisy(study))
    count = round(KEPT * len(rows))
    if random:
        chosen = [rows[i] for i in sorted(study.rng(4).choice(len(rows), count, replace=False))]
    else:
        files = [study.data / f"cascade_{number}.jsonl" for number in (1, 2)]
        before, keeps = _noisy(study), (str(KEPT**0.5), str(count))
        kinds = ("reward_corrupted", "reward_bdhs")
        for kind, out, keep in zip(kinds, files, keeps, strict=True):
            model = str(rewards.model(study, kind))
            measured = Measured("reward", reward=model, batch_size=64, score_name=f"{kind}_score")
            select([before], out, measured, keep=keep)
            before = out
        chosen = _read(before)
    return chosen, {"wrong": float(np.mean([row["wrong"] for row in chosen]))}


# ---- diversity as a reward ---------------------------------------------------------------------------


def _domains(study: Makers, random: bool) -> Made:
    """Captions and answers that lie between a model's domains, or as many drawn at random."""
    pool, out = study.data / "all.jsonl", study.data / "domains.jsonl"
    if not pool.exists():
        builder.write_files(study.read("train"), study.data, "all")
    kinds = {f"{e.id}-{n}": qa.kind for e in study.read("train") for n, qa in enumerate(e.qas)}
    rows, told = _read(pool), {}
    if random:
        count = round(KEPT * len(rows))
        chosen = [rows[i] for i in sorted(study.rng(5).choice(len(rows), count, replace=False))]
    else:
        settings = {"model": str(study.out / "sft"), "domains": DOMAINS, "batch_size": 64}
        found = select([pool], out, Measured("domains", seed=study.seed, **settings), keep=str(KEPT))
        chosen, told = _read(out), found["domains"]
    shares = np.array([*Counter(kinds[row["id"]] for row in chosen).values()]) / len(chosen)
    return chosen, told | {"entropy_of_kinds": float(-(shares * np.log(shares)).sum())}


def _two(make: Callable[[Makers, bool], Made]) -> tuple[Callable[[Makers], Made], ...]:
    return lambda study: make(study, False), lambda study: make(study, True)


MAKERS: dict[str, Callable[[Makers], Made]] = {
    f"{name}{kind}": each
    for name, make in (
        ("retrieved", _retrieved),
        ("pairs", _pairs),
        ("cascade", _cascade),
        ("domains", _domains),
    )
    for kind, each in zip(("", "_random"), _two(make), strict=True)
}


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: Sequence[Row]) -> Path:
    with new_file(path) as file:
        file.writelines(json_text(row) + "\n" for row in rows)
    return path
