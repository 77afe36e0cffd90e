"""The study's reward models: each learns from one kind of rejected response and is asked about all."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_align import DataConfig, Distorted, Reward
from mllm_align.config import Config
from mllm_align.data.batches import Batches
from mllm_align.files import new_file
from mllm_align.generation.bdhs_job import bdhs
from mllm_align.prepare import prepare
from mllm_align.sharding import assemble, batch_sharding
from mllm_align.testbed.scenes import builder
from mllm_align.testbed.scenes.corrupt import corrupt
from mllm_align.training.loop import train
from mllm_align.training.online.feed import open_maker
from mllm_align.training.score import score
from scenes_study.rows import REWARDS

if TYPE_CHECKING:
    from scenes_study.variants import Study

STEPS, RATE = 500, 7e-4
SPLIT = "held_out"


def settings(study: Study) -> Config:
    return study._config(STEPS, RATE, objective=Reward(), freeze=("vision_tower",), log_every=50)


def model(study: Study, name: str) -> Path:
    """Its run folder; it is trained where it is not there yet."""
    run = study.out / "runs" / name
    train(settings(study), study.sft, _pairs(study, REWARDS[name], "train"), run)
    return run


def row(study: Study, name: str) -> dict[str, Any]:
    """Train the model; of the held-out pairs of every kind, how many it decides rightly."""
    began = time.perf_counter()
    run = model(study, name)
    asked = {kind: _asked(run, _pairs(study, kind, SPLIT)) for kind in REWARDS.values()}
    return {"asked": asked, "seconds": {"whole": round(time.perf_counter() - began, 1)}}


def _asked(run: Path, pairs: Path) -> dict[str, Any]:
    lines = score(run, pairs, batch_size=64)
    rewards = np.array([[each["chosen_reward"], each["rejected_reward"]] for each in lines])
    tokens = np.array([[each["chosen_tokens"], each["rejected_tokens"]] for each in lines])
    right = float((np.sign(rewards[:, 0] - rewards[:, 1]) / 2 + 0.5).sum())  # a tie is half of one
    longer = float(np.corrcoef(rewards.ravel(), tokens.ravel())[0, 1])
    return {"pairs": len(lines), "right": right, "length_correlation": round(longer, 4)}


def _pairs(study: Study, kind: str, split: str) -> Path:
    """All captions of a split with rejected responses of a kind."""
    path = study.data / f"{kind}-{split}.jsonl"
    if path.exists():
        return path
    examples = study.read(split)
    captions = builder.write_files(
        (replace(e, qas=e.qas[:1]) for e in examples), study.data, f"sft-{split}"
    )
    if kind == "bdhs":
        bdhs(study.writer(), study.sft, captions, path)
        return path
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    if kind == "corrupted":
        made = corrupted(rows, examples, study.seed)
    else:
        made = _distorted(study, captions)
    with new_file(path) as file:
        for each, rejected in zip(rows, made, strict=True):
            if rejected is not None:
                file.write(json.dumps(each | {"rejected": rejected}) + "\n")
    return path


def corrupted(rows: list[dict[str, Any]], examples: list[builder.Example], seed: int) -> list[str]:
    """The chosen caption of each row with facts of its picture made false."""
    rngs = (np.random.default_rng([seed, number]) for number in range(len(rows)))
    return [corrupt(e.scene, r["chosen"], rng) for e, r, rng in zip(examples, rows, rngs, strict=True)]


def _distorted(study: Study, captions: Path) -> list[str | None]:
    """POVID-style, as the SFT model writes them before any training; None where nothing is changed."""
    config = study._config(1, RATE, objective=Reward(), online=Distorted())
    bundle = replace(study.sft, lora=None, trained={})
    encoder, records, _ = prepare(bundle, captions, DataConfig(), responses=1, opening=False)
    maker = open_maker(config, bundle, encoder, records, study.out)
    batches = Batches(records, encoder, size=config.batch_size, shapes=1, multiple=8)
    texts: list[str | None] = []
    for number in range(batches.per_epoch):
        batch = batches(number)
        group = assemble(batch.group, batch_sharding(bundle.mesh), config.rows_per_micro)
        made, _ = maker.make(batch, group, {})
        for index, ids in zip(batch.records, made, strict=True):
            text = None if ids is None else encoder.text(ids).strip()
            texts.append(text if text and text != records[index].record.responses[0] else None)
    return texts
