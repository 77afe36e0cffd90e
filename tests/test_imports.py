"""Arrows between the modules point one way: from what runs to what computes to what is plain data."""

import ast
from pathlib import Path

import pytest

import mllm_align

ROOT = Path(mllm_align.__file__).parent
FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
ORDER = (
    "errors",
    "registry",
    "processes",
    "files",
    "locks",
    "progress",
    "batch",
    "ops",
    "align",
    "config",
    "sharding",
    "data",
    "models",
)
ORDER += ("prepare", "generate", "evaluate", "annotate", "training", "plan", "testbed", "cli")
LEVEL = {name: i for i, name in enumerate(ORDER)}
# Stricter than the order; what is not here may import everything below.
ONLY = {
    "align": {"ops", "batch", "errors", "registry"},
    "data": {"batch", "config", "errors", "files", "registry"},
    "models": {"ops", "batch", "config", "sharding", "data", "errors", "files", "registry"},
}
AXES = {"slice", "data", "fsdp", "tensor"}


def tree(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def home(file: Path) -> str:
    return file.with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_arrows_point_down(file):
    ours = home(file)
    assert ours in LEVEL, f"{ours} has no place in the order"
    for name in imported(file):
        package, _, rest = name.partition(".")
        if package != "mllm_align":
            continue
        there = rest.split(".")[0]
        if there == ours:
            continue
        assert there in LEVEL, f"{file} imports {name}: import it from its own module"
        assert LEVEL[there] < LEVEL[ours], f"{file} imports {name}"
        assert there in ONLY.get(ours, LEVEL), f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_frameworks_stay_where_they_belong(file):
    packages = {name.split(".")[0] for name in imported(file)}
    assert "torch" not in packages
    assert "flax" not in packages or home(file) == "models"


@pytest.mark.parametrize("file", [f for f in FILES if f != Path("sharding.py")], ids=str)
def test_only_sharding_names_mesh_axes(file):
    """No PartitionSpec is made elsewhere, and no mesh is asked for an axis."""
    assert not any(name.endswith(".PartitionSpec") for name in imported(file))
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            shape = isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
            assert not (shape and node.slice.value in AXES), f"{file} line {node.lineno}"


def test_importing_the_package_is_cheap():
    """Names load when they are used; none of them is misspelt."""
    for name in mllm_align.__all__:
        assert getattr(mllm_align, name) is not None
    with pytest.raises(AttributeError):
        mllm_align.nothing  # noqa: B018
