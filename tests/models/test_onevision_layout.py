"""LLaVA-OneVision's images, tokens and settings, against transformers' image processor and processor."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conversations import CHATS, picture, same_ids
from goldens import FIXTURES, goldens
from oracle.images_only import Images
from refusals import assert_refusal
from transformers.image_processing_utils import select_best_resolution

from mllm_align.data.encode import Encoder
from mllm_align.data.layout import counts, mixed, whole_tiles
from mllm_align.data.records import parse_record
from mllm_align.models.families.onevision.config import PINPOINTS
from mllm_align.models.families.onevision.layout import OneVisionLayout, bilinear
from mllm_align.models.processor import load_processor

SIZES = [
    *((1, 1), (1, 2), (1, 5000), (5000, 1), (3, 4000), (100, 1000), (333, 500), (500, 333), (2304, 2304)),
    *((384, 383), (385, 384), (1200, 1600), (9000, 12000), (2047, 1025), (384, 2304), (1536, 1152)),
    *map(tuple, np.random.default_rng(0).integers(1, 3000, (60, 2)).tolist()),
]
LAYOUT = OneVisionLayout(384, 14, pinpoints=PINPOINTS)


@pytest.mark.parametrize("most", [9, 3])
def test_an_image_has_as_many_embeddings_as_to_transformers(most):
    layout = OneVisionLayout(384, 14, pinpoints=PINPOINTS, most=most)
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=list(map(list, PINPOINTS))),
        num_image_tokens=27**2,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    theirs._get_unpadded_features = lambda *args: Images._get_unpadded_features(theirs, *args)
    largest = max(counts(layout, *size, 1)[2] for size in layout.largest)
    for height, width in SIZES:
        grid = select_best_resolution((height, width), list(PINPOINTS))
        wanted = Images._get_number_of_features(theirs, height, width, 384, 384)
        tiles, runs, found = counts(layout, height, width, 1)
        assert (tiles, runs, found) == (1 + grid[0] * grid[1] // 384**2, 1, wanted), (height, width)
        assert counts(layout, height, width, 2) == (1, 1, 27**2 + 1)
        assert found <= largest
    assert max(layout.tiles(*size)[0] for size in layout.largest) == 37


def test_no_image_has_more_embeddings_than_the_largest():
    """Of a small model, by trying them all."""
    pinpoints = tuple((8 * down, 8 * across) for down in range(1, 5) for across in range(1, 5))
    for most in (1, 3):
        layout = OneVisionLayout(8, 2, pinpoints=pinpoints, most=most)
        every = (counts(layout, height, width, 1)[2] for height in range(1, 41) for width in range(1, 41))
        assert max(every) == max(counts(layout, *size, 1)[2] for size in layout.largest)


@pytest.mark.parametrize("size, new", [((9, 14), (7, 11)), ((12, 5), (4, 2)), ((6, 6), (6, 5))])
def test_scaling_is_bilinear(size, new):
    """Against jax.image; no row is named that has no share."""
    numbers = np.random.default_rng(0).standard_normal((1 + size[0] * size[1], 3)).astype(np.float32)
    picture = 1 + np.arange(size[0] * size[1], dtype=np.int32).reshape(size)
    rows, shares = bilinear(picture, *new)
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-6)
    assert ((rows > 0) == (shares > 0)).all()
    found = (shares[..., None] * numbers[rows]).sum(0)
    wanted = jax.image.resize(numbers[picture], (*new, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_base_tile_lines_and_newlines():
    layout = OneVisionLayout(4, 2, pinpoints=((4, 8), (8, 8)), most=9)
    (run,) = layout.runs(10, 20, 1, 2)
    assert run.rows.tolist() == [9, 10, 11, 12, 13, 14, 17, 18, 0, 15, 16, 19, 20, 0] and run.taps is None
    (several,) = layout.runs(10, 20, 3, 2)
    assert several.rows.tolist() == [9, 10, 11, 12, 0] and several.taps is None
    (scaled,) = OneVisionLayout(4, 2, pinpoints=((8, 8),), most=1).runs(9, 9, 1, 0)
    assert scaled.rows[:4].tolist() == [1, 2, 3, 4] and scaled.taps.shape == (3, 4 + 2 * 3)
    assert (scaled.rows[[6, 9]] == 0).all() and not scaled.mix[:, [0, 1, 2, 3, 6, 9]].any()
    np.testing.assert_allclose(scaled.mix[:, [4, 5, 7, 8]], 0.25)
    image = np.array([-1, *scaled.rows, -1])
    whole = mixed(image, [scaled], 3)
    assert whole["taps"][:, 1:-1].tolist() == scaled.taps.tolist() and not whole["mix"][:, [0, -1]].any()
    assert mixed(image, [scaled], 0) == {}


# ---- token ids and pixels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    """An encoder, and transformers' processor of the same folder."""
    golden, ours = goldens("onevision"), load_processor(FIXTURES / "onevision")
    coder = Encoder(ours, golden.layout, golden.config.image_token)
    return coder, Images.from_pretrained(golden.folder.path)


