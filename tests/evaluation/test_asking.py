"""A judge is asked about answers: what it reads, what is kept of it, what becomes of one that is silent."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from bench_folders import lines
from chat_server import Reply, chat_server, said
from judges import IMAGE, answering, base, record
from refusals import refusal
from runs import bundle, compiling

from mllm_align import Evaluator, Item, SamplingConfig, Scored, evaluate
from mllm_align.config.servers import BenchmarkJudge
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.results import record_of

assert answering and base and compiling  # fixtures


@dataclass(frozen=True)
class Marks(Judged):
    """A benchmark of one's own: a verdict is a number."""

    fields = ("question_id", "text")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=2)

    def to_judge(self, item, answer):
        return f"About {item.record.id}: {answer}."

    def verdict(self, item, text):
        if not text.isdecimal():
            return Scored({}, {"unparsable": True})
        return Scored({"score": float(text)}, {"mark": int(text)})


@dataclass(frozen=True)
class Looks(Marks):
    judge_sees = True


@dataclass(frozen=True)
class Long(Marks):
    """Takes any verdict."""

    def verdict(self, item, text):
        return Scored({"score": float(len(text))})


@dataclass(frozen=True)
class Same(Marks):
    def to_judge(self, item, answer):
        return "About a"


@dataclass(frozen=True)
class Dumb(Judged):
    fields = ("question_id", "text")


@dataclass(frozen=True)
class Plain(Evaluator):
    fields = ("question_id", "text")

    def score(self, item, answer):
        return Scored({"score": 1})


NAMES = "abcd"
ITEMS = [Item(record(name)) for name in NAMES]


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("mllm_align.annotate.endpoint.FIRST_PAUSE", 0.002)
    with chat_server() as server:
        server.reply = lambda request, number: said(str(marks[about(request)]))
        yield server


marks = dict(zip(NAMES, (4, 6, 2, 8), strict=True))


def about(request):
    """The question that a request is about."""
    return request["messages"][0]["content"][-1]["text"].removeprefix("About ")[0]


@pytest.fixture
def answers(tmp_path):
    rows = [{"question_id": name, "text": f"No {name}"} for name in NAMES]
    return lines(tmp_path / "answers.jsonl", rows)


def judge(chat, **settings):
    return BenchmarkJudge(**{"url": chat.url, "name": "teacher", "retries": 0, "concurrency": 1} | settings)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def fail_from(number, reply):
    return lambda request, n: reply if n >= number else said(str(marks[about(request)]))


# ---- verdicts that come ------------------------------------------------------------------------------


def test_what_is_asked_and_what_comes_of_it(chat, answers, tmp_path):
    out = tmp_path / "out"
    found = score_answers(answers, ITEMS, Marks(), out=out, judge=judge(chat, max_tokens=17))
    assert [r["messages"][0]["content"] for r in chat.requests] == [
        [{"type": "text", "text": f"About {name}: No {name}."}] for name in NAMES
    ]
    assert {r["model"] for r in chat.requests} == {"teacher"} and chat.requests[0]["max_tokens"] == 17
    results = json.loads((out / "results.json").read_text())
    assert results == found.results and results["scores"] == {"score": 5.0, "by_category": {}}
    assert results["intervals"]["score"]["low"] < 5 < results["intervals"]["score"]["high"]
    assert (results["n"], results["unparsable"]) == (4, 0)
    assert results["judge"] | {"questions": ""} == {
        "name": "teacher",
        "temperature": 0.0,
        "max_tokens": 17,
        "runs": 1,
        "questions": "",
    }
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "results.json", "reviews.jsonl"]
    line = rows(out / "reviews.jsonl")[1]
    assert line.pop("record") == record_of(Marks(), ITEMS[1])
    assert line == {
        "index": 1,
        "run": 1,
        "question_id": "b",
        "content": "6",
        "mark": 6,
        "figures": {"score": [6, 1]},
    }
    assert rows(out / "answers.jsonl")[3] == {"index": 3, "question_id": "d", "text": "No d"}
    assert score_answers(answers, ITEMS, Marks(), out=out, judge=judge(chat, max_tokens=17)) == found
    assert len(chat.requests) == 4  # it was finished
    others = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert "is of another evaluation" in others


