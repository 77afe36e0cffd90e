"""Online runs as real processes: killed, told to go, several at once, with an endpoint that answers."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from chat_server import chat_server, said, shown
from jobs import Job, as_it_was, demo, final, log, losses, reach

pytestmark = pytest.mark.slow
ONLINE = ("--online", "pairs", "--online.sampling.max-tokens", 16, "--steps", 10)
SCORER = ("--online.annotator", "scorer", "--online.annotator.function", "votes:hashed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    tests = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{os.environ.get('PYTHONPATH', '')}")


def assert_same(found, expected):
    assert losses(found) == losses(expected), "of every step, to the last bit"
    ours, theirs = final(found), final(expected)
    assert ours[:2] == theirs[:2]
    assert all(np.array_equal(ours[2][name], leaf) for name, leaf in theirs[2].items())


def the_shorter(request, number):
    """A judge with a mind of its own, whatever comes first; of equals it can't say."""
    first, second = shown(request)
    if len(first) == len(second):
        return said("I do not know.")
    return said(f"Response {1 if len(first) < len(second) else 2}\nIt is shorter.")


def test_a_run_with_an_endpoint_goes_on_with_the_answers_on_disk(folder):
    """With a batch begun ahead; without one there is less to go on with."""
    with chat_server() as chat:
        chat.reply = the_shorter
        endpoint = ("--online.annotator", "endpoint", "--online.annotator.url", chat.url)
        options = (*ONLINE, *endpoint, "--online.stale")
        whole, out = folder / "whole", folder / "killed"
        Job(folder, whole, 1, *options).done()
        asked = len(chat.requests)
        assert asked == len({str(r) for r in chat.requests}), "nothing is asked twice"
        for step, how, status in ((3, signal.SIGKILL, -signal.SIGKILL), (6, signal.SIGTERM, 75)):
            job = Job(folder, out, 1, *options)
            reach(out, step, job=job)
            job.kill(0, how)
            assert job.wait() == [status], job.said()
        Job(folder, out, 1, *options).done()
        assert_same(out, whole)
        again = chat.requests[asked:]
        assert len({str(r) for r in again}) == asked
        assert len(again) <= asked + 8, "only those on their way when it was killed are asked again"
    lines = [e for e in log(out) if e["event"] == "train"]
    assert sum(e["annotate/unparsable"] for e in lines) > 0 < sum(e["annotate/ranked"] for e in lines)
    assert lines[-1]["staleness"] == 1


def test_two_processes_train_on_what_one_does(folder):
    """Ranked by a model, which reads the rows of its process."""
    one, two = folder / "one-judge", folder / "two-judge"
    options = (*ONLINE, "--online.annotator", "judge", "--steps", 2, "--lora", "none")
    Job(folder, one, 1, *options).done()
    Job(folder, two, 2, *options).done()
    ours, theirs = ([e for e in log(out) if e["event"] == "train"] for out in (two, one))
    names = ("rollout/tokens", "annotate/ranked", "annotate/unparsable", "groups_used", "online_share")
    assert [[e[n] for n in names] for e in ours] == [[e[n] for n in names] for e in theirs]


def test_two_processes_go_on_in_the_middle_of_a_round(folder):
    """Each has its rows' rewards, and a checkpoint what was made of them. One computes the same."""
    rounds = ("--online.minibatches", 2, "--online.epochs", 2, "--online.sampling.max-tokens", 16)
    shorter = ("--online.annotator", "scorer", "--online.annotator.function", "votes:short")
    # Steps are short: a request to stop needs some to arrive.
    options = ("--objective", "ppo", "--online", "rewards", *shorter, *rounds, "--steps", 24)
    one, out = folder / "one-round", folder / "two-rounds"
    Job(folder, one, 1, *options).done()
    job = Job(folder, out, 2, *options)
    reach(out, 6, job=job)
    job.kill(0, signal.SIGTERM)
    assert job.wait() == [75, 75], job.said()
    Job(folder, out, 2, *options).done()
    ours, theirs = ({e["step"]: e for e in log(it) if e["event"] == "train"} for it in (out, one))
    assert ours.keys() == theirs.keys() == set(range(1, 25))
    for step, line in ours.items():
        assert line.get("reward") == pytest.approx(theirs[step].get("reward"), abs=1e-6)
        assert line["value/error"] == pytest.approx(theirs[step]["value/error"], rel=1e-3)


def test_two_processes_go_on_with_a_batch_begun_ahead(folder):
    """Samples and verdicts come from the checkpoint; each process has asked about its own rows."""
    options = (*ONLINE, *SCORER, "--online.stale", "--online.offline-share", 0.3, "--keep", 5)
    whole, out = folder / "whole-two", folder / "stopped-two"
    Job(folder, whole, 2, *options).done()
    as_it_was(whole, out, 6)
    assert (out / "checkpoints" / "6" / "begun_arrays").is_dir()
    Job(folder, out, 2, *options).done()
    assert_same(out, whole)


def test_two_processes_make_the_same_rejected_responses(folder):
    one, two = folder / "one-bdhs", folder / "two-bdhs"
    options = ("--online", "bdhs", "--steps", 2, "--lora", "none")
    options += ("--online.similarity", "lexical", "--online.sentence-tokens", 8)
    Job(folder, one, 1, *options).done()
    Job(folder, two, 2, *options).done()
    ours, theirs = ([e for e in log(out) if e["event"] == "train"] for out in (two, one))
    assert [e["rejected_usable"] for e in ours] == [e["rejected_usable"] for e in theirs]
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], abs=2e-5)


def test_a_fault_that_one_process_meets_ends_both(folder):
    with chat_server() as chat:
        chat.reply = lambda request, number: said("no", status=401) if number > 20 else said("Response 1")
        endpoint = ("--online.annotator", "endpoint", "--online.annotator.url", chat.url)
        job = Job(folder, folder / "refused", 2, *ONLINE, *endpoint)
        assert job.wait(120) == [2, 2], job.said()
        assert "OPENAI_API_KEY" in job.said(0) and "OPENAI_API_KEY" in job.said(1)