@pytest.mark.parametrize("messages, sizes", CHATS.values(), ids=CHATS)
def test_ids_and_pixels_are_those_of_the_processor(both, messages, sizes):
    """The answer follows where transformers asks for one."""
    coder, theirs = both
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    whole, given = (asked + "{}<|im_end|>").format, [images] if images else None
    one, made = same_ids(coder, theirs, messages, images, whole, given)
    found = coder.pixels(one)
    wanted = np.asarray(made["pixel_values"] if images else np.zeros((0, 1, 3, 56, 56)), np.float32)
    tiles = whole_tiles(wanted.reshape(-1, *wanted.shape[2:]).transpose(0, 2, 3, 1), 14)
    assert len(tiles.patches) == one.shape.tiles
    np.testing.assert_array_equal(found.patches, tiles.patches)
    np.testing.assert_array_equal(found.place, tiles.place)


def test_the_largest_image_is_scaled_and_the_text_is_not(both):
    coder, _ = both
    row = {"images": [picture(0, 112, 112)], "prompt": "gi dan?", "chosen": "a", "rejected": "b"}
    prefix = coder.prefix(coder.encode(parse_record(row, index=0, where="row", root=None), 2))
    assert prefix.mix.shape == (3, len(prefix.tokens)) and prefix.mix.any()
    assert not prefix.mix[:, prefix.image < 0].any() and not prefix.mix[:, prefix.image == 0].any()
    short = prefix.keep(prefix.image != 0)
    assert short.taps.shape == (3, len(short.tokens))


def test_side_files_as_published(tmp_path):
    """preprocessor_config.json, chat_template.json and a processor_config.json of settings alone."""
    folder = shutil.copytree(FIXTURES / "onevision", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, golden = load_processor(folder), goldens("onevision")
    assert golden.folder.family.layout(golden.config, ours) == golden.layout
    assert ours.chat_template == template
    assert type(ours.image_processor).__name__ == "LlavaOnevisionImageProcessorPil"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_grid_pinpoints": [[56, 56]]}, ("image_grid_pinpoints", "one folder")),
        ({"size": {"height": 28, "width": 28}}, ("it gives pixels", "config.json asks for")),
        ({"do_rescale": "yes"}, ("do_rescale is 'yes'",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_computed(change, words, tmp_path):
    folder = shutil.copytree(FIXTURES / "onevision", tmp_path / "model")
    raw = json.loads((folder / "processor_config.json").read_text())
    raw["image_processor"].update(change)
    (folder / "processor_config.json").write_text(json.dumps(raw))
    assert_refusal(lambda: load_processor(folder), *words)


def test_video_is_refused(both):
    row = {"images": [], "prompt": "gi?", "chosen": "a", "rejected": "b", "video": "a.mp4"}
    assert_refusal(lambda: parse_record(row, index=0, where="row", root=None), "video")
