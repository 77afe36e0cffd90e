"""All objectives are found, and docs/objectives.md has each of them, with its settings."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mllm_align.align.contract import OBJECTIVES
from mllm_align.align.weighted import Sum

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", PAGE, re.M | re.S))


def test_every_module_of_the_folder_registers_its_own():
    assert {"dpo", "robust", "ipo", "slic", "averaged", "sft", "reward"} <= set(OBJECTIVES)
    assert all(OBJECTIVES.find(name) is kind for name, kind in OBJECTIVES.items())


def test_the_page_has_all_objectives():
    assert sorted(SECTIONS) == sorted(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_page_has_all_settings_and_their_defaults(name):
    names = {kind: name for name, kind in OBJECTIVES.items()}
    settings = re.findall(r"^\| `(\w+)` \| (\S+) \|", SECTIONS[name], re.M)
    default = {each.name: each.default for each in fields(OBJECTIVES[name])}
    shown = {
        key: f"`{names[type(value)]}`" if type(value) in names else str(value)
        for key, value in default.items()
    }
    if name == "sum":
        assert shown.pop("parts") == str(Sum().parts) and settings.pop() == ("parts", "MPO's")
    assert dict(settings) == shown
