"""`mllm-align score`."""

import json
from pathlib import Path

from runs import MODEL, PAIRS, rows, write_pairs

KEYS = ["index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]


def test_score_writes_a_line_a_record_and_what_was_run(run, tmp_path):
    out = tmp_path / "new" / "scores.jsonl"
    status, told, said = run("score", "--model", MODEL, "--data", PAIRS, "--out", out, "--data.shapes", 1)
    assert (status, told, said) == (0, f"8 records scored to {out}\n", "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(8))
    assert all(list(line) == KEYS for line in lines)
    assert all(line["chosen_logp"] < 0 < line["chosen_tokens"] for line in lines)
    (event,) = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    assert event["event"] == "score" and event["records"] == 8 and event["skipped"] == []
    assert event["model"] == str(MODEL) and event["data"] == str(PAIRS)
    assert {p.name for p in out.parent.iterdir()} == {"scores.jsonl", "scores.jsonl.log.jsonl"}

    argv = ("--data.max-length", 75, "--data.over-long", "skip", "--data.shapes", 1)
    status, told, _ = run("score", "--model", MODEL, "--data", PAIRS, "--out", out, *argv)
    gone = [i for i, line in enumerate(out.read_text().splitlines()) if "null" in line]
    assert status == 0 and gone
    assert told == f"{8 - len(gone)} records scored to {out}, {len(gone)} over-long records left out\n"
    events = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    assert len(events) == 2 and events[1]["skipped"] == gone


def test_over_long_records_are_refused(refused, tmp_path):
    argv = ("score", "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "s", "--data.max-length", 10)
    assert "record 0: prompt and longest response are 79 tokens, the limit is 10" in refused(*argv)
    assert "all 8 records" in refused(*argv, "--data.over-long", "skip")


def test_identical_records_are_refused_or_left_out(refused, run, tmp_path):
    first, second, third = rows(3)
    data = write_pairs(tmp_path, [first, {**second, "rejected": f" {second['chosen']}\n"}, third])
    argv = ("--model", MODEL, "--data.shapes", 1, "--data", data, "--out", tmp_path / "scores")
    line = refused("score", *argv)
    assert "pairs.jsonl record 1, rejected: the response is identical to that of chosen" in line
    assert "--data.identical skip" in line
    status, told, _ = run("score", *argv, "--data.identical", "skip")
    assert status == 0 and told.endswith(", 1 identical records left out\n")
    lines = [json.loads(line) for line in (tmp_path / "scores").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[1] == {**dict.fromkeys(KEYS), "index": 1, "left_out": "identical"}

    turns = [{"from": "human", "value": "gi?"}, {"from": "gpt", "value": "ku."}]
    other = [turns[0], {"from": "gpt", "value": "der."}]
    povid = [{"conversations": turns, "rejected_conversations": each} for each in (turns, other)]
    data = write_pairs(tmp_path, povid)
    status, told, said = run("score", *argv)  # published sets have some: they are left out by rule
    assert status == 0 and told.startswith("1 records scored to ")
    assert said == f"left out of {data}: 1 identical pair\n"


def test_control_tokens_in_responses_are_scored_as_text(run, tmp_path):
    """They ended a response, and both had the same log-prob."""
    texts = ("The tag </s> closes it and the dog is red.", "The tag </s> opens it and two cups are blue.")
    data = write_pairs(tmp_path, [{**rows(1)[0], "chosen": texts[0], "rejected": texts[1]}])
    argv = ("--model", MODEL, "--data.shapes", 1, "--data", data, "--out", tmp_path / "scores")
    assert run("score", *argv)[0] == 0
    (line,) = [json.loads(line) for line in (tmp_path / "scores").read_text().splitlines()]
    assert line["chosen_logp"] != line["rejected_logp"]
    assert min(line["chosen_tokens"], line["rejected_tokens"]) > 20
