"""Locks that allow one writer per output: a second run with the same output is refused with the holder's
name.

The lock of `OUT` is the file `.OUT.lock` beside it. It identifies its holder, and its modification time is
renewed every few seconds. A holder on this machine is dead if its process has ended; a holder on another
machine counts as dead if its lock has not been renewed for a while. The file system must support exclusive
creation of files.
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

BEAT, LAPSE = (
    5.0,
    60.0,
)  # seconds between renewals; seconds without one until a remote holder counts as dead
PATIENCE = 180.0  # seconds to wait for a holder that is ending
INSIDE = ".lock"  # name of a lock inside the folder, if only the folder itself is writable
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")  # set by schedulers that restart a job under its id

_held: list[_Held] = []


@contextmanager
def alone(*places: Any) -> Iterator[None]:
    """Hold the locks of these paths while the block runs. Of several processes, the first holds the locks
    for all.

    Raises InputError, naming host and process, if another run holds one of them. The lock of a dead holder
    is taken over. A holder that is ending, or of the same job, is waited for. Missing parents are made, and
    removed if the block leaves them empty.
    """
    with ExitStack() as stack:
        for place in dict.fromkeys(os.path.realpath(place) for place in places):
            stack.enter_context(_alone(Path(place)))
        yield


def ending() -> None:
    """Mark the held locks as ending, so that others wait; called when this process was asked to end."""
    for held in _held:
        held.say_ending()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    attempt = _Attempt(out)
    try:
        while not processes.on_first(attempt):  # in short intervals: no process waits long for the others
            pass
        yield
    finally:
        attempt.close()


class _Attempt:
    """Acquires the lock of `out`, and then holds it."""

    def __init__(self, out: Path):
        self.out, self.held = out, None
        self.made = [parent for parent in out.parents if not parent.exists()]
        self.began, self.announced = time.monotonic(), False
        self.seen: tuple[str, float] | None = None

    def __call__(self) -> bool:
        """Whether the lock is now ours; if not, some time has passed. Raises InputError if another run is
        using it."""
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
        """Decide whether to wait on; raises InputError if the holder is alive and not ending."""
        waited = time.monotonic() - self.began
        before, self.seen = self.seen, (holder.token, holder.renewed)
        renewed = before is not None and before != self.seen  # by its holder, or by a new holder
        if (waited >= PATIENCE) if holder.ends else (holder.here or renewed):
            raise refusal(str(self.out), f"is in use by {holder}", "let it end, or give another --out")
        if not self.announced:
            why, seconds = "which is ending", PATIENCE
            if not holder.ends:
                why, seconds = "which may have died", LAPSE
            message = f"{self.out} is in use by {holder}, {why}: waiting for up to {seconds:g} s"
            print(message, file=sys.stderr, flush=True)
        self.announced = True

    def close(self) -> None:
        if self.held is not None:
            self.held.release()
        with suppress(OSError):
            for parent in self.made:
                parent.rmdir()


def _lock_of(out: Path) -> Path:
    """The lock's path: beside `out`, or inside it if only the folder itself is writable."""
    beside = out.parent / f".{out.name}.lock"
    if out.is_dir() and not os.access(out.parent, os.W_OK):
        return out / INSIDE
    return beside


# ---- one lock ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Holder:
    """The holder of a lock, and its state.

    token: identifies this acquisition. here: on this machine, so its process can be checked. ends: it is
    marked as ending, or belongs to our job. renewed: time of the last renewal, by the file system's clock.
    dead: its process has ended or, on another machine, the lock has not been renewed for LAPSE seconds.
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
    """Acquire the lock: (lock, None), or (None, its holder)."""
    token = secrets.token_hex(8)
    content = {
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
        file.write(json.dumps(content).encode() + b"\n")
    try:
        holder = _made(mine, lock)
        if holder is not None and holder.dead:
            holder = _replaced(mine, lock, holder)
        return (_Held(lock, token), None) if holder is None else (None, holder)
    finally:
        with suppress(OSError):
            os.unlink(mine)


def _made(mine: Path, lock: Path) -> _Holder | None:
    """None if `lock` is now our file; else the holder that was first."""
    while True:
        with suppress(FileExistsError):
            try:
                os.link(mine, lock)
            except FileExistsError:
                raise
            except OSError:  # the file system has no hard links
                with open(lock, "xb") as file:
                    file.write(mine.read_bytes())
            return None
        with suppress(FileNotFoundError):  # released in the meantime
            return _read(lock, mine)


def _replaced(mine: Path, lock: Path, dead: _Holder) -> _Holder | None:
    """None if `lock` is now our file instead of the dead holder's; else the holder that was faster.

    Several processes may find the holder dead. The one that acquires the lock's own lock replaces it; the
    others then see a new holder.
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
        content = parse_json(first)
        token, host, pid, since = (content[name] for name in ("token", "host", "pid", "since"))
        good = all(isinstance(each, str) for each in (token, host, since)) and isinstance(pid, int)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good or not 0 < pid < 2**31:  # it is still being written, or damaged
        whose = "a run that its lock does not name"
        return _Holder(data.hex()[:64], whose, 0, "?", False, False, renewed, silent)
    here = host == socket.gethostname() and content.get("machine") == _machine()
    dead = not _is_alive(pid, content.get("process_start")) if here else silent
    ends = rest.startswith(b"ending") or (_job() is not None and content.get("job") == _job())
    return _Holder(token, host, pid, since, here, ends, renewed, dead)


class _Held:
    """A lock held by this process: a thread renews it until it is released."""

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
        """Renew the lock, and append `more`, if it is still ours."""
        with open(self.lock, "r+b") as file:
            first = file.readline()
            if self.token in first:
                file.seek(0)
                file.write(first)  # rewritten: some file systems do not allow setting times only
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
    """Identifies the machine's boot and the PID namespace: containers have their own."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_alive(pid: int, start: Any) -> bool:
    """Whether the process with this pid started at `start` and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    now = _process_start(pid)
    return None in (now, start) or now == start


def _process_start(pid: int) -> str | None:
    """Start time of a process, as given by the system; None if unknown."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "ended" if fields[0] in (b"Z", b"X") else fields[19].decode()
    return None


def _job() -> str | None:
    """The scheduler's id of this process's job, if any."""
    return next((f"{name}={os.environ[name]}" for name in JOBS if os.environ.get(name)), None)