def test_a_judge_that_sees_the_image(chat, answers):
    score_answers(answers, ITEMS, Looks(), judge=judge(chat))
    image, text = chat.requests[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text["text"].startswith(
        "About a"
    )
    assert IMAGE.suffix == ".png"


def test_several_runs_ask_the_same_again(chat, answers, tmp_path):
    chat.reply = lambda request, number: said(str(marks[about(request)] + number // 4))
    found = score_answers(answers, ITEMS, Marks(), out=tmp_path / "out", judge=judge(chat, runs=3))
    assert len(chat.requests) == 12
    scores = found.results["scores"]
    assert scores["runs"] == [5, 6, 7] and scores["score"] == 6
    assert scores["std"] == pytest.approx((2 / 3) ** 0.5)
    assert [row["run"] for row in found.lines] == [1] * 4 + [2] * 4 + [3] * 4


def test_equal_questions_are_asked_once_a_run(chat, tmp_path):
    twins = [Item(record("a")), Item(record("b"))]
    file = lines(tmp_path / "a.jsonl", [{"question_id": name, "text": "x"} for name in "ab"])
    found = score_answers(file, twins, Same(), judge=judge(chat, runs=2))
    assert len(chat.requests) == 2 and [row["content"] for row in found.lines] == ["4"] * 4


def test_verdicts_that_can_not_be_read(chat, answers, tmp_path):
    marks_of = {"a": "4", "b": "well...", "c": "2", "d": "9"}
    chat.reply = lambda request, number: said(marks_of[about(request)])
    found = score_answers(answers, ITEMS, Marks(), judge=judge(chat)).results
    assert found["scores"]["score"] == 5 and found["unparsable"] == 1
    chat.reply = lambda request, number: said("It depends.")
    out = tmp_path / "out"
    problem = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert "judge.name teacher: none of 4 verdicts can be read, the first being 'It depends.'" in problem
    assert f"remove {out / 'reviews.jsonl.part'} to ask again" in problem
    assert [path.name for path in out.iterdir()] == ["reviews.jsonl.part"]


# ---- verdicts that do not come -----------------------------------------------------------------------


def test_a_judge_that_falls_silent_is_asked_for_the_rest_alone(chat, answers, tmp_path):
    out = tmp_path / "out"
    chat.reply = fail_from(2, Reply("busy", status=503))
    problem = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert problem == (
        f"judge.url {chat.url}: no answer to 2 requests; the last problem: 503 busy; mend it, and the same "
        f"command goes on; kept: 2 of 4 verdicts, in {out}/reviews.jsonl.part; the same command asks for "
        "the other 2"
    )
    part = out / "reviews.jsonl.part"
    assert rows(part)[1:] == [
        {"index": 0, "run": 1, "question_id": "a", "content": "4"},
        {"index": 1, "run": 1, "question_id": "b", "content": "6"},
    ]
    with open(part, "a") as file:
        file.write('{"index": 2, "run": 1, "quest')  # a kill cut it
    chat.requests.clear()
    chat.reply = lambda request, number: said(str(marks[about(request)]))
    found = score_answers(answers, ITEMS, Marks(), out=out, judge=judge(chat, concurrency=4))
    assert sorted(map(about, chat.requests)) == ["c", "d"]
    assert found.results["scores"]["score"] == 5 and not part.exists()


@pytest.mark.parametrize(
    "reply, settings, problem",
    [
        (
            Reply(wait=5),
            {"timeout": 0.05},
            "no answer to 2 requests; the last problem: no whole answer within",
        ),
        (said(None), {}, "the last problem: the answer's content is NoneType, not text"),
        (
            said(" \n"),
            {},
            "judge.name teacher: said nothing about 2 of 4 answers: c, d; raise judge.max_tokens",
        ),
        (Reply("no", status=400), {}, "asked about rows 0: the server refuses this (400 no)"),
        (Reply("no", status=401), {}, "set the environment variable OPENAI_API_KEY to it; kept: 2 of 4"),
        (said("5"), {"budget": 2}, "judge.budget: all 2 requests are spent"),
    ],
    ids=["late", "null", "empty", "refused", "key", "budget"],
)
def test_how_a_judge_is_silent(chat, answers, tmp_path, reply, settings, problem):
    chat.reply, out = fail_from(2, reply), tmp_path / "out"
    line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat, **settings))
    assert problem in line and "kept: 2 of 4 verdicts" in line
    assert [path.name for path in out.iterdir()] == ["reviews.jsonl.part"]


def test_a_judge_that_never_answers_leaves_nothing(chat, answers, tmp_path):
    chat.reply = lambda request, number: Reply("gone", status=404)
    line = refusal(score_answers, answers, ITEMS, Marks(), out=tmp_path / "out", judge=judge(chat))
    assert "check judge.url and judge.name; no verdict of 4 came" in line
    assert not (tmp_path / "out").exists()
    chat.reply = fail_from(1, Reply("busy", status=503))
    line = refusal(score_answers, answers, ITEMS, Marks(), judge=judge(chat))
    assert line.endswith("no verdict of 4 came") and len(chat.requests) < 9


def test_a_budget_counts_the_verdicts_on_disk(chat, answers, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat, budget=3))
        assert "judge.budget: all 3 requests are spent" in line and "kept: 3 of 4 verdicts" in line
    assert len(chat.requests) == 3
    found = score_answers(answers, ITEMS, Marks(), out=out, judge=judge(chat, budget=4))
    assert found.results["scores"]["score"] == 5 and len(chat.requests) == 4


