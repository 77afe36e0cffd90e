"""Policy gradients on the policy's own samples: what a batch holds, by hand; runs, resumed and split."""

import json
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from runs import MODEL, PAIRS, TINY, EachStep, bundle, compiling, events, reward_run, same

from mllm_align import AnnotatorConfig, load, train
from mllm_align.align.pairwise import DPO
from mllm_align.align.policy_gradient import GRPO, PPO, RLOO
from mllm_align.annotate.scorer import Scorer
from mllm_align.annotate.verdict import Verdict, scored
from mllm_align.config import LoraConfig, MeshConfig, OnlineRewards, SamplingConfig
from mllm_align.errors import Diverged, InputError
from mllm_align.sharding import make_mesh
from mllm_align.training.online import rewarded
from mllm_align.training.run_model import initial, load_run

assert compiling and reward_run  # fixtures
ONLINE = OnlineRewards(Scorer("votes:short"), sampling=SamplingConfig(max_tokens=8))
RUN = replace(TINY, objective=RLOO(responses=3, beta=0.5), online=ONLINE, save_every=1)


@pytest.fixture
def credited(monkeypatch):
    """(rewards, batch) of all batches of every round."""
    seen, whole = [], rewarded.Rewarded.complete

    def complete(self, round):
        whole(self, round)
        each = [(self._rewards(self.samples(it)), jax.device_get(it.made.group)) for it in round]
        seen.append(each)

    monkeypatch.setattr(rewarded.Rewarded, "complete", complete)
    return seen


def flat(x):
    return np.asarray(x, np.float64).reshape(-1, *x.shape[2:])


def test_what_a_batch_holds_by_hand(tmp_path, credited):
    online = replace(ONLINE, reward_mean=-1.0, reward_deviation=2.0, missing_end=0.25)
    train(replace(RUN, online=online, steps=3), bundle(), PAIRS, tmp_path / "run")
    assert len(credited) == 3
    for step, ((rewards, group),) in enumerate(credited, 1):
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


ROUNDS = replace(ONLINE, minibatches=2, epochs=2)
PPO_RUN = replace(RUN, objective=PPO(responses=2), online=ROUNDS, steps=6)


@pytest.mark.slow
def test_a_round_of_ppo_by_hand(tmp_path, credited):
    """Two batches are credited together, and values are the value model's."""
    config = replace(PPO_RUN, online=replace(ROUNDS, missing_end=1.0))
    whole = train(config, bundle(), PAIRS, tmp_path / "run")
    assert len(credited) == 2 and {len(round) for round in credited} == {2}
    for number, round in enumerate(credited):
        before, every = [], []
        for rewards, group in round:
            given = group.responses
            mask, old, value = (flat(x) for x in (given.mask, given.old, given.values))
            mask, reference, tokens = mask.astype(bool), flat(given.reference[0]), flat(given.tokens)
            assert (np.abs(value[mask]).max() == 0) == (number == 0), "the head begins at 0"
            last = np.take_along_axis(tokens, mask.sum(-1, keepdims=True) - 1, axis=2)[..., 0]
            rewards = rewards - ~np.isin(last, [bundle().processor.tokenizer.eos_token_id])
            advantages = np.zeros(mask.shape)
            for b, k in np.ndindex(*mask.shape[:2]):
                later = value_after = 0.0
                for t in reversed(range(mask[b, k].sum())):
                    end = rewards[b, k] if t == mask[b, k].sum() - 1 else 0.0
                    r = end - 0.05 * (old[b, k, t] - reference[b, k, t])
                    later = r + value_after - value[b, k, t] + 0.95 * later
                    advantages[b, k, t], value_after = later, value[b, k, t]
            expected = np.where(mask, advantages + value, 0)
            np.testing.assert_allclose(flat(given.returns), expected, atol=1e-5)
            before.append(advantages[mask])
            every.append(flat(given.advantages)[mask])
        before, every = np.concatenate(before), np.concatenate(every)
        whitened = (before - before.mean()) / before.std(ddof=1)
        np.testing.assert_allclose(every, whitened, atol=1e-4)
    lines = events(tmp_path / "run", "train")
    assert [line["staleness"] for line in lines] == [0, 1, 2, 3, 0, 1]
    assert [("reward" in line, "rollout/tokens" in line) for line in lines] == [
        (step % 4 < 2,) * 2 for step in range(6)
    ]
    off = [abs(line["policy/ratio"] - 1) > 1e-6 for line in lines]
    assert not off[0] and not off[4] and all(off[1:4]), "the policy has moved"
    assert "value/explained" in lines[0] and lines[-1]["value/error"] > 0
    assert "value" not in whole.trained, "what answers needs no value model"
    assert "value" not in load(tmp_path / "run", "float32", bundle().mesh).trained


