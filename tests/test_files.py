"""JSON is read with care; outputs appear whole or not at all."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from mllm_align.errors import InputError, NotFinite
from mllm_align.files import (
    MAX_DEPTH,
    json_text,
    lines_beside,
    names_apart,
    new_file,
    new_folder,
    parse_json,
    read_json,
)


def fill_folder(out):
    with new_folder(out) as folder:
        (folder / "a.txt").write_text("a")


def fill_file(out):
    with new_file(out) as file:
        file.write("a")


WRITERS = pytest.mark.parametrize("write", [fill_folder, fill_file])


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_folder_is_made_with_its_parents(tmp_path):
    fill_folder(tmp_path / "deep" / "out")
    assert everything(tmp_path) == ["deep", "deep/out", "deep/out/a.txt"]


def test_folder_is_not_there_before_the_end(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert everything(tmp_path) == ["out"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    fill_folder(tmp_path / "out")
    assert everything(tmp_path) == ["out", "out/a.txt"]


def test_folder_has_ordinary_permissions(tmp_path):
    fill_folder(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@WRITERS
def test_links_are_followed(tmp_path, write):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").exists() and not (tmp_path / "real").is_symlink()


def test_full_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "not empty" in refusal(fill_folder, tmp_path / "out")
    assert everything(tmp_path) == ["out", "out/mine"]


def test_file_where_a_folder_is_wanted_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "this is a file" in refusal(fill_folder, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@WRITERS
def test_place_under_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        assert str(out) in refusal(write, out)
    assert everything(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
@pytest.mark.parametrize("new", [new_folder, new_file])
def test_failure_leaves_nothing(tmp_path, new, error):
    with pytest.raises(error), new(tmp_path / "deep" / "out") as partial:
        if new is new_folder:
            (partial / "sub").mkdir()
            (partial / "sub" / "a.txt").write_text("half")
        raise error("in the middle")
    assert everything(tmp_path) == []


@pytest.mark.parametrize("new", [new_folder, new_file])
def test_os_errors_become_one_line(tmp_path, new):
    def full():
        with new(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    assert refusal(full) == f"can't write {tmp_path / 'out'}: No space left on device"
    assert everything(tmp_path) == []


def test_os_error_names_another_file_but_not_the_hidden_one(tmp_path):
    def read():
        with new_folder(tmp_path / "out"):
            (tmp_path / "missing").read_text()

    def write():
        with new_folder(tmp_path / "out") as folder:
            (folder / "sub" / "a.txt").write_text("a")

    assert refusal(read).endswith(f"({tmp_path / 'missing'})")
    assert refusal(write).endswith("No such file or directory")


def test_file_is_replaced_only_at_the_end(tmp_path):
    out = tmp_path / "out.txt"
    out.write_text("old")
    with new_file(out) as file:
        file.write("größer")
        assert out.read_text() == "old"
    assert out.read_bytes() == "größer".encode()
    with pytest.raises(RuntimeError), new_file(out) as file:
        file.write("half")
        raise RuntimeError
    assert out.read_bytes() == "größer".encode()
    assert everything(tmp_path) == ["out.txt"]


def test_binary_file(tmp_path):
    with new_file(tmp_path / "out.bin", "wb") as file:
        file.write(b"\0\xff")
    assert (tmp_path / "out.bin").read_bytes() == b"\0\xff"


def test_file_refuses_folders_and_pipes(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert "folder" in refusal(fill_file, tmp_path / "folder")
    assert "pipe" in refusal(fill_file, tmp_path / "pipe")
    assert everything(tmp_path) == ["folder", "pipe"]


@WRITERS
def test_name_too_long_is_refused(tmp_path, write):
    assert "can't write" in refusal(write, tmp_path / ("x" * 256))
    assert everything(tmp_path) == []


@pytest.mark.parametrize("text", ["[" * MAX_DEPTH + "]" * MAX_DEPTH, '{"a": [1, {"b": "]]]"}]}'])
def test_json_is_read(text):
    assert str(parse_json(text)) == str(parse_json(text.encode())) != ""


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 500, 100_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_nested_json_is_no_recursion_error(depth, opening, closing):
    text = opening * depth + "1" + closing * depth
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(given)


@pytest.mark.parametrize("text", ["", "{", "[1", "\ud800", "1" + "0" * 5000])
def test_other_texts_are_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "contents, said",
    [
        (b"[1]", "holds list where an object belongs"),
        (b"null", "holds NoneType where an object belongs"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 5000, "nested too deeply"),
        (None, "can't be read (No such file or directory)"),
    ],
)
def test_a_json_file_that_is_no_object_is_refused(tmp_path, contents, said):
    file = tmp_path / "a.json"
    if contents is not None:
        file.write_bytes(contents)
    message = refusal(read_json, file, "copy it again")
    assert str(file) in message and said in message and message.endswith("; copy it again")


def test_a_json_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\u00e9"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "") == {"a": "\u00e9"}


# ---- what is reported --------------------------------------------------------------------------------


def test_results_hold_no_number_that_is_not_finite():
    good = {"a": [1.5, None, np.float32(2.0)], "out": Path("x/y"), "n": np.int64(3)}
    assert json.loads(json_text(good)) == {"a": [1.5, None, 2.0], "out": "x/y", "n": 3}
    assert json_text([1], indent=2) == "[\n  1\n]"
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NotFinite, match=r"^scores\[1\]\.logp is not finite, so it"):
            json_text({"scores": [{"logp": 0.0}, {"logp": value}]})
    with pytest.raises(NotFinite, match="a number is not finite"):
        json_text({"x": np.float32("nan")})


def test_lines_stand_beside_the_result(tmp_path):
    assert lines_beside(tmp_path / "a.json") == tmp_path / "a.jsonl"
    (tmp_path / "b.jsonl").touch()
    assert "is there without its .json" in refusal(lines_beside, tmp_path / "b.json")
    assert "give --out a name that ends in .json" in refusal(lines_beside, tmp_path / "b.jsonl")
    assert "this is a folder" in refusal(lines_beside, tmp_path)


def test_paths_have_names_apart():
    assert names_apart(["runs/dpo", "/base/"]) == ["dpo", "base"]
    assert names_apart(["a/x/m", "b/x/m", "b/y/m", "n"]) == ["a-x-m", "b-x-m", "y-m", "n"]
    here = Path.cwd().name
    assert names_apart([".", "/"]) == [here, "root"]
    with pytest.raises(InputError, match="runs/a is given twice; give each once"):
        names_apart(["runs/a", "runs/b", "runs/./a"])
