"""Idefics3's images, tokens and settings, against transformers' own image processor and processor."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from coders import encoder
from conversations import CHATS, picture, same_ids
from goldens import FIXTURES, goldens
from refusals import assert_refusal
from transformers import Idefics3ImageProcessorPil, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from mllm_align.data.encode import Encoder
from mllm_align.data.layout import counts
from mllm_align.data.records import parse_record
from mllm_align.models.families.idefics3.layout import Idefics3Layout
from mllm_align.models.processor import load_processor

GEOMETRIES = [(512, 2048), (384, 1536), (364, 1456), (32, 90), (32, 32), (32, 31)]
SIZES = [
    *((1, 1), (1, 2), (1, 5000), (5000, 1), (3, 4000), (100, 1000), (333, 500), (500, 333), (2048, 2048)),
    *((512, 511), (511, 512), (1200, 1600), (9000, 12000), (2047, 1025), (45, 90), (46, 90), (89, 90)),
    *map(tuple, np.random.default_rng(0).integers(1, 3000, (40, 2)).tolist()),
]


class Shapes(Idefics3ImageProcessorPil):
    """transformers' rules on pictures without pixels."""

    def resize(self, image, size, **_):
        shape = size.height, size.width
        if size.longest_edge:
            shape = get_resize_output_image_size(image, size.longest_edge)
        return np.broadcast_to(np.float32(0), (3, *shape))

    def grid(self, height, width):
        image = self.resize(
            np.broadcast_to(np.float32(0), (3, height, width)), SimpleNamespace(**self.size)
        )
        image = self.resize_for_vision_encoder(image, self.max_image_size["longest_edge"])
        _, *grid = self.split_images(image, self.max_image_size)
        return tuple(grid) if grid[0] else None


