"""Processes that are killed, told to go, and started again in other numbers: as real processes."""

import json
import random
import re
import signal
import time

import numpy as np
import pytest
from jobs import Job, Processes, demo, final, log, losses, reach

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("jobs"))


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


def test_kills_at_random_moments_leave_no_trace(folder):
    """3 kills, the first while a checkpoint is being written, and a notice of preemption; of two data sets,
    the smaller one with a third of the weight."""
    steps, rng, mixed = ("--steps", 120), random.Random(0), ("pairs.jsonl:2", "held_out.jsonl")
    undisturbed, out = Job(folder, folder / "whole_120", 1, *steps, sets=mixed), folder / "killed"
    for kill in range(3):
        begun = max(losses(out), default=0)
        job = Job(folder, out, 1, *steps, sets=mixed)
        if kill:
            reach_first_step(out, job)
            time.sleep(rng.uniform(0, 1))
        else:
            partial = see_partial_checkpoint(out / "checkpoints", 4, job)
        job.kill(0)
        assert job.wait() == [-signal.SIGKILL], job.said()
        if not kill:
            assert partial.exists(), "killed while it was being written"
        assert max(losses(out), default=0) >= begun
    job = Job(folder, out, 1, *steps, sets=mixed)
    reach_first_step(out, job)
    job.kill(0, signal.SIGTERM)
    assert job.wait() == [75], job.said()
    assert max(losses(out)) < 120
    Job(folder, out, 1, *steps, sets=mixed).done()
    undisturbed.done()
    expected, found = final(folder / "whole_120"), final(out)
    assert found[:2] == expected[:2] and found[0] == 120
    assert losses(out) == losses(folder / "whole_120"), "of every step, to the last bit"
    assert all(np.array_equal(found[2][name], leaf) for name, leaf in expected[2].items())


def reach_first_step(out, job):
    """Until the job has taken a step: it has compiled, and read what was saved."""
    reach(out, 1, "start", job=job)
    while not re.search("^step ", job.said(), re.MULTILINE) and job.processes[0].poll() is None:
        time.sleep(0.02)


def see_partial_checkpoint(place, number, job):
    """The temporary folder of the job's save number `number`."""
    seen = set(place.iterdir()) if place.exists() else set()
    count = 0
    while job.processes[0].poll() is None:
        for path in set(place.iterdir()) - seen if place.exists() else ():
            seen.add(path)
            count += "tmp" in path.name
            if count == number:
                return path
    raise AssertionError(job.said())


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


def test_a_full_disk_leaves_the_earlier_checkpoints(folder, whole):
    """As far as a process can tell: its files may not grow beyond a size."""
    out = folder / "full"
    job = Job(folder, out, 1, "--save-every", 4)
    reach(out, 4, "save", job=job)  # early: the steps that are left take a fraction of a second
    job.kill(0, signal.SIGTERM)
    assert job.wait() == [75], job.said()
    before = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    limited = Job(folder, out, 1, limit=24 * 1024)
    assert limited.wait() == [2], limited.said()
    last = limited.said().splitlines()[-1]
    assert last.startswith("mllm-align: error: can't write a checkpoint to") and "make room" in last
    assert "Traceback" not in limited.said()
    assert all(path.read_bytes() == held for path, held in before.items())
    Job(folder, out, 1).done()
    assert np.array_equal(*(losses(each)[24] for each in (out, whole)))


def test_a_dead_process_ends_the_others_by_name(folder, whole):
    victim, out = 2, folder / "lost"
    job = Job(folder, out, 4)
    reach(out, 5, job=job)
    job.kill(victim)
    began = time.monotonic()
    statuses = job.wait(60)
    assert all(statuses), f"{statuses}\n{job.said()}"
    assert time.monotonic() - began < 60
    others = [job.said(i) for i in range(4) if i != victim]
    name = rf"[Tt]ask {victim}\b|heartbeats\):\s+{victim}\b"
    assert all(re.search(name, said) for said in others), others
    Job(folder, out, 4).done()
    assert_close(out, whole)


def test_two_commands_into_one_folder(folder, whole):
    """The second is refused while the first runs; killed, the first is no hindrance; told to go, it is
    waited for."""
    out = folder / "twice"
    first = Job(folder, out, 1, "--steps", 400)
    reach(out, 2, job=first)
    (folder / "link").symlink_to(out)
    second = Job(folder, folder / "link", 1, "--steps", 400)
    assert second.wait() == [2]
    said = second.said().splitlines()[-1]
    assert re.search(rf"error: .*twice: is in use by process {first.processes[0].pid} on ", said)
    assert first.processes[0].poll() is None
    first.kill(0)
    first.wait()
    second = Job(folder, out, 1, "--steps", 400)
    step = max(losses(out))
    reach(out, step + 4, job=second)
    second.kill(0, signal.SIGTERM)
    third = Job(folder, out, 1, "--steps", 400)  # at once, as a scheduler may start it
    assert second.wait() == [75]
    reach(out, max(losses(out)) + 2, job=third)
    third.kill(0, signal.SIGTERM)
    assert third.wait() == [75]
    files = {path.name for path in folder.iterdir()}
    assert not [name for name in files if ".lock" in name]
    steps = [event["step"] for event in log(out) if event["event"] == "train"]
    assert losses(whole)[1] == losses(out)[1] and max(steps) == len(set(steps)), "none left out"


def test_two_processes_of_a_job_are_refused_together(folder):
    out = folder / "together"
    first = Job(folder, out, 2, "--steps", 400)
    reach(out, 2, job=first)
    (folder / "too").symlink_to(out)
    second = Job(folder, folder / "too", 2, "--steps", 400)
    assert second.wait(120) == [2, 2], second.said()
    assert all("is in use by process" in second.said(i) for i in range(2))
    first.kill(1, signal.SIGTERM)
    assert first.wait() == [75, 75]


def test_two_processes_write_what_one_writes(folder, tmp_path):
    """score, generate and bdhs: all compute, the first writes."""
    data = folder / "data" / "pairs.jsonl"
    model = ["--model", folder / "model", "--data", data]
    (tmp_path / "bdhs.py").write_text(BDHS)
    verbs = {
        "score": [*model],
        "generate": [*model, "--sampling.max-tokens", 4, "--samples", 2, "--sampling.temperature", 1],
        "bdhs": [tmp_path / "bdhs.py", *model, "--data.image-root", folder / "data"],
    }
    rows = read(data)[:6]
    sft = folder / "data" / "sft.jsonl"
    for row in rows:
        del row["rejected"]
    sft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verbs["bdhs"][4] = sft
    for verb, words in verbs.items():
        for count in (1, 2):
            out = tmp_path / f"{verb}{count}.jsonl"
            command = ["-m", "mllm_align.cli", verb, *words, "--out", out]
            Processes(out, count, command, devices=2 // count).done()
        one, two = (read(tmp_path / f"{verb}{n}.jsonl") for n in (1, 2))
        assert len(one) == len(two) and len(one) >= 6
        for mine, theirs in zip(two, one, strict=True):
            for name, value in theirs.items():
                wanted = pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
                assert name == "bdhs" or mine[name] == wanted
        assert not list(tmp_path.glob("*.part"))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


BDHS = """
from mllm_align import BDHSConfig

def get_config():
    return BDHSConfig(similarity="lexical", iterations=2, sentence_tokens=8, batch_size=2)
"""
