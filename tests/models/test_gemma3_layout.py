"""Gemma 3's images, tokens and settings, against transformers' own image processor and processor."""

import json
import shutil

import numpy as np
import pytest
from conversations import CHATS, picture, same_ids
from goldens import FIXTURES, goldens
from refusals import assert_refusal
from transformers import Gemma3Processor

from mllm_align.data.encode import Encoder
from mllm_align.data.layout import Run, counts, ordered, whole_tiles
from mllm_align.data.records import parse_record
from mllm_align.models.processor import end_tokens, load_processor


def test_embeddings_of_an_image_have_one_order():
    """Text, an image of 3, text, one of 2, text."""
    image = np.array([-1, 1, 2, 3, -1, -1, 4, 5, -1])
    runs = [Run(image[1:4], block=True), Run(image[6:8], block=True)]
    assert ordered(image, runs).tolist() == [0, 1, 1, 1, 4, 5, 6, 6, 8]
    assert ordered(image, [Run(run.rows) for run in runs]).tolist() == list(range(9))
    assert ordered(image[:1], []).tolist() == [0]


def test_every_image_is_one_tile():
    layout = goldens("gemma3").layout
    for size in ((1, 1), (3, 4000), (4000, 3), (84, 84)):
        assert counts(layout, *size, 1) == (1, 1, 9) and layout.tiles(*size) == (1, 36)
    (run,) = layout.runs(5, 7, 3, 2)
    assert run.rows.tolist() == list(range(19, 28)) and run.block


# ---- token ids and pixels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    """An encoder, and transformers' processor of the same folder."""
    golden = goldens("gemma3")
    path, config = golden.folder.path, golden.config
    ends = end_tokens(path, config.decoder.vocab)
    coder = Encoder(load_processor(path), golden.layout, config.image_token, ends)
    return coder, Gemma3Processor.from_pretrained(path)


@pytest.mark.parametrize("messages, sizes", CHATS.values(), ids=CHATS)
def test_ids_and_pixels_are_those_of_the_processor(both, messages, sizes):
    coder, theirs = both
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    whole, given = (asked + "{}<end_of_turn>").format, [images] if images else None
    one, made = same_ids(coder, theirs, messages, images, whole, given)
    found = coder.pixels(one)
    wanted = np.asarray(made["pixel_values"] if images else np.zeros((0, 3, 84, 84)), np.float32)
    tiles = whole_tiles(wanted.transpose(0, 2, 3, 1), 14)
    assert len(tiles.patches) == one.shape.tiles == len(images)
    np.testing.assert_array_equal(found.patches, tiles.patches)
    blocks = np.split(coder.prefix(one).order[coder.prefix(one).image >= 0], len(images) or 1)
    assert all(len(np.unique(block)) == 1 for block in blocks if len(block))


def test_lines_around_an_image_merge_with_the_template_s(both):
    """One token of three lines: the image's text is put in before the text is tokenized."""
    coder, _ = both
    row = {"images": [picture(0, 9, 9)], "prompt": "gi?", "chosen": "a", "rejected": "b"}
    ids = coder.encode(parse_record(row, index=0, where="row", root=None), 2).prefix
    tokens = coder.tokenizer.convert_ids_to_tokens(ids)
    at = tokens.index("<start_of_image>")
    assert tokens[at - 1 : at + 4] == ["\n\n\n", *tokens[at : at + 3], "\n\n"]


def test_a_system_turn_begins_the_user_s(both):
    coder, _ = both
    messages = [{"role": "system", "content": "der."}, {"role": "user", "content": "gi?"}]
    row = {"images": [], "prompt": messages, "chosen": "a", "rejected": "b"}
    ids = coder.encode(parse_record(row, index=0, where="row", root=None), 2).prefix
    assert coder.tokenizer.decode(ids) == (
        "<bos><start_of_turn>user\nder.\n\ngi?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_side_files_as_published(tmp_path):
    """preprocessor_config.json with the fast processor's name and nulls, chat_template.json."""
    folder = shutil.copytree(FIXTURES / "gemma3", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor") | {"image_processor_type": "Gemma3ImageProcessorFast"}
    images |= dict.fromkeys(("do_convert_rgb", "do_pan_and_scan", "pan_and_scan_min_crop_size"))
    images |= {"image_seq_length": 9, "processor_class": "Gemma3Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, golden = load_processor(folder), goldens("gemma3")
    assert golden.folder.family.layout(golden.config, ours) == golden.layout
    assert ours.chat_template == template
    assert type(ours.image_processor).__name__ == "Gemma3ImageProcessorPil"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_pan_and_scan": True}, ("do_pan_and_scan is True, wanted null or False",)),
        ({"do_resize": False}, ("do_resize is False, wanted True",)),
        ({"size": {"height": 28, "width": 28}}, ("it gives pixels", "config.json asks for", "one folder")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_computed(change, words, tmp_path):
    folder = shutil.copytree(FIXTURES / "gemma3", tmp_path / "model")
    raw = json.loads((folder / "processor_config.json").read_text())
    raw["image_processor"].update(change)
    (folder / "processor_config.json").write_text(json.dumps(raw))
    assert_refusal(lambda: load_processor(folder), *words)


def test_a_tokenizer_without_the_tokens_around_an_image(tmp_path):
    folder = shutil.copytree(FIXTURES / "gemma3", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eoi_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = (folder / "tokenizer.json").read_text().replace("<end_of_image>", "<other>")
    (folder / "tokenizer.json").write_text(text)
    assert_refusal(lambda: load_processor(folder), "<end_of_image>", "stands around images")
