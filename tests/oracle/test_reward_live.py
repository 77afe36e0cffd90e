"""Reward models against TRL's loss, and exported ones in transformers and PEFT."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import FIXTURES, NAMES
from interpreter import run
from runs import REWARD, compiling, one_device
from test_export_live import oracle

from mllm_align import export, load, score, train
from mllm_align.align.contract import Signals
from mllm_align.align.reward import Reward
from mllm_align.batch import Responses
from mllm_align.prepare import prepare

assert compiling and oracle  # fixtures
pytestmark = pytest.mark.oracle
PAIRS = FIXTURES / "pairs.jsonl"


def peer(out: Path, **options: Path | None) -> dict[str, np.ndarray]:
    given = [x for name, value in options.items() if value is not None for x in (f"--{name}", value)]
    run("check_reward.py", "--out", out, *given)
    with np.load(out) as found:
        return dict(found)


def test_loss_and_gradient_are_those_of_trl(tmp_path):
    rewards = (3 * np.random.default_rng(0).standard_normal((16, 2))).astype(np.float32)
    settings = [(0.0, 0.0), (0.75, 0.0), (0.0, 0.01), (1.5, 0.1)]  # margin, centring
    np.savez(tmp_path / "rewards.npz", rewards=rewards, settings=settings)
    theirs = peer(tmp_path / "out.npz", rewards=tmp_path / "rewards.npz")
    mask = jnp.ones((16, 2, 3), bool)
    given = Responses(jnp.zeros(mask.shape, jnp.int32), mask, jnp.ones(16))
    for i, setting in enumerate(settings):

        def loss(rewards, objective=Reward(*setting)):  # noqa: B008
            made = objective(Signals((), None, given, ((0, 1),), rewards))
            return made.sums["pairs"] / objective.weights(given)["pairs"]

        ours, gradient = jax.value_and_grad(loss)(jnp.asarray(rewards))
        np.testing.assert_allclose(ours, theirs["loss"][i], rtol=1e-5)
        np.testing.assert_allclose(gradient, theirs["gradient"][i], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_reward_model_means_the_same_to_torch(tmp_path, name):
    model = load(FIXTURES / name, "float32", one_device())
    train(replace(REWARD, steps=6), model, PAIRS, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "merged")
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    lines = score(tmp_path / "run", PAIRS)
    ours = np.array([[line["chosen_reward"], line["rejected_reward"]] for line in lines]).ravel()
    encoder, records, _ = prepare(model, PAIRS, REWARD.data, responses=2)
    rows = [
        np.concatenate([encoder.prefix(record).tokens, answer])
        for record in records
        for answer in record.responses
    ]
    ids = np.zeros((2, len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        ids[0, i, : len(row)], ids[1, i, : len(row)] = row, 1
    index = np.array([record.index for record in records]).repeat(2)
    np.savez(tmp_path / "ids.npz", input_ids=ids[0], attention_mask=ids[1], row_index=index)
    asked = {"data": PAIRS, "ids": tmp_path / "ids.npz"}
    merged = peer(tmp_path / "merged.npz", folder=tmp_path / "merged", **asked)["rewards"]
    folder, adapter = FIXTURES / name, tmp_path / "adapter"
    adapted = peer(tmp_path / "adapter.npz", folder=folder, adapter=adapter, **asked)["rewards"]
    assert np.ptp(ours) > 0.05, "else all rewards are near"
    np.testing.assert_allclose(merged, ours, atol=1e-4)
    np.testing.assert_allclose(adapted, ours, atol=1e-4)
