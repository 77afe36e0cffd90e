"""The verbs, as subcommands of one tyro program."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from mllm_align.cli import help
from mllm_align.cli.bdhs import Bdhs
from mllm_align.cli.configs import Configs
from mllm_align.cli.data import DataBuild, DataFlip, DataMix, DataSelect, DataShow, DataStats
from mllm_align.cli.evaluate import Evaluate
from mllm_align.cli.export import Export
from mllm_align.cli.generate import Generate
from mllm_align.cli.inspect import Inspect
from mllm_align.cli.judge import Judge
from mllm_align.cli.makers import DataCorrupt, DataPair, DataRetrieve, DataRewrite
from mllm_align.cli.options import by_part, check, choose, in_fields, options
from mllm_align.cli.plan import Plan
from mllm_align.cli.quickstart import Quickstart
from mllm_align.cli.report import Report
from mllm_align.cli.score import Score
from mllm_align.cli.train import Train
from mllm_align.config import load_config, save_json, save_yaml
from mllm_align.errors import InputError, nearest, one_line, quoted

VERBS: dict[str, type] = {
    "train": Train,
    "bdhs": Bdhs,
    "generate": Generate,
    "score": Score,
    "judge": Judge,
    "evaluate": Evaluate,
    "report": Report,
    "inspect": Inspect,
    "data show": DataShow,
    "data stats": DataStats,
    "data mix": DataMix,
    "data corrupt": DataCorrupt,
    "data select": DataSelect,
    "data flip": DataFlip,
    "data rewrite": DataRewrite,
    "data retrieve": DataRetrieve,
    "data pair": DataPair,
    "data build": DataBuild,
    "export": Export,
    "plan": Plan,
    "configs": Configs,
    "quickstart": Quickstart,
}
SHELLS = ("bash", "zsh", "fish")


def named(argv: list[str]) -> tuple[str, list[str]]:
    """The verb of a command and what follows it; some verbs are two words."""
    two = " ".join(argv[:2])
    return (two, argv[2:]) if two in VERBS else (argv[0], argv[1:])


def parse(name: str, argv: list[str]) -> Any:
    """The verb with its options, to be called; None where help or a config was printed instead.

    Raises InputError, in one line, for whatever is wrong with the command.
    """
    parts = {each: verb for each, verb in VERBS.items() if each.startswith(f"{name} ")}
    if parts and {"-h", "--help", "--help-all"} & set(argv):
        print(help.program(parts, SHELLS))
        return None
    if parts:
        raise InputError(f"{name} is one of {', '.join(parts)}; mllm-align {name} --help says more")
    if name not in VERBS:
        raise InputError(f"no verb {quoted(name)}{nearest(name, VERBS)}; mllm-align --help lists them")
    verb, config = VERBS[name], None
    argv = getattr(verb, "place", list)(argv)
    file = argv[0] if argv and not argv[0].startswith("-") else None
    helping = {"-h", "--help", "--help-all"} & set(argv)
    if "config" in get_type_hints(verb) and not (helping and file is None):
        if file is None:
            first = getattr(verb, "FIRST", "CONFIG")
            article = "an" if first[0] in "AEIOU" else "a"
            usage = f"mllm-align {name} {first} --model ..."
            raise InputError(f"{name} needs {article} {first.lower()} first: {usage}")
        config, argv = choose(_load(verb, file), argv[1:])
    known = options(verb, config)
    if helping:
        everything = "--help-all" in argv
        print(_full_help(name, verb, file, config) if everything else help.screen(name, verb, known))
        return None
    argv = _with_format(argv)
    printing = "--print-config" in {word.partition("=")[0].replace("_", "-") for word in argv}
    check(name, known, argv, incomplete=printing)
    argv = in_fields(config, argv)
    made = _read(name, argv, _default(verb, file, config, Path() if printing else tyro.MISSING_NONPROP))
    if printing:
        print((save_yaml if made.print_config == "yaml" else save_json)(made.config), end="")
        return None
    return made


def _with_format(argv: list[str]) -> list[str]:
    """`--print-config` without a format means JSON."""
    given = list(argv)
    for i, word in enumerate(argv):
        if word.replace("_", "-") == "--print-config" and argv[i + 1 : i + 2] not in (["json"], ["yaml"]):
            given[i] = f"{word}=json"
    return given


def _load(verb: type, file: str) -> Any:
    """The config of the verb's kind, or of one of its kinds."""
    if hasattr(verb, "load"):
        return verb.load(file)  # type: ignore[attr-defined]
    hint = get_type_hints(verb)["config"]
    return load_config(file, get_args(hint) or hint)


