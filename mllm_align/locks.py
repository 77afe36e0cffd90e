"""One writer of an output: a second run into the same place is refused, and told whose it is.

The lock of `OUT` is the file `.OUT.lock` beside it. It says who holds it, and its time of change is renewed
every few seconds. Where the holder's process is of this machine, the system is asked whether it lives;
elsewhere it counts as dead when its lock has not been renewed for a while. Needed of the file system: a new
file that only one of several makers gets.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_align import processes
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import parse_json

BEAT, LAPSE = 5.0, 60.0  # seconds between renewals, and without one until a holder elsewhere counts as dead
PATIENCE = 180.0  # seconds that one which is ending is waited for
INSIDE = ".lock"  # the name where a lock can only lie in the folder itself
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")  # of schedulers that start a job again under its name

_held: list[_Held] = []


@contextmanager
def alone(*places: Any) -> Iterator[None]:
    """Let nobody else write these places while the block runs. Of several processes the first holds the
    locks for all.

    Raises InputError, naming host and process, where another run has one of them. A dead one's is taken
    over. One that is ending, or of the same job, is waited for. Parents that are missing are made, and go
    again if the block leaves nothing in them.
    """
    with ExitStack() as stack:
        for place in dict.fromkeys(os.path.realpath(place) for place in places):
            stack.enter_context(_alone(Path(place)))
        yield


def ending() -> None:
    """Tell those who wait that this process is saving its last; called when it was asked to end."""
    for held in _held:
        held.say_ending()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    attempt = _Attempt(out)
    try:
        while not processes.on_first(attempt):  # in short turns: no process waits long for the others
            pass
        yield
    finally:
        attempt.close()


class _Attempt:
    """What one process does for the lock of `out`, until it has it; then it holds it."""

    def __init__(self, out: Path):
        self.out, self.held = out, None
        self.made = [parent for parent in out.parents if not parent.exists()]
        self.began, self.told = time.monotonic(), False
        self.seen: tuple[str, float] | None = None

    def __call__(self) -> bool:
        """Whether the lock is ours now; else time has passed. Raises InputError where it is another's."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.held, holder = _take(_lock_of(self.out))
        except OSError as error:
            reason = f"{error.strerror or error} ({error.filename})"
            raise InputError(
                one_line(f"can't write {self.out}: {reason}; mend its folder, or give another --out", 800)
            ) from error
        if holder is None:
            return True
        self._judge(holder)
        time.sleep(min(1.0, BEAT / 5))
        return False

    def _judge(self, holder: _Holder) -> None:
        """Wait on, unless the holder goes on with its work."""
        waited = time.monotonic() - self.began
        before, self.seen = self.seen, (holder.token, holder.renewed)
        renewed = before is not None and before != self.seen  # by its holder, or it is of a new one
        if (waited >= PATIENCE) if holder.ends else (holder.here or renewed):
            raise refusal(str(self.out), f"is in use by {holder}", "let it end, or give another --out")
        if not self.told:
            why, most = "which is ending", PATIENCE
            if not holder.ends:
                why, most = "which may have died", LAPSE
            said = f"{self.out} is in use by {holder}, {why}: waiting for up to {most:g} s"
            print(said, file=sys.stderr, flush=True)
        self.told = True

    def close(self) -> None:
        if self.held is not None:
            self.held.release()
        with suppress(OSError):
            for parent in self.made:
                parent.rmdir()


def _lock_of(out: Path) -> Path:
    """Beside `out`, so that nothing is left in it; within, where only the folder itself can be written."""
    beside = out.parent / f".{out.name}.lock"
    if out.is_dir() and not os.access(out.parent, os.W_OK):
        return out / INSIDE
    return beside


# ---- one lock ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Holder:
    """Who holds a lock, and what can be told of it.

    token: of this one hold. here: of this machine, so the system can be asked. ends: it said so, or it is
    of our job. renewed: when it last was, by the file system's clock. dead: certainly, or long not renewed.
    """

    token: str
    host: str
    pid: int
    since: str
    here: bool
    ends: bool
    renewed: float
    dead: bool

    def __str__(self) -> str:
        process = f"process {self.pid} on {one_line(self.host)} since {one_line(self.since)}"
        return process if self.pid else self.host


