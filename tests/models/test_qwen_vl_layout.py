"""Qwen2.5-VL's and Qwen3-VL's images, tokens and settings, against transformers' own processors."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conversations import CHATS, picture, same_ids
from goldens import FIXTURES, goldens
from oracle.images_only import Qwen3Images, Qwen25Images
from refusals import assert_refusal
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mllm_align.data.encode import Encoder
from mllm_align.data.inspect import describe
from mllm_align.data.layout import Run, counts, rotary
from mllm_align.data.records import parse_record
from mllm_align.models.families.qwen_vl.layout import QwenLayout
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


@pytest.mark.parametrize("down, across", [(1, 1), (3, 5), (4, 4), (9, 2), (1, 11), (8, 10)])
def test_cells_come_window_by_window(down, across):
    """As they are found by going through windows, lines of a window and its columns in turn."""
    layout = QwenLayout(14, 2, 2, 784, 1 << 20, window=4)
    wanted = [
        row * across + column
        for top in range(0, down, 4)
        for left in range(0, across, 4)
        for row in range(top, min(top + 4, down))
        for column in range(left, min(left + 4, across))
    ]
    assert layout.order(down, across).tolist() == wanted
    (run,) = layout.runs(28 * down, 28 * across, 1, 7)
    assert run.grid == (down, across) == layout.cells(28 * down, 28 * across)
    assert [wanted[row - 8] for row in run.rows] == list(range(down * across))
    assert replace(layout, window=0).order(down, across).tolist() == list(range(down * across))


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


PROCESSORS = {"qwen2_5_vl": Qwen25Images, "qwen3_vl": Qwen3Images}


@pytest.fixture(scope="module", params=PROCESSORS)
def both(request):
    """An encoder, and transformers' processor of the same folder."""
    golden = goldens(request.param)
    coder = Encoder(load_processor(golden.folder.path), golden.layout, golden.config.image_token)
    return coder, PROCESSORS[request.param].from_pretrained(golden.folder.path)


@pytest.mark.parametrize("messages, sizes", CHATS.values(), ids=CHATS)
def test_ids_and_pixels_are_those_of_the_processor(both, messages, sizes):
    coder, theirs = both
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    one, made = same_ids(coder, theirs, messages, images, (asked + "{}<|im_end|>").format, images or None)
    patches, place = coder.pixels(one)
    assert patches.shape[:2] == place.shape[:2] == (one.shape.tiles, 4)
    prefix, first = coder.prefix(one), 0
    assert prefix.rope.shape == (3, len(prefix.tokens))
    rows = prefix.image[prefix.image >= 0] - 1
    assert sorted(rows) == list(range(one.shape.tiles))
    for _, down, across in np.asarray(made["image_grid_thw"]) if images else ():
        wanted = np.asarray(made["pixel_values"])[first : first + down * across].reshape(-1, 3, 2, 64)
        number = np.arange(down * across)  # of the processor's patches: cell by cell, cells line by line
        line, column = np.divmod(number // 4, across // 2)
        line, column = 2 * line + number // 2 % 2, 2 * column + number % 2
        own = rows[first // 4 : (first + down * across) // 4]
        assert own.min() == first // 4
        np.testing.assert_array_equal(place[own].reshape(-1, 2), np.stack([line, column], axis=1))
        for frame in (0, 1):
            np.testing.assert_array_equal(patches[own].reshape(-1, 3, 64), wanted[:, :, frame])
        first += down * across


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


@pytest.mark.parametrize("name", PROCESSORS)
def test_side_files_as_published(name, tmp_path):
    """preprocessor_config.json, of Qwen3-VL with the fast processor's name, of Qwen2.5-VL with sizes as
    older versions wrote them; and chat_template.json."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "model")
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    if name == "qwen3_vl":
        images |= {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
        }
    else:
        area = images.pop("size")
        images |= {"min_pixels": area["shortest_edge"], "max_pixels": area["longest_edge"]}
        images |= {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text("{}")
    (folder / "processor_config.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, golden = load_processor(folder), goldens(name)
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
