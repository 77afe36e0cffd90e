"""Which files a data set is made of: splits, shards, patterns, saved and cached data sets."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import assert_refused

from mllm_align.data.readers import records_from


def rows(*answers):
    return [{"prompt": "What?", "chosen": answer, "rejected": "A dog."} for answer in answers]


def parquet(path, *answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows(*answers)), path)
    return path


def jsonl(path, *answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(*answers)))
    return path


def make(folder, *names):
    """A file for each name, whose one record has the name as its chosen response."""
    for name in names:
        (parquet if name.endswith(".parquet") else jsonl)(folder / name, name)
    return folder


def chosen(data, **options):
    return [record.responses[0] for record in records_from(data, **options)]


# --- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "name"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "test"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "test"),
        (
            "data/train-00000-of-00001-8a4b1f.parquet",
            "data/validation-00000-of-00001-9c.parquet",
            "validation",
        ),
        ("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet", "test_sft"),
        ("helpful-00000-of-00001.parquet", "other-00000-of-00001.parquet", "other"),
        ("train.jsonl", "test.jsonl", "test"),
        ("train_0.jsonl", "dev_0.jsonl", "dev"),
        ("povid-train.jsonl", "povid-val.jsonl", "val"),
        ("pairs.jsonl", "held_out.jsonl", "held"),
        ("my.training.parquet", "my.valid.parquet", "valid"),
        ("train/0000.parquet", "test/0000.parquet", "test"),
        ("default/train/0000.parquet", "default/test/0000.parquet", "test"),
        ("train/part-00000-of-00001.parquet", "test/part-00000-of-00001.parquet", "test"),
        ("train2017/a.jsonl", "val2017/a.jsonl", "val2017"),
    ],
)
def test_splits_are_never_mixed(tmp_path, train, test, name):
    make(tmp_path, train, test)
    message = assert_refused(tmp_path, tmp_path.name, name, "--data.split")
    assert "split" in message
    assert chosen(tmp_path, split=name) == [test]
    assert_refused(tmp_path, "has no split 'x'", name, split="x")


def test_names_of_splits_that_mean_the_same(tmp_path):
    make(tmp_path, "train-00000-of-00001.parquet", "dev-00000-of-00001.parquet")
    for name in ("dev", "validation", "val"):
        assert chosen(tmp_path, split=name) == ["dev-00000-of-00001.parquet"]
    make(tmp_path, "val-00000-of-00001.parquet")
    assert chosen(tmp_path, split="val") == ["val-00000-of-00001.parquet"]
    assert_refused(tmp_path, "no split 'validation'", "dev, train, val", split="validation")


def test_one_split_needs_no_name(tmp_path):
    names = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    make(tmp_path, *names)
    (tmp_path / "README.md").touch()
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    make(tmp_path / ".cache", "test.jsonl")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    assert chosen(tmp_path) == chosen(tmp_path, split="train") == names
    assert [record.id for record in records_from(tmp_path)] == ["0", "1", "2"]
    assert records_from(tmp_path)[2].where == f"{names[2]} record 0"
    assert_refused(tmp_path, "has no split 'test': its splits are train", split="test")


@pytest.mark.parametrize(
    "names", [("0000.jsonl", "0001.jsonl"), ("part-0.parquet", "part-1.parquet"), ("a.jsonl", "b.jsonl")]
)
def test_names_without_a_split_are_one_data_set(tmp_path, names):
    make(tmp_path, *reversed(names))
    assert chosen(tmp_path) == list(names)
    assert_refused(tmp_path, "its files name no split", split="train")


def test_files_beside_a_split(tmp_path):
    make(tmp_path, "train.jsonl", "extra.jsonl")
    assert_refused(tmp_path, "the splits train", "name none: extra.jsonl", "--data.split")
    assert chosen(tmp_path, split="train") == ["train.jsonl"]


def test_a_file_has_no_splits(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl")
    assert chosen(tmp_path / "train.jsonl") == ["train.jsonl"]
    assert_refused(tmp_path / "train.jsonl", "train.jsonl", "single file", split="train")


def test_several_data_sets(tmp_path):
    make(tmp_path, "a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet")
    assert_refused(tmp_path, "several data sets: a, b", "name one of these folders")
    assert chosen(tmp_path / "b") == ["b/train-00000-of-00001.parquet"]
    assert_refused(make(tmp_path / "c", "x.jsonl", "old/x.jsonl"), "several data sets: ., old")


def test_kinds_are_not_mixed(tmp_path):
    make(tmp_path, "a.parquet", "b.jsonl")
    assert_refused(tmp_path, "several formats: a.parquet, b.jsonl", "pattern")


def test_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, "train.jsonl", "test.jsonl"))
    assert assert_refused(".", "several splits").startswith(".: holds")
    assert chosen(".", split="test") == ["test.jsonl"]


def test_a_state_of_something_else(tmp_path):
    (make(tmp_path, "a.jsonl") / "state.json").write_text("{}")
    assert chosen(tmp_path) == ["a.jsonl"]


def test_missing_shards(tmp_path):
    names = [f"train-{i:05d}-of-00008.parquet" for i in range(8)]
    make(tmp_path, *names)
    assert len(chosen(tmp_path)) == 8
    (tmp_path / names[3]).unlink()
    assert_refused(tmp_path, "train", "1 are missing: train-00003-of-00008")
    assert_refused(f"{tmp_path}/*.parquet", "1 are missing: train-00003-of-00008")
    for name in names[4:]:
        (tmp_path / name).unlink()
    assert_refused(tmp_path, "5 are missing: train-00003-of-00008, ", "and 1 more")
    assert chosen(tmp_path / names[0]) == names[:1]


def test_two_sets_of_shards(tmp_path):
    make(
        tmp_path,
        "train-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    )
    assert_refused(tmp_path, "shards of train", "of 1, 2", "keep those of one set")
    other = make(tmp_path / "hashes", "train-00000-of-00001-a.parquet", "train-00000-of-00001-b.parquet")
    assert_refused(other, "shard of train twice")


# --- patterns -----------------------------------------------------------------------------------


def test_patterns(tmp_path, monkeypatch):
    make(tmp_path / "shards", "b.jsonl", "a.jsonl", "c.parquet", "deep/d.jsonl")
    assert chosen(f"{tmp_path}/shards/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert chosen(tmp_path / "shards" / "[ac].jsonl") == ["a.jsonl"]
    monkeypatch.chdir(tmp_path)
    records = records_from("shards/**/*.jsonl")
    assert [record.where for record in records] == [
        "a.jsonl record 0",
        "b.jsonl record 0",
        "deep/d.jsonl record 0",
    ]
    assert [record.id for record in records] == ["0", "1", "2"]
    assert_refused("shards/*", "several formats")
    assert_refused("shards/*.csv", "'shards/*.csv'", "check the pattern")
    make(tmp_path, "odd[1].jsonl", "_x.jsonl")
    assert chosen("_*.jsonl") == ["_x.jsonl"]
    assert chosen("odd[1].jsonl") == ["odd[1].jsonl"]


def test_a_pattern_mixes_no_splits(tmp_path):
    make(tmp_path, "train-0.jsonl", "test-0.jsonl")
    assert_refused(f"{tmp_path}/t*.jsonl", "splits: test, train", "--data.split")
    assert chosen(f"{tmp_path}/t*.jsonl", split="train") == ["train-0.jsonl"]


def test_a_pattern_may_pick_shards(tmp_path):
    make(tmp_path, *[f"train-{i:05d}-of-00003.jsonl" for i in range(3)])
    assert len(chosen(f"{tmp_path}/train-0000[01]*")) == 2


def test_errors_name_the_file(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps(rows("x")[0]) + "\n{}\n")
    assert_refused(f"{tmp_path}/*.jsonl", "b.jsonl record 1, ")
    (tmp_path / "a.jsonl").write_text("{")
    assert_refused(tmp_path, "a.jsonl line 1")


def test_images_stand_beside_their_own_file(tmp_path):
    for name in ("x/a.jsonl", "y/b.jsonl"):
        file = jsonl(tmp_path / name)
        file.write_text(json.dumps({**rows("A cat.")[0], "images": ["i.png"]}))
    paths = [record.images[0].path for record in records_from(f"{tmp_path}/*/*.jsonl")]
    assert paths == [tmp_path.resolve() / "x/i.png", tmp_path.resolve() / "y/i.png"]
    # but where the folder of all is given
    (tmp_path / "all").mkdir()
    records = records_from(f"{tmp_path}/*/*.jsonl", image_root=tmp_path / "all")
    assert {record.images[0].path for record in records} == {tmp_path.resolve() / "all/i.png"}


# --- saved by `datasets` ------------------------------------------------------------------------


def save(folder, *answers, shards=1, split="train"):
    """What Dataset.save_to_disk writes: shards in Arrow's stream format and the list of them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows(*answers[i::shards]))
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0f",
        "_format_type": None,
    }
    (folder / "state.json").write_text(json.dumps({**state, "_split": split}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def test_a_saved_data_set(tmp_path):
    folder = save(tmp_path / "saved", *"abcde", shards=2)
    assert chosen(folder) == chosen(folder, split="train") == ["a", "c", "e", "b", "d"]
    assert records_from(folder)[2].where == "data-00000-of-00002.arrow record 2"
    assert_refused(folder, "no split 'test'", "train", split="test")
    (folder / "data-00007-of-00009.arrow").write_bytes(b"left from before")
    assert len(chosen(folder)) == 5
    assert chosen(folder / "data-00001-of-00002.arrow") == ["b", "d"]
    (folder / "data-00001-of-00002.arrow").unlink()
    assert_refused(folder, "state.json", "'data-00001-of-00002.arrow'", "missing")


def test_a_saved_data_set_with_splits(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / "saved" / split, split[0], split=split)
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert_refused(tmp_path / "saved", "several splits: test, train", "--data.split")
    assert chosen(tmp_path / "saved", split="test") == ["t"]
    assert (
        records_from(tmp_path / "saved", split="test")[0].where == "test/data-00000-of-00001.arrow record 0"
    )
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert chosen(tmp_path / "saved") == ["t"]


def test_a_saved_data_set_without_rows(tmp_path):
    folder = save(tmp_path / "saved" / "test", shards=0)
    assert_refused(folder, "test", "holds no records")
    save(tmp_path / "saved" / "train", "a")
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert chosen(tmp_path / "saved", split="train") == ["a"]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("state.json", "[]", ["state.json", "an object", "save the data set again"]),
        ("state.json", "{", ["state.json", "not JSON"]),
        ("state.json", "{}", ["lists no data files"]),
        ("state.json", '{"_data_files": [7]}', ["is no file name"]),
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', ["'../x.arrow' is no file name"]),
        ("state.json", '{"_data_files": [{}], "_indices_data_files": [{}]}', ["flatten_indices"]),
        ("dataset_dict.json", '{"splits": "train"}', ["names no splits"]),
        ("dataset_dict.json", '{"splits": [".."]}', ["names no splits"]),
        ("dataset_dict.json", '{"splits": ["gone"]}', ["state.json", "can't be read"]),
    ],
)
def test_damaged_lists(tmp_path, file, text, words):
    folder = save(tmp_path / "saved", "a")
    (folder / file).write_text(text)
    assert_refused(folder, *words)


