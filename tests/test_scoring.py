"""Reward models: the head's place, what a step does to it, runs that score, resume and are refused."""

import json
from dataclasses import replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    FULL,
    MODEL,
    PAIRS,
    REWARD,
    TINY,
    bundle,
    compiling,
    events,
    one_device,
    reward_run,
    same,
)

from mllm_align import export, generate, load, load_run, score, train
from mllm_align.align.reward import Reward
from mllm_align.batch import Shape, pad
from mllm_align.config import DataConfig, MeshConfig
from mllm_align.errors import InputError
from mllm_align.models.bundle import make_model
from mllm_align.models.policy import SCORE, policy_variables
from mllm_align.prepare import prepare
from mllm_align.scoring import response_rewards
from mllm_align.sharding import make_mesh

assert compiling and reward_run  # fixtures


def ends(model, records, encoder):
    """Each response alone after its prompt: the final hidden state of its last token, [records, 2, D]."""
    apply = jax.jit(make_model(model.config).apply, static_argnames="method")
    policy = policy_variables(model.params, model.trained, model.lora_scale, jnp.float32)
    alone = [
        replace(record, responses=(answer,), shape=replace(record.shape, response=len(answer)))
        for record in records
        for answer in record.responses
    ]
    groups = [encoder.group(each) for each in alone]
    shape = reduce(Shape.union, (group.shape for group in groups))
    out = []
    for group in groups:
        batch = pad([group], shape, 1)
        features = apply(policy, batch.prefix.pixels, method="features")
        _, states = apply(policy, features, batch.prefix, batch.responses, method="hidden")
        out.append(np.asarray(states, np.float64)[0, 0, len(group.responses[0]) - 1])
    return np.array(out).reshape(len(records), 2, -1)


def test_a_reward_is_the_head_on_the_last_token(reward_run):
    model = load_run(reward_run)
    encoder, records, _ = prepare(model, PAIRS, DataConfig(), responses=2)
    head = np.asarray(model.trained[SCORE]["kernel"], np.float64)
    expected = ends(model, records[:2], encoder) @ head
    found = response_rewards(model, encoder, records, DataConfig(shapes=2, multiple=4), 3, what=None)
    np.testing.assert_allclose(found[:2], expected, atol=1e-5)
    lines = score(reward_run, PAIRS, batch_size=4)
    rewards = [[line["chosen_reward"], line["rejected_reward"]] for line in lines]
    np.testing.assert_allclose(rewards, found, atol=1e-5)
    assert [line["chosen_tokens"] for line in lines] == [len(r.responses[0]) for r in records]
    last = events(reward_run, "eval")[-1]
    assert last["rewards/margin"] == pytest.approx(np.subtract(*np.transpose(rewards)).mean(), abs=1e-5)


@pytest.mark.slow
def test_the_first_step_moves_the_head_along_the_difference(tmp_path):
    """All rewards are 0 before it: the gradient is half of the mean difference of hidden states."""
    config = replace(REWARD, steps=1, batch_size=8)
    trained = train(config, bundle(), PAIRS, tmp_path / "run").trained
    (line,) = events(tmp_path / "run", "train")
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-6) and line["rewards/margin"] == 0
    encoder, records, _ = prepare(bundle(), PAIRS, DataConfig(), responses=2)
    states = ends(bundle(), records, encoder)
    gradient = -(states[:, 0] - states[:, 1]).mean(0) / 2
    assert line["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-4), "no other part has one"
    head = np.asarray(trained[SCORE]["kernel"])
    clear = np.abs(gradient) > 1e-5  # Adam's first step is the rate, against the gradient's sign
    np.testing.assert_allclose(head[clear], -1e-2 * np.sign(gradient[clear]), rtol=1e-2)
    assert clear.mean() > 0.9


@pytest.mark.slow
def test_micro_batches_devices_and_full_training_agree(tmp_path):
    runs = {
        "one": (replace(REWARD, batch_size=8), one_device()),
        "parts": (replace(REWARD, batch_size=8, micro_batches=2), one_device()),
        "eight": (replace(REWARD, batch_size=8), None),
        "full": (replace(FULL, objective=Reward()), one_device()),
    }
    losses = {}
    for name, (config, mesh) in runs.items():
        model = load(MODEL, "float32", mesh or make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
        train(config, model, PAIRS, tmp_path / name)
        losses[name] = [line["loss"] for line in events(tmp_path / name, "train")]
    assert losses["parts"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["eight"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["full"][0] == pytest.approx(np.log(2)) and losses["full"][-1] < 0.65


@pytest.mark.slow
def test_a_run_goes_on_to_the_last_bit(tmp_path):
    whole = train(REWARD, bundle(), PAIRS, tmp_path / "whole")
    train(replace(REWARD, steps=2), bundle(), PAIRS, tmp_path / "parts")
    again = train(REWARD, bundle(), PAIRS, tmp_path / "parts")
    assert same(again.trained, whole.trained) and SCORE in again.trained
    begun = train(
        replace(REWARD, steps=1), bundle(), PAIRS, tmp_path / "begun", init_from=tmp_path / "parts"
    )
    assert not np.array_equal(begun.trained[SCORE]["kernel"], whole.trained[SCORE]["kernel"])
    assert events(tmp_path / "begun", "train")[0]["loss"] < 0.69


def test_where_a_reward_model_does_not_fit(reward_run, tmp_path):
    with pytest.raises(InputError, match="is a reward model; name a model that answers"):
        train(TINY, reward_run, PAIRS, tmp_path / "policy")
    with pytest.raises(InputError, match="score: trained by one run alone"):
        train(TINY, bundle(), PAIRS, tmp_path / "policy", init_from=reward_run)
    encoder, records, _ = prepare(bundle(), PAIRS, DataConfig(), responses=2)
    with pytest.raises(InputError, match="is no reward model; name a run of one"):
        response_rewards(bundle(), encoder, records, DataConfig(), 4)
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_an_exported_reward_model_scores_like_its_run(reward_run, tmp_path, adapter):
    said = export(reward_run, tmp_path / "out", adapter=adapter)
    found, wanted = (score(where, PAIRS) for where in (tmp_path / "out", reward_run))
    for name in ("chosen_reward", "rejected_reward"):
        np.testing.assert_allclose([x[name] for x in found], [x[name] for x in wanted], atol=1e-4)
    assert "step" in said
    if adapter:
        told = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert told["task_type"] == "SEQ_CLS" and told["modules_to_save"][-1] == "score"
    with pytest.raises(InputError, match="is a reward model, which does not answer"):
        generate(tmp_path / "out", PAIRS)