@pytest.mark.parametrize("tile, longest", GEOMETRIES)
def test_images_are_cut_as_transformers_cuts_them(tile, longest):
    sizes = {"longest_edge": longest, "height": None, "width": None}
    theirs = Shapes(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    theirs.size = sizes
    layout, most = Idefics3Layout(tile, tile // 2, 1, longest), 0
    for height, width in SIZES:
        grid = layout.grid(height, width)
        assert grid == theirs.grid(height, width), (height, width)
        tiles = 1 if grid is None else grid[0] * grid[1] + 1
        assert counts(layout, height, width, 1) == (tiles, tiles, tiles)
        most = max(most, tiles)
    (largest,) = layout.largest
    assert most == layout.tiles(*largest)[0]


def test_every_tile_is_a_run_after_its_name():
    layout = Idefics3Layout(32, 8, 4, 64, token="<i>", fence="|", whole="<g>")
    assert (
        layout.text(40, 64, 1)
        == "|<row_1_col_1><i>|<row_1_col_2><i>\n|<row_2_col_1><i>|<row_2_col_2><i>\n\n|<g><i>|"
    )
    assert [run.rows.tolist() for run in layout.runs(20, 64, 1, 2)] == [
        [9, 10, 11, 12],
        [13, 14, 15, 16],
        [17, 18, 19, 20],
    ]
    whole = Idefics3Layout(32, 8, 4, 64, split=False)
    assert whole.grid(20, 64) is None and len(whole.runs(20, 64, 1, 0)) == 1
    assert whole.text(20, 64, 1).count("<image>") == 1


# ---- token ids and pixels ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tokens", "text", "whole"])
def both(request, tmp_path_factory):
    """An encoder, and transformers' processor of the same folder: names of tiles are tokens, or text as in
    Idefics3-8B, or images are not cut."""
    folder = shutil.copytree(FIXTURES / "idefics3", tmp_path_factory.mktemp("both") / "model")
    if request.param == "text":
        edit(folder / "tokenizer.json", without_tags)
    if request.param == "whole":
        edit(
            folder / "processor_config.json",
            lambda raw: raw["image_processor"].update(do_image_splitting=False),
        )
    golden, ours = goldens("idefics3"), load_processor(folder)
    layout = golden.folder.family.layout(golden.config, ours)
    return Encoder(ours, layout, golden.config.image_token), Idefics3Processor.from_pretrained(folder)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_tags(raw):
    raw["added_tokens"] = [each for each in raw["added_tokens"] if not each["content"].startswith("<row")]


@pytest.mark.parametrize("messages, sizes", CHATS.values(), ids=CHATS)
def test_ids_and_pixels_are_those_of_the_processor(both, messages, sizes):
    coder, theirs = both
    images = [picture(i, *size) for i, size in enumerate(sizes)]

    def whole(answer):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return theirs.apply_chat_template([*messages, turn], tokenize=False)

    one, made = same_ids(coder, theirs, messages, images, whole, images or None)
    prefix = coder.prefix(one)
    image = prefix.image
    assert image[image >= 0].tolist() == list(range(1, 1 + (prefix.tokens == coder.image_token).sum()))
    patches, place = coder.pixels(one)
    if images:
        tiles = np.asarray(made["pixel_values"][0])
        assert len(patches) == len(tiles) == one.shape.tiles
        for tile, found in zip(tiles, patches, strict=True):
            for row, column in ((0, 0), (1, 2), (3, 3)):
                patch = tile[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].transpose(1, 2, 0)
                assert np.array_equal(found[4 * row + column], patch.reshape(-1))
                assert place[0, 4 * row + column].tolist() == [row, column]


def test_names_of_tiles_in_a_text_are_text():
    coder = encoder("idefics3")
    row = {
        "prompt": "<row_1_col_1><fake_token_around_image>?",
        "chosen": "<global-img>",
        "rejected": "a",
    }
    one = coder.encode(parse_record(row | {"images": []}, index=0, where="row", root=None), 2)
    names = coder.tokenizer.convert_ids_to_tokens([*one.prefix, *one.responses[0][:-1]])
    assert not {"<row_1_col_1>", "<fake_token_around_image>", "<global-img>"} & set(names)


def test_side_files_as_smolvlm2_has_them(tmp_path):
    """Its image processor's class, settings of video, and files of older versions of transformers."""
    folder = shutil.copytree(FIXTURES / "idefics3", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor") | {"image_processor_type": "SmolVLMImageProcessor"}
    images |= {"video_sampling": {"fps": 1, "video_size": {"longest_edge": 512}}, "do_pad": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    edit(folder / "processor_config.json", lambda raw: raw.pop("image_processor"))
    edit(folder / "processor_config.json", lambda raw: raw.update(processor_class="SmolVLMProcessor"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    edit(folder / "config.json", lambda raw: raw.update(model_type="smolvlm"))
    ours, golden = load_processor(folder), goldens("idefics3")
    layout = golden.folder.family.layout(golden.config, ours)
    assert type(ours.image_processor).__name__ == "SmolVLMImageProcessorPil"
    assert layout == golden.layout and ours.chat_template == template
    image = picture(0, 90, 60)
    own = golden.layout.pixels(load_processor(golden.folder.path).image_processor, image)
    assert np.array_equal(layout.pixels(ours.image_processor, image).patches, own.patches)


# ---- what does not go with the model -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"max_image_size": {"longest_edge": 64}}, ("64 pixels", "32", "max_image_size", "one folder")),
        ({"size": {"height": 64, "width": 64}}, ("size.longest_edge is None",)),
        ({"size": {"longest_edge": 5000}}, ("size.longest_edge is 5000",)),
        ({"do_resize": False}, ("do_resize is False, wanted True",)),
        ({"do_image_splitting": "yes"}, ("do_image_splitting is 'yes'",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_computed(change, words, tmp_path):
    folder = shutil.copytree(FIXTURES / "idefics3", tmp_path / "model")
    edit(folder / "processor_config.json", lambda raw: raw["image_processor"].update(change))
    assert_refusal(lambda: load_processor(folder), *words)


def test_a_tokenizer_without_the_token_around_images(tmp_path):
    folder = shutil.copytree(FIXTURES / "idefics3", tmp_path / "model")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<fake_token_around_image>", "<another>"))
    edit(folder / "tokenizer_config.json", lambda raw: raw.pop("extra_special_tokens"))
    assert_refusal(lambda: load_processor(folder), "no token <fake_token_around_image>")
