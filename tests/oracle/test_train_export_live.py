"""A short LoRA run through the command line, and what torch makes of both of its exports."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from goldens import ALL, FIXTURES, goldens
from interpreter import run as run_peer
from runs import compiling, one_device
from safetensors.numpy import load_file, save_file
from test_export_live import furthest, oracle

from mllm_align import DataConfig, load, load_run
from mllm_align.cli import main
from mllm_align.prepare import prepare
from mllm_align.scoring import response_logps

assert compiling and oracle  # fixtures
pytestmark = pytest.mark.oracle

MASKS = ("attention_mask", "completion_mask")
PAIRS = FIXTURES / "pairs.jsonl"
CONFIG = Path(__file__).parents[2] / "configs" / "dpo_tiny.py"
ONE_SHAPE = DataConfig(shapes=1)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    """As `ours` computes: a program for eight takes twice the time to compile."""
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    monkeypatch.setattr("mllm_align.training.inputs.make_mesh", one_device)


def aligned(model: Path, folder: Path) -> Path:
    """Train, export both ways; the run folder."""
    run = folder / "run"
    training = ["--steps", "6", "--data.shapes", "1", "--optim.schedule", "linear"]
    main(["train", str(CONFIG), "--model", str(model), "--data", str(PAIRS), "--out", str(run), *training])
    main(["export", "--run", str(run), "--out", str(folder / "merged")])
    main(["export", "--run", str(run), "--out", str(folder / "adapter"), "--adapter"])
    return run


def ours(bundle, ids: Path) -> list[np.ndarray]:
    """Per-token log-probs as `score` sums them, record by record; writes `ids` for `peer`."""
    encoder, records, _ = prepare(bundle, PAIRS, ONE_SHAPE, responses=2)
    rows = [(record, answer) for record in records for answer in record.responses]
    prefixes = [encoder.prefix(record).tokens for record, _ in rows]
    width = max(len(p) + len(r) for p, (_, r) in zip(prefixes, rows, strict=True))
    arrays = {n: np.zeros((len(rows), width), np.int64) for n in ("input_ids", *MASKS)}
    for i, (prefix, (_, answer)) in enumerate(zip(prefixes, rows, strict=True)):
        start, stop = len(prefix), len(prefix) + len(answer)
        arrays["input_ids"][i, :stop] = [*prefix, *answer]
        arrays["attention_mask"][i, :stop] = 1
        arrays["completion_mask"][i, start:stop] = 1
    np.savez(ids, row_index=np.array([record.index for record, _ in rows]), **arrays)
    logps = response_logps(bundle, encoder, records, ONE_SHAPE, batch_size=8)
    return [values for answers in logps for values in answers]


def peer(ids: Path, folder: Path, adapter: Path | None = None) -> tuple[list[np.ndarray], list[str]]:
    """The same by transformers and PEFT, and the modules PEFT replaced."""
    out = ids.with_suffix(".out.npz")
    asked = ["--folder", folder, "--data", PAIRS, "--ids", ids, "--out", out]
    run_peer("check_export.py", *asked, *(["--adapter", adapter] if adapter else []))
    with np.load(out) as scores, np.load(ids) as asked:
        masks = asked["completion_mask"][:, 1:] == 1
        logps = [row[mask] for row, mask in zip(scores["per_token_logps"][:, :-1], masks, strict=True)]
        return logps, list(scores["modules_to_save"])


@pytest.mark.parametrize("name", ALL)
def test_a_run_means_the_same_to_torch(name, tmp_path, capsys):
    run = aligned(FIXTURES / name, tmp_path)
    adapter_told = json.loads(capsys.readouterr().out.splitlines()[-1])
    ids = tmp_path / "ids.npz"
    trained = ours(load_run(run, "float32", one_device()), ids)
    base = ours(load(FIXTURES / name, "float32", one_device()), ids)
    merged, _ = peer(ids, tmp_path / "merged")
    adapter, saved = peer(ids, FIXTURES / name, tmp_path / "adapter")
    figures = {
        "merged - jax": furthest(merged, trained),
        "adapter - jax": furthest(adapter, trained),
        "trained - base": furthest(trained, base),
    }
    print(name, json.dumps(figures))
    projector = goldens(name).folder.family.modules["projector"]
    assert len(saved) == 1 and saved[0].endswith(projector)
    assert adapter_told["modules_to_save"] == [projector]
    assert figures.pop("trained - base") > 0.1
    assert max(figures.values()) < 1e-4, figures


def test_rounding_of_a_16_bit_folder_is_told_and_no_more_than_that(tmp_path, capsys):
    """The merged folder in bfloat16 means, in float32 arithmetic, what was trained but for the rounding."""
    model = shutil.copytree(FIXTURES / "llava15", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run = aligned(model, tmp_path)
    told = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert told["dtype"] == "bfloat16"
    rounding = told["rounding"]
    assert 0 < rounding["max_relative_to_update"] < 0.5 and 0 < rounding["max_abs"] < 0.01

    ids = tmp_path / "ids.npz"
    trained = ours(load_run(run, "float32", one_device()), ids)
    stored = ours(load(tmp_path / "merged", "float32", one_device()), ids)
    base = ours(load(model, "float32", one_device()), ids)
    merged, _ = peer(ids, tmp_path / "merged")
    figures = [furthest(merged, stored), furthest(stored, trained), furthest(trained, base)]
    print(json.dumps([*figures, rounding]))
    assert figures[0] < 1e-4, "torch and JAX read the same folder alike"
    assert figures[1] < figures[2] * 2 * rounding["max_relative_to_update"], "rounding explains the rest"
