"""Processes that are killed, told to go, and started again in other numbers: as real processes."""

import json
import random
import re
import signal
import time

import numpy as np
import pytest
from jobs import Job, Processes, as_it_was, demo, final, log, losses, reach

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
    """2 kills, the first while a checkpoint is being written, and a notice of preemption; of two data sets,
    the smaller one with a third of the weight."""
    steps, rng, mixed = ("--steps", 80), random.Random(0), ("pairs.jsonl:2", "held_out.jsonl")
    undisturbed, out = Job(folder, folder / "whole_80", 1, *steps, sets=mixed), folder / "killed"
    for kill in range(2):
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
    assert max(losses(out)) < 80
    Job(folder, out, 1, *steps, sets=mixed).done()
    undisturbed.done()
    expected, found = final(folder / "whole_80"), final(out)
    assert found[:2] == expected[:2] and found[0] == 80
    assert losses(out) == losses(folder / "whole_80"), "of every step, to the last bit"
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


def test_saved_by_two_resumed_by_four_of_which_one_dies_and_back(folder, whole):
    """Told to go, two save; of four a dead one ends the others, which name it; two compute to the end what
    one computes."""
    out, victim, four = folder / "moving", 2, ("--mesh.fsdp", 2, "--mesh.tensor", 2, "--mesh.data", -1)
    job = Job(folder, out, 2, "--mesh.fsdp", 2, "--mesh.data", -1)
    reach(out, 6, job=job)
    job.kill(1, signal.SIGTERM)
    assert job.wait() == [75] * 2, job.said()
    saved = [e["step"] for e in log(out) if e["event"] == "preempted"][-1]
    assert final(out)[0] == saved

    job = Job(folder, out, 4, *four)
    reach(out, saved + 3, job=job)
    job.kill(victim)
    began = time.monotonic()
    statuses = job.wait(60)
    assert all(statuses), f"{statuses}\n{job.said()}"
    assert time.monotonic() - began < 60
    others = [job.said(i) for i in range(4) if i != victim]
    name = rf"[Tt]ask {victim}\b|heartbeats\):\s+{victim}\b"
    assert all(re.search(name, said) for said in others), others

    job = Job(folder, out, 2, "--mesh.data", -1)
    job.done()
    assert saved < log(out)[-1]["step"] == 24 and "resuming" in job.said()
    assert_close(out, whole)


def test_a_full_disk_leaves_the_earlier_checkpoints(folder, whole):
    """As far as a process can tell: its files may not grow beyond a size."""
    out = folder / "full"
    as_it_was(whole, out, 22)
    before = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    limited = Job(folder, out, 1, limit=24 * 1024)
    assert limited.wait() == [2], limited.said()
    last = limited.said().splitlines()[-1]
    assert last.startswith("mllm-align: error: can't write a checkpoint to") and "make room" in last
    assert "Traceback" not in limited.said()
    assert all(path.read_bytes() == held for path, held in before.items())
    Job(folder, out, 1).done()
    assert np.array_equal(*(losses(each)[24] for each in (out, whole)))


def test_two_commands_into_one_folder(folder, whole):
    """The second is refused while the first runs, all of its processes; killed, the first is no hindrance;
    told to go, it is waited for."""
    out = folder / "twice"
    first = Job(folder, out, 1, "--steps", 400)
    reach(out, 2, job=first)
    (folder / "link").symlink_to(out)
    second = Job(folder, folder / "link", 2, "--steps", 400)
    assert second.wait(120) == [2, 2], second.said()
    refused = rf"error: .*twice: is in use by process {first.processes[0].pid} on "
    assert all(re.search(refused, second.said(i).splitlines()[-1]) for i in range(2)), second.said()
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


def test_two_processes_write_what_one_writes(folder, tmp_path):
    """score, generate and bdhs: all compute, the first writes."""
    data = folder / "data" / "pairs.jsonl"
    rows = read(data)[:6]
    sft = folder / "data" / "sft.jsonl"
    for row in rows:
        del row["rejected"]
    sft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bdhs.py").write_text(BDHS)
    model = ["--model", folder / "model", "--data"]
    sampling = ["--sampling.max-tokens", 4, "--samples", 2, "--sampling.temperature", 1]
    verbs = {
        "score": [*model, data],
        "generate": [*model, data, *sampling],
        "bdhs": [tmp_path / "bdhs.py", *model, sft, "--data.image-root", folder / "data"],
    }
    for count in (1, 2):  # one after another in one process, as starting it takes longest
        words = [[verb, *verbs[verb], "--out", tmp_path / f"{verb}{count}.jsonl"] for verb in verbs]
        (tmp_path / "verbs.json").write_text(json.dumps([[*map(str, each)] for each in words]))
        Processes(
            tmp_path / f"by{count}", count, ["-c", IN_TURN, tmp_path / "verbs.json"], 2 // count
        ).done()
    for verb in verbs:
        one, two = (read(tmp_path / f"{verb}{n}.jsonl") for n in (1, 2))
        assert len(one) == len(two) and len(one) >= 6
        for mine, theirs in zip(two, one, strict=True):
            for name, value in theirs.items():
                wanted = pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
                assert name == "bdhs" or mine[name] == wanted
    assert not list(tmp_path.glob("*.part"))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


IN_TURN = """
import json, sys
from mllm_align.cli import main

for words in json.load(open(sys.argv[1])):
    main(words)
"""

BDHS = """
from mllm_align import BDHSConfig

def get_config():
    return BDHSConfig(similarity="lexical", iterations=2, sentence_tokens=8, batch_size=2)
"""