def test_what_was_kept_of_other_questions_is_not_taken(chat, answers, tmp_path):
    out = tmp_path / "out"
    chat.reply = fail_from(1, Reply("busy", status=503))
    refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat, name="pupil"))
    assert "reviews.jsonl.part: was begun with another config.name; remove it or give" in line
    part, text = out / "reviews.jsonl.part", answers.read_text()
    answers.write_text(text.replace("No d", "Yes"))
    line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert "was begun with another asked" in line
    answers.write_text(text)
    part.write_text(part.read_text().replace('"question_id": "a"', '"question_id": "b"'))
    line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert "reviews.jsonl.part line 2: is damaged" in line


def test_nobody_is_asked_where_answers_do_not_join(chat, answers, tmp_path):
    out = tmp_path / "out"
    lines(answers, rows(answers) + rows(answers)[1:3])
    line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert "2 ids come several times: b, c; keep one answer" in line
    lines(answers, rows(answers)[:3])
    line = refusal(score_answers, answers, ITEMS, Marks(), out=out, judge=judge(chat))
    assert "1 of 4 questions have no answer: d" in line
    assert not chat.requests and not out.exists()


def test_evaluators_without_a_question_for_a_judge(chat, answers):
    line = refusal(score_answers, answers, ITEMS, Dumb(), judge=judge(chat))
    assert "evaluator Dumb has no to_judge(item, answer); give it one, or use --reviews" in line
    line = refusal(score_answers, answers, ITEMS, Plain(), judge=judge(chat))
    assert line == "evaluator Plain asks no judge; leave out --judge.url and --judge.model"
    assert not chat.requests


# ---- with a model ------------------------------------------------------------------------------------


def test_answers_are_kept_where_the_judge_falls_silent(chat, tmp_path, monkeypatch):
    out, two = tmp_path / "out", ITEMS[:2]
    chat.reply = fail_from(1, Reply("busy", status=503))
    line = refusal(evaluate, bundle(), two, Marks(), out=out, batch_size=2, judge=judge(chat))
    assert "kept: 1 of 2 verdicts" in line
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl.part", "reviews.jsonl.part"]
    monkeypatch.setattr("mllm_align.evaluation.run.respond", None)  # no answer is generated again
    chat.reply = lambda request, number: said(str(marks[about(request)]))
    found = evaluate(bundle(), two, Marks(), out=out, batch_size=2, judge=judge(chat))
    assert found.results["scores"]["score"] == 5 and found.results["model"].endswith("llava15")
    assert [row["content"] for row in found.lines] == ["4", "6"]
    texts = [row["text"] for row in rows(out / "answers.jsonl")]
    shown = {about(r): r["messages"][0]["content"][0]["text"] for r in chat.requests}
    assert shown == {name: f"About {name}: {text}." for name, text in zip("ab", texts, strict=True)}
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "results.json", "reviews.jsonl"]
    assert evaluate(bundle(), two, Marks(), out=out, batch_size=2, judge=judge(chat)) == found


