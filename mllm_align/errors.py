"""What ends a run before its time."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one line: what is wrong, where it stands (file, record, field), how to mend it. The
    command line prints it as it is and exits with status 2.
    """


class Preempted(Exception):
    """A notice of preemption came; what was done is saved. The same command goes on from there."""


class NotFinite(Exception):
    """A number that was to be trained on or reported is NaN or infinite."""


def one_line(value: object, limit: int = 80) -> str:
    """Return `value` as one printable line; what is longer than `limit` loses its middle."""
    text = str(value)
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def quoted(value: object) -> str:
    """Return `value` short and in quotes, to stand in an error message."""
    return f"'{one_line(value)}'"


def not_finite(what: str, ids: Sequence[str]) -> NotFinite:
    """Return the error to raise: what is not finite, and the records with which it came about."""
    few = ", ".join(one_line(each) for each in ids[:5])
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return NotFinite(f"{what} not finite, with records {few}{more}; look at them and the model's weights")


def refusal(at: str, problem: str, remedy: str) -> InputError:
    """Return the error to raise: where, what is wrong, how to mend it, in one line."""
    return InputError(one_line(f"{at}: {problem}; {remedy}", limit=2000))
