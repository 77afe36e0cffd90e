"""Parts by name: the package's own, and a user's in a file or a module of hers."""

import dataclasses
import pickle
import sys
from types import ModuleType

import pytest
from refusals import refusal

from mllm_align.config import Config
from mllm_align.errors import InputError
from mllm_align.registry import Registry, load_part, part_file, part_name

LOSS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    beta: float = 0.5
"""


def test_the_program_itself_is_not_run_again(file, monkeypatch):
    """A script that passes its own class, and continues: its file would train within the training."""
    path = file("class Mine: pass\nraise SystemExit('run again')\n")
    main = ModuleType("__main__")
    main.__file__, main.Mine = str(path), int
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert load_part(f"{path}:Mine", "loss") is int


def test_a_program_that_would_run_within_itself_is_told_so(file):
    """Its parts are loaded by another command, and it does its work without a guard."""
    path = file(
        "class Mine: pass\nfrom mllm_align.registry import load_part\nload_part(__file__ + ':Mine', 'x')\n"
    )
    assert "put what the program does under if __name__ ==" in refusal(load_part, f"{path}:Mine", "loss")


@pytest.fixture
def losses():
    registry = Registry("loss")
    registry.register("first")(int)
    registry.register("second")(float)
    return registry


@pytest.fixture
def file(tmp_path):
    """file(text) is a Python file with this text."""

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refused(name):
    return refusal(load_part, name, "loss")


# ---- ours --------------------------------------------------------------------------------------------


def test_parts_are_known_by_name_in_the_order_of_registration(losses):
    assert [*losses] == ["first", "second"] and len(losses) == 2
    assert losses.find("second") is losses["second"] is float
    assert "third" not in losses


def test_a_decorated_part_is_the_part_itself(losses):
    @losses.register("third")
    def third():
        return 3

    assert third() == 3 and losses.find("third") is third


def test_a_name_is_given_once(losses):
    with pytest.raises(ValueError, match="'first' is registered twice as loss"):
        losses.register("first")(str)
    assert losses["first"] is int


def test_an_unknown_name_lists_the_known_ones(losses):
    with pytest.raises(InputError) as error:
        losses.find("thrid")
    assert str(error.value) == "'thrid' is no loss; give one of first, second, or your own as file.py:Name"


# ---- a user's ----------------------------------------------------------------------------------------


def test_a_part_of_a_file(losses, file):
    path = file(LOSS, "my.losses.py")
    mine = losses.find(f"{path}:Mine")
    assert mine(beta=2).beta == 2 and dataclasses.is_dataclass(mine)
    assert pickle.loads(pickle.dumps(mine(3))) == mine(3)


def test_a_file_is_run_once_however_it_is_named(losses, file, monkeypatch):
    path = file(LOSS + "\nwith open(__file__ + '.runs', 'a') as runs:\n    runs.write('x')\n")
    monkeypatch.chdir(path.parent)
    found = [losses.find(f"{name}:Mine") for name in (path, path, "mine.py", "./mine.py")]
    assert all(part is found[0] for part in found)
    assert path.with_name("mine.py.runs").read_text() == "x"


def test_files_of_one_name_are_two(file, tmp_path):
    (tmp_path / "other").mkdir()
    one, two = file("def Mine(): return 1"), file("def Mine(): return 2", "other/mine.py")
    assert [load_part(f"{path}:Mine", "loss")() for path in (one, two)] == [1, 2]


def test_a_part_of_a_module(losses, file, monkeypatch):
    path = file(LOSS, "module_of_a_user.py")
    monkeypatch.syspath_prepend(path.parent)
    try:
        mine = losses.find("module_of_a_user:Mine")
        assert mine.__module__ == "module_of_a_user"
        assert part_name(mine) == "module_of_a_user:Mine"
    finally:
        del sys.modules["module_of_a_user"]


def test_the_name_of_a_part_finds_it_again(losses, file, monkeypatch):
    path = file(LOSS)
    monkeypatch.chdir(path.parent)
    mine = losses.find("mine.py:Mine")
    assert part_name(mine) == f"{path.resolve()}:Mine" and part_file(mine) == path.resolve()
    monkeypatch.chdir("/")
    assert losses.find(f"{path}:Mine") is mine
    assert part_name(Config) is None


def test_what_a_file_only_imports_is_named_where_it_is_defined(losses, file):
    path = file("from dataclasses import Field as Mine")
    assert losses.find(f"{path}:Mine") is dataclasses.Field
    assert part_name(dataclasses.Field) == "dataclasses:Field"


def test_a_file_that_changed_is_run_again(losses, file):
    path = file("def Mine(): return 1")
    assert losses.find(f"{path}:Mine")() == 1
    file("def Mine(): return 'another'")
    assert losses.find(f"{path}:Mine")() == "another"


@pytest.mark.parametrize(
    "text, said",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Mine(", "SyntaxError: '(' was never closed"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("class Other: pass", "has no attribute 'Mine'"),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
    ],
)
def test_a_file_that_can_not_be_used_is_one_line(file, text, said):
    name = f"{file(text)}:Mine"
    line = refused(name)
    assert line.startswith("loss '") and "mine.py:Mine' can't be loaded (" in line and said in line
    assert line.endswith("; mend the file or the name")
    assert refused(name) == line, "the second time as the first"


def test_a_file_that_failed_leaves_no_module(file):
    path = file("raise ValueError")
    before = set(sys.modules)
    refused(f"{path}:Mine")
    assert set(sys.modules) == before


def test_what_a_file_refuses_by_itself_stands_as_it_is(file):
    path = file("from mllm_align.errors import InputError\nraise InputError('beta is 3; give less')")
    assert refused(f"{path}:Mine") == "beta is 3; give less"


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "absent.py"
    assert refused(f"{path}:Mine") == f"{path} is not there; give the path of a Python file"
    (tmp_path / "folder.py").mkdir()
    assert "folder.py is not there" in refused(f"{tmp_path / 'folder.py'}:Mine")


def test_a_module_that_is_not_there():
    assert "No module named 'nowhere_to_be_found'" in refusal(
        load_part, "nowhere_to_be_found.losses:Mine", "loss"
    )


@pytest.mark.parametrize("name", [":Mine", "mine.py:", "mine.py", "", ":"])
def test_a_name_of_nothing(name):
    assert refused(name) == f"loss '{name}' names nothing; give file.py:Name or package.module:Name"
