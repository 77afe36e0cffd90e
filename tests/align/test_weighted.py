"""Sums of objectives: terms, metrics, states and needs of their parts; what words say; what is refused."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from refusals import refusal
from signals import signals

from mllm_align import BCO, DPO, IPO, PPO, SFT, Averaged, Config, Part, Reward, Sum
from mllm_align.align.contract import Objective, Terms
from mllm_align.align.weighted import says_sum, weighted
from mllm_align.config import from_json, to_json

MASK = np.arange(6) < np.array([[3, 5], [6, 1], [2, 2], [4, 6]])[:, :, None]
RNG = np.random.default_rng(5)
POLICY, REFERENCE = (np.where(MASK, -5 * RNG.random(MASK.shape), 0) for _ in range(2))
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
GIVEN = signals(POLICY, REFERENCE, MASK, WEIGHT)
MPO = Sum()
STATE = {"bco": {"mean": np.float32(0.25), "count": np.float32(6)}}


def numbers(values):
    return {name: float(value) for name, value in values.items()}


def loss(objective, given=GIVEN, state=()):
    sums, weights = objective(given, state).sums, objective.weights(given.responses)
    return sum(float(sums[name]) / float(weights[name]) for name in weights)


def test_terms_metrics_and_state_are_those_of_the_parts():
    made = MPO(GIVEN, STATE)
    dpo, bco, sft = DPO()(GIVEN), BCO()(GIVEN, STATE["bco"]), SFT()(GIVEN.of(SFT()))
    expected = {"dpo": 0.8 * dpo.sums["pairs"], "bco": 0.2 * bco.sums["pairs"], "sft": sft.sums["nll"]}
    assert numbers(made.sums) == pytest.approx(numbers(expected))
    assert numbers(MPO.weights(GIVEN.responses)) == {"dpo": 3, "bco": 3, "sft": 3 + 6 + 4}
    each = dpo.metrics | {f"bco/{name}": x for name, x in bco.metrics.items()}
    each |= {f"sft/{name}": x for name, x in sft.metrics.items()}
    assert made.metrics.keys() == each.keys()
    np.testing.assert_array_equal(*([list(x.values()) for x in (made.metrics, each)]))
    assert made.stats == {"bco": bco.stats}
    updated = MPO.update(STATE, made.stats)
    assert jax.tree.leaves(updated) == jax.tree.leaves({"bco": BCO().update(STATE["bco"], bco.stats)})
    assert jax.tree.structure(MPO.init_state()) == jax.tree.structure(STATE)


def test_mpo_begins_at_its_share_of_ln_2_and_the_loss_of_tokens():
    """0.8 ln 2 + 0.2 * 2 ln 2 = 0.8318, and nats per chosen token."""
    given = signals(POLICY, POLICY, MASK, WEIGHT)
    nll = -(POLICY[:, 0].sum(-1) * WEIGHT).sum() / (3 + 6 + 4)
    assert loss(MPO, given, MPO.init_state()) == pytest.approx(0.831777 + nll, rel=1e-5)
    assert Sum((Part(DPO(), 0.8), Part(BCO(), 0.2), Part(SFT(), 1.0))) == MPO


def test_a_sum_with_sft_is_the_weight_that_dpo_has_for_it():
    both = Sum((Part(DPO(0.3), 1.0), Part(SFT(), 0.5)))
    assert loss(both) == pytest.approx(loss(DPO(0.3, sft_weight=0.5)), rel=1e-6)
    assert jax.tree.leaves(both.init_state()) == []


def test_needs_responses_and_held_out_are_those_of_all_parts():
    assert MPO.needs == {"reference"} and MPO.responses == 2 and MPO.held_out is MPO
    assert Sum((Part(SFT()),)).needs == frozenset() and Sum((Part(SFT()),)).responses == 1
    three = Sum((Part(Averaged(pair=IPO())), Part(SFT(), 0.5)))
    assert (three.responses, three.made) == (3, 1)
    assert three.held_out == Sum((Part(IPO()), Part(SFT(), 0.5))) and three.held_out.responses == 2


def test_an_objective_of_one_response_sees_the_chosen_one_alone():
    @dataclass(frozen=True)
    class Lonely(Objective):
        responses = 1

        def weights(self, responses):
            assert responses.tokens.shape[1] == 1
            return {"all": responses.mask.sum() * 1.0}

        def __call__(self, signals, state):
            assert state == ()
            return Terms({"all": -signals.policy[0].sum()}, {})

    made = Sum((Part(DPO()), Part(Lonely(), 2.0)))(GIVEN)
    assert float(made.sums["Lonely"]) == pytest.approx(-2 * POLICY[:, 0].sum(), rel=1e-6)


# ---- as words ----------------------------------------------------------------------------------------


def test_words_say_parts_and_weights():
    assert not says_sum(["dpo"]) and not says_sum(["mine.py:Mine"]) and not says_sum([""])
    assert says_sum(["dpo:0.5"]) and says_sum(["dpo", "sft"]) and says_sum(["mine.py:Mine:2"])
    assert weighted(["dpo:0.8", "bco:0.2", "sft"]) == MPO
    kept = weighted(["sft:0.1", "dpo"], DPO(beta=0.7))
    assert kept == Sum((Part(SFT(), 0.1), Part(DPO(beta=0.7))))
    assert weighted(["dpo:2"], kept) == Sum((Part(DPO(beta=0.7), 2.0),))


def test_saved_and_read_again():
    config = Config(objective=Sum((Part(DPO(0.3), 0.8), Part(BCO(0.2), 0.2))))
    assert from_json(to_json(config)) == config
    assert to_json(config)["objective"]["parts"][1] == {
        "objective": {"kind": "bco", "beta": 0.2},
        "weight": 0.2,
    }


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Part(SFT(), 0), "the weight of sft is '0'; it must be a number above 0"),
        (lambda: Part(SFT(), float("inf")), "the weight of sft is 'inf'; it must be"),
        (lambda: Part(SFT(), True), "the weight of sft is 'True'"),
        (lambda: Sum(()), "objective.parts is '()'; it must be a tuple of parts"),
        (lambda: Sum((DPO(),)), "it must be Part(objective, weight)"),  # type: ignore[arg-type]
        (lambda: Sum((Part(DPO()), Part(DPO(0.3)))), "dpo is in a sum twice; give it once"),
        (lambda: Sum((Part(DPO()), Part(PPO()))), "ppo can't be part of a sum; take one on"),
        (lambda: Sum((Part(DPO()), Part(Reward()))), "reward can't be part of a sum"),
        (lambda: Sum((Part(MPO),)), "sum can't be part of a sum"),
        (lambda: Sum((Part(DPO()), Part(Averaged()))), "(dpo 2, averaged 3); take those of one number"),
        (lambda: Averaged(pair=BCO()), "it must be one without a state"),
        (lambda: weighted(["dpo:much"]), "'much' in 'dpo:much' is no weight; give NAME:WEIGHT"),
        (lambda: weighted(["nope:1"]), "'nope' is no objective; give one of sft, dpo"),
    ],
)
def test_nonsense_is_refused(make, said):
    assert said in refusal(make)
