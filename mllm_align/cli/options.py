"""The options of a verb: which there are, which replace a branch of the config, and what is refused.

They follow from the verb's dataclass and the config that the command names. tyro makes values of them;
names and values are checked here before, so that bad input gives one line with the nearest name.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mllm_align.align.weighted import Sum, says_sum, weighted
from mllm_align.config import ANNOTATORS, OBJECTIVES, ONLINE
from mllm_align.errors import InputError, nearest, one_line, quoted
from mllm_align.evaluation.base import EVALUATORS
from mllm_align.registry import load_part, made, part_name

# Fields of several kinds, by name. Other branches that may be absent are `none` or `on`.
KINDS: dict[str, Mapping[str, Any]] = {
    "objective": OBJECTIVES,
    "online": ONLINE,
    "annotator": ANNOTATORS,
    "evaluator": EVALUATORS,
}


@dataclass(frozen=True)
class Option:
    """kind: type of the value. default: MISSING where one must be given. doc: the field's."""

    kind: Any
    default: Any
    doc: str

    @property
    def required(self) -> bool:
        return self.default is MISSING


def options(verb: type, config: Any = None) -> dict[str, Option]:
    """The options of a verb by name, `--like-this`; those of its config as the config's branches are."""
    values = {each.name: _default(each) for each in dataclasses.fields(verb)}
    if config is not None:
        values["config"] = config
    return dict(_options(verb, values, ""))


def _options(owner: type, values: dict[str, Any], group: str) -> Iterator[tuple[str, Option]]:
    hints, docs = get_type_hints(owner), field_docs(owner)
    for field, value in values.items():
        name = option_name(group, field)
        known = kinds(field, hints[field])
        if known is not None:
            found = [kind for kind, cls in known.items() if cls is type(value)]
            default = found[0] if found else part_name(type(value))
            yield name, Option(Literal[tuple(known)], default, docs.get(field, ""))  # type: ignore[valid-type]
        inside = group if field == "config" else name.removeprefix("--")
        if isinstance(value, Sum):
            for part in value.parts:
                yield f"--{inside}.{part.name}.weight", Option(float, part.weight, "")
                yield from _options(type(part.objective), _values(part.objective), f"{inside}.{part.name}")
        elif dataclasses.is_dataclass(value):
            yield from _options(type(value), _values(value), inside)
        elif known is None and field != "config_file":
            yield name, Option(hints[field], value, docs.get(field, ""))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _values(config: Any) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}


def option_name(group: str, field: str) -> str:
    """--group.field, with dashes."""
    field = "data" if field == "data_file" else field.replace("_", "-")
    return f"--{group}.{field}" if group else f"--{field}"