# --- the Hub's cache ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache, and no way to the Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub, name, *files):
    """A snapshot as the Hub's library stores it: links to blobs."""
    repo, commit = hub / f"datasets--{name.replace('/', '--')}", "0" * 40
    for number, file in enumerate(files):
        blob = repo / "blobs" / str(number)
        (parquet if file.endswith(".parquet") else jsonl)(blob, file)
        link = repo / "snapshots" / commit / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    return repo / "snapshots" / commit


def test_a_data_set_in_the_hubs_cache(hub):
    files = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
    cached(hub, "org/pairs", *files)
    assert chosen("org/pairs", split="train") == [files[0]]
    assert_refused("org/pairs", "several splits: test, train", "--data.split")
    cached(hub, "alone", "pairs.jsonl")
    assert chosen("alone") == ["pairs.jsonl"]


def test_images_of_a_cached_data_set(hub):
    folder = cached(hub, "org/pairs", "pairs.jsonl")
    blob = folder.parents[1] / "blobs/0"
    image = folder.parents[1] / "blobs/1"
    image.write_bytes(b"x")
    (folder / "i.png").symlink_to(image)
    blob.write_text(json.dumps({**rows("A cat.")[0], "images": ["i.png"]}))
    assert records_from("org/pairs")[0].images[0].path == image.resolve()
    blob.write_text(json.dumps({**rows("A cat.")[0], "images": ["../../../../secret.png"]}))
    assert_refused("org/pairs", "leaves the image folder")


@pytest.mark.parametrize("name", ["org/absent", "absent"])
def test_nothing_is_downloaded(hub, name, monkeypatch):
    def call(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", call)
    message = assert_refused(name, "no such file", str(hub), f"hf download --repo-type dataset {name}")
    assert re.search("check the path", message)
    assert_refused(f"{name}.jsonl", "no such file")
    assert_refused(f"./{name}", "no such file")
