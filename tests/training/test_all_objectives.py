"""Runs that train by all objectives on pairs at once, as parts of a sum."""

import json
from dataclasses import replace
from math import log

import pytest
from runs import FULL, PAIRS, TINY, bundle, compiling, events

from mllm_align import KTO, Part, Sum, train
from mllm_align.config import OBJECTIVES

assert compiling  # a fixture

# Of a policy that is its reference.
AT_FIRST = {
    "dpo": log(2),
    "robust": log(2),
    "ipo": 25,
    "slic": 1,
    "exo": log(0.5) - log(1e-3 * (1 - 1e-3)) / 2,
    "bco": 2 * log(2),
    "apo": 1,
    "kto": 0.5,
}
NAMES = [*AT_FIRST, "simpo", "cpo", "orpo", "sft"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, without",
    [(TINY, ()), (FULL, ()), (replace(TINY, reference="stored"), ("kto",))],
    ids=["LoRA", "full", "stored reference"],
)
def test_every_objective_trains(config, without, tmp_path):
    parts = tuple(Part(OBJECTIVES[name](), 0.5) for name in NAMES if name not in without)
    config = replace(config, objective=Sum(parts), steps=2)
    train(config, bundle(), PAIRS, tmp_path / "run")
    first, second = events(tmp_path / "run", "train")
    for name in AT_FIRST.keys() - set(without):
        assert first[f"loss/{name}"] == pytest.approx(AT_FIRST[name] / 2, rel=1e-4), name
    tokens = first["loss/sft"]
    assert first["loss/cpo/nll"] == pytest.approx(tokens) == first["loss/orpo/nll"] and tokens > 1
    assert first["loss/simpo"] > 0 and first["loss/orpo/pairs"] > 0 and first["loss/cpo/pairs"] > 0
    total = sum(value for name, value in first.items() if name.startswith("loss/"))
    assert first["loss"] == pytest.approx(total, rel=1e-5)
    assert all(second[name] != value for name, value in first.items() if name.startswith("loss/"))
    assert (tmp_path / "run" / "reference.npz").exists() == (config.reference == "stored")


@pytest.mark.slow
def test_kto_trains_on_rows_of_one_response(tmp_path):
    """Held-out rows too; without pairs there are no margins."""
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    for i, row in enumerate(rows):
        both = row.pop("chosen"), row.pop("rejected")
        row |= {"completion": both[i % 2], "label": i % 2 == 0}
        row["images"] = [str(PAIRS.parent / name) for name in row["images"]]
    config = replace(TINY, objective=KTO(), steps=1)
    train(config, bundle(), rows, tmp_path / "run", rows)
    (first,), (held_out,) = (events(tmp_path / "run", kind) for kind in ("train", "eval"))
    assert first["loss"] == pytest.approx(0.5, rel=1e-5) and held_out["loss"] != first["loss"]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6) and first["rewards/margin"] is None
