"""`mllm-align plan`."""

import json

import pytest
from runs import MODEL


@pytest.mark.parametrize(
    "options, said",
    [
        (("--topology", "v9z:2x2"), "v9z"),
        (
            ("--topology", "v5e:4x4", "--model", "llava-9"),
            "model 'llava-9' is no folder and none of llava-1.5",
        ),
        (("--sweep",), "plan --sweep needs --topology"),
        (("--topology", "v5e:4x4", "--what", "dance"), "has no program 'dance'"),
    ],
)
def test_plans_of_what_is_not_known_are_refused(refused, config_file, options, said):
    assert said in refused("plan", config_file, *options)


def test_plan_takes_configs_of_both_kinds(run, config_file, tmp_path):
    bdhs = tmp_path / "bdhs.py"
    bdhs.write_text("from mllm_align import BDHSConfig\ndef get_config():\n    return BDHSConfig()\n")
    for file, options, field in (
        (config_file, ("--lora.rank", 3), "lora"),
        (bdhs, ("--iterations", 3), "iterations"),
    ):
        status, out, _ = run("plan", file, *options, "--print-config")
        found = json.loads(out)[field]
        assert status == 0 and 3 in (found, found["rank"] if isinstance(found, dict) else None)


@pytest.mark.slow
def test_plan_for_the_devices_of_this_machine(run, config_file, tmp_path):
    options = ("--model", MODEL, "--what", "train", "--json", tmp_path / "plan.json")
    status, out, err = run("plan", config_file, *options, "--batch-size", 8)
    assert status == 0, err
    (program,) = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert program["program"] == "train" and program["flops"] > program["model_flops"] / 2 > 0
    assert "train" in out
