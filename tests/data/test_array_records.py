"""Data sets of tensorflow-datasets, of our own and of others, as training reads them."""

import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from published import gpt, human, png
from refusals import assert_refusal

from mllm_align.data.array_records import ArrayRecords, Stored, tensorflow_datasets
from mllm_align.data.readers import read_each, records_from

tfds = pytest.importorskip("tensorflow_datasets")
COUNT = 6


def written(folder, features, rows, **splits):
    """A user's own data set."""

    class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described, disable_shuffling=True)

        def _split_generators(self, manager):
            return {name: enumerate(each) for name, each in (splits or {"train": rows}).items()}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Mine(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_dir=str(folder / "downloads"))
    return folder / "mine/1.0.0"


TEXT, IMAGE = tfds.features.Text(), tfds.features.Image()
PAIR = {
    "prompt": TEXT,
    "image": IMAGE,
    "chosen": TEXT,
    "rejected": TEXT,
    "score": tfds.features.Scalar(np.float32),
}
PAIR |= {"id": tfds.features.Scalar(np.int64), "tags": tfds.features.Sequence(TEXT)}


def pair(number):
    row = {
        "prompt": "What?",
        "image": io.BytesIO(png(number + 1)),
        "chosen": f"{number}.",
        "rejected": "No.",
    }
    return row | {"score": number / 2, "id": number, "tags": ["ä"] * number}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("pairs"), PAIR, [pair(i) for i in range(COUNT)])


def test_plain_fields(folder):
    found = list(read_each(folder))
    assert [each.record.id for each in found] == [str(i) for i in range(COUNT)]
    assert [each.record.images[0].read() for each in found] == [png(i + 1) for i in range(COUNT)]
    assert found[3].record.responses == ("3.", "No.") and found[3].fields == {
        "score": 1.5,
        "tags": ["ä"] * 3,
    }
    (file,) = folder.glob("*array_record*")
    for place in (file, folder.parent):
        assert len(records_from(place)) == COUNT, "one file alone, or the folder around it"


def test_images_are_read_by_any_thread_and_after_pickling(folder):
    sources = [record.images[0] for record in records_from(folder)] * 20
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda source: source.read(), sources)) == [png(i + 1) for i in range(COUNT)] * 20
        )
    again = pickle.loads(pickle.dumps(sources[2]))
    assert again == sources[2] and again.key == sources[2].key != sources[3].key and again.read() == png(3)


def test_conversations_and_splits(tmp_path):
    turns = {"from": TEXT, "value": TEXT}
    features = {"id": TEXT, "image": IMAGE, "conversations": tfds.features.Sequence(turns)}
    row = {"id": "a", "image": io.BytesIO(png()), "conversations": [human("<image>\nWhat?"), gpt("A cat.")]}
    made = written(tmp_path, features, [], lessons=[row], other=[row, row | {"id": "b"}])
    (record,) = records_from(made, split="lessons", responses=1)
    assert record.messages[0].text == "What?" and record.responses == ("A cat.",)
    assert len(records_from(made, split="other", responses=1)) == 2
    assert len(records_from(str(made / "*other*"), responses=1)) == 2, "a pattern"
    assert_refusal(lambda: records_from(made, responses=1), "holds several splits: lessons, other")
    (made / "mine-other.array_record-00000-of-00001").unlink()
    for place in (made, made.parent, str(made / "*lessons*")):
        assert_refusal(lambda: records_from(place), "mine-other.array_record", "is missing")  # noqa: B023


def test_what_is_refused(folder, tmp_path, monkeypatch):
    square = {"prompt": TEXT, "box": tfds.features.Tensor(shape=(2,), dtype=np.int64)}
    made = written(tmp_path / "square", square, [{"prompt": "What?", "box": [1, 2]}])
    assert_refusal(lambda: records_from(made), "field box: is a Tensor feature", "build it with texts")
    (made / "features.json").write_text("{}")
    (made / "dataset_info.json").write_text("{")
    assert_refusal(lambda: records_from(made), "no readable data set of tensorflow-datasets")
    (file,) = folder.glob("*array_record*")
    cut = tmp_path / "cut"
    cut.mkdir()
    for each in folder.iterdir():
        (cut / each.name).write_bytes(each.read_bytes()[: 5000 if each == file else None])
    assert_refusal(lambda: records_from(cut), "has 0 records, and dataset_info.json says 6")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert_refusal(tensorflow_datasets, "need the package tensorflow_datasets", "pip install")


def test_a_stored_image_knows_its_place(folder):
    (file,) = folder.glob("*array_record*")
    with pytest.raises(IndexError):
        Stored(ArrayRecords(file), 0, "image", 1).read()
