"""What ends a run before its time."""


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one line: what is wrong, where it stands (file, record, field), how to mend it. The
    command line prints it as it is and exits with status 2.
    """


class Preempted(Exception):
    """A notice of preemption came; what was done is saved. The same command goes on from there."""


class NotFinite(Exception):
    """A loss or gradient was not finite, and the config says to stop there."""


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


def refusal(at: str, problem: str, remedy: str) -> InputError:
    """Return the error to raise: where, what is wrong, how to mend it, in one line."""
    return InputError(one_line(f"{at}: {problem}; {remedy}", limit=2000))
