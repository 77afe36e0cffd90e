"""Which of the project's requirements this machine lacks, and the command that fetches them elsewhere."""

from __future__ import annotations

import importlib.metadata as metadata
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
    from packaging.tags import platform_tags
except ModuleNotFoundError:  # a bare machine: pip has a copy of its own
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.tags import platform_tags

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
UNUSED = ("tyro", "tensorflow-datasets")  # the command line and the testbed: no part imports them
# pip matches the names of platforms exactly, and wheels carry these
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def requirements(pyproject: Path = PYPROJECT) -> list[Requirement]:
    """What the project itself asks for, extras left out."""
    return [Requirement(line) for line in tomllib.loads(pyproject.read_text())["project"]["dependencies"]]


def lacking(wanted: list[Requirement]) -> list[dict[str, str | None]]:
    """Each package that is not there, or not in a version that the project takes: name, wanted, found.

    Packages that are there are asked what they need in turn; of that only its absence is told.
    """
    out: dict[str, dict[str, str | None]] = {}
    for own, requirement in _walk(wanted):
        found = _version(requirement.name)
        if found is None or (own and not requirement.specifier.contains(found, prereleases=True)):
            each = {"name": requirement.name, "wanted": str(requirement.specifier), "found": found}
            out.setdefault(requirement.name.lower().replace("_", "-"), each)
    return list(out.values())


def _walk(wanted: list[Requirement]) -> Iterator[tuple[bool, Requirement]]:
    """(whether the project itself asks for it, requirement) of everything that is needed here."""
    seen, waiting = set(), [(True, requirement) for requirement in wanted]
    while waiting:
        own, requirement = waiting.pop(0)
        extras = requirement.extras or {""}
        known = requirement.name.lower().replace("_", "-"), frozenset(extras)
        if not own and known in seen:
            continue
        seen.add(known)
        yield own, requirement
        if _version(requirement.name) is None:
            continue
        for line in metadata.requires(requirement.name) or ():
            need = Requirement(line)
            if need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in {*extras, ""}
            ):
                waiting.append((False, need))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def command(lacks: list[dict[str, Any]], folder: str = "wheels") -> str | None:
    """One line for a machine with a network: wheels for this machine's Python and platform."""
    wanted = [f"{each['name']}{each['wanted']}" for each in lacks if each["name"] not in UNUSED]
    if not wanted:
        return None
    known = set(platform_tags())
    names = [tag for tag in known if tag.rpartition("_")[0].removesuffix("_x86") in PLATFORMS]
    platforms = [word for name in sorted(names, reverse=True) for word in ("--platform", name)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    words = ["python3", "-m", "pip", "download", "--only-binary=:all:", "--python-version", python]
    words += ["--implementation", "cp", *platforms, "-d", folder]
    return shlex.join([*words, *wanted])


def report() -> dict[str, Any]:
    """The first line of the check."""
    wanted = requirements()
    lacks = lacking(wanted)
    return {
        "part": "needs",
        "item": "packages",
        "status": "left out" if lacks else "ok",
        "python": sys.version.split()[0],
        "found": {r.name: _version(r.name) for r in wanted if _version(r.name)},
        "lacking": lacks,
        "not_needed_here": list(UNUSED),
        "fetch": command(lacks),
    }