def _default(verb: type, file: str | None, config: Any, required: Any) -> Any:
    """The verb as it is without options; `required` stands where one must be given."""
    if config is None:
        return tyro.MISSING_NONPROP
    hints = get_type_hints(verb)
    bare: dict[str, Any] = {}
    for each in dataclasses.fields(verb):
        if each.default is dataclasses.MISSING:
            several = get_origin(hints[each.name]) is tuple and required is not tyro.MISSING_NONPROP
            bare[each.name] = (required,) if several else required
    return verb(**bare | {"config_file": Path(str(file)), "config": config})


def _program() -> tuple[Any, dict[str, Any]]:
    """The type that tyro makes the program of: one of the verbs; those of two words are one of a group. And
    the groups, by the first word."""

    def command(name: str, verb: type) -> Any:
        about = tyro.conf.subcommand(name, description=help.title(verb))
        return Annotated[tyro.conf.AvoidSubcommands[verb], about]  # type: ignore[valid-type]

    groups: dict[str, list[Any]] = {}
    for name, verb in VERBS.items():
        first, _, last = name.partition(" ")
        groups.setdefault(first, []).append(command(last or first, verb))
    commands, made = [], {}
    for first, found in groups.items():
        if first in VERBS:
            commands += found
            continue
        inside = Annotated[Union[tuple(found)], tyro.conf.arg(name="")]  # noqa: UP007
        made[first] = dataclasses.make_dataclass(first, [("verb", inside)], bases=(_Group,))
        commands.append(Annotated[made[first], tyro.conf.subcommand(first, description=first)])
    return Union[tuple(commands)], made  # noqa: UP007


class _Group:
    """Verbs of two words with the same first one."""

    verb: Any


def _tyro(argv: list[str], default: Any = tyro.MISSING_NONPROP) -> Any:
    program, groups = _program()
    if default is not tyro.MISSING_NONPROP and argv[0] in groups:
        default = groups[argv[0]](default)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a user's own kind stands in no annotation of ours
        made = tyro.cli(program, args=argv, default=default, prog="mllm-align")
    return made.verb if isinstance(made, _Group) else made


def _read(name: str, argv: list[str], default: Any) -> Any:
    """The verb with these options. What is left to refuse here are values that a config refuses."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return _tyro([*name.split(), *argv], default)
    except (ValueError, SystemExit) as error:
        cause: BaseException | None = error  # tyro draws a box round the message of the error that it met
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__context__
        if cause is None:
            sys.stderr.write(box.getvalue())
            raise
        found = cause if isinstance(cause, InputError) else f"{name}: {one_line(cause, 300)}"
        raise InputError(str(found)) from error


def _full_help(name: str, verb: type, file: str | None, config: Any) -> str:
    """Every option with all that is said of it, by tyro."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _tyro([*name.split(), "--help"], _default(verb, file, config, tyro.MISSING_NONPROP))
    return help.fitted(by_part(config, text.getvalue().rstrip()))


def print_completion(argv: list[str]) -> None:
    """A completion script for a shell."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise InputError(f"--print-completion needs the name of a shell: {', '.join(SHELLS)}")
    with contextlib.suppress(SystemExit):
        _tyro(["--tyro-print-completion", argv[0]])
