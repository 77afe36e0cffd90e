"""One writer of an output, with real processes that live, die, end and race."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mllm_align import locks
from mllm_align.errors import InputError
from mllm_align.locks import alone

# A process of its own that takes the lock of argv[1]; JAX stays asleep.
START = """
    import os, signal, sys, time
    from mllm_align import locks, processes
    processes.on_first = lambda f: f()
    locks.BEAT = 0.1
"""
HOLDER = """
    if "ends" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: (locks.ending(), time.sleep(2), sys.exit(0)))
    with locks.alone(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
"""
RACE = """
    children = []
    for number in range(8):
        if not (child := os.fork()):
            try:
                with locks.alone(sys.argv[1]):
                    os.write(1, b"held\\n")
                    time.sleep(1.5)
            except ValueError as error:
                os.write(1, f"refused {error}\\n".encode())
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


class Process(subprocess.Popen):
    def __init__(self, body, *words):
        program = textwrap.dedent(START) + textwrap.dedent(body)
        super().__init__(
            [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, text=True
        )

    def line(self):
        assert self.stdout is not None
        return self.stdout.readline().strip()


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of tmp_path / "out"."""
    process = Process(HOLDER, tmp_path / "out", "ends")
    assert process.line() == "held"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "LAPSE", 2.0)
    monkeypatch.setattr(locks, "PATIENCE", 5.0)


def lock_of(out):
    return out.with_name(f".{out.name}.lock")


def rewrite(lock, **fields):
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **fields}) + "\n")


def left(tmp_path, **fields):
    """The lock that a process left; `fields` as if it had been another one."""
    out = tmp_path / "out"
    with alone(out):
        text = lock_of(out).read_text()
    lock_of(out).write_text(text)
    rewrite(lock_of(out), **fields)
    return out


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_nothing_stays_however_it_ends(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with alone(out):
        assert files(tmp_path) == [".out.lock", "a", "b"]
    for error in (KeyboardInterrupt, SystemExit, InputError):
        with pytest.raises(error), alone(out):
            raise error
    assert not files(tmp_path), "parents that it made, too"
    with alone(out):
        out.mkdir()
    assert out.is_dir() and files(tmp_path) == ["a", "b", "out"]


def test_a_second_one_is_refused_by_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    with alone(tmp_path / "out", tmp_path / "other"):
        for name in ("out", "link/out", "x/../out", "other"):
            with pytest.raises(InputError) as refused, alone(tmp_path / name):
                pass
            said = str(refused.value)
            assert f"is in use by process {os.getpid()} on {socket.gethostname()} since 20" in said
            assert "\n" not in said and said.endswith("let it end, or give another --out")
        with alone(tmp_path / "third"):
            pass
    assert files(tmp_path) == ["link"]


def test_one_that_was_killed_does_not_block(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(InputError, match=f"process {holder.pid} on"), alone(tmp_path / "out"):
        pass
    assert time.monotonic() - began < 1, "at once"
    holder.kill()
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # dead, though nobody has waited for it
    with alone(tmp_path / "out"):
        assert json.loads(lock_of(tmp_path / "out").read_text())["pid"] == os.getpid()
    assert not files(tmp_path)


def test_a_process_with_the_same_number_is_another_one(tmp_path):
    out = left(tmp_path, process_start="1")
    with alone(out):
        pass
    assert not files(tmp_path)


def test_one_that_ends_is_waited_for(tmp_path, holder, capsys):
    holder.terminate()
    while "ending" not in lock_of(tmp_path / "out").read_text():
        time.sleep(0.01)
    with alone(tmp_path / "out"):
        assert holder.wait(5) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"in use by process {holder.pid}" in line and "is ending: waiting for up to 5 s" in line


def test_one_that_does_not_end_is_waited_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    with alone(tmp_path / "out"):
        began = time.monotonic()
        with pytest.raises(InputError, match="is in use by process"), alone(tmp_path / "out"):
            pass
        assert 0.5 <= time.monotonic() - began < 3
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        began = time.monotonic()
        with pytest.raises(InputError, match="is in use by process"), alone(tmp_path / "out"):
            pass
        assert time.monotonic() - began < 0.3, "of another job: at once"


def test_one_elsewhere_that_renews_its_lock_lives(tmp_path):
    with alone(tmp_path / "out"):
        rewrite(lock_of(tmp_path / "out"), host="elsewhere")
        with pytest.raises(InputError, match=r"process \d+ on elsewhere since"), alone(tmp_path / "out"):
            pass


def test_one_elsewhere_that_is_silent_is_dead(tmp_path, capsys):
    out = left(tmp_path, host="elsewhere")
    began = time.monotonic()
    with alone(out):
        assert 1.5 < time.monotonic() - began < 5
    assert "on elsewhere" in capsys.readouterr().err
    out = left(tmp_path, host="elsewhere")
    os.utime(lock_of(out), (time.time() - 100,) * 2)
    began = time.monotonic()
    with alone(out):
        assert time.monotonic() - began < 0.5, "known at once"
    assert not files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": 1e400}', "[" * 10_000])
def test_a_lock_that_says_nothing_lapses(tmp_path, text, monkeypatch):
    lock_of(tmp_path / "out").write_text(text)
    monkeypatch.setattr(locks, "LAPSE", 0.2)
    with alone(tmp_path / "out"):
        pass
    assert not files(tmp_path)


def test_of_many_that_find_a_dead_ones_lock_one_gets_it(tmp_path):
    out = left(tmp_path, process_start="1")
    said = Process(RACE, out).communicate(timeout=60)[0].splitlines()
    assert len(said) == 8 and said.count("held") == 1
    assert all("is in use by process" in line for line in said if line != "held")
    assert not files(tmp_path)


def test_one_that_was_robbed_leaves_the_new_ones_lock(tmp_path):
    """It was silent for long, and another host has taken over."""
    with alone(tmp_path / "out"):
        rewrite(lock_of(tmp_path / "out"), token="new")
        time.sleep(0.3)
    assert json.loads(lock_of(tmp_path / "out").read_text())["token"] == "new"


def test_without_hard_links(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    with alone(tmp_path / "out"), pytest.raises(InputError, match="in use"), alone(tmp_path / "out"):
        pass
    assert not files(tmp_path)


def test_a_place_that_takes_no_lock_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    said = r"^can't write .*/file/out: File exists \(.*/file\); mend its folder"
    with pytest.raises(InputError, match=said), alone(tmp_path / "file" / "out"):
        pass
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # as of another user
    with alone(tmp_path / "out"):
        assert files(tmp_path / "out") == [".lock"]


def test_signals_are_those_of_before(holder):
    assert holder.poll() is None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