def field_docs(owner: type) -> dict[str, str]:
    """The string below each field of a dataclass, of its bases too, each on one line."""
    docs: dict[str, str] = {}
    for cls in reversed(owner.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # made by a program: it has no source
            continue
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return docs


# ---- branches ----------------------------------------------------------------------------------------


def kinds(field: str, hint: Any) -> dict[str, Any] | None:
    """What a branch can be replaced by: classes by name, with defaults for all fields. None for other
    fields."""
    inside = [each for each in get_args(hint) if dataclasses.is_dataclass(each)]
    optional = NoneType in get_args(hint)
    if field not in KINDS and not (optional and inside):
        return None
    return ({"none": NoneType} if optional else {}) | dict(KINDS.get(field) or {"on": inside[0]})


def choose(config: Any, argv: list[str], group: str = "") -> tuple[Any, list[str]]:
    """Apply the options that replace a branch; the config and the other arguments.

    Those of one level apply at once, as one may need the other. An option that names the kind that is there
    changes nothing.
    """
    if isinstance(config, Sum):
        parts = []
        for part in config.parts:
            objective, argv = choose(part.objective, argv, f"{group}.{part.name}")
            parts.append(dataclasses.replace(part, objective=objective))
        return Sum(tuple(parts)), argv
    hints = get_type_hints(type(config))
    fields = {option_name(group, each.name): each.name for each in dataclasses.fields(config)}
    changed: dict[str, Any] = {}
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        field = fields.get(name.replace("_", "-"), "")
        known = kinds(field, hints[field]) if field else None
        if known is None:
            rest.append(word)
            continue
        texts = [text] if equals else words[:1]
        if field == "objective" and not equals:
            texts = list(itertools.takewhile(lambda each: not each.startswith("--"), words))
        words = words if equals else words[len(texts) :]
        present = getattr(config, field)
        if field == "objective" and says_sum(texts):
            changed[field] = weighted(texts, present)
            continue
        kind = _kind(name, "".join(texts), field, known)
        changed[field] = present if type(present) is kind else made(kind)
    config = dataclasses.replace(config, **changed)
    for name, field in fields.items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            below, rest = choose(value, rest, name.removeprefix("--"))
            config = config if below is value else dataclasses.replace(config, **{field: below})
    return config, rest


def in_fields(config: Any, argv: list[str]) -> list[str]:
    """Options of a sum's parts as tyro has them: `--objective.bco.beta` is
    `--objective.parts.1.objective.beta`."""
    names = _parts(config)

    def placed(word: str) -> str:
        found = next((name for name in names if word.startswith(f"--{name}.")), None)
        if found is None:
            return word
        setting = word.removeprefix(f"--{found}.")
        inside = "" if setting.partition("=")[0] == "weight" else "objective."
        return f"--{names[found]}.{inside}{setting}"

    return [placed(word) for word in argv]


def by_part(config: Any, text: str) -> str:
    """A text by tyro with the names of a sum's parts: the inverse of `in_fields`."""
    for name, place in _parts(config).items():
        text = text.replace(f"{place}.objective.", f"{name}.").replace(f"{place}.", f"{name}.")
    return text


def _parts(config: Any) -> dict[str, str]:
    """`objective.bco` -> `objective.parts.1`, of a config whose objective is a sum."""
    objective = getattr(config, "objective", None)
    parts = objective.parts if isinstance(objective, Sum) else ()
    return {f"objective.{part.name}": f"objective.parts.{i}" for i, part in enumerate(parts)}


def _kind(name: str, text: str, field: str, known: Mapping[str, Any]) -> Any:
    if text in known:
        return known[text]
    if field in KINDS and ":" in text:
        return load_part(text, field)
    own = ", or your own as file.py:Name" if field in KINDS else ""
    raise InputError(f"{name} is {quoted(text)}; it must be one of {', '.join(known)}{own}")


# ---- checks ------------------------------------------------------------------------------------------


def check(verb: str, known: dict[str, Option], argv: list[str], incomplete: bool = False) -> None:
    """Refuse what tyro would refuse, in one line: unknown names; values that are missing, too many or of
    another type; and required options that are not given, unless `incomplete`."""
    words, given = list(argv), set()
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        if not name.startswith("--"):
            raise InputError(f"{verb} can't place {quoted(word)}: no option before it takes it as a value")
        positive = re.sub(r"^(--(?:.*\.)?)no-(?=[^.]*$)", r"\1", name)
        if positive in known and known[positive].kind is bool:
            name = positive
        if name not in known:
            raise InputError(f"unknown option {one_line(name)}{_absent(name, known)}{nearest(name, known)}")
        kind = known[name].kind
        several = get_origin(kind) is tuple
        texts = [text] if equals else []
        while words and not words[0].startswith("--") and kind is not bool and (several or not texts):
            texts.append(words.pop(0))
        several &= not known[name].required
        if kind is bool and equals:
            raise InputError(f"{name} takes no value; leave out {quoted('=' + text)}")
        if not texts and kind is not bool and not several:
            raise InputError(f"{name} needs a value; it must be {wanted(kind)}")
        for text in texts:
            if not _fits(kind, text):
                raise InputError(f"{name} is {quoted(text)}; it must be {wanted(kind)}")
        given.add(name)
    missing = [name for name, option in known.items() if option.required and name not in given]
    if missing and not incomplete:
        raise InputError(f"{verb} needs {', '.join(missing)}; mllm-align {verb} --help says more")


def _absent(name: str, known: dict[str, Option]) -> str:
    """Which branch the option would belong to, if it were of another kind."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in known and get_origin(known[name].kind) is Literal:
            return f" ({name.removeprefix('--')} is {known[name].default})"
    return ""


def wanted(kind: Any) -> str:
    """A type in words: "a whole number"."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return wanted(get_args(kind)[0])
    if get_args(kind):
        return " or ".join(wanted(each) for each in get_args(kind))
    return {int: "a whole number", float: "a number", NoneType: "None", str: "a text"}.get(kind, "a path")


def _fits(kind: Any, text: str) -> bool:
    if get_origin(kind) is Literal:
        return text in get_args(kind)
    if get_origin(kind) is tuple:
        return _fits(get_args(kind)[0], text)
    if get_args(kind):
        return any(_fits(each, text) for each in get_args(kind))
    if kind is NoneType:
        return text == "None"
    try:
        kind(text)
    except (ValueError, TypeError):  # TypeError: not a type of ours, tyro shall see
        return kind not in (int, float)
    return True