def test_a_model_as_judge(base, answers, tmp_path):
    out, model = tmp_path / "out", BenchmarkJudge(model=str(base.folder.path), max_tokens=3)
    found = score_answers(answers, ITEMS, Long(), out=out, judge=model)
    assert found.results["scores"]["score"] > 0 and found.results["n"] == 4
    assert found.results["judge"]["fingerprint"] == base.folder.fingerprint
    assert [row["question_id"] for row in found.lines] == list(NAMES)
    assert score_answers(answers, ITEMS, Long(), out=out, judge=model) == found


def test_a_model_that_says_nothing_or_can_not(base, answers, answering, tmp_path):
    texts = {"a": "4", "b": "", "c": "2", "d": ""}
    calls, out = answering(lambda each: texts[each.id]), tmp_path / "out"
    model = BenchmarkJudge(model=str(base.folder.path), max_tokens=3)
    line = refusal(score_answers, answers, ITEMS, Looks(), out=out, judge=model)
    assert f"judge.model {base.folder.path}: said nothing about 2 of 4 answers: b, d" in line
    assert "kept: 2 of 4 verdicts" in line
    assert [each.record.messages[0].places for each in calls[0]["records"]] == [1] * 4
    texts |= {"b": "6", "d": "8"}
    found = score_answers(answers, ITEMS, Looks(), out=out, judge=model)
    assert [each.record.id for each in calls[1]["records"]] == ["b", "d"]
    assert found.results["scores"]["score"] == 5
    large = BenchmarkJudge(model=str(base.folder.path), max_tokens=10_000)
    line = refusal(score_answers, answers, ITEMS, Marks(), judge=large)
    assert "4 of 4 questions are too long for it: a, b, c, d; lower judge.max_tokens" in line


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_goes_on_after_a_kill(chat, tmp_path, end):
    chat.reply = lambda request, number: said(f"Good.\nRating: {number % 7}", wait=0.3)
    kinds = ("attribute", "adversarial", "comparison", "counting", "relation", "environment")
    asked = [
        {"question_type": kind, "image_src": f"{i}.jpg", "image_content": ["Mug"], "question": f"What {i}?"}
        | {"gt_answer": "A mug."}
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "hal").mkdir()
    (tmp_path / "hal/questions.json").write_text(json.dumps(asked))
    said_by = [{"question_id": i, "model_answer": "A mug."} for i in range(len(kinds))]
    command = [sys.executable, "-m", "mllm_align.cli", "evaluate", "mmhal", "--data", str(tmp_path / "hal")]
    command += ["--answers", str(lines(tmp_path / "a.jsonl", said_by)), "--out", str(tmp_path / "out")]
    command += ["--judge.url", chat.url, "--judge.name", "teacher", "--judge.concurrency", "1"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(chat.requests) < 4:
        assert first.poll() is None and time.sleep(0.05) is None
    first.send_signal(end)
    _, told = first.communicate(timeout=60)
    assert first.returncode == (-9 if end == signal.SIGKILL else 75), told
    kept = len(rows(tmp_path / "out/reviews.jsonl.part")) - 1
    assert 1 <= kept < len(kinds)
    before = len(chat.requests)
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"resuming {tmp_path / 'out'}/reviews.jsonl: {kept} of 6 records are done" in done.stdout
    assert len(chat.requests) - before == len(kinds) - kept
    assert len(rows(tmp_path / "out/reviews.jsonl")) == len(kinds)
