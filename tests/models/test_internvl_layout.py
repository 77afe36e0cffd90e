"""InternVL's images, tokens and settings, against transformers' own image processor and processor."""

import json
import shutil

import numpy as np
import pytest
from conversations import CHATS, picture, same_ids
from goldens import FIXTURES, goldens
from oracle.images_only import InternVLImages
from refusals import assert_refusal
from transformers import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from mllm_align.data.encode import Encoder
from mllm_align.data.layout import counts, whole_tiles
from mllm_align.data.records import parse_record
from mllm_align.models.families.internvl.layout import InternVLLayout
from mllm_align.models.processor import load_processor

SIZES = [
    *((1, 1), (1, 2), (1, 5000), (5000, 1), (3, 4000), (100, 1000), (333, 500), (500, 333), (448, 448)),
    *((633, 633), (634, 634), (635, 635), (950, 950), (951, 951), (1200, 1600), (9000, 12000), (896, 448)),
    *((2, 3), (672, 448), (634, 1268), (635, 1270), (1268, 634), (450, 300), (900, 600), (1551, 517)),
    *map(tuple, np.random.default_rng(0).integers(1, 3000, (200, 2)).tolist()),
]


@pytest.mark.parametrize("fewest, most", [(1, 12), (1, 1), (1, 4), (3, 9), (7, 7), (1, 40)])
def test_images_are_cut_as_transformers_cuts_them(fewest, most):
    """Ratios as near as another's among them: of the square of 634 pixels, or between two ratios."""
    layout = InternVLLayout(448, 14, 256, fewest, most)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, min_patches=fewest, max_patches=most, crop_to_patches=True
    )
    for height, width in SIZES:
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), fewest, most)
        assert (layout.grid(height, width) or (1, 1)) == (rows, columns), (height, width)
        tiles = theirs.get_number_of_image_patches(height, width)
        assert counts(layout, height, width, 1) == (tiles, 1, 256 * tiles)
    ((height, width),) = layout.largest
    tiles = [counts(layout, *size, 1)[0] for size in [*SIZES, (height, width)]]
    assert max(tiles) == tiles[-1] == (1 if most == 1 else 1 + most)


def test_rows_follow_each_other_the_whole_image_last():
    layout = InternVLLayout(4, 2, 1)
    (run,) = layout.runs(4, 8, 3, 5)
    assert run.rows.tolist() == [6, 7, 8] and run.taps is None
    assert layout.text(4, 8, 1) == "<img><IMG_CONTEXT></img>"


# ---- token ids and pixels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    """An encoder, and transformers' processor of the same folder."""
    golden, ours = goldens("internvl"), load_processor(FIXTURES / "internvl")
    coder = Encoder(ours, golden.layout, golden.config.image_token)
    return coder, InternVLImages.from_pretrained(golden.folder.path)


@pytest.mark.parametrize("messages, sizes", CHATS.values(), ids=CHATS)
def test_ids_and_pixels_are_those_of_the_processor(both, messages, sizes):
    coder, theirs = both
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    one, made = same_ids(coder, theirs, messages, images, (asked + "{}<|im_end|>").format, images or None)
    found = coder.pixels(one)
    wanted = np.asarray(made["pixel_values"] if images else np.zeros((0, 3, 56, 56)), np.float32)
    tiles = whole_tiles(wanted.transpose(0, 2, 3, 1), 14)
    assert len(tiles.patches) == one.shape.tiles
    np.testing.assert_array_equal(found.patches, tiles.patches)
    np.testing.assert_array_equal(found.place, tiles.place)


def test_side_files_as_published(tmp_path):
    """preprocessor_config.json with the fast processor's name, a processor_config.json of settings."""
    folder = shutil.copytree(FIXTURES / "internvl", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor") | {"image_processor_type": "GotOcr2ImageProcessorFast"}
    images |= {"default_to_square": True, "do_center_crop": None, "processor_class": "InternVLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, golden = load_processor(folder), goldens("internvl")
    assert golden.folder.family.layout(golden.config, ours) == golden.layout
    assert (golden.layout.begin, golden.layout.token, golden.layout.most) == ("<img>", "<IMG_CONTEXT>", 4)
    assert ours.chat_template == template
    assert type(ours.image_processor).__name__ == "GotOcr2ImageProcessorPil"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_resize": False}, ("do_resize is False, wanted True",)),
        ({"max_patches": 0}, ("max_patches is 0",)),
        ({"min_patches": 5}, ("min_patches is 5, above max_patches, which is 4",)),
        ({"size": {"height": 28, "width": 28}}, ("it gives pixels", "config.json asks for", "one folder")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_computed(change, words, tmp_path):
    folder = shutil.copytree(FIXTURES / "internvl", tmp_path / "model")
    raw = json.loads((folder / "processor_config.json").read_text())
    raw["image_processor"].update(change)
    (folder / "processor_config.json").write_text(json.dumps(raw))
    assert_refusal(lambda: load_processor(folder), *words)


def test_a_tokenizer_without_the_tokens_around_an_image(tmp_path):
    folder = shutil.copytree(FIXTURES / "internvl", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["end_image_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = (folder / "tokenizer.json").read_text().replace("</img>", "<other>")
    (folder / "tokenizer.json").write_text(text)
    assert_refusal(lambda: load_processor(folder), "</img>", "stands around images")


def test_video_is_refused(both):
    row = {"images": [], "prompt": "gi?", "chosen": "a", "rejected": "b", "video": "a.mp4"}
    assert_refusal(lambda: parse_record(row, index=0, where="row", root=None), "video")