@pytest.mark.slow
def test_a_run_that_is_stopped_at_every_update_ends_as_if_it_had_not_been(tmp_path):
    whole = train(PPO_RUN, bundle(), PAIRS, tmp_path / "whole")
    for stopped in range(1, 6):

        def stop(values, stopped=stopped):
            if values["step"] == stopped + 1:
                raise RuntimeError

        with pytest.raises(RuntimeError):
            train(PPO_RUN, bundle(), PAIRS, tmp_path / "parts", callbacks=[EachStep(stop)])
    again = train(PPO_RUN, bundle(), PAIRS, tmp_path / "parts")
    assert same(again.trained, whole.trained)
    names = ("loss", "grad_norm", "reward", "value/error", "kl/sequence", "rollout/tokens", "staleness")
    of_each = {
        line["step"]: [line.get(name) for name in names] for line in events(tmp_path / "parts", "train")
    }
    assert [of_each[step] for step in range(1, 7)] == [
        [line.get(name) for name in names] for line in events(tmp_path / "whole", "train")
    ]


@pytest.mark.slow
def test_the_scale_of_rewards_is_measured_once(tmp_path, monkeypatch):
    config = replace(RUN, online=replace(ONLINE, reward_samples=20), steps=2)
    train(replace(config, steps=1), bundle(), PAIRS, tmp_path / "run")
    place = tmp_path / "run" / rewarded.SCALE
    scale = json.loads(place.read_text())
    assert scale["samples"] == 20 and scale["mean"] < 0 < scale["deviation"]
    monkeypatch.setattr(rewarded.Rewarded, "_measured", None)
    place.write_text('{"mean": 1.0}')
    with pytest.raises(InputError, match=r"reward_scale.json: it has no mean and deviation; bring the run"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    place.write_text(json.dumps(scale))
    train(config, bundle(), PAIRS, tmp_path / "run")


@pytest.mark.slow
def test_a_run_stops_above_its_limits(tmp_path):
    config = replace(RUN, online=replace(ONLINE, max_length=1.0), steps=2)
    with pytest.raises(Diverged, match=r"step 1: rollout/tokens is .*, above online.max_length \(1\); see"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    assert len(events(tmp_path / "run", "train")) == 1
    train(replace(config, online=replace(ONLINE, max_length=8.0)), bundle(), PAIRS, tmp_path / "run")


def test_a_value_model_starts_from_a_reward_model(tmp_path, reward_run):
    optim = replace(RUN.optim, projector_learning_rate=0.0)
    online = replace(ROUNDS, value_model=str(reward_run))
    config = replace(PPO_RUN, optim=optim, online=online, save_every=1)
    assert same(initial(config, bundle(), None)["value"], load_run(reward_run).trained)
    with pytest.raises(InputError, match="give the same --lora options"):
        initial(replace(config, lora=LoraConfig(rank=1)), bundle(), None)


@pytest.mark.slow
def test_micro_batches_and_devices_agree(tmp_path):
    config = replace(PPO_RUN, batch_size=8, steps=2)
    train(config, bundle(), PAIRS, tmp_path / "one")
    eight = load(MODEL, "float32", make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    train(replace(config, micro_batches=2), eight, PAIRS, tmp_path / "parts")
    for ours, one in zip(*(events(tmp_path / name, "train") for name in ("parts", "one")), strict=True):
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert ours["value/error"] == pytest.approx(one["value/error"], rel=1e-3)
        assert ours["reward"] == pytest.approx(one["reward"], rel=1e-6)


@pytest.mark.slow
def test_the_reward_rises(tmp_path):
    config = replace(RUN, objective=GRPO(beta=0.01), steps=40, batch_size=8, save_every=100, log_every=10)
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


@pytest.mark.slow
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
        (
            {"online": replace(ONLINE, value_model="runs/r")},
            "online.value_model is 'runs/r'; it must be left",
        ),
        ({"online": {"minibatches": 0}}, "online.minibatches is 0; it must be 1 or more"),
        ({"online": {"reward_samples": 1}}, "online.reward_samples is 1; it must be 0, or at least 2"),
        (
            {"online": {"reward_samples": 8, "reward_mean": 1.0}},
            "online.reward_samples is 8; it must be 0, or reward_mean and reward_deviation left out",
        ),
        ({"reference": "stored"}, "reference is 'stored'; it must be live"),
    ],
)
def test_configs_that_are_refused(change, said):
    with pytest.raises(InputError) as error:
        if isinstance(online := change.get("online"), dict):
            change = {"online": replace(ONLINE, **online)}
        replace(RUN, **change)
    assert said in str(error.value)


def test_held_out_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="RLOO has no loss on held-out data; leave out --eval-data"):
        train(RUN, bundle(), PAIRS, tmp_path / "run", PAIRS)
    assert not (tmp_path / "run").exists()
