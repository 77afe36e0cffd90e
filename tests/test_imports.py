"""Arrows between the modules point one way: from what runs to what computes to what is plain data."""

import ast
import re
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
    "part_file",
    "result_file",
    "progress",
    "report",
    "batch",
    "sizes",
    "ops",
    "align",
    "config",
    "sharding",
    "data",
    "models",
)
ORDER += ("prepare", "scoring", "generation", "annotate", "curation", "training")
ORDER += ("evaluation", "plan", "testbed", "cli")
LEVEL = {name: i for i, name in enumerate(ORDER)}
# Stricter than the order; what is not here may import everything below.
ONLY = {
    "align": {"ops", "batch", "errors", "registry"},
    "data": {"batch", "config", "errors", "files", "registry", "sizes"},
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


COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ppermute"}
COLLECTIVES |= {"pshuffle", "axis_index", "axis_size", "pvary", "pcast"}
SHARDINGS = {"PartitionSpec", "NamedSharding", "axis_names"}  # what names axes, or is made of their names


def names_axes(source: ast.AST) -> list[int]:
    """Lines that name a mesh axis: "fsdp" and "tensor" mean nothing else; "data" and "slice" are axes where
    they are looked up in a mesh or its shape, given to a collective, or part of a sharding."""

    def axis(node: ast.AST, axes: set[str] = AXES) -> bool:
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in axes

    def of_mesh(node: ast.AST) -> bool:
        return isinstance(node, ast.expr) and bool(re.search(r"mesh\b|\.shape\b", ast.unparse(node)))

    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bad = any(alias.name.split(".")[-1] in SHARDINGS for alias in node.names)
        elif isinstance(node, ast.Attribute):
            bad = node.attr in SHARDINGS
        elif isinstance(node, ast.Subscript):
            bad = axis(node.slice) and of_mesh(node.value)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            bad = any(map(axis, sides)) and any(map(of_mesh, sides))
        elif isinstance(node, ast.Call):
            given = [each for value in node.args for each in ast.walk(value)]
            given += [each for keyword in node.keywords for each in ast.walk(keyword.value)]
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            looked_up = isinstance(node.func, ast.Attribute) and name == "get" and of_mesh(node.func.value)
            bad = any(map(axis, given)) and (looked_up or name in COLLECTIVES)
        else:
            bad = axis(node, {"fsdp", "tensor"})
        if bad:
            found.append(node.lineno)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("file", [f for f in FILES if f != Path("sharding.py")], ids=str)
def test_only_sharding_names_mesh_axes(file):
    assert not names_axes(tree(file)), f"{file} names mesh axes in these lines; let sharding.py do it"


@pytest.mark.parametrize(
    "source",
    [
        "mesh.shape['data']",
        "shape = bundle.mesh.shape.get('data', 1)",
        "facts_mesh['slice']",
        "self.mesh.get('data')",
        "'data' in mesh.shape",
        "mesh.axis_names.index(name)",
        "jax.lax.psum(x, 'data')",
        "lax.all_gather(x, axis_name=('slice', 'data'))",
        "axis_index('data')",
        "if axis == 'tensor': pass",
        "sizes = {'fsdp': 4}",
        "P(None, 'fsdp')",
        "from jax.sharding import NamedSharding",
        "from jax.sharding import PartitionSpec as P",
        "jax.sharding.PartitionSpec(None)",
    ],
)
def test_names_of_mesh_axes_are_seen(source):
    assert set(names_axes(ast.parse(source))) == {1}


@pytest.mark.parametrize(
    "source",
    ["row['data']", "row.get('data')", "mesh.shape", "x.shape[0]", "open('data')", "'slice' in names"],
)
def test_other_uses_of_the_words_are_free(source):
    assert not names_axes(ast.parse(source))


def test_importing_the_package_is_cheap():
    """Names load when they are used; none of them is misspelt."""
    for name in mllm_align.__all__:
        assert getattr(mllm_align, name) is not None
    with pytest.raises(AttributeError):
        mllm_align.nothing  # noqa: B018
