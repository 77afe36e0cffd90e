"""A growing file of finished rows: what is read back after a stop, and what is refused."""

import json
import signal

import pytest
from refusals import refusal

from mllm_align.errors import Interrupted, Preempted
from mllm_align.part_file import PartFile, flat

STAMP = {"config": {"a": 1, "b": [2]}, "model": "m"}


@pytest.fixture
def job(tmp_path):
    """job(stamp) is the job on the same output."""

    def job(stamp=STAMP, indices=range(4)):
        return PartFile(tmp_path / "out.json", "count", stamp, indices, lambda row: row["value"] >= 0)

    return job


@pytest.fixture
def begun(job):
    first = job()
    first.open()
    with first:
        first.add(2, {"value": 5})
        first.add(0, {"value": 0})
    return first


def test_rows_come_back_after_a_stop(job, begun):
    again = job()
    again.open()
    assert again.finished == {2: {"index": 2, "value": 5}, 0: {"index": 0, "value": 0}} == begun.finished
    with again:
        again.add(1, {"value": 7})
    last = job()
    last.open()
    assert list(last.finished) == [2, 0, 1]


@pytest.mark.parametrize(
    "number, kind, how",
    [(signal.SIGINT, Interrupted, "interrupted"), (signal.SIGTERM, Preempted, "preempted")],
)
def test_a_signal_says_what_is_kept(job, begun, capsys, number, kind, how):
    again, before = job(), signal.getsignal(number)
    again.open()
    with pytest.raises(kind, match=f"{how}; 3 of 4 records are done"), again:
        assert "resuming" in (said := capsys.readouterr().out) and "2 of 4 records are done" in said
        again.add(1, {"value": 7})
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    last = job()
    last.open()
    assert list(last.finished) == [2, 0, 1]


def test_a_line_that_was_cut_short_is_made_again(job, begun):
    whole = begun.part.read_bytes()
    begun.part.write_bytes(whole + b'{"index": 1, "val')
    again = job()
    again.open()
    assert list(again.finished) == [2, 0] and begun.part.read_bytes() == whole


def test_nothing_finished_leaves_nothing(job):
    first = job()
    first.open()
    with first:
        assert first.part.exists()
    assert not first.part.exists()


def test_another_job_is_named_by_what_differs(job, begun):
    other = {"config": {"a": 1, "b": [3]}, "model": "n"}
    line = refusal(job(other).open)
    assert "out.json.part: was begun with another config.b, model; remove it or give another --out" in line


@pytest.mark.parametrize("head", [b"", b"mine", b"[]\n", b'{"count": 3}\n', b'{"other": {"config": {}}}\n'])
def test_a_file_of_something_else(job, head):
    job().part.write_bytes(head)
    assert "can't be resumed" in refusal(job().open)


@pytest.mark.parametrize(
    "row",
    ['{"index": 9, "value": 1}', '{"index": 1, "value": -1}', '{"index": 1}', '{"index": true}', "[]", "x"],
)
def test_a_damaged_row_is_named(job, begun, row):
    with open(begun.part, "a") as file:
        file.write(row + "\n")
    assert "out.json.part line 4: is damaged; remove the file or that line" in refusal(job().open)


def test_a_stamp_is_compared_field_by_field():
    assert flat(STAMP) == {"config.a": 1, "config.b": [2], "model": "m", "config": None}
    assert json.dumps(flat(STAMP))
