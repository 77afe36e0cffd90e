"""Pixels read ahead of their use: in order, no more than asked, errors where they belong."""

import threading

import pytest

from mllm_align.errors import InputError
from mllm_align.prepare import pixels_ahead


class Reader:
    """An encoder that knows which records it was asked for; record 7 can't be read."""

    def __init__(self):
        self.asked, self.lock = [], threading.Lock()

    def pixels(self, record, draw):
        assert draw == (0, 0)
        with self.lock:
            self.asked.append(record)
        if record == 7:
            raise InputError("record 7 can't be read")
        return record * 10


@pytest.mark.parametrize("threads", [1, 3])
def test_pixels_come_in_order(threads):
    assert list(pixels_ahead(Reader(), range(7), 3, threads)) == [0, 10, 20, 30, 40, 50, 60]
    assert list(pixels_ahead(Reader(), [], 3, threads)) == []


def test_no_more_is_read_than_may_be_ahead():
    reader = Reader()
    pixels = pixels_ahead(reader, range(100), 3, threads=1)
    assert reader.asked == []
    assert [next(pixels), next(pixels)] == [0, 10]
    pixels.close()
    assert set(reader.asked) <= set(range(5))


def test_an_image_that_cannot_be_read_is_refused_at_its_turn():
    pixels = pixels_ahead(Reader(), range(5, 10), 4)
    assert [next(pixels), next(pixels)] == [50, 60]
    with pytest.raises(InputError, match="record 7"):
        next(pixels)
