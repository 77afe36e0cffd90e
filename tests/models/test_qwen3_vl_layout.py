"""Qwen3-VL's images, tokens and settings, against transformers' own image processor and processor."""

import json
import shutil

import numpy as np
import pytest
from conversations import CHATS, picture, same_ids
from goldens import FIXTURES, goldens
from oracle.images_only import QwenImages
from refusals import assert_refusal
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mllm_align.data.encode import Encoder
from mllm_align.data.inspect import describe
from mllm_align.data.layout import Run, counts, rotary
from mllm_align.data.records import parse_record
from mllm_align.models.families.qwen3_vl.layout import QwenLayout
from mllm_align.models.processor import load_processor

SIZES = [
    *((1, 1), (1, 2), (1, 200), (200, 1), (3, 600), (100, 1000), (333, 500), (500, 333), (4096, 4096)),
    *((16, 48), (15, 17), (48, 80), (1200, 1600), (9000, 12000), (2047, 1025), (20, 4000), (33, 31)),
    *map(tuple, np.random.default_rng(0).integers(20, 3000, (60, 2)).tolist()),
]


@pytest.mark.parametrize(
    "patch, merge, fewest, most",
    [(16, 2, 1 << 16, 1 << 24), (16, 2, 1 << 12, 1280 << 10), (8, 2, 1 << 10, 5120), (14, 1, 3136, 4000)],
)
def test_images_are_resized_as_transformers_resizes_them(patch, merge, fewest, most):
    layout = QwenLayout(patch, merge, 2, fewest, most)
    largest = max(counts(layout, *size, 1)[2] for size in layout.largest)
    for height, width in SIZES:
        wanted = smart_resize(height, width, patch * merge, fewest, most)
        assert layout.resized(height, width) == wanted, (height, width)
        cells = wanted[0] * wanted[1] // (patch * merge) ** 2
        assert counts(layout, height, width, 1) == (cells, 1, cells)
        assert cells <= largest
    assert (
        sum(layout.largest[0]) and counts(layout, *layout.largest[0], 1)[2] <= most // (patch * merge) ** 2
    )
    with pytest.raises(ValueError, match="one side is 201 times the other, 200 times at most"):
        layout.resized(2, 402)
    with pytest.raises(ValueError):
        smart_resize(2, 402, patch * merge, fewest, most)


def test_rotation_counts_lines_and_columns_from_where_an_image_begins():
    """Text, an image of 2 x 3 cells, text, one of 3 x 1, text."""
    image = np.array([-1, -1, *range(1, 7), -1, *range(7, 10), -1])
    runs = [Run(image[2:8], grid=(2, 3)), Run(image[9:12], grid=(3, 1))]
    assert rotary(image, runs, 3).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 6, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 6, 9],
    ]
    assert rotary(image, [Run(run.rows) for run in runs], 1).tolist() == [list(range(13))]


# ---- token ids and pixels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    """An encoder, and transformers' processor of the same folder."""
    golden = goldens("qwen3_vl")
    coder = Encoder(load_processor(golden.folder.path), golden.layout, golden.config.image_token)
    return coder, QwenImages.from_pretrained(golden.folder.path)


@pytest.mark.parametrize("messages, sizes", CHATS.values(), ids=CHATS)
def test_ids_and_pixels_are_those_of_the_processor(both, messages, sizes):
    coder, theirs = both
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    one, made = same_ids(coder, theirs, messages, images, (asked + "{}<|im_end|>").format, images or None)
    patches, place = coder.pixels(one)
    assert patches.shape[:2] == place.shape[:2] == (one.shape.tiles, 4)
    if images:
        wanted = np.asarray(made["pixel_values"]).reshape(-1, 3, 2, 64)
        for frame in (0, 1):
            np.testing.assert_array_equal(patches.reshape(-1, 3, 64), wanted[:, :, frame])
        grids = np.asarray(made["image_grid_thw"]) // [1, 2, 2]
        prefix = coder.prefix(one)
        seen = np.split(place.reshape(-1, 2), 4 * grids.prod(1).cumsum()[:-1])
        for (_, down, across), each in zip(grids, seen, strict=True):
            assert each[:6].tolist()[:4] == [[0, 0], [0, 1], [1, 0], [1, 1]]
            assert len(np.unique(each, axis=0)) == len(each) and each.max(0).tolist() == [
                2 * down - 1,
                2 * across - 1,
            ]
        assert prefix.image[prefix.image >= 0].tolist() == list(range(1, 1 + grids.prod(1).sum()))
        assert prefix.rope.shape == (3, len(prefix.tokens))


def test_an_image_is_one_entry_of_an_inspected_record(both):
    row = {"images": [picture(0, 90, 60)], "prompt": "gi?", "chosen": "a", "rejected": "b"}
    told = describe(both[0], both[0].encode(parse_record(row, index=0, where="row", root=None), 2))
    (image,) = (entry for entry in told["prefix"] if entry["text"] == "image")
    first, last = image["positions"]
    assert last - first + 1 == told["images"][0]["embeddings"] == 15


def test_an_image_that_is_too_long_is_refused_by_its_record(both):
    row = {"images": [picture(0, 3, 700)], "prompt": "gi?", "chosen": "a", "rejected": "b"}
    record = parse_record(row, index=0, where="row 7", root=None)
    assert_refusal(lambda: both[0].encode(record, 2), "row 7", "233 times", "take it out")


def test_side_files_as_published(tmp_path):
    """preprocessor_config.json with the fast processor's name, and chat_template.json."""
    folder = shutil.copytree(FIXTURES / "qwen3_vl", tmp_path / "model")
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    images |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text("{}")
    (folder / "processor_config.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, golden = load_processor(folder), goldens("qwen3_vl")
    assert golden.folder.family.layout(golden.config, ours) == golden.layout
    assert ours.chat_template == template
    assert type(ours.image_processor).__name__ == "Qwen2VLImageProcessorPil"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"patch_size": 16}, ("patch_size is 16", "config.json 8", "one folder")),
        ({"merge_size": 1}, ("merge_size is 1",)),
        ({"temporal_patch_size": 1}, ("temporal_patch_size is 1",)),
        ({"size": {"shortest_edge": 9000, "longest_edge": 5000}}, ("9000", "5000", "mend")),
        ({"size": {"height": 64, "width": 64}}, ("size.shortest_edge is None",)),
        ({"do_resize": False}, ("do_resize is False, wanted True",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_computed(change, words, tmp_path):
    folder = shutil.copytree(FIXTURES / "qwen3_vl", tmp_path / "model")
    raw = json.loads((folder / "processor_config.json").read_text())
    raw["image_processor"].update(change)
    (folder / "processor_config.json").write_text(json.dumps(raw))
    assert_refusal(lambda: load_processor(folder), *words)


def test_video_is_refused(both):
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "gi?"}]
    row = {"images": [], "prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert_refusal(lambda: parse_record(row, index=0, where="row", root=None), "video")
