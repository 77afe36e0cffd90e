"""`mllm-align judge`: its config, and where that comes from. What is measured: test_accuracy.py."""

import pytest
from refusals import refusal

from mllm_align import JudgeModel
from mllm_align.cli.judge import Judge
from mllm_align.config import JudgeConfig, load_config


def test_a_runs_config_gives_its_annotator_and_devices():
    config = load_config("online_dpo_llava16_7b")
    judge = Judge.load("online_dpo_llava16_7b")
    assert judge == JudgeConfig(JudgeModel(), config.data, config.mesh, config.distributed, config.dtype)
    assert Judge.load("judge") == load_config("judge", JudgeConfig)


@pytest.mark.parametrize("name, kind", [("dpo_tiny", "NoneType"), ("povid_scenes", "Distorted")])
def test_a_config_without_an_annotator_is_refused(name, kind):
    line = refusal(Judge.load, name)
    assert f"online is {kind}" in line and "a Config with online=OnlinePairs" in line