def _take(lock: Path) -> tuple[_Held | None, _Holder | None]:
    """The lock, or who holds it."""
    token = secrets.token_hex(8)
    said = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "machine": _machine(),
        "job": _job(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    mine = lock.with_name(f"{lock.name}.{token}")
    with open(mine, "xb") as file:
        file.write(json.dumps(said).encode() + b"\n")
    try:
        holder = _made(mine, lock)
        if holder is not None and holder.dead:
            holder = _replaced(mine, lock, holder)
        return (_Held(lock, token), None) if holder is None else (None, holder)
    finally:
        with suppress(OSError):
            os.unlink(mine)


def _made(mine: Path, lock: Path) -> _Holder | None:
    """None where `lock` is now our file; else who was there first."""
    while True:
        with suppress(FileExistsError):
            try:
                os.link(mine, lock)
            except FileExistsError:
                raise
            except OSError:  # no hard links here
                with open(lock, "xb") as file:
                    file.write(mine.read_bytes())
            return None
        with suppress(FileNotFoundError):  # released since
            return _read(lock, mine)


def _replaced(mine: Path, lock: Path, dead: _Holder) -> _Holder | None:
    """None where `lock` is now our file in place of the dead one's; else who was sooner.

    Many may see that the holder is dead; the one with the lock of the lock replaces it, and the others see
    then that it is no longer the dead one's.
    """
    turn, other = _take(lock.with_name(f"{lock.name}.turn"))
    if turn is None:
        assert other is not None
        return other
    try:
        with suppress(FileNotFoundError):
            now = _read(lock, mine)
            if now.token != dead.token:
                return now
        os.replace(mine, lock)
        return None
    finally:
        turn.release()


def _read(lock: Path, mine: Path) -> _Holder:
    """Who holds a lock. mine: a file of the same file system, whose clock tells ages."""
    with open(lock, "rb") as file:
        data, renewed = file.read(1 << 16), os.fstat(file.fileno()).st_mtime
    os.utime(mine)
    silent = os.stat(mine).st_mtime - renewed > LAPSE
    first, _, rest = data.partition(b"\n")
    try:
        said = parse_json(first)
        token, host, pid, since = (said[name] for name in ("token", "host", "pid", "since"))
        good = all(isinstance(each, str) for each in (token, host, since)) and isinstance(pid, int)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good or not 0 < pid < 2**31:  # it is just being written, or was damaged
        whose = "a run that its lock does not name"
        return _Holder(data.hex()[:64], whose, 0, "?", False, False, renewed, silent)
    here = host == socket.gethostname() and said.get("machine") == _machine()
    dead = not _lives(pid, said.get("process_start")) if here else silent
    ends = rest.startswith(b"ending") or (_job() is not None and said.get("job") == _job())
    return _Holder(token, host, pid, since, here, ends, renewed, dead)


class _Held:
    """A lock that is ours: renewed by a thread until it is released."""

    def __init__(self, lock: Path, token: str):
        self.lock, self.token = lock, token.encode()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._renew, name=f"renews {lock}", daemon=True)
        self.thread.start()
        _held.append(self)

    def _renew(self) -> None:
        while not self.over.wait(BEAT):
            with suppress(OSError):
                self._write(b"")

    def say_ending(self) -> None:
        with suppress(OSError):
            self._write(b"ending\n")

    def _write(self, more: bytes) -> None:
        """Renew the lock, with more at its end, if it is ours still."""
        with open(self.lock, "r+b") as file:
            first = file.readline()
            if self.token in first:
                file.seek(0)
                file.write(first)  # the same once more: not every file system lets times alone be set
                file.seek(0, os.SEEK_END)
                file.write(more)

    def release(self) -> None:
        _held.remove(self)
        self.over.set()
        self.thread.join()
        with suppress(OSError):
            if self.token in self.lock.read_bytes():
                os.unlink(self.lock)


# ---- this process --------------------------------------------------------------------------------------


def _machine() -> str:
    """Names the machine as it runs, and the numbering of its processes: containers have their own."""
    said = []
    with suppress(OSError):
        said.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        said.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(said)


def _lives(pid: int, start: Any) -> bool:
    """Whether a process of this machine is the one that began then, and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    now = _process_start(pid)
    return None in (now, start) or now == start


def _process_start(pid: int) -> str | None:
    """When a process began, in the system's own words; None where it does not tell."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "ended" if fields[0] in (b"Z", b"X") else fields[19].decode()
    return None


def _job() -> str | None:
    """The scheduler's name for the job that this process is of."""
    return next((f"{name}={os.environ[name]}" for name in JOBS if os.environ.get(name)), None)
