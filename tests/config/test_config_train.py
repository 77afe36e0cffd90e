"""A training run's settings, and which of them go together."""

import pytest
from refusals import refusal

from mllm_align import JudgeModel, SceneOracle, SceneQuestions
from mllm_align.align.pairwise import DPO, IPO, Averaged
from mllm_align.align.policy_gradient import GRPO, PPO, RLOO
from mllm_align.align.sft import SFT
from mllm_align.config import PARTS, Config, Distorted, OnlineBDHS, OnlinePairs

ORACLE = OnlinePairs(annotator=SceneOracle())


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Config(steps=2.5), "steps is 2.5; it must be of type int"),
        (lambda: Config(steps=True), "steps is True"),
        (lambda: Config(objective="dpo"), "objective is 'dpo'"),
        (lambda: Config(lora=4), "lora is 4"),
        (lambda: Config(freeze=("vision_tower")), "freeze is 'vision_tower'; it must be of type tuple"),
        (lambda: Config(freeze=("head",)), "some of vision_tower, projector"),
        (lambda: Config(lora=None, freeze=PARTS), "nothing is left to train"),
        (lambda: Config(dtype="float16"), "dtype is 'float16'; it must be one of auto, float32, bfloat16"),
        (lambda: Config(remat="some"), "one of auto, none, dots, gate, qkv, attention, full"),
        (lambda: Config(nonfinite="ignore"), "nonfinite is 'ignore'; it must be one of stop, skip"),
        (lambda: Config(batch_size=6, micro_batches=4), "a multiple of micro_batches (4)"),
        (lambda: Config(epochs=0), "epochs is 0; it must be above 0"),
        (lambda: Config(epochs=float("inf")), "epochs"),
        (lambda: Config(seed=-1), "seed"),
        (lambda: Config(keep=0), "keep"),
        (lambda: Config(eval_every=0), "eval_every"),
        (lambda: Config(checkpoints=3), "checkpoints is 3"),
    ],
)
def test_values_are_checked_where_they_are_given(make, said):
    assert said in refusal(make)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Config(objective=Averaged()), "`online` must make the third response"),
        *(
            (lambda k=k, o=o: Config(objective=k(responses=2), online=o), f"objective is '{k.__name__}'")
            for k in (RLOO, GRPO, PPO)
            for o in (None, ORACLE, OnlineBDHS())
        ),
        (lambda: Config(online=ORACLE, reference="stored"), "reference is 'stored'; it must be live"),
        (lambda: Config(features="stored", lora=None, freeze=()), "live: the vision tower is trained"),
        (
            lambda: Config(features="stored", objective=Averaged(), online=Distorted()),
            "noise on the images",
        ),
        (lambda: Config(online=ORACLE, objective=SFT()), "objective is 'SFT'; it must be one on pairs"),
        (lambda: Config(online=ORACLE, objective=Averaged()), "it must be one on pairs"),
        (lambda: Config(online=OnlineBDHS(), objective=SFT()), "one on pairs, or averaged"),
        *(
            (lambda a=a: Config(online=OnlinePairs(annotator=a, stale=True)), "online.stale is True")
            for a in (JudgeModel(), SceneQuestions())
        ),
    ],
)
def test_settings_that_do_not_go_together(make, said):
    assert said in refusal(make)


def test_settings_that_go_together():
    Config(lora=None, freeze=PARTS[:-1])
    Config(batch_size=6, micro_batches=3)
    Config(objective=Averaged(), online=Distorted())
    Config(online=OnlinePairs(annotator=SceneOracle(), stale=True))


@pytest.mark.parametrize(
    "config, count",
    [
        (Config(), 2),
        (Config(objective=SFT()), 1),
        (Config(online=OnlineBDHS()), 1),
        (Config(objective=Averaged(), online=Distorted()), 2),
        (Config(online=ORACLE), 0),
        (Config(online=OnlinePairs(annotator=SceneOracle(), offline_share=0.5)), 2),
    ],
)
def test_how_many_responses_a_record_must_have(config, count):
    """What the objective compares, without what the policy makes."""
    assert config.data_responses == count


def test_held_out_records_have_no_third_response():
    assert Config(objective=IPO(0.3)).objective.held_out == IPO(0.3)
    averaged = Averaged(pair=DPO(beta=0.3))
    assert Config(objective=averaged, online=Distorted()).objective.held_out == DPO(beta=0.3)
