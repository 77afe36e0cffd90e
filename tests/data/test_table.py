"""Records encoded by all cores and kept for the next start: the same as one by one."""

import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coders import PAIRS, encoder, record
from goldens import FIXTURES
from PIL import Image
from refusals import refusal

from mllm_align.data import table
from mllm_align.data.encode import Encoder
from mllm_align.data.images import ImageSource
from mllm_align.data.readers import records_from
from mllm_align.data.table import FOLDER, encode_all, encode_each


@pytest.fixture
def folder(tmp_path):
    """The pairs and their pictures, which a test may change."""
    shutil.copytree(FIXTURES / "images", tmp_path / "images")
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """Everything counts as large; how many parts were encoded, here and not in other processes."""
    parts = []

    def here(records, encoder, responses, opening, tell):
        for start in range(0, len(records), 3):
            part = records[start : start + 3]
            parts.append(len(part))
            made = [table._encoded(each, encoder, responses, start + i) for i, each in enumerate(part)]
            yield table.Table.of(made, responses)

    monkeypatch.setattr(table, "MIN_CACHED", 1)
    monkeypatch.setattr(table, "_encode_parallel", here)
    return parts


def equal(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert (a.record, a.sizes, a.shape, a.index) == (b.record, b.sizes, b.shape, b.index)
        for ids, same in zip((a.prefix, *a.responses), (b.prefix, *b.responses), strict=True):
            assert ids.dtype == same.dtype == np.int32 and ids.tolist() == same.tolist()


# ---- all records -------------------------------------------------------------------------------------


def lengths(coder, records):
    return [coder.encode(r, 2).length for r in records]


def test_the_limit_itself_is_not_over_long():
    coder, records = encoder(), [record(row) for row in PAIRS]
    limit = max(lengths(coder, records))
    told = []
    kept, skipped = encode_all(records, coder, responses=2, max_length=limit, tell=told.append)
    assert len(kept) == sum(told) == 8 and not skipped
    assert [e.index for e in kept] == list(range(8)) and [e.record for e in kept] == records


def test_over_long_records_are_refused_by_name_and_number():
    coder, pair = encoder(), record(PAIRS[0])
    length = coder.encode(pair, 2).length
    message = refusal(lambda: encode_all([pair], coder, responses=2, max_length=length - 1))
    assert "pairs.jsonl record 3: " in message
    assert f"are {length} tokens, the limit is {length - 1}" in message
    assert "--data.max-length" in message and "--data.over-long skip" in message


def test_over_long_records_are_skipped_and_counted():
    coder = encoder()
    records = [record(row, id=f"r{i}") for i, row in enumerate(PAIRS)]
    sizes = lengths(coder, records)
    limit = sorted(sizes)[4]
    kept, skipped = encode_all(records, coder, responses=2, max_length=limit, over_long="skip")
    assert [e.index for e in kept] == [i for i, n in enumerate(sizes) if n <= limit]
    assert skipped == [(i, f"r{i}", "over-long") for i, n in enumerate(sizes) if n > limit] and skipped
    for e in kept:
        alone = coder.encode(e.record, 2)
        assert np.array_equal(e.prefix, alone.prefix) and e.shape == alone.shape


def test_all_records_over_long():
    records = [record(row) for row in PAIRS]
    message = refusal(lambda: encode_all(records, encoder(), responses=2, max_length=3, over_long="skip"))
    assert "all 8 records are left out, 8 over-long" in message and "--data.max-length above 3" in message


# ---- other processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_parts_and_other_processes_encode_the_same(monkeypatch, shared):
    coder, records = encoder(), [record(row) for row in PAIRS]
    alone = [coder.encode(each, 2, i) for i, each in enumerate(records)]
    for name, value in (("MIN_CACHED", 2), ("MIN_PARALLEL", shared), ("PART", 3)):
        monkeypatch.setattr(table, name, value)
    told = []
    equal(list(encode_each(records, coder, 2, tell=told.append)), alone)
    assert told == [3, 3, 2]
    # what another process refuses is refused here, and the first of two
    bad = [*records[:4], record(PAIRS[0], images=["images/none.png"]), *records[5:]]
    bad[7] = record(PAIRS[0], images=["images/nor_this.png"])
    assert "none.png" in refusal(lambda: list(encode_each(bad, coder, 2)))


def test_identical_responses_are_told_from_a_table_as_without_one(tmp_path, counted):
    coder = encoder()
    records = [record(PAIRS[0]), record(PAIRS[1], rejected=PAIRS[1]["chosen"]), record(PAIRS[2])]
    settings = {"responses": 2, "max_length": 999, "beside": tmp_path}
    for _ in range(2):
        kept, left_out = encode_all(records, coder, identical="skip", **settings)
        assert [e.index for e in kept] == [0, 2] and left_out == [(1, records[1].id, "identical")]
        message = refusal(lambda: encode_all(records, coder, **settings))
        assert "rejected: the response is identical to that of chosen" in message
    assert counted == [3]


# ---- the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [0, 1, 2])
@pytest.mark.parametrize("name", ["llava15", "llavanext"])
def test_the_second_start_reads_what_the_first_kept(tmp_path, counted, name, responses):
    coder, records = encoder(name), [record(row) for row in PAIRS]
    alone = [coder.encode(each, responses, i) for i, each in enumerate(records)]
    told = []
    equal(list(encode_each(records, coder, responses, tmp_path)), alone)
    assert counted == [3, 3, 2]
    equal(list(encode_each(records, encoder(name), responses, tmp_path, told.append)), alone)
    assert counted == [3, 3, 2] and told == [8]


def changed_text(folder, records, coder):
    return [replace(records[0], responses=("ku.", "der.")), *records[1:]], coder


def changed_picture(folder, records, coder):
    path = records[0].images[0].path
    Image.new("RGB", (200, 20)).save(path)
    return records, coder


def touched_picture(folder, records, coder):
    os.utime(records[0].images[0].path, ns=(1, 1))
    return records, coder


def changed_template(folder, records, coder):
    return records, encoder(template=coder.template + " ")


def other_order(folder, records, coder):
    return records[::-1], coder


def other_model(folder, records, coder):
    return records, encoder("llavanext")


def more_ends(folder, records, coder):
    return records, Encoder(coder.processor, coder.layout, coder.image_token, frozenset([7]))


CHANGES = (
    changed_text,
    changed_picture,
    touched_picture,
    changed_template,
    other_order,
    other_model,
    more_ends,
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_encoded_anew(folder, counted, change):
    coder, records = encoder(), [record(row, root=folder) for row in PAIRS]
    list(encode_each(records, coder, 2, folder))
    records, coder = change(folder, records, coder)
    found = list(encode_each(records, coder, 2, folder))
    assert len(counted) == 6
    equal(found, [coder.encode(each, 2, i) for i, each in enumerate(records)])


def test_images_in_memory_are_told_apart(tmp_path, counted):
    coder = encoder()

    def shown(colour):
        source = ImageSource.from_memory(Image.new("RGB", (40, 30), colour))
        return [replace(record(PAIRS[0]), images=(source,))]

    for colour in ("red", "red", "blue"):
        list(encode_each(shown(colour), coder, 2, tmp_path))
    assert counted == [1, 1]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_inside_a_table_file_are_known_again_until_it_is_written_anew(tmp_path, counted, suffix):
    coder, file = encoder(), tmp_path / f"pairs.{suffix}"
    for colour in ("red", "red", "blue"):
        if colour == "blue" or not file.exists():
            write_table(file, colour)
        records = records_from(file)
        alone = [coder.encode(each, 2, i) for i, each in enumerate(records)]
        assert pickle.loads(pickle.dumps(records))[1].images[0].read() == records[1].images[0].read()
        equal(list(encode_each(records, coder, 2, tmp_path)), alone)
    assert counted == [2, 2]


def write_table(file, colour):
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(picture, "PNG")
    row = {**PAIRS[0], "images": [{"bytes": picture.getvalue(), "path": None}], "id": None}
    rows = pa.Table.from_pylist([{**row, "id": str(i)} for i in range(2)])
    if file.suffix == ".parquet":
        pq.write_table(rows, file)
        return
    with pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)


@pytest.mark.parametrize("harm", ["cut", "empty", "of another", "no archive"])
def test_a_damaged_table_is_made_anew(tmp_path, counted, harm):
    coder, records = encoder(), [record(row) for row in PAIRS]
    alone = list(encode_each(records, coder, 2, tmp_path))
    (file,) = (tmp_path / FOLDER).iterdir()
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "no archive": b"PK"}.get(harm, whole))
    if harm == "of another":
        with np.load(file) as arrays:
            few = {name: arrays[name][:-1] for name in arrays}
        np.savez(file, **few)
    equal(list(encode_each(records, coder, 2, tmp_path)), alone)
    assert len(counted) == 6
    equal(list(encode_each(records, coder, 2, tmp_path)), alone)
    assert len(counted) == 6


def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path, counted):
    (tmp_path / FOLDER).write_text("a file where the folder would be")
    coder, records = encoder(), [record(row) for row in PAIRS]
    for _ in range(2):
        assert len(list(encode_each(records, coder, 2, tmp_path))) == 8
    assert len(counted) == 6 and [p.name for p in tmp_path.iterdir()] == [FOLDER]


def test_the_tables_used_last_are_kept(tmp_path, counted):
    coder, records = encoder(), [record(row) for row in PAIRS]
    sets = [records[i : i + 2] for i in range(6)]
    for i, some in enumerate(sets):
        list(encode_each(some, coder, 2, tmp_path))
        for file in (tmp_path / FOLDER).iterdir():  # the clock of the file system may be coarse
            if file.stat().st_mtime > 1000:
                os.utime(file, (i, i))
    assert len(list((tmp_path / FOLDER).iterdir())) == table.MAX_FILES
    before = len(counted)
    for some in sets[-table.MAX_FILES :]:
        list(encode_each(some, coder, 2, tmp_path))
    assert len(counted) == before


def test_small_data_leave_nothing_beside_them(tmp_path):
    list(encode_each([record(row) for row in PAIRS], encoder(), 2, tmp_path))
    assert not any(Path(tmp_path).iterdir())
