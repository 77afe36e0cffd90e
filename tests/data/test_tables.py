"""Images in Parquet and Arrow files: read when they are asked for, by any thread, and never all held."""

import io
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm_align.data import tables
from mllm_align.data.images import image_size, load_rgb
from mllm_align.data.readers import records_from
from mllm_align.data.tables import Cell
from mllm_align.errors import InputError

ROW = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def png(number, side=4):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, rows, group=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def arrow(path, rows, new=pa.ipc.new_stream):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def arrow_file(path, rows):
    return arrow(path, rows, pa.ipc.new_file)


WRITERS = {"a.parquet": parquet, "stream.arrow": arrow, "file.arrow": arrow_file}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    return lambda rows: WRITERS[request.param](tmp_path / request.param, rows)


def shapes(number):
    """The same picture in each way in which a row may hold it."""
    data = {"bytes": png(number), "path": None}
    part = {"type": "image", "image": data, "text": None}
    words = {"type": "text", "image": None, "text": "What?"}
    return {
        "image": {**ROW, "image": data},
        "bytes": {**ROW, "image": png(number)},
        "images": {**ROW, "images": [{"bytes": png(0), "path": "x"}, data][number % 2 :]},
        "prompt": {**ROW, "prompt": [{"role": "user", "content": [part, words]}]},
    }


@pytest.mark.parametrize("shape", shapes(0))
def test_bytes_are_read_from_their_place(write, shape):
    records = records_from(write([shapes(i)[shape] for i in range(8)]))
    sources = [record.images[-1] for record in records]
    assert all(source.data is None and isinstance(source.stored, Cell) for source in sources)
    assert len({source.key for source in sources}) == 8
    again = [record.images[-1].key for record in records_from(sources[0].stored.table.path)]
    assert again == [source.key for source in sources]
    for i in (7, 0, 4, 3, 1, 2, 6, 5):
        assert sources[i].read() == png(i)
        assert np.asarray(load_rgb(sources[i]))[0, 0].tolist() == [i] * 3


def test_nulls_and_paths_are_no_cells(write):
    rows = [{**ROW, "image": {"bytes": None, "path": "a.png"}}, {**ROW, "image": None}]
    rows.append({**ROW, "image": {"bytes": png(1), "path": None}})
    records = records_from(write(rows))
    assert records[0].images[0].path.name == "a.png" and records[1].images == ()
    assert records[2].images[0].read() == png(1)


def test_threads_read_the_right_bytes(write, monkeypatch):
    monkeypatch.setattr(tables._columns, "capacity", 1)  # nothing is kept but the last
    records = records_from(write([shapes(i)["image"] for i in range(40)]))
    order = np.random.default_rng(0).integers(0, 40, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda i: records[i].images[0].read(), order)
        assert list(read) == [png(i) for i in order]


def test_images_are_not_held(write):
    noise = np.random.default_rng(0)
    pictures = [noise.bytes(50_000) for _ in range(200)]
    path = write([{**ROW, "image": picture} for picture in pictures])
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    records = records_from(path)
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert held < 1_000_000 < sum(map(len, pictures))
    assert records[150].images[0].read() == pictures[150]


def test_bytes_without_nulls_are_not_read_for_rows(tmp_path):
    data = png(1)
    both, null = {"bytes": data, "path": "p"}, {"bytes": None, "path": "p"}
    row = {
        "image": both,
        "images": [both],
        "a.b": both,
        "deep": [{"content": [{"image": both, "text": "x"}]}],
        "raw": data,
        "some": null,
        "only": {"bytes": data},
        "two": {"bytes": data, "more": data},
    }
    table = tables.ParquetTable(parquet(tmp_path / "a.parquet", [row, row]))
    read = set(table._leaves(0))
    assert {"raw", "some.bytes", "only.bytes", "two.bytes", "two.more", "image.path"} <= read
    skipped = {"image.bytes", "images.list.element.bytes", "a.b.bytes"}
    skipped.add("deep.list.element.content.list.element.image.bytes")
    assert not read & skipped
    for number, found in enumerate(table.rows()):
        deep = found["deep"][0]["content"][0]["image"]["bytes"]
        cells = [found["image"]["bytes"], found["images"][0]["bytes"], found["a.b"]["bytes"], deep]
        cells += [found["raw"], found["only"]["bytes"], *found["two"].values()]
        assert all(cell.row == number and cell.read() == data for cell in cells)
        assert found["some"] == null and found["image"]["path"] == "p"


def test_a_file_that_is_written_anew(write):
    first = records_from(write([shapes(1)["image"]]))[0].images[0]
    assert first.read() == png(1)
    second = records_from(write([shapes(2)["image"]]))[0].images[0]
    assert second.read() == png(2) and first.key != second.key


def test_what_was_read_is_kept_within_bounds(tmp_path):
    recent = tables._ColumnCache(capacity=100)
    read = []

    def column(name):
        def make():
            read.append(name)
            return pa.chunked_array([pa.array([bytes(40)])])

        return recent.get((None, 0, name), make)

    for name in "aabacab":
        column(name)
    assert read == ["a", "b", "c", "b"]
    assert recent._held == sum(each.nbytes for each in recent._columns.values())


def test_bytes_that_cannot_be_read(tmp_path):
    path = parquet(tmp_path / "a.parquet", [shapes(i)["image"] for i in range(4)])
    records = records_from(path)
    path.unlink()
    with pytest.raises(
        InputError, match=r"a.parquet record 3, image: its bytes cannot be read \(FileNotFound"
    ):
        image_size(records[3].images[0])
    empty = records_from(parquet(tmp_path / "b.parquet", [{**ROW, "image": b""}]))
    with pytest.raises(InputError, match="record 0, image: the image has 0 bytes"):
        image_size(empty[0].images[0])


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files(tmp_path, name):
    path = WRITERS[name](tmp_path / name, [{**ROW, "prompt": f"Question {i}?"} for i in range(50)])
    whole = path.read_bytes()
    noise = np.random.default_rng(0)
    for cut in (0, 3, 8, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=name):
            records_from(path)
    for _ in range(60):  # one byte changed: other text, or one line
        damaged = bytearray(whole)
        damaged[noise.integers(len(whole))] ^= int(noise.integers(1, 256))
        path.write_bytes(damaged)
        try:
            records_from(path)
        except InputError as error:
            assert str(error).startswith(name) and "\n" not in str(error)
