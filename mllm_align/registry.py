"""Kinds of objectives, annotators, readers, evaluators: ours by name, a user's by where it is defined.

A user's part is named `file.py:Name` or `package.module:Name`, in a config, on the command line and in the
saved config of a run. It needs no change of this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mllm_align.errors import InputError, one_line, quoted

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """Name -> part, in the order of registration. what: "objective", for messages."""

    def __init__(self, what: str):
        self.what = what
        self._parts: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator: the part is known by this name in configs, on the command line, in help and docs."""

        def put(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"{name!r} is registered twice as {self.what}")
            self._parts[name] = part
            return part

        return put

    def find(self, name: str) -> Any:
        """The part of this name. Raises InputError for an unknown name, or a file that fails."""
        if name in self._parts:
            return self._parts[name]
        if ":" not in name:
            known = ", ".join(self._parts)
            problem = f"{quoted(name)} is no {self.what}"
            raise InputError(f"{problem}; give one of {known}, or your own as file.py:Name")
        return load_part(name, self.what)

    def name_of(self, part: Any) -> str | None:
        """The name that `find` takes; None for a part that it can't find again."""
        ours = next((name for name, each in self._parts.items() if each is part), None)
        return ours or getattr(part, "__part__", None)

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def load_part(name: str, what: str) -> Any:
    """The class or function that `file.py:Name` or `package.module:Name` names.

    A file is run once in a process, however often it is named. Raises InputError for what is not there or
    fails.
    """
    place, _, attribute = name.rpartition(":")
    wanted = f"{what} {quoted(name)}"
    if not place or not attribute:
        raise InputError(f"{wanted} names nothing; give file.py:Name or package.module:Name")
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            module, known_as = _run(path), f"{path}:{attribute}"
        else:
            module, known_as = importlib.import_module(place), name
        part = getattr(module, attribute)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's program: anything may come out of it
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"{wanted} can't be loaded ({said}); mend the file or the name") from error
    if getattr(part, "__part__", None) != known_as and getattr(part, "__module__", None) == module.__name__:
        part.__part__ = known_as
    return part


@cache
def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} is not there; give the path of a Python file")
    name = f"mllm_align_user_{sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
