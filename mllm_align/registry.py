"""Kinds of objectives, annotators, readers, evaluators: ours by name, a user's by where it is defined.

A user's part is named `file.py:Name` or `package.module:Name`, in a config, on the command line and in the
saved config of a run. It needs no change of this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mllm_align.errors import InputError, one_line, quoted

T = TypeVar("T")
USER = "mllm_align_user_"  # modules that are run from a file
_NAMES: dict[type, str] = {}  # registered classes
_RUNNING: set[str] = set()  # modules of files that have not ended yet


class Registry(Mapping[str, Any]):
    """Name -> part, in the order of registration.

    what: "objective", for messages. homes: modules and packages whose modules register parts; imported at
    the first lookup, so that a lower layer can hold the registry of a higher one's parts.
    """

    def __init__(self, what: str, *homes: str):
        self.what = what
        self._homes = list(homes)
        self._registered: dict[str, Any] = {}

    @property
    def _parts(self) -> dict[str, Any]:
        while self._homes:
            home = importlib.import_module(self._homes.pop(0))
            for module in pkgutil.iter_modules(getattr(home, "__path__", ()), f"{home.__name__}."):
                importlib.import_module(module.name)
        return self._registered

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator: the part is known by this name in configs, on the command line, in help and docs."""

        def put(part: T) -> T:
            if name in self._registered:
                raise ValueError(f"{name!r} is registered twice as {self.what}")
            self._registered[name] = part
            if isinstance(part, type):
                _NAMES[part] = name
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

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def made(kind: Any) -> Any:
    """A part with its default settings. Raises InputError for a user's class that has none."""
    try:
        return kind()
    except InputError:
        raise
    except Exception as error:  # a user's class: anything may come out of it
        name = getattr(kind, "__name__", kind)
        raise InputError(f"{name} can't be made without arguments ({one_line(error, 200)})") from error


def registered_name(part: type) -> str | None:
    """The name of one of this package's registered classes."""
    return _NAMES.get(part) if part_name(part) is None else None


def part_name(part: Any) -> str | None:
    """The name by which `load_part` finds a class or function again; None for this package's own, and for
    what is defined in no file."""
    module = part.__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return None
    if module == "__main__" or module.startswith(USER):
        file = part_file(part)
        return None if file is None else f"{file}:{part.__qualname__}"
    return f"{module}:{part.__qualname__}"


def part_file(part: Any) -> Path | None:
    """The file of a module, or of that which a class or function is defined in."""
    module = part if isinstance(part, ModuleType) else sys.modules.get(part.__module__)
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def function_name(function: Any, what: str) -> str:
    """The name of a function that Python passed as an object. Raises InputError for one that no name finds
    again: a lambda, or a function within another."""
    name = part_name(function) if hasattr(function, "__qualname__") else None
    if name is None and getattr(function, "__module__", None) == "__main__":
        name = f"__main__:{function.__qualname__}"  # of a notebook
    if name is None or "<" in name:
        found = one_line(getattr(function, "__qualname__", repr(function)))
        raise InputError(f"{what} {found} is no function at the top of a file or notebook; define it there")
    return name


def absolute(name: str) -> str:
    """`file.py:Name` with the file's absolute path; any other name as it is."""
    place, colon, attribute = name.rpartition(":")
    return f"{Path(place).resolve()}{colon}{attribute}" if place.endswith(".py") else name


def load_part(name: str, what: str) -> Any:
    """The class or function that `file.py:Name` or `package.module:Name` names.

    A file is run once in a process, as long as it does not change. Raises InputError for what is not there
    or fails.
    """
    place, _, attribute = name.rpartition(":")
    wanted = f"{what} {quoted(name)}"
    if not place or not attribute:
        raise InputError(f"{wanted} names nothing; give file.py:Name or package.module:Name")
    try:
        if not place.endswith(".py"):
            return getattr(importlib.import_module(place), attribute)
        path = Path(place).resolve()
        if not path.is_file():
            raise InputError(f"{path} is not there; give the path of a Python file")
        main = sys.modules["__main__"]
        if part_file(main) == path and hasattr(main, attribute):  # the program itself: not to be run again
            return getattr(main, attribute)
        about = path.stat()
        return getattr(_run_once(path, about.st_mtime_ns, about.st_size), attribute)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's program: anything may come out of it
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"{wanted} can't be loaded ({said}); mend the file or the name") from error


@cache
def _run_once(path: Path, *version: int) -> ModuleType:
    return run_file(path)


def run_file(path: Path) -> ModuleType:
    """A user's Python file as a module. Raises what the file raises, and ImportError if it is no .py."""
    name = f"{USER}{sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not Python; it must end in .py")
    if name in _RUNNING:
        remedy = "put what the program does under if __name__ == '__main__'"
        raise InputError(
            f"{path} is asked for a part while it runs; {remedy}, or its parts into another file"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for it there
    _RUNNING.add(name)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _RUNNING.discard(name)
    return module
