"""Help on one screen: a verb's own options, and those of its config that are used most."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from mllm_align.cli.options import Option, option_name

COLUMN = 32  # where descriptions start
LONG = 24  # characters of the names of an option's values


def title(verb: type) -> str:
    """The first line of its docstring."""
    return (verb.__doc__ or "").splitlines()[0]


def program(verbs: dict[str, type], shells: Iterable[str]) -> str:
    """The verbs, a line each."""
    lines = ["usage: mllm-align VERB ...", ""]
    lines += [_entry(name, title(verb), 16) for name, verb in verbs.items()]
    lines += ["", _entry("VERB --help", "the options that are used most; --help-all: every one", COLUMN)]
    lines += [_entry("--version", "the version", COLUMN)]
    lines += [_entry("--print-completion SHELL", f"a completion script for {', '.join(shells)}", COLUMN)]
    return "\n".join(lines)


def screen(name: str, verb: type, known: dict[str, Option]) -> str:
    """Usage, what the verb does, what it needs, its own options but rare ones, and the common ones of its
    branches."""
    own = {option_name("", each.name) for each in dataclasses.fields(verb)}  # type: ignore[arg-type]
    own -= {f"--{each}" for each in getattr(verb, "RARE", ())}
    common = {f"--{each}" for each in getattr(verb, "COMMON", ())}
    needed = {each: option for each, option in known.items() if option.required}
    positional = f"{getattr(verb, 'FIRST', 'CONFIG')} " if "--config-file" in own else ""
    words = positional + "".join(f"{each} {_metavar(option.kind)} " for each, option in needed.items())
    shown = [
        [each for each in known if each in needed],
        [each for each in known if each in own and each not in needed],
        [each for each in known if each in common],
    ]
    lines = [_wrapped(f"usage: mllm-align {name} {words}[options]", " " * 8), ""]
    lines += [_wrapped(part.strip()) for part in (verb.__doc__ or "").split("\n\n")]
    for heading, names in zip(("needed:", "options:", "most used of the rest:"), shown, strict=True):
        lines += ["", heading] * bool(names)
        lines += [_described(each, known[each]) for each in names]
    if sum(map(len, shown)) < len(known):
        more = f"mllm-align {name} --help-all has all {len(known)} options, and more about each"
        lines += ["", _wrapped(more)]
    return "\n".join(lines)


def fitted(text: str) -> str:
    """Another program's help, its lines no wider than the terminal and without blanks at their ends."""
    return "\n".join(
        line if len(line) <= _width() else _wrapped(line, " " * 8 if line.startswith("usage:") else "")
        for line in (line.rstrip() for line in text.splitlines())
    )


def _described(name: str, option: Option) -> str:
    about = re.split(r"(?<=[.;]) ", option.doc)[0].rstrip(".,; ")
    metavar = _metavar(option.kind)
    if option.kind is bool and option.default:
        name = re.sub(r"([^-.]+[^.]*)$", r"[no-]\1", name)
    if len(metavar) > LONG:
        about, metavar = f"{about}: {metavar.replace('|', ', ')}", "KIND"
    if not (option.default is False or option.default in (None, dataclasses.MISSING, ())):
        values = option.default if isinstance(option.default, tuple) else [option.default]
        about += f" (default: {' '.join(map(str, values))})"
    return _entry(f"{name} {metavar}".rstrip(), about, COLUMN)


def _entry(left: str, right: str, column: int) -> str:
    """Two columns; what is too long for the first has a line of its own."""
    indent = " " * column
    text = _wrapped(indent + right, indent)
    if len(left) < column - 2:
        return f"  {left:{column - 2}}{text[column:]}"
    return f"  {left}\n{text}"


def _width() -> int:
    return max(shutil.get_terminal_size().columns, COLUMN + 20)


def _wrapped(text: str, indent: str = "") -> str:
    lead = text[: len(text) - len(text.lstrip())]
    names: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}  # of options, kept whole
    return textwrap.fill(
        " ".join(text.split()), _width(), initial_indent=lead, subsequent_indent=indent, **names
    )


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    if get_args(kind):
        return "|".join(_metavar(each) for each in get_args(kind) if each is not NoneType)
    return {bool: "", int: "N", float: "X", str: "TEXT"}.get(kind, "PATH")
