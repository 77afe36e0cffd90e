"""YAML, and so JSON, as plain values and back; by the core schema of YAML 1.2, where 1e-6 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mllm_align.errors import InputError, one_line, quoted, refusal

LARGEST = 2**18  # bytes of a config
TAG = "tag:yaml.org,2002:"
CORE = (  # what a plain scalar is: the first that matches, else a string
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        [*"-+.0123456789"],
    ),
)
CONTAINERS = {TAG + name for name in ("seq", "map")}
SCALARS = {TAG + name for name in ("str", "null", "bool", "int", "float")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}


for name, pattern, first in CORE:
    for each in (_Loader, _Dumper):
        each.add_implicit_resolver(TAG + name, re.compile(f"^{pattern}$"), first)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a YAML or JSON file, and the line of each by its dotted name.

    Raises InputError, with the line, for a text that is not YAML, and for aliases, tags and repeated keys:
    an alias could grow without end, and no config needs any of them.
    """
    try:
        with open(file, "rb") as opened:
            text = opened.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise refusal(str(file), f"is larger than {LARGEST >> 10} KiB", "give a config")
        loader = _Loader(text.decode())
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        values = {} if node is None else _plain(loader, node, "", lines, file, set())
    except OSError as error:
        raise refusal(
            str(file), f"can't be read ({error.strerror or error})", "give a config file"
        ) from error
    except UnicodeDecodeError as error:
        raise refusal(str(file), "is not UTF-8", "save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise refusal(
            f"{file} line {line}", f"is not YAML ({one_line(error.problem, 200)})", "mend it"
        ) from error
    except yaml.YAMLError as error:
        raise refusal(str(file), f"is not YAML ({one_line(error, 200)})", "mend it") from error
    except RecursionError as error:
        raise refusal(str(file), "is nested too deeply", "a config has a few levels") from error
    if not isinstance(values, dict):
        raise refusal(
            str(file), f"holds {type(values).__name__} where fields of a config belong", "give field: value"
        )
    return values, lines


def _plain(
    loader: _Loader, node: yaml.Node, at: str, lines: dict[str, int], file: Path, seen: set[int]
) -> Any:
    line = node.start_mark.line + 1

    def refuse(problem: str, remedy: str) -> InputError:
        return refusal(f"{file} line {line}", problem, remedy)

    if id(node) in seen:
        raise refuse("an alias is not taken", "write the values out")
    seen.add(id(node))
    if node.tag not in CONTAINERS | SCALARS:
        raise refuse(f"the tag {quoted(node.tag.removeprefix(TAG))} is not taken", "give a plain value")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, each, at, lines, file, seen) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != TAG + "str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a collection"
                raise refuse(f"{quoted(shown)} is no name of a field", "give field: value")
            if key.value in values:
                raise refuse(f"{quoted(key.value)} is given twice", "leave one")
            name = f"{at}.{key.value}" if at else key.value
            lines[name] = line
            values[key.value] = _plain(loader, value, name, lines, file, seen)
        return values
    try:
        return loader.construct_object(node)
    except ValueError as error:  # a number of thousands of digits
        raise refuse(f"{at} can't be read ({one_line(error, 100)})", "give a smaller number") from error


def write_yaml(values: dict[str, Any]) -> str:
    """A text that `read_yaml` gives the same values of."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
