"""Exceptions that end a run early, and the format of their messages."""

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 5  # maximum number of records listed in an error
WEIGHTS = "look for NaN in the weights; where 16 bits overflow, take --dtype float32"


class InputError(ValueError):
    """An error in the user's input.

    The message is one line: where (file, record, field), what is wrong, how to correct it. The command line
    prints it unchanged and exits with status 2.
    """


class Preempted(Exception):
    """The run was preempted; its progress is saved, and the same command resumes it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the work. The message says what is kept; the same command goes on from there."""


class NotFinite(Exception):
    """A value that would be reported or used for training is not finite.

    The message is one line that names the records. The command line exits with status 3. Results are not
    written; resumable jobs keep their finished parts.
    """


class Diverged(Exception):
    """A run passed a limit that it was told to stop at. The message is one line. The command line exits
    with status 3; what was saved before stays."""


def one_line(value: object, limit: int = 80) -> str:
    """Return `value` as one printable line; a text longer than `limit` loses its middle."""
    text = str(value)
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def not_finite(what: str, ids: Sequence[str], of: int, remedy: str = WEIGHTS) -> NotFinite:
    """Return the error to raise if `what` is not finite for the records `ids`, of `of` records.

    A record that occurs several times in `ids` counts once.
    """
    ids = list(dict.fromkeys(ids))
    return NotFinite(f"{what} not finite for {len(ids)} of {of} records: {first_few(ids)}; {remedy}")


def first_few(ids: Sequence[str]) -> str:
    """Return the first ids in one line, followed by three dots if there are more."""
    return ", ".join(map(one_line, ids[:SHOWN])) + ", ..." * (len(ids) > SHOWN)


def quoted(value: object) -> str:
    """Return `value`, shortened and quoted, for an error message."""
    return f"'{one_line(value)}'"


def refusal(at: str, problem: str, remedy: str) -> InputError:
    """Return the error to raise: where, what is wrong and how to correct it, in one line."""
    return InputError(one_line(f"{at}: {problem}; {remedy}", limit=2000))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name that `name` most likely stands for, or "".

    Names may have groups: `rank` stands for `lora.rank`, and `lr` for `optim.learning-rate`.
    """
    last = _last_part(name)
    same = [each for each in known if last in (_last_part(each), _initials(_last_part(each)))]
    close = difflib.get_close_matches(name, sorted(same or known), n=1, cutoff=0.1 if same else 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _last_part(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-").replace("_", "-")


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("-"))
