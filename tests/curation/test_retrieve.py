"""Which images are retrieved for which record, and what a file of them holds."""

import numpy as np
import pytest
from published import png, trl
from refusals import assert_refusal
from runs import bundle
from test_items import read, written

from mllm_align.curation.image_index import ImageIndex
from mllm_align.curation.retrieve import retrieve, told
from mllm_align.data.readers import records_from

ANGLES = {"a": 0, "b": 10, "c": 25, "d": 90, "e": 180}  # degrees; the vectors of pictures


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Pictures a to e, with `again` the same bytes as a; what the index was asked for."""
    for width, name in enumerate(ANGLES, 3):
        (tmp_path / f"{name}.png").write_bytes(png(width))
    (tmp_path / "again.png").write_bytes(png(3))
    asked = []

    def vectors(self, images, rows):
        asked.append([source.path.stem if source.path else None for source in images.values()])
        names = {(tmp_path / f"{name}.png").read_bytes(): angle for name, angle in ANGLES.items()}
        angles = np.radians([names[source.read()] for source in images.values()])
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), len(images)

    monkeypatch.setattr(ImageIndex, "__call__", vectors)
    return asked


def rows(*names):
    return [trl(id=f"r{i}", images=[f"{name}.png"]) for i, name in enumerate(names)]


def near(item):
    return "".join(source.path.stem for source in item.record.neighbour_images)


def test_neighbours_the_nearest_first(pictures, tmp_path):
    data, out = written(tmp_path, *rows(*ANGLES, "again")), tmp_path / "out.jsonl"
    found = retrieve([data], out, bundle(), neighbours=2)
    assert pictures == [[*ANGLES]], "each picture once"
    items = read(out)
    assert [near(item) for item in items] == ["bc", "ac", "ba", "cb", "dc", "bc"]
    for item in items:
        first = item.record.neighbour_images[0]
        assert [each.key for each in item.record.rejected_images] == [first.key]
    cosines = np.cos(np.radians([10, 25]))
    np.testing.assert_allclose(items[0].fields["neighbour_similarity"], cosines, atol=1e-6)
    assert (found["records"], found["images"], found["without_image"]) == (6, 5, [])
    first, second = told(found).splitlines()
    assert first == "6 of 6 records; 5 images, of which 5 were indexed now"
    assert second.startswith("cosine of the nearest neighbour: 0.9")
    records = records_from(out)
    assert [r.rejected_images[0].path.name for r in records[:2]] == ["b.png", "a.png"]


def test_a_pool_of_its_own(pictures, tmp_path):
    data = written(tmp_path, *rows("a", "c"), trl(id="text", images=[]))
    pool = written(tmp_path, *rows("a", "d", "e"), name="pool.jsonl")
    found = retrieve([data], tmp_path / "out.jsonl", bundle(), neighbours=2, pool=[pool])
    assert [near(item) for item in read(tmp_path / "out.jsonl")] == ["de", "ad"]
    assert found["without_image"] == ["text"] and "(1 have no image: text)" in told(found)


def test_of_several_images_the_neighbours_of_each(pictures, tmp_path):
    data = written(
        tmp_path, trl(images=["a.png", "e.png"], prompt="<image> <image> What?"), *rows("b", "c")
    )
    retrieve([data], tmp_path / "out.jsonl", bundle(), neighbours=2)
    (item, *_) = read(tmp_path / "out.jsonl")
    assert near(item) == "bccb" and [s.path.stem for s in item.record.rejected_images] == ["b", "c"]


def test_parquet_holds_the_pictures(pictures, tmp_path):
    data = written(tmp_path, *rows(*ANGLES))
    retrieve([data], tmp_path / "out.parquet", bundle(), neighbours=1)
    (item, *_) = read(tmp_path / "out.parquet")
    assert item.record.rejected_images[0].read() == (tmp_path / "b.png").read_bytes()
    retrieve([tmp_path / "out.parquet"], tmp_path / "again.jsonl", bundle(), neighbours=1)
    (item, *_) = read(tmp_path / "again.jsonl")
    assert item.record.rejected_images[0].read() == (tmp_path / "b.png").read_bytes()


def test_what_is_refused(pictures, tmp_path):
    data, out = written(tmp_path, *rows("a", "b", "again")), tmp_path / "out.jsonl"
    assert_refusal(
        lambda: retrieve([data], out, bundle()), "--neighbours is 5", "2 different images", "--pool"
    )
    assert_refusal(lambda: retrieve([data], out, bundle(), neighbours=0), "--neighbours is 0")
    assert_refusal(lambda: retrieve([data], tmp_path / "o.csv", bundle()), ".parquet or .jsonl")
    bare = written(tmp_path, trl(images=[]), name="bare.jsonl")
    assert_refusal(lambda: retrieve([bare], out, bundle()), "no record of", "has an image")
    assert not out.exists()


def test_second_images_of_a_record(pictures, tmp_path):
    def refused(*words, **fields):
        assert_refusal(lambda: read(written(tmp_path, trl(**fields), name="x.jsonl")), *words)

    refused("rejected_images: has 2 images, and the record has 1", rejected_images=["a.png", "b.png"])
    refused("rejected_images: has 1 images, and the record has 0", images=[], rejected_images=["a.png"])
    refused("found str", "a list of images", rejected_images="a.png")
    three = {"images": ["a.png"] * 2, "neighbour_images": ["a.png"] * 3}
    refused("neighbour_images: has 3 images, and the record has 2", **three)
    refused("neighbour_images[0]", "leaves the image folder", neighbour_images=["/etc/x.png"])
