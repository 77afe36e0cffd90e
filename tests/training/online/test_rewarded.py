"""Policy gradients on the policy's own samples: what a batch holds, by hand; runs, resumed and split."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from runs import MODEL, PAIRS, TINY, EachStep, bundle, compiling, events, same

from mllm_align import AnnotatorConfig, load, train
from mllm_align.align.pairwise import DPO
from mllm_align.align.policy_gradient import GRPO, PPO, RLOO
from mllm_align.annotate.scorer import Scorer
from mllm_align.annotate.verdict import Verdict, scored
from mllm_align.config import MeshConfig, OnlineRewards, SamplingConfig
from mllm_align.errors import InputError
from mllm_align.sharding import make_mesh
from mllm_align.training.online import rewarded

assert compiling  # a fixture
ONLINE = OnlineRewards(Scorer("votes:short"), sampling=SamplingConfig(max_tokens=8))
RUN = replace(TINY, objective=RLOO(responses=3, beta=0.5), online=ONLINE, save_every=1)


@pytest.fixture
def credited(monkeypatch):
    """(rewards, batch before, batch after, trained) of every step."""
    seen, whole = [], rewarded.Rewarded._credited

    def credit(self, group, samples, rewards, trained):
        made = whole(self, group, samples, rewards, trained)
        seen.append((rewards, jax.device_get(made), jax.device_get(trained)))
        return made

    monkeypatch.setattr(rewarded.Rewarded, "_credited", credit)
    return seen


def flat(x):
    return np.asarray(x, np.float64).reshape(-1, *x.shape[2:])


def test_what_a_batch_holds_by_hand(tmp_path, credited):
    online = replace(ONLINE, reward_mean=-1.0, reward_deviation=2.0, missing_end=0.25)
    train(replace(RUN, online=online, steps=3), bundle(), PAIRS, tmp_path / "run")
    assert len(credited) == 3
    for step, (rewards, group, _) in enumerate(credited, 1):
        given = group.responses
        tokens, mask, old, found = map(flat, (given.tokens, given.mask, given.old, given.advantages))
        reference, mask = flat(given.reference[0]), mask.astype(bool)
        k1 = np.where(mask, old - reference, 0).sum(-1)
        assert (np.abs(k1).max() < 1e-5) == (step == 1), "the policy moves with the first update"
        last = np.take_along_axis(tokens, mask.sum(-1, keepdims=True) - 1, axis=2)[..., 0]
        ended = np.isin(last, [bundle().processor.tokenizer.eos_token_id])
        shaped = (rewards + 1) / 2 - 0.25 * ~ended - 0.5 * k1
        others = (shaped.sum(1, keepdims=True) - shaped) / 2
        expected = np.where(mask, (shaped - others)[..., None], 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for line in events(tmp_path / "run", "train"):
        assert line["policy/ratio"] == pytest.approx(1, abs=1e-4) and line["policy/clipped"] == 0
        assert line["reward"] < 0 and line["reward/unscored"] == 0 and line["rollout/logp_gap"] < 1e-4
    assert events(tmp_path / "run", "train")[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path):
    whole = train(RUN, bundle(), PAIRS, tmp_path / "whole")

    def stop(values):
        if values["step"] == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(RUN, bundle(), PAIRS, tmp_path / "parts", callbacks=[EachStep(stop)])
    again = train(RUN, bundle(), PAIRS, tmp_path / "parts")
    assert same(again.trained, whole.trained)


@pytest.mark.slow
def test_micro_batches_and_devices_agree(tmp_path):
    lines = {}
    eight = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    runs = {
        "one": (replace(RUN, batch_size=8), bundle().mesh),
        "parts": (replace(RUN, batch_size=8, micro_batches=2), bundle().mesh),
        "eight": (replace(RUN, batch_size=8), eight),
    }
    for name, (config, mesh) in runs.items():
        train(replace(config, steps=2), load(MODEL, "float32", mesh), PAIRS, tmp_path / name)
        lines[name] = events(tmp_path / name, "train")
    for name in ("parts", "eight"):
        for ours, one in zip(lines[name], lines["one"], strict=True):
            assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert ours["reward"] == pytest.approx(one["reward"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [RLOO(beta=0.01), GRPO(beta=0.01)], ids=["rloo", "grpo"])
def test_the_reward_rises(tmp_path, objective):
    config = replace(RUN, objective=objective, steps=40, batch_size=8, save_every=100, log_every=10)
    train(config, bundle(), PAIRS, tmp_path / "run")
    rewards = [line["reward"] for line in events(tmp_path / "run", "train")]
    assert rewards[-1] > rewards[0] + 0.05


@dataclass(frozen=True)
class Picky(AnnotatorConfig):
    """Scores two prompts of three."""

    def __call__(self, questions):
        return [
            Verdict("failed") if i % 3 == 2 else scored([1.0] * len(each.responses))
            for i, each in enumerate(questions)
        ]


def test_prompts_without_rewards_weigh_nothing_and_ties_are_rewards(tmp_path):
    config = replace(RUN, online=replace(ONLINE, annotator=Picky()), steps=1, batch_size=8)
    train(config, bundle(), PAIRS, tmp_path / "run")
    (line,) = events(tmp_path / "run", "train")
    assert line["reward"] == 1 and line["reward/unscored"] == 0.25 and line["groups_used"] == 0.75
    assert line["grad_norm"] == pytest.approx(0, abs=1e-6), "all rewards of a prompt are the same"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"online": None}, "objective is 'RLOO'; it must be another, or --online rewards"),
        ({"objective": DPO()}, "objective is 'DPO'; it must be one on pairs, without --online rewards"),
        ({"objective": PPO()}, "objective is 'PPO'; it must be another: nothing trains the value model"),
        ({"reference": "stored"}, "reference is 'stored'; it must be live"),
    ],
)
def test_configs_that_are_refused(change, said):
    with pytest.raises(InputError) as error:
        replace(RUN, **change)
    assert said in str(error.value)


def test_held_out_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="RLOO has no loss on held-out data; leave out --eval-data"):
        train(RUN, bundle(), PAIRS, tmp_path / "run", PAIRS)
    assert not (tmp_path / "run").exists()
