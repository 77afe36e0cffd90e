"""Tokenizer, image processor and generation settings go with the model, or are refused."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from goldens import FIXTURES, NAMES
from refusals import assert_refusal
from transformers import LlavaNextProcessor, LlavaProcessor

from mllm_align.cli import main
from mllm_align.config import MeshConfig
from mllm_align.models.bundle import load
from mllm_align.models.processor import end_tokens, load_processor
from mllm_align.sharding import make_mesh

PAIRS = FIXTURES / "pairs.jsonl"


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    return shutil.copytree(FIXTURES / request.param, tmp_path / "model")


def edit(file: Path, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def add_token(folder, token, number):
    """As a tokenizer gets a new token: the table is not resized by that."""
    new = {"id": number, "content": token, "special": True}
    new |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit(folder / "tokenizer.json", lambda raw: raw["added_tokens"].append(new))


def test_token_beyond_the_table(folder):
    size = len(load_processor(folder).tokenizer)
    for number in range(size, 385):
        add_token(folder, f"<extra-{number}>", number)
    words = "'<extra-384>'", "id 384", "384 rows", "resize", "tokenizer of this model"
    assert_refusal(lambda: load_processor(folder), *words)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert_refusal(lambda: load(folder, "float32", mesh), *words)
    edit(folder / "tokenizer.json", lambda raw: raw["added_tokens"].pop())
    assert len(load_processor(folder).tokenizer) == 384


def test_inspect_says_so_in_one_line(folder, capfd):
    for number in range(len(load_processor(folder).tokenizer), 385):
        add_token(folder, f"<extra-{number}>", number)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "--model", str(folder), "--data", str(PAIRS)])
    said = capfd.readouterr()
    assert caught.value.code == 2 and not said.out
    assert said.err.count("\n") == 1 and "<extra-384>" in said.err


def post_processor(tokens):
    """Writes <s> before a text; tokens: what its special tokens are."""
    before, text, second = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    pieces = {"single": [before, text], "pair": [text, second], "special_tokens": tokens}
    return {"post_processor": {"type": "TemplateProcessing", **pieces}}


def test_post_processor_that_writes_an_id_beyond_the_table(folder):
    new = post_processor({"<s>": {"id": "<s>", "ids": [1, 999], "tokens": ["<s>", "<t>"]}})
    edit(folder / "tokenizer.json", lambda raw: raw.update(new))
    assert_refusal(lambda: load_processor(folder), "id 999", "384 rows")


def test_end_of_sequence_that_is_no_token(folder):
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(eos_token=""))
    assert_refusal(lambda: load_processor(folder), "eos_token", "vocabulary")


@pytest.mark.parametrize(
    "name, values",
    [
        ("eos_token_id", ("2", [[2]], [True], True, -1, 384, 10**12, 2.0, {"a": 2}, [2, "3"], [None])),
        ("bos_token_id", ("1", -1, 384, [1], True)),
        ("pad_token_id", ("1", -2, 384, [1], True)),
    ],
)
def test_generation_settings_out_of_range(name, values, tmp_path):
    for value in values:
        (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
        assert_refusal(lambda: end_tokens(tmp_path, 384), "generation_config.json", name, "383")


def test_generation_settings(tmp_path):
    assert end_tokens(tmp_path, 384) == frozenset()
    for value, ends in ((None, set()), (2, {2}), ([2, 7], {2, 7}), ([], set())):
        settings = {"eos_token_id": value, "pad_token_id": -1, "bos_token_id": None}
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        assert end_tokens(tmp_path, 384) == ends


@pytest.mark.parametrize(
    "name, values",
    [
        ("image_mean", ([0.5], [0.5, 0.5], ["a", "b", "c"], [0.5, 0.5, None], [400.0, 0.5, 0.5], "x")),
        ("image_std", ([0.0, 0.5, 0.5], [-0.5, 0.5, 0.5], [float("nan"), 0.5, 0.5], [0.5])),
        ("rescale_factor", (0, -1, float("nan"), "x", 300)),
        ("size", ({"shortest_edge": -4}, {"shortest_edge": 10**6}, {"shortest_edge": "56"}, [56], "x")),
        (
            "crop_size",
            ({"height": 0, "width": 56}, {"height": 10**6, "width": 56}, {"height": 57, "width": 57}),
        ),
        ("do_normalize", ("yes", 3)),
        ("resample", (99, "x", -1)),
    ],
)
def test_image_processor_out_of_range(folder, name, values):
    file = folder / "processor_config.json"
    before = file.read_text()
    for value in values:
        edit(file, lambda raw, value=value: raw["image_processor"].update({name: value}))
        assert_refusal(lambda: load_processor(folder), str(folder))
        file.write_text(before)
    assert load_processor(folder)


def test_tile_size_of_the_configuration_and_of_the_processor(folder):
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    edit(folder / "processor_config.json", lambda raw: raw["image_processor"].update(sizes))
    assert_refusal(lambda: load_processor(folder), "[3, 42, 42]", "[3, 56, 56]", "one folder")


def test_canvases_of_the_configuration_and_of_the_processor(tmp_path):
    folder = shutil.copytree(FIXTURES / "llavanext", tmp_path / "model")
    other = {"image_grid_pinpoints": [[56, 112], [112, 56]]}
    edit(folder / "processor_config.json", lambda raw: raw["image_processor"].update(other))
    assert_refusal(lambda: load_processor(folder), "image_grid_pinpoints", "one folder")
    other["image_grid_pinpoints"] = [[56, 112], [112]]
    edit(folder / "processor_config.json", lambda raw: raw["image_processor"].update(other))
    assert_refusal(lambda: load_processor(folder), str(folder), "image processor")


def test_panic_of_the_tokenizers_library_is_one_line(folder, capfd):
    """Its template names a special token that it does not define."""

    edit(folder / "tokenizer.json", lambda raw: raw.update(post_processor({})))
    assert_refusal(lambda: load_processor(folder), "tokenizer")
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["jinja", "json", "processor_config", "tokenizer_config", "several"])
def test_the_parts_are_those_of_transformers_own_processor(name, place, tmp_path):
    folder = shutil.copytree(FIXTURES / name, tmp_path / "model")
    file = folder / "chat_template.jinja"
    template = file.read_text()
    if place == "several":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    elif place != "jinja":
        file.unlink()
    if place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif place.endswith("config"):
        edit(folder / f"{place}.json", lambda raw: raw.update(chat_template=template))
    ours = load_processor(folder)
    theirs = (LlavaProcessor if name == "llava15" else LlavaNextProcessor).from_pretrained(folder)
    assert ours.chat_template == theirs.chat_template
    found = ours.chat_template or ours.tokenizer.chat_template
    assert (found["default"] if isinstance(found, dict) else found) == template
    assert ours.image_token == theirs.image_token
    assert ours.image_processor.to_json_string() == theirs.image_processor.to_json_string()
    assert ours.tokenizer.backend_tokenizer.to_str() == theirs.tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("content", ["{}", '{"chat_template"', "[]"])
def test_a_chat_template_that_is_none(content, folder):
    (folder / "chat_template.json").write_text(content)
    assert_refusal(lambda: load_processor(folder), str(folder))
