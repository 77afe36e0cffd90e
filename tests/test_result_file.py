"""A result file: whole or not at all, never its own data."""

import pytest

from mllm_align.errors import InputError
from mllm_align.locks import alone
from mllm_align.result_file import result


def test_a_result_is_there_when_it_is_whole(tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    with result(out, [{"rows": 1}]) as file:
        file.write("a line\n")
        assert not out.exists()
        with pytest.raises(InputError, match="is in use"), alone(out):
            pass
    assert out.read_text() == "a line\n" and [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_one_that_fails_leaves_what_was_there(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt), result(out, tmp_path / "data.jsonl") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert out.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_its_own_data_stay(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("dear")
    (tmp_path / "link.jsonl").symlink_to(data)
    for given in (data, str(data)):
        with (
            pytest.raises(InputError, match="is the data file itself"),
            result(tmp_path / "link.jsonl", given),
        ):
            pass
    assert data.read_text() == "dear"
