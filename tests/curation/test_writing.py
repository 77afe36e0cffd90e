"""Records written as files that read as they did."""

import pyarrow.parquet as pq
import pytest
from published import png, trl
from test_items import read, written

from mllm_align.curation.writing import GROUP, write


@pytest.fixture
def items(tmp_path):
    (tmp_path / "a.png").write_bytes(png(3, 2))
    (tmp_path / "b.png").write_bytes(png(4, 2))
    rows = [trl(id=str(i), images=["ab"[i % 2] + ".png"]) for i in range(GROUP + 1)]
    return read(written(tmp_path, *rows))


def test_images_that_were_no_files_stand_beside_the_lines(items, tmp_path):
    write(items[:8], tmp_path / "p.parquet")
    write(read(tmp_path / "p.parquet"), tmp_path / "lines/m.jsonl")
    assert len(list((tmp_path / "lines/m-images").iterdir())) == 2, "one for each different picture"
    found = read(tmp_path / "lines/m.jsonl")
    assert [item.record.images[0].read() for item in found] == [png(3, 2), png(4, 2)] * 4


def test_row_groups_are_small(items, tmp_path):
    write(items, tmp_path / "m.parquet")
    assert pq.ParquetFile(tmp_path / "m.parquet").num_row_groups == 2


def test_an_id_that_repeats_gets_a_number(items, tmp_path):
    write([items[0], items[1], items[0]], tmp_path / "m.jsonl")
    assert [item.record.id for item in read(tmp_path / "m.jsonl")] == ["0", "1", "0-1"]
