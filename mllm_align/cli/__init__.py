"""The command line: `mllm-align VERB ...`.

One file a verb: a dataclass of its options, called to do the work. What options there are, and what is
refused, follows from the dataclasses (`options.py`); tyro reads the values and writes the full help and the
completion scripts.
"""

from __future__ import annotations

import logging
import os
import sys

from mllm_align.errors import Diverged, InputError, Interrupted, NotFinite, Preempted, one_line


def main(argv: list[str] | None = None) -> None:
    """Entry of the console script.

    Exit status: 0 done, 2 bad input, 3 a number that is not finite (a loss, a gradient, or one that would
    be reported) or passes a limit that was set, 75 preempted with all saved, 130 interrupted; anything else
    is a failure, after which the same command may be tried again.
    """
    try:
        _main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        _end(2, f"error: {one_line(error, 2000)}")
    except (NotFinite, Diverged) as error:
        _end(3, f"error: {one_line(error, 2000)}")
    except Preempted as error:
        _end(75, f"{error}; the same command goes on from there")
    except Interrupted as error:
        _end(130, f"{error}; the same command goes on from there")
    except KeyboardInterrupt as error:
        _end(130, str(error) or "interrupted")
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:
        process = _process()
        if process:
            hint = "failed, as below. If a collective failed, another process died: JAX names it soon after"
            print(f"mllm-align:{process} {hint} (the leader is process 0)", file=sys.stderr, flush=True)
        raise


def _main(argv: list[str]) -> None:
    from mllm_align.cli import help, verbs

    if not argv or argv[0] in ("-h", "--help"):
        print(help.program(verbs.VERBS, verbs.SHELLS))
    elif argv[0] == "--version":
        from importlib.metadata import version

        print(version("mllm-align"))
    elif argv[0] == "--print-completion":
        verbs.print_completion(argv[1:])
    else:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax; what fails there is raised, too
        verb = verbs.parse(*verbs.named(argv))
        if verb is not None:
            verb()


def _end(status: int, reason: str) -> None:
    """Print why, and by which process if there are several."""
    print(f"mllm-align:{_process()} {reason}", file=sys.stderr, flush=True)
    sys.exit(status)


def _process() -> str:
    """Which process this is, if it has joined others."""
    if "jax" not in sys.modules:
        return ""
    from mllm_align import processes

    return f" {processes.name()}:" if processes.joined() else ""
