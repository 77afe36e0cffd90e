"""What configs say of makers and annotators, so that nobody else asks of which kind they are."""

from dataclasses import replace

import pytest

from mllm_align import (
    DPO,
    SFT,
    Averaged,
    BDHSConfig,
    Config,
    Distorted,
    Endpoint,
    JudgeModel,
    OnlineBDHS,
    OnlinePairs,
    OnlineRewards,
    RewardModel,
    SamplingConfig,
    SceneOracle,
    Scorer,
)
from mllm_align.config import ANNOTATORS, ONLINE
from mllm_align.testbed.annotators import SceneQuestions

PAIRS = OnlinePairs(annotator=Scorer("votes:hashed"), sampling=SamplingConfig(max_tokens=7))


@pytest.mark.parametrize(
    "online, objective, data, reserved, generates",
    [
        (PAIRS, DPO(), 0, 7, True),
        (replace(PAIRS, offline_share=0.5), DPO(), 2, 7, True),
        (OnlineBDHS(), DPO(), 1, 0, True),
        (OnlineBDHS(), Averaged(), 2, 0, True),
        (Distorted(), DPO(), 1, 0, False),
        (Distorted(), Averaged(), 2, 0, False),
    ],
)
def test_what_a_maker_needs_of_the_data(online, objective, data, reserved, generates):
    assert Config(objective=objective, online=online).data_responses == data
    assert (online.reserved_tokens, online.generates) == (reserved, generates)


@pytest.mark.parametrize("objective, wanted", [(SFT(), 1), (DPO(), 2)])
def test_without_a_maker_the_data_have_all_responses(objective, wanted):
    assert Config(objective=objective).data_responses == wanted


@pytest.mark.parametrize("kind", ONLINE.values())
def test_every_maker_says_how_it_generates(kind):
    online = kind()
    assert online.sampling.max_tokens >= 1 and online.mesh is None
    assert ":" in online.maker and (online.annotator is not None) == (kind in (OnlinePairs, OnlineRewards))


@pytest.mark.parametrize(
    "annotator, on_devices, asks_base, folder",
    [
        (JudgeModel(), True, True, None),
        (JudgeModel(model="judge"), True, False, "judge"),
        (RewardModel(model="runs/reward"), True, False, "runs/reward"),
        (SceneQuestions(), True, True, None),
        (Endpoint(model="gpt"), False, False, None),
        (SceneOracle(), False, False, None),
        (Scorer("votes:hashed"), False, False, None),
    ],
)
def test_what_an_annotator_runs_on(annotator, on_devices, asks_base, folder):
    assert annotator.on_devices == on_devices and annotator.asks_base == asks_base
    assert annotator.model_folder == folder


def test_what_may_change_are_fields():
    """A name that is misspelt would let nothing change, without a word."""
    for config in (Config(), Config().data, *(kind() for kind in ANNOTATORS.values())):
        assert config.may_change <= set(type(config).__dataclass_fields__), type(config)


def test_parts_of_a_batch_and_its_reference():
    config = Config(batch_size=12, micro_batches=3)
    assert config.rows_per_micro == 4 and BDHSConfig(batch_size=6).rows_per_micro == 6
    kinds = [(DPO(), "live"), (DPO(), "stored"), (SFT(), "live"), (SFT(), "stored")]
    made = [Config(objective=objective, reference=reference) for objective, reference in kinds]
    assert [c.live_reference for c in made] == [True, False, False, False]
    assert [c.stored_reference for c in made] == [False, True, False, False]
