"""The index of images: what a vector is, and that its folder goes on where it was."""

import json

import numpy as np
import pytest
from goldens import FIXTURES
from refusals import assert_refusal
from runs import bundle, compiling, one_device

from mllm_align.config import DataConfig, SamplingConfig
from mllm_align.curation.image_index import ImageIndex
from mllm_align.data.encode import image_digest
from mllm_align.data.images import ImageSource
from mllm_align.data.records import parse_record
from mllm_align.errors import NotFinite
from mllm_align.generation.decode import Generator
from mllm_align.models.bundle import load
from mllm_align.prepare import make_encoder

assert compiling  # a fixture
PICTURES = sorted((FIXTURES / "images").glob("*.png"))[:4]


def sources(paths=PICTURES):
    found = [ImageSource(path=path, where=path.name) for path in paths]
    return {image_digest(source): source for source in found}


def index(folder):
    return ImageIndex(folder, bundle(), make_encoder(bundle(), DataConfig()))


@pytest.fixture
def towers(monkeypatch):
    """Features without a tower: a function of the pixels. The number of images in each call."""
    calls = []

    def features(self, pictures):
        calls.append(len(pictures))
        width = bundle().config.vision.features
        return [
            np.full((2, width), each.patches.mean(), np.float32) + np.arange(width) for each in pictures
        ]

    monkeypatch.setattr(Generator, "features", features)
    return calls


def test_a_folder_goes_on_and_grows(towers, tmp_path):
    folder, images = tmp_path / "index", sources()
    first = dict(list(images.items())[:2])
    vectors, made = index(folder)(first, 8)
    assert made == len(first) and sum(towers) == made
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    entries = folder / "entries"
    whole = entries.read_bytes()
    entries.write_bytes(whole[:-5])  # a kill cut the second entry
    again, made = index(folder)(images, 8)
    assert made == len(images) - 1 and len(entries.read_bytes()) == len(images) * (len(whole) // 2)
    np.testing.assert_array_equal(again[:2], vectors)
    last, made = index(folder)(dict(reversed(images.items())), 8)
    assert made == 0
    np.testing.assert_array_equal(last[::-1], again)


def test_what_is_refused(towers, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    index(folder)(sources(), 8)
    stamp = json.loads((folder / "stamp.json").read_text())
    (folder / "stamp.json").write_text(json.dumps(stamp | {"model": "other"}))
    assert_refusal(lambda: index(folder)(sources(), 8), "belongs to another model", "--index")
    (folder / "stamp.json").write_text("{")
    assert_refusal(lambda: index(folder)(sources(), 8), "stamp.json", "is not JSON")
    monkeypatch.setattr(
        Generator, "features", lambda self, some: [np.full((2, 3), np.nan, "f4")] * len(some)
    )
    with pytest.raises(NotFinite, match=f"features are not finite for {len(PICTURES)} of"):
        index(tmp_path / "new")(sources(), 8)
    assert not (tmp_path / "new" / "entries").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llavanext", "idefics3", "qwen3_vl"])
def test_a_vector_is_the_mean_over_the_tiles_that_show_all(name, tmp_path):
    model = load(FIXTURES / name, "float32", one_device())
    encoder, images = make_encoder(model, DataConfig()), sources(PICTURES[:3])
    vectors, _ = ImageIndex(tmp_path / "index", model, encoder)(images, 2)
    generator = Generator(model, SamplingConfig(), 2)
    for vector, source in zip(vectors, images.values(), strict=True):
        row = {"prompt": "x", "images": [str(source.path)], "chosen": "y"}
        record = encoder.encode(parse_record(row, index=0, where="r", root=None, responses=1), 1)
        (features,) = generator.features([encoder.pixels(record)])
        tiles = features.reshape(record.shape.tiles, -1, features.shape[-1]).astype(np.float64)
        shown = {"llavanext": tiles[:1], "idefics3": tiles[-1:], "qwen3_vl": tiles}[name]
        mean = shown.mean((0, 1))
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-5)
