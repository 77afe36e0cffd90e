"""Pushing an exported folder: what the Hub is asked for, and what is said where it can't be."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from hub import Hub
from refusals import refusal

from mllm_align.models.hub import check_name, push


@pytest.mark.parametrize("name, whole", [("org/model", "org/model"), ("model", "me/model")])
def test_a_folder_is_pushed_to_a_private_repository(monkeypatch, tmp_path, name, whole):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(tmp_path, name) == f"https://hub/{whole}"
    assert Hub.repositories[-1] == (whole, {"private": True, "exist_ok": True})
    assert Hub.made[-1] == tmp_path


def test_who_is_not_logged_in_is_told_how_to_go_on(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required,\nbut no token found.")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: SimpleNamespace(create_repo=refuse))
    line = refusal(push, tmp_path, "me/model")
    said = "is whole, but can't be pushed to me/model (LocalTokenNotFoundError: Token is required, but"
    assert line.startswith(f"{tmp_path} {said}")
    assert line.endswith(
        f"see to the network and the log-in (hf auth login), then: hf upload me/model {tmp_path}"
    )


@pytest.mark.parametrize("name", ["", "a/b/c", "no spaces", "https://hub/me/model", "../up"])
def test_names_that_the_hub_has_not_are_refused(name):
    assert "give owner/name, as on the Hub" in refusal(check_name, name)
    check_name("owner/a-model.v1_x")
