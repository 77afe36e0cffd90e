"""What int8 does to log-probs: the table of a stored model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import int8_error
import pytest
from runs import MODEL, PAIRS, compiling

assert compiling  # a fixture


@pytest.mark.slow
def test_a_line_of_each_model(monkeypatch, capsys):
    words = ["int8_error.py", "--model", str(MODEL), "--data", str(PAIRS), "--max-records", "2"]
    monkeypatch.setattr(sys, "argv", words)
    int8_error.main()
    *_, line = capsys.readouterr().out.splitlines()
    name, count, *cells = (cell.strip() for cell in line.strip("|").split("|"))
    assert (name, count, len(cells)) == (MODEL.name, "4", 3)
    for most, mean in (map(float, cell.split(",")) for cell in cells):
        assert 0 < mean <= most < 0.05, "nats per token"
