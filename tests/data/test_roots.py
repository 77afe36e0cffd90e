"""Where images are looked for, and the folders that they may not leave."""

import os
from pathlib import Path

import pytest
from refusals import refusal

from mllm_align.data.roots import Roots

AT = "pairs.jsonl record 3, images[0]"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """a and b with pictures, one of the same name; secret.png beside them. The current folder is a."""
    for name in ("a/one.png", "a/both.png", "a/deep/three.png", "b/two.png", "b/both.png", "secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path.resolve()


def refused(roots, name):
    message = refusal(roots.find, name, AT)
    assert message.startswith(f"{AT}: ")
    return message


def test_the_first_folder_that_has_the_file(folders):
    roots = Roots([folders / "a", folders / "b"])
    assert roots.find("both.png", AT) == folders / "a/both.png"
    assert roots.find("two.png", AT) == folders / "b/two.png"
    assert Roots([folders / "b", folders / "a"]).find("both.png", AT) == folders / "b/both.png"


def test_a_file_that_none_of_several_has(folders):
    message = refused(Roots([folders / "a", "../b"]), "three.png")
    assert f"no file 'three.png' in any of '{folders / 'a'}', '../b'; check" in message
    assert "--data.image-root" in message


def test_a_file_that_an_only_folder_does_not_have(folders):
    """Whether it is there is found when it is opened."""
    assert Roots([folders / "a"]).find("absent.png", AT) == folders / "a/absent.png"


def test_without_folders_paths_start_here_and_lead_anywhere(folders):
    roots = Roots()
    assert roots.find("one.png", AT) == folders / "a/one.png"
    assert roots.find("../secret.png", AT) == folders / "secret.png"
    assert roots.find(str(folders / "b/two.png"), AT) == folders / "b/two.png"


@pytest.mark.parametrize(
    "name", ["../secret.png", "deep/../../secret.png", "/etc/passwd", "..", "deep/../.."]
)
def test_paths_that_leave_the_folder(folders, name):
    message = refused(Roots([folders / "a"]), name)
    assert f"the path '{name}' leaves the image folder '{folders / 'a'}'" in message
    assert "--data.allow-outside" in message
    found = Roots([folders / "a"], allow_outside=True).find(name, AT)
    assert found == Path(os.path.realpath(folders / "a" / name))


@pytest.mark.parametrize("name", ["deep/../one.png", "./one.png", "deep//../one.png"])
def test_dots_within_the_folder(folders, name):
    assert Roots([folders / "a"]).find(name, AT) == folders / "a/one.png"


def test_an_absolute_path_into_the_folder(folders):
    assert Roots([folders / "a"]).find(str(folders / "a/one.png"), AT) == folders / "a/one.png"


def test_a_folder_of_a_longer_name_is_another(folders):
    (folders / "a2").mkdir()
    (folders / "a2" / "x.png").touch()
    assert "leaves" in refused(Roots([folders / "a"]), "../a2/x.png")


@pytest.mark.parametrize("link, target", [("a/link.png", "secret.png"), ("a/linked", "b")])
def test_symbolic_links_that_leave_the_folder(folders, link, target):
    """Of the file, and of a folder above it; also once that folder was resolved before."""
    (folders / link).symlink_to(folders / target)
    name = "link.png" if target == "secret.png" else "linked/two.png"
    roots = Roots([folders / "a"])
    for _ in range(2):
        assert "leaves the image folder" in refused(roots, name)
    inside = Roots([folders / "a"], within=[folders])
    assert inside.find(name, AT) == folders / ("secret.png" if name == "link.png" else "b/two.png")


def test_the_folder_itself_may_be_a_link(folders):
    (folders / "link").symlink_to(folders / "a")
    assert Roots([folders / "link"]).find("one.png", AT) == folders / "a/one.png"


def test_a_further_folder_that_paths_may_lead_into(folders):
    roots = Roots([folders / "a"], within=[folders / "b"])
    assert roots.find("../b/two.png", AT) == folders / "b/two.png"
    assert "leaves" in refused(roots, "../secret.png")


@pytest.mark.parametrize(
    "name, said",
    [
        ("https://host/a.png", "is a URL"),
        ("", "the path is empty"),
        (" \t", "the path is empty"),
        ("a\0b.png", "embedded null byte"),
        ("\ud800.png", "a lone surrogate"),
        ("x" * 256, "not a path"),
        ("deep/" + "é" * 128, "(133 characters), not a path"),
        ("d/" * 2100, "not a path"),
    ],
)
def test_what_is_no_path(folders, name, said):
    assert said in refused(Roots([folders / "a"]), name)
    assert said in refused(Roots(), name)


@pytest.mark.parametrize("name", ["é" * 127, "d/" * 2000])
def test_the_longest_paths_that_there_can_be(folders, name):
    assert Roots([folders / "a"]).find(name, AT) == folders / "a" / name


def test_a_loop_of_links_is_no_path(folders):
    (folders / "a/loop").symlink_to(folders / "a/loop")
    roots = Roots([folders / "a"])
    found = roots.find("loop", AT)  # as os.path.realpath leaves it: it can't be opened
    assert not found.exists()
