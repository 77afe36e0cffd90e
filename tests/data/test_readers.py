"""Files and rows in memory to records, in three formats, and every refusal."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from published import assert_refused, gpt, human, png, povid, rlaifv, rlhfv, turns

from mllm_align.data.images import image_size, load_rgb
from mllm_align.data.readers import records_from

ROW = {"images": ["a.png"], "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def write(path, *rows):
    """Write .json as one list and anything else as lines."""
    lines = [json.dumps(row) for row in rows]
    path.write_text(f"[{','.join(lines)}]" if path.suffix == ".json" else "\n".join(lines) + "\n")
    return path


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSONL"])
def test_json_files(tmp_path, suffix):
    path = write(tmp_path / f"pairs{suffix}", ROW, {**ROW, "id": "x", "score": float("nan")})
    records = records_from(path)
    assert [record.id for record in records] == ["0", "x"]
    assert records[1].where == f"pairs{suffix} record 1"
    assert records[1].images[0].where == f"pairs{suffix} record 1, images[0]"
    assert records[0].images[0].path == tmp_path.resolve() / "a.png"
    assert records_from(str(path)) == records


def test_faulty_records_of_a_file_are_named(tmp_path):
    faulty = {name: value for name, value in ROW.items() if name != "rejected"}
    assert_refused(write(tmp_path / "a.jsonl", ROW, faulty), "a.jsonl record 1, rejected", "missing")
    assert_refused(write(tmp_path / "a.json", 1), "a.json record 0", "found int")


@pytest.mark.parametrize(
    ("name", "contents"),
    [("a.jsonl", ""), ("a.jsonl", "\ufeff \n\n"), ("a.json", ""), ("a.json", "[]")],
)
def test_files_without_records(tmp_path, name, contents):
    (tmp_path / name).write_text(contents, encoding="utf-8")
    assert_refused(tmp_path / name, name, "holds no records")


def test_unusable_files(tmp_path):
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet at all")
    (tmp_path / "c.parquet").touch()
    (tmp_path / "d.parquet").write_bytes(parquet(tmp_path / "e.parquet", ROW).read_bytes()[:-20])
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "gone.jsonl", "gone.jsonl", "no such file")
    assert_refused(tmp_path / "a.csv", "'.csv'", ".jsonl, .json, ")
    for name in ("b.parquet", "c.parquet", "d.parquet"):
        assert_refused(tmp_path / name, name, "cannot be read")
    assert_refused(tmp_path / "folder", "folder", "no data files (.jsonl, ")
    assert_refused(tmp_path / ("x" * 300), "no such file")
    assert_refused(tmp_path / "a\0b.jsonl", "no such file")
    assert_refused(tmp_path / "two\nlines.jsonl", "two lines.jsonl")


def test_forbidden_folder(tmp_path, monkeypatch):
    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", forbidden)
    assert_refused(tmp_path, "folder cannot be read")


def test_options_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    assert_refused(path, "format", "'csv'", "auto, trl, povid", format="csv")
    assert_refused(path, "image_root", "not a folder", image_root=tmp_path / "gone")


def test_image_root(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "data" / "a.jsonl", ROW)
    record = records_from(path, image_root=tmp_path / "images")[0]
    assert record.images[0].path == (tmp_path / "images" / "a.png").resolve()
    path = write(path, {**ROW, "images": ["../images/a.png"]})
    assert_refused(path, "a.jsonl record 0, images[0]", "--data.allow-outside")
    assert records_from(path, allow_outside=True)[0].images == record.images


# --- Parquet --------------------------------------------------------------------------------------


def parquet(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_parquet_with_images_in_bytes(tmp_path):
    rows = [
        {
            "images": [{"bytes": png(width), "path": "gone.png"}],
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "What?"}],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
        }
        for width in (4, 5)
    ]
    records = records_from(parquet(tmp_path / "pairs.parquet", *rows))
    assert [image_size(record.images[0]) for record in records] == [(4, 2), (5, 2)]
    assert np.asarray(load_rgb(records[0].images[0]))[0, 0].tolist() == [1, 2, 3]
    assert turns(records[1]) == [("user", "What?", 1)]
    assert records[1].responses == ("A cat.", "A dog.")
    assert records[1].where == "pairs.parquet record 1"


def test_parquet_with_paths_and_nulls(tmp_path):
    rows = [{**ROW, "images": [{"bytes": None, "path": "b.png"}], "id": 8}, {**ROW, "images": None}]
    first, second = records_from(parquet(tmp_path / "pairs.parquet", *rows))
    assert first.images[0].path == tmp_path.resolve() / "b.png" and first.id == "8"
    assert second.images == () and second.id == "1"


def test_parquet_folder(tmp_path):
    parquet(tmp_path / "part-1.parquet", {**ROW, "chosen": "third"})
    parquet(tmp_path / "part-0.parquet", {**ROW, "chosen": "first"}, {**ROW, "chosen": "second"})
    (tmp_path / "README.md").touch()
    records = records_from(tmp_path)
    assert [record.responses[0] for record in records] == ["first", "second", "third"]
    assert [record.id for record in records] == ["0", "1", "2"]
    assert records[2].where == "part-1.parquet record 0"
    assert records[2].images[0].path == tmp_path.resolve() / "a.png"


# --- ids ------------------------------------------------------------------------------------------


def test_repeated_ids_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {**ROW, "id": 5}, ROW, {**ROW, "id": "5"})
    assert_refused(path, "a.jsonl record 2, id", "'5'", "a.jsonl record 0")


def test_ids_of_our_own_give_way():
    records = records_from([ROW, {**ROW, "id": "0"}, ROW])
    assert [record.id for record in records] == ["0-0", "0", "2"]


# --- POVID ----------------------------------------------------------------------------------------


def test_povid(tmp_path):
    chosen = [human("<image>\nWhat?"), gpt("A cat.")]
    row = povid(chosen, [chosen[0], gpt("A dog.")])
    (record,) = records_from(write(tmp_path / "povid.json", row))
    assert record.id == "7" and record.where == "povid.json record 0"
    assert turns(record) == [("user", "What?", 1)]
    assert record.responses == ("A cat.", "A dog.")
    assert record.images[0].path == tmp_path.resolve() / "a.png"


def test_povid_gives_a_record_for_each_differing_turn():
    chosen = [human("<image>\nWhat?"), gpt("A cat."), human("Sure?"), gpt("Yes."), human("Why?")]
    chosen += [gpt("Whiskers.")]
    rejected = [chosen[0], gpt("A dog."), *chosen[2:5], gpt("It barks.")]
    row = povid(chosen, rejected)
    first, second = records_from([row])
    assert (first.id, second.id) == ("7-0", "7-1")
    assert turns(first) == [("user", "What?", 1)]
    assert turns(second) == [
        ("user", "What?", 1),
        ("assistant", "A cat.", 0),
        ("user", "Sure?", 0),
        ("assistant", "Yes.", 0),
        ("user", "Why?", 0),
    ]
    assert second.responses == ("Whiskers.", "It barks.")
    assert [record.id for record in records_from([{**row, "id": None}])] == ["0-0", "0-1"]


def test_faulty_povid():
    chosen = [human("What?"), gpt("A cat.")]
    rejected = [human("What?"), gpt("A dog.")]
    at = "record 0, rejected_conversations"
    assert_refused([povid(chosen, [human("Who?"), rejected[1]])], f"{at}[0].value", "human turn")
    assert_refused([povid(chosen, rejected * 2)], at, "same turns")
    assert_refused([povid(chosen, rejected_conversations=None)], at, "found null")
    assert_refused([povid(chosen, [])], at, "empty list")
    assert_refused([povid(chosen, "x")], at, "found str")
    assert_refused([povid(chosen, ["x", "y"])], f"{at}[0]", "found str")
    assert_refused([povid([human("x"), {"from": "bot", "value": "x"}], rejected)], "[1].from")
    assert_refused([povid(chosen, [human("What?"), gpt(3)])], f"{at}[1].value", "found int")
    assert_refused([povid(chosen, [human("What?"), gpt("")])], "rejected", "empty")
    assert_refused([povid(chosen, rejected, id=[1])], "record 0, id", "found list")
    ids = [record.id for record in records_from([povid(chosen, rejected)] * 2)]
    assert len(set(ids)) == 2  # published ids repeat
    assert_refused([ROW], "record 0, conversations", format="povid")


# --- RLHF-V ---------------------------------------------------------------------------------------


def test_rlhfv(tmp_path):
    (record,) = records_from(parquet(tmp_path / "rlhfv.parquet", rlhfv()))
    assert record.id == "4" and record.responses == ("A cat.", "A dog.")
    assert turns(record) == [("user", "What?", 1)]
    assert image_size(record.images[0]) == (3, 2)


def test_rlhfv_variants():
    text = {"question": "Who?", "chosen": "x", "rejected": "y"}
    rows = [
        rlhfv(text=text, image=None),
        rlhfv(image=png(9), idx=5),
        rlhfv(image=Image.new("RGB", (8, 1)), idx=6),
        rlhfv(image={"bytes": None, "path": None}, idx=None),
    ]
    records = records_from(rows)
    assert turns(records[0]) == [("user", "Who?", 1)]
    assert [r.images[0].path and r.images[0].path.name for r in records] == [
        "a.png",
        None,
        None,
        "a.png",
    ]
    assert [image_size(record.images[0]) for record in records[1:3]] == [(9, 2), (8, 1)]
    assert [record.id for record in records] == ["4", "5", "6", "3"]


def test_rlhfv_indices_may_repeat():
    records = records_from([rlhfv(), rlhfv(), rlhfv(idx="4-1")])
    assert [record.id for record in records] == ["4", "4-1", "4-1-2"]


def test_faulty_rlhfv():
    at = "record 0, text"
    assert_refused([rlhfv(text="{")], at, "not JSON")
    assert_refused([rlhfv(text="[]")], at, "found list")
    assert_refused([rlhfv(text=None)], at, "found null")
    assert_refused([rlhfv(text='{"question": "What?", "chosen": "x"}')], f"{at}.rejected", "null")
    assert_refused([rlhfv(idx=1.5)], "record 0, idx", "found float")
    assert_refused([ROW], at, format="rlhfv")


# --- rows in memory -------------------------------------------------------------------------------


def test_rows_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{**ROW, "images": [Image.new("RGB", (4, 3))]}, {**ROW, "images": ["../a.png"]}]
    records = records_from(row for row in rows)
    assert records[0].where == "record 0" and image_size(records[0].images[0]) == (4, 3)
    assert records[1].images[0].path == (tmp_path / "../a.png").resolve()
    assert_refused(rows, "record 1, images[0]", "leaves", image_root=tmp_path)


def test_the_first_records_are_read_and_no_more(tmp_path):
    """Counted behind a published set's own rules, over all files; what follows is not looked at."""
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", *[{**ROW, "id": f"{name}{i}"} for i in range(2)])
    (tmp_path / "c.jsonl").write_text("not JSON")
    found = [records_from(tmp_path / "*.jsonl", max_records=n) for n in (1, 3, 4)]
    assert [[each.id for each in records] for records in found] == [
        ["a0"],
        ["a0", "a1", "b0"],
        ["a0", "a1", "b0", "b1"],
    ]
    assert len(records_from([ROW, ROW], max_records=9)) == 2
    same, dropped = rlaifv(rejected="A cat."), Counter()
    kept = records_from(iter([same, rlaifv(), same, rlaifv(), same]), max_records=2, dropped=dropped)
    assert len(kept) == 2 and dropped["identical pair"] == 2


def test_records_pass_as_they_are():
    records = records_from([ROW, ROW])
    mixed = records_from([*records, {**ROW, "id": "x"}])
    assert mixed[:2] == records and mixed[0] is records[0] and mixed[2].where == "record 2"
    assert_refused([records[0], records[0]], "record 0, id", "'0'")


def test_responses_for_tuning():
    (record,) = records_from([{"prompt": "What?", "completion": "A cat."}], responses=1)
    assert record.responses == ("A cat.",)


@pytest.mark.parametrize("data", [ROW, b"a.jsonl", 7, None])
def test_data_must_be_rows(data):
    assert_refused(data, "data", type(data).__name__)


def test_empty_data_is_refused():
    assert re.search("data: holds no records", assert_refused([]))


def test_row_that_is_no_object():
    assert_refused([ROW, 5], "record 1", "found int")
