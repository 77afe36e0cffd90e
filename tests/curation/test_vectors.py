"""Vectors in a folder: what a kill leaves, and whose folder it is."""

import numpy as np
import pytest
from refusals import assert_refusal

from mllm_align.curation.vectors import Vectors
from mllm_align.errors import InputError

NAMES = [bytes([i]) * 32 for i in range(3)]
ROWS = {name: np.arange(4, dtype=np.float32) + i for i, name in enumerate(NAMES)}


def opened(folder, **stamp):
    return Vectors(folder, {"model": "m"} | stamp, 4, "--index")


def test_what_is_there_after_a_kill(tmp_path):
    folder = tmp_path / "new" / "index"
    assert opened(folder).open() == {}
    opened(folder).add(ROWS)
    entries = folder / "entries"
    assert entries.stat().st_size == 3 * (32 + 16)
    entries.write_bytes(entries.read_bytes()[:-1])
    kept = opened(folder)
    assert [*kept.open()] == NAMES[:2] and entries.stat().st_size == 2 * 48
    kept.add({NAMES[2]: ROWS[NAMES[2]]})
    for name, vector in kept.open().items():
        np.testing.assert_array_equal(vector, ROWS[name])


def test_what_is_refused(tmp_path):
    opened(tmp_path).open()
    assert_refusal(lambda: opened(tmp_path, model="n").open(), "belongs to another model", "--index")
    with pytest.raises(InputError, match="another width"):
        Vectors(tmp_path, {"model": "m"}, 5, "--index").open()
    (tmp_path / "entries").mkdir()
    assert_refusal(lambda: opened(tmp_path).open(), "can't read", "--index")
    assert_refusal(lambda: opened(tmp_path).add(ROWS), "can't write", "make room")
