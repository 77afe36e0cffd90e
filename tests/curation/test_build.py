"""Data sets built for tensorflow-datasets hold what they were built from."""

import pytest
from goldens import FIXTURES, goldens
from published import png, rlhfv, trl
from refusals import assert_refusal
from test_items import read, written

pytest.importorskip("tensorflow_datasets")

import tensorflow_datasets as tfds

from mllm_align.curation.build import build
from mllm_align.data.array_records import Stored
from mllm_align.data.batches import Batches
from mllm_align.data.encode import Encoder
from mllm_align.data.readers import records_from
from mllm_align.models.processor import load_processor

TURNS = [{"role": "user", "content": "\n<image>\n\nWhat?"}, {"role": "assistant", "content": "A\ncow."}]
TURNS += [{"role": "user", "content": "And <image>"}]
ROWS = [
    trl(id="a", score=0.5, bdhs={"iterations": 2}, source="coco"),
    trl(id="b", images=["a.png", "b.png"], prompt=TURNS, responses=["A third."]),
    trl(id="c", image=None, images=[], rejected=None, level=3),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    for name, width in (("a", 3), ("b", 4)):
        (folder / f"{name}.png").write_bytes(png(width, 2))
    data, out = written(folder, *ROWS), folder / "new/built"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm_align.curation.build.SHARD", 3)
        assert build([data, written(folder, rlhfv(image=None), name="other.jsonl")], out) == 4
    return data, out


def test_it_reads_as_what_it_was_built_from(made):
    before, after = read(made[0]), read(made[1])
    assert [item.record.id for item in after] == ["a", "b", "c", "4"]
    for one, other in zip(before, after, strict=False):
        assert (one.record.responses, one.fields) == (other.record.responses, other.fields)
        assert one.record.messages == other.record.messages
        assert [s.read() for s in one.record.images] == [s.read() for s in other.record.images]
    assert [item.source for item in after] == ["coco", "set.jsonl", "set.jsonl", "other.jsonl"]
    assert after[3].fields["ds_name"] == "a set" and after[2].rejected is None
    files = [f"pairs-train.array_record-0000{i}" for i in (0, 1)]
    described = ["dataset_info.json", "features.json", "metadata.json"]
    assert sorted(file.name for file in made[1].iterdir()) == described + files


def test_tensorflow_datasets_reads_it(made):
    source = tfds.builder_from_directory(made[1]).as_data_source("train")
    assert len(source) == 4 and source[1]["id"] == b"b" and source[2]["rejected"] == b""
    assert [image.shape for image in source[1]["images"]] == [(2, 3, 3), (2, 4, 3)]


def test_a_process_reads_the_images_of_its_own_rows_alone(tmp_path, monkeypatch):
    build([FIXTURES / "pairs.jsonl"], tmp_path / "built")
    golden = goldens("llava15")
    encoder = Encoder(load_processor(golden.folder.path), golden.layout, golden.config.image_token)
    records = [encoder.encode(record, 2, i) for i, record in enumerate(records_from(tmp_path / "built"))]
    seen, plain = set(), Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: seen.add(self.record) or plain(self))
    for rows in ([0, 1], [2, 3]):
        seen.clear()
        batch = Batches(records, encoder, size=4, shuffle=True, local_rows=rows)(0)
        assert seen == {batch.records[row] for row in rows}


def test_nothing_is_left_of_what_fails(made, tmp_path):
    data = written(tmp_path, trl(id="a", image=None, images=["none.png"]))
    assert_refusal(lambda: build([data], tmp_path / "new/built"), "set.jsonl record 0", "no such file")
    assert [file.name for file in tmp_path.iterdir()] == ["set.jsonl"]
    assert_refusal(lambda: build([made[0]], made[1]), "the folder is not empty")
    assert len(records_from(made[1], responses=1)) == 4
