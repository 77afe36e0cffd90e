"""Tests stand where their modules stand: a/b.py is tested by tests/a/test_b.py, or test_a_b.py there.

Test files have names of their own, so that pytest tells them apart; hence the second form.
"""

from pathlib import Path

import pytest

import mllm_align

ROOT, TESTS = Path(mllm_align.__file__).parent, Path(__file__).parent
SMALL = 30  # lines; what is not longer needs no file of its own
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p.name != "__init__.py")
UNCHECKED_FOLDERS = {"models", "align", "training/online"}
ELSEWHERE = {
    "config/annotators.py": "config/test_config_checks.py",
    "data/formats/base.py": "data/test_formats.py",
    "data/formats/conversations.py": "data/test_formats.py",
    "data/formats/ratings.py": "data/test_formats.py",
    "data/formats/triples.py": "data/test_formats.py",
}


def mirrors(module: Path) -> list[Path]:
    """The places where a module's tests may stand."""
    names = [module.stem, f"{module.parent.name}_{module.stem}"]
    return [TESTS / module.parent / f"test_{name}.py" for name in names]


def checked(module: Path) -> bool:
    folders = {parent.as_posix() for parent in module.parents}
    lines = (ROOT / module).read_text(encoding="utf-8").count("\n")
    return lines > SMALL and not folders & UNCHECKED_FOLDERS


@pytest.mark.parametrize("module", filter(checked, MODULES), ids=str)
def test_a_module_has_its_tests(module):
    if module.as_posix() not in ELSEWHERE:
        assert any(place.exists() for place in mirrors(module)), f"write {mirrors(module)[0]}"


@pytest.mark.parametrize("module, tests", ELSEWHERE.items())
def test_what_is_tested_elsewhere_is_there_and_needs_it(module, tests):
    assert (ROOT / module).exists(), "the module is gone: take it off the list"
    assert (TESTS / tests).exists()
    assert not any(place.exists() for place in mirrors(Path(module))), "it has tests of its own now"


@pytest.mark.parametrize("folder", sorted(UNCHECKED_FOLDERS))
def test_a_folder_that_is_not_checked_is_there(folder):
    assert (ROOT / folder).is_dir()


def test_names_of_test_files_are_unique():
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))
