"""Data sets mixed into a file that reads as they did."""

import json

import pytest
from published import completion, png, povid, trl, vlfeedback
from refusals import assert_refusal
from test_items import read, written

from mllm_align.config import DataConfig
from mllm_align.curation.mix import mix, table
from mllm_align.curation.writing import leads_outside
from mllm_align.data.mixture import Weighted
from mllm_align.data.readers import records_from


@pytest.fixture
def sets(tmp_path):
    """40 own pairs, 12 of POVID in another folder, with ids that repeat."""
    folders = [tmp_path / "sets/own", tmp_path / "sets/povid"]
    for n, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png(3 + n, 2))
    own = [
        trl(id=str(i), chosen=f"A cat {i}.", origin="ab"[i % 2], bdhs={"iterations": i}) for i in range(40)
    ]
    (folders[1] / "povid.json").write_text(json.dumps([povid(id=str(i)) for i in range(12)]))
    return [Weighted(written(folders[0], *own), 3.0), Weighted(folders[1] / "povid.json", 1.0)]


def answers(file, **options):
    return [(record.responses, record.messages) for record in records_from(file, **options)]


@pytest.mark.parametrize("name", ["mixed.parquet", "mixed.jsonl"])
def test_shares_order_and_images(sets, tmp_path, name):
    files = [tmp_path / place / name for place in ("first", "again", "other")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        found = mix(sets, file, limit=16, seed=seed)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other
    assert [(each["records"], each["taken"]) for each in found] == [(40, 12), (12, 4)]
    outside = leads_outside(files[0])
    assert outside == name.endswith("jsonl")
    items = read(files[0], allow_outside=outside)
    assert sorted(item.source for item in items) == ["povid.json"] * 4 + ["set.jsonl"] * 12
    assert [item.source for item in items] != sorted(item.source for item in items)
    ids = [item.record.id for item in items]
    assert len(set(ids)) == 16 and len({item.chosen for item in items}) == 13
    for item in items:
        width = 3 if item.source == "set.jsonl" else 4
        assert item.record.images[0].read() == png(width, 2)
    records_from(files[0], allow_outside=outside)  # as training reads it


def test_without_a_limit_as_many_as_the_shares_allow(sets, tmp_path):
    assert [each["taken"] for each in mix(sets, tmp_path / "m.jsonl")] == [36, 12]
    (alone,) = mix(sets[:1], tmp_path / "n.jsonl")
    assert alone["taken"] == 40


def test_what_is_filtered_is_counted_and_the_rest_is_kept_whole(sets, tmp_path):
    out = tmp_path / "sets/m.jsonl"
    found = mix(sets, out, where='origin == "a" or source == "povid.json"', limit=8)
    assert [each["filtered"] for each in found] == [20, 0]
    assert table(found).splitlines()[0] == "set.jsonl: 6 of 40 records (20 filtered out)"
    kept = {item.record.id: item for item in read(out) if item.source == "set.jsonl"}
    assert len(kept) == 6 and all(int(id) % 2 == 0 for id in kept)
    assert all(item.fields == {"origin": "a", "bdhs": {"iterations": int(id)}} for id, item in kept.items())
    assert not leads_outside(out), "images below the file's folder are named from there"
    mix([Weighted(out, 1.0)], tmp_path / "p.parquet")
    again = {item.record.id: item for item in read(tmp_path / "p.parquet")}
    assert sorted(map(str, answers(out))) == sorted(map(str, answers(tmp_path / "p.parquet")))
    assert all(json.loads(again[id].fields["bdhs"]) == item.fields["bdhs"] for id, item in kept.items())
    assert {item.source for item in again.values()} == {"set.jsonl", "povid.json"}


def test_controlled_subsets_of_rated_responses(tmp_path):
    """The published files' own fields are enough for who was chosen."""
    (tmp_path / "a.png").write_bytes(png())
    models = ("gpt4v", "llava-v1.5-7b", "fuyu-8b")
    rows = [
        vlfeedback(
            *(completion(f"{i} by {m}.", 1 + (i + k) % 3, model=m) for k, m in enumerate(models)), id=f"{i}"
        )
        for i in range(30)
    ]
    found = mix(
        [Weighted(written(tmp_path, *rows), 1.0)], tmp_path / "g.jsonl", where='"llava" in chosen_model'
    )
    assert found[0] == {"set": "set.jsonl", "records": 30, "left_out": {}, "filtered": 20, "taken": 10}
    assert all("by llava" in item.chosen for item in read(tmp_path / "g.jsonl"))


def test_what_is_refused(sets, tmp_path):
    out = tmp_path / "new/m.jsonl"
    assert_refusal(lambda: mix(sets, tmp_path / "m.csv"), "m.csv", ".parquet or .jsonl")
    assert_refusal(lambda: mix(sets, out, limit=52), "povid.json has 12 records to take, its share is 13")
    assert_refusal(lambda: mix(sets, out, where='chosen == ""'), "no record is left")
    assert_refusal(lambda: mix(sets, out, where='orign == "a"'), "'orign'", "did you mean origin?")
    assert_refusal(lambda: mix(sets, out, limit=0), "--limit is 0")
    assert_refusal(lambda: mix([sets[0], sets[0]], out), "given twice")
    assert_refusal(
        lambda: mix(sets, out.with_suffix(".parquet"), data=DataConfig(image_root=(tmp_path / "sets",))),
        "a.png",
        "no such file",
    )
    assert not out.exists()
