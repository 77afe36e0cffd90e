"""Processes that are killed, told to go, and started again in other numbers: as real processes."""

import random
import signal
import time

import numpy as np
import pytest
from jobs import CONFIG, Job, final, log, losses, reach

from mllm_align.data.demo import make_model, make_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    make_model(folder / "model")
    make_pairs(folder / "data", 20, held_out=1)
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run of one process that nothing disturbed."""
    Job(folder, folder / "whole", 1).done()
    return folder / "whole"


def assert_close(found, expected):
    """The same steps on the same records; numbers up to rounding."""
    assert final(found)[:2] == final(expected)[:2]
    ours, theirs = losses(found), losses(expected)
    assert ours.keys() == theirs.keys()
    assert [ours[s] for s in ours] == pytest.approx([theirs[s] for s in ours], abs=2e-5)
    for name, leaf in final(expected)[2].items():
        np.testing.assert_allclose(final(found)[2][name], leaf, atol=5e-4)


def started(out):
    return sum(e["event"] == "start" for e in log(out))


def test_kills_at_random_moments_leave_no_trace(folder, whole):
    """20 kills, a third of them while a checkpoint is being written, and a notice of preemption."""
    out, rng, saving = folder / "killed", random.Random(0), 0
    for kill in range(20):
        job = Job(folder, out, 1)
        if kill % 3:
            begun = started(out)
            while (
                not [e for e in log(out) if e["event"] == "start"][begun:]
                and job.processes[0].poll() is None
            ):
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 6))
        else:
            deadline = time.monotonic() + 60
            place = out / "checkpoints"
            while job.processes[0].poll() is None and time.monotonic() < deadline:
                if any("tmp" in p.name for p in (place.iterdir() if place.exists() else ())):
                    break
            saving += 1
        job.kill(0)
        status = job.wait()
        assert status in ([-signal.SIGKILL], [0]), job.said()
        if status == [0]:
            break
    assert saving >= 3
    if final(out)[0] < 24:
        job = Job(folder, out, 1)
        reach(out, final(out)[0] + 1, job=job)
        job.kill(0, signal.SIGTERM)
        assert job.wait() in ([75], [0]), job.said()
        Job(folder, out, 1).done()
    step, records, parameters = final(out)
    expected = final(whole)
    assert (step, records) == expected[:2]
    assert losses(out) == losses(whole), "of every step, to the last bit"
    assert all(np.array_equal(parameters[name], leaf) for name, leaf in expected[2].items())


def test_two_processes_compute_what_one_computes(folder, whole):
    Job(folder, folder / "two", 2).done()
    assert_close(folder / "two", whole)


def test_saved_by_two_resumed_by_four_and_back(folder, whole):
    out = folder / "moving"
    for count, mesh in ((2, ("--mesh.fsdp", 2)), (4, ("--mesh.fsdp", 2, "--mesh.tensor", 2)), (2, ())):
        options = () if count == 2 and not mesh else mesh
        job = Job(folder, out, count, *options, "--mesh.data", -1)
        if not mesh:
            job.done()
            break
        reach(out, 6 if count == 2 else 12, job=job)
        job.kill(count - 1, signal.SIGTERM)
        assert job.wait() == [75] * count, job.said()
        saved = [e["step"] for e in log(out) if e["event"] == "preempted"][-1]
        assert final(out)[0] == saved
    assert_close(out, whole)


@pytest.mark.parametrize("victim", [2, 0])
def test_a_dead_process_ends_the_others_by_name(folder, whole, victim):
    out = folder / f"lost{victim}"
    job = Job(folder, out, 4)
    reach(out, 5, job=job)
    job.kill(victim)
    began = time.monotonic()
    statuses = job.wait(60)
    assert all(statuses), f"{statuses}\n{job.said()}"
    assert time.monotonic() - began < 60
    others = [job.said(i) for i in range(4) if i != victim]
    name = f"ask {victim}" if victim else "leader"
    assert all(name in said for said in others), others
    Job(folder, out, 4).done()
    assert_close(out, whole)
