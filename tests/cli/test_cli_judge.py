"""`mllm-align judge`: its config, and the files that it writes. What is measured: test_accuracy.py."""

import pytest
from refusals import refusal

from mllm_align.cli.judge import Judge, _lines_beside
from mllm_align.config import JudgeConfig, JudgeModel, load_config


def test_a_runs_config_gives_its_annotator_and_devices():
    config = load_config("online_dpo_llava16_7b")
    judge = Judge.load("online_dpo_llava16_7b")
    assert judge == JudgeConfig(JudgeModel(), config.data, config.mesh, config.distributed, config.dtype)
    assert Judge.load("judge") == load_config("judge", JudgeConfig)


@pytest.mark.parametrize("name, kind", [("dpo_tiny", "NoneType"), ("povid_scenes", "Distorted")])
def test_a_config_without_an_annotator_is_refused(name, kind):
    line = refusal(Judge.load, name)
    assert f"online is {kind}" in line and "a Config with online=OnlinePairs" in line


def test_lines_stand_beside_the_result(tmp_path):
    assert _lines_beside(tmp_path / "a.json") == tmp_path / "a.jsonl"
    (tmp_path / "b.jsonl").touch()
    assert "is there without its .json" in refusal(_lines_beside, tmp_path / "b.json")
    assert "give --out a name that ends in .json" in refusal(_lines_beside, tmp_path / "b.jsonl")
    assert "this is a folder" in refusal(_lines_beside, tmp_path)
