"""One data file to its rows, in every format, and every way in which it can't be read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refusal

from mllm_align.data.files import SUFFIXES, DataFile, read_rows, suffix_of
from mllm_align.data.roots import Roots
from mllm_align.errors import InputError

ROWS = [{"prompt": "What?", "score": 0.5, "tags": ["a", "b"]}, {"prompt": "Où?", "score": None, "tags": []}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()


def read(path):
    return list(read_rows(DataFile(path, f"data/{path.name}", Roots())))


def values(path):
    return [row.value for row in read(path)]


@pytest.fixture
def written(tmp_path):
    """written(name, bytes) is a file."""

    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def refused(path):
    message = refusal(read, path)
    assert message.startswith(f"data/{path.name}")
    return message


# ---- formats -----------------------------------------------------------------------------------------


def parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)


def arrow(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


WRITERS = {
    ".jsonl": lambda path: path.write_bytes(LINES),
    ".json": lambda path: path.write_bytes(LIST),
    ".jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    ".json.gz": lambda path: path.write_bytes(gzip.compress(LIST)),
    ".parquet": parquet,
    ".arrow": arrow,
}


def test_every_format_is_tried():
    assert {*SUFFIXES} == {*WRITERS, ".array_record"}, "which test_array_records.py has"


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("upper", [False, True])
def test_every_format_gives_the_same_rows(tmp_path, suffix, upper):
    path = tmp_path / f"rows{suffix.upper() if upper else suffix}"
    WRITERS[suffix](path)
    assert values(path) == ROWS
    assert [row.at for row in read(path)] == [f"data/{path.name} record {i}" for i in (0, 1)]


@pytest.mark.parametrize(
    "name, suffix",
    [
        ("a.jsonl", ".jsonl"),
        ("a.JSON.GZ", ".json.gz"),
        ("part.0.parquet", ".parquet"),
        ("a.gz", ""),
        ("a.csv", ""),
        ("jsonl", ""),
        ("", ""),
    ],
)
def test_suffixes(name, suffix):
    assert suffix_of(name) == suffix


def test_jsonl_tolerates_bom_crlf_blank_lines_and_line_separators(written):
    """Rows are counted without the blank lines. U+2028 ends no line of JSON."""
    row = {"prompt": "two\u2028lines"}
    lines = ["", json.dumps(row, ensure_ascii=False), "  ", json.dumps(ROWS[0]), ""]
    path = written("a.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [(each.value, each.index) for each in read(path)] == [(row, 0), (ROWS[0], 1)]


def test_json_tolerates_bom(written):
    assert values(written("a.json", b"\xef\xbb\xbf" + LIST)) == ROWS


@pytest.mark.parametrize(
    "name, data", [("a.jsonl", b""), ("a.jsonl", b"\xef\xbb\xbf\n \n"), ("a.json", b"")]
)
def test_a_file_without_rows_has_none(written, name, data):
    assert read(written(name, data)) == []


def test_rows_come_one_by_one(written):
    """What stands before a fault is read."""
    rows = read_rows(DataFile(written("a.jsonl", LINES + b"{"), "a.jsonl", Roots()))
    assert [next(rows).value for _ in ROWS] == ROWS
    with pytest.raises(InputError, match=r"a\.jsonl line 3"):
        next(rows)


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"a": 1,, }', ["line 3, column 9", "not JSON"]),
        (b'{"a": 1', ["line 3", "not JSON"]),
        (b"[1, 2]", ["line 3", "found list", "object"]),
        (b'{"a": "\xff"}', ["line 3", "UTF-8"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["line 3", "cannot be read"]),
        (b"[" * 100_000, ["line 3", "cannot be read"]),
    ],
)
def test_a_faulty_line_is_named(written, line, words):
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        message = refused(written(name, pack(LINES.split(b"\n")[0] + b"\n\n" + line + b"\n")))
        assert all(word in message for word in words)


@pytest.mark.parametrize(
    "text, words",
    [
        (b'[\n{"a": 1},\n{"a" 2}]', ["line 3, column 6", "not JSON"]),
        (b'[\n"\xff"]', ["line 2", "UTF-8"]),
        (b'{"a": 1}', ["holds dict", ".jsonl"]),
        (LINES, ["line 2, column 1", "one object per line"]),
    ],
)
def test_faulty_json(written, text, words):
    message = refused(written("a.json", text))
    assert all(word in message for word in words)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-4],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5],
        lambda whole: whole + b"garbage",
        lambda whole: whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:],  # of the checksum
        lambda whole: whole[:60] + bytes(10) + whole[70:],
        lambda whole: LINES,
        lambda whole: whole[:2],
    ],
)
def test_damaged_gzip(written, suffix, damage):
    whole = gzip.compress(LINES if suffix == ".jsonl.gz" else LIST)
    path = written(f"a{suffix}", damage(whole))
    assert "is damaged or cut short (gzip: " in refused(path)


def test_gzip_of_several_members(written):
    path = written("a.jsonl.gz", gzip.compress(LINES[:9]) + gzip.compress(LINES[9:]))
    assert values(path) == ROWS
    path.write_bytes(gzip.compress(LINES + b"{"))
    assert "a.jsonl.gz line 3, column 2" in refused(path)
    path.write_bytes(gzip.compress(b""))
    assert read(path) == []


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("data", [b"", b"PAR1 no table at all", LINES])
def test_damaged_tables(written, suffix, data):
    message = refused(written(f"a{suffix}", data))
    assert "cannot be read (" in message and "check that it is complete and readable" in message


def test_a_parquet_file_that_was_cut_short(tmp_path, written):
    parquet(tmp_path / "whole.parquet")
    cut = written("cut.parquet", (tmp_path / "whole.parquet").read_bytes()[:-20])
    assert "cannot be read" in refused(cut)


def test_an_unknown_suffix_lists_the_known(written):
    message = refused(written("a.csv", LINES))
    assert "the suffix '.csv' is unknown" in message and message.endswith(", ".join(SUFFIXES))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_forbidden_files(written, name, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = written(name, LINES)
    monkeypatch.setattr("pathlib.Path.open", forbidden)
    assert "cannot be read (PermissionError: [Errno 13] Permission denied)" in refused(path)
