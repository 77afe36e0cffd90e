"""Objectives' cost beside DPO's: medians and table of rounds that are given."""

import json
import sys
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import objective_steps

from mllm_align.registry import registered_name

ROUNDS = [
    {"dpo": {"s": 2.0, "cpu_s": 4.0}, "mdpo": {"s": 3.0, "cpu_s": 8.0}},
    {"dpo": {"s": 4.0, "cpu_s": 4.0}, "mdpo": {"s": 8.0, "cpu_s": 6.0}},
    {"dpo": {"s": 1.0, "cpu_s": 4.0}, "mdpo": {"s": 1.6, "cpu_s": 7.0}},
]


def test_ratios_are_of_one_round_and_their_median_is_told(monkeypatch, capsys):
    ratios = {key: objective_steps.by_dpo(ROUNDS, "mdpo", key) for key in ("s", "cpu_s")}
    assert ratios == {"s": 1.6, "cpu_s": 1.75}  # of 1.5, 2 and 1.6; of 2, 1.5 and 1.75
    found = {"batch": 8, "a_step": ROUNDS, "by_dpo": {"dpo": {"s": 1.0, "cpu_s": 1.0}, "mdpo": ratios}}
    monkeypatch.setattr(sys, "argv", ["objective_steps.py", "--report"])
    monkeypatch.setattr(sys, "stdin", StringIO(json.dumps(found)))
    objective_steps.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == ["| `dpo` | 4.00 | 1.00 | 1.00 |", "| `mdpo` | 2.67 | 1.60 | 1.75 |"]


def test_all_systems_are_measured(tmp_path):
    made = objective_steps.objectives(tmp_path)
    assert next(iter(made)) == "dpo" and made["mrpo"].references == (str(tmp_path),)
    assert all(registered_name(type(each)) == name for name, each in made.items() if name != "mpo")
