"""`mllm-align judge`: what is measured of an annotator, what is printed and written, what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judges import answering, base, likes, record
from runs import MODEL, PAIRS, compiling, one_device, rows, write_pairs

from mllm_align import Endpoint, JudgeConfig, JudgeModel, MeshConfig, Scorer, cli
from mllm_align.annotate.pairwise import Pairwise
from mllm_align.annotate.verdict import OUTCOMES
from mllm_align.config import from_json
from mllm_align.evaluation import accuracy as module
from mllm_align.evaluation.accuracy import accuracy, table

assert compiling and base and answering  # fixtures
CONFIGS = Path(__file__).parents[2] / "configs"


def pairs(count, **fields):
    return [
        record(f"r{i}", images=0, chosen=f"{i} cats.", rejected=f"{i} dogs.", **fields)
        for i in range(count)
    ]


@pytest.fixture
def asking(monkeypatch):
    """asking(say): measure an annotator that answers say(record, is the chosen response first)."""

    def asking(say, data):
        def ask(asked):
            return [say(each.record.id, each.first == each.record.responses[0]) for each in asked]

        opened = []
        monkeypatch.setattr(module, "open_annotator", lambda *args: (opened.append(args), Pairwise(ask))[1])
        return (*accuracy(JudgeConfig(), data), opened)

    return asking


def share(found):
    return found["mean"], found["n"]


# ---- figures -----------------------------------------------------------------------------------------


def test_a_judge_that_is_mostly_right(asking):
    """Right on 30, wrong on 6, at odds with itself on 4."""

    def say(name, chosen_first):
        number = int(name[1:])
        if number < 4:
            return "Response 1"
        return f"Response {1 if chosen_first == (number >= 10) else 2}"

    found, lines, _ = asking(say, pairs(40))
    assert found["pairs"] == 40 and (found["decided"], found["right"]) == (36, 30)
    assert found["outcomes"] == {**dict.fromkeys(OUTCOMES, 0), "ranked": 36, "disagreement": 4}
    assert share(found["accuracy"]) == (pytest.approx(30 / 36), 36)
    assert share(found["accuracy_of_all"]) == (pytest.approx(30 / 40), 40)
    assert found["apart_from_chance"] and found["p_of_chance"] < 1e-3
    assert share(found["orders"]["chosen_first"]) == (pytest.approx(34 / 40), 40)
    assert share(found["orders"]["rejected_first"]) == (pytest.approx(30 / 40), 40)
    assert share(found["first"]) == (pytest.approx(44 / 80), 80) and found["first_expected"] == 0.5
    for each in ("accuracy", "accuracy_of_all", "first"):
        assert found[each]["low"] < found[each]["mean"] < found[each]["high"]
    assert [line["right"] for line in lines] == [None] * 4 + [False] * 6 + [True] * 30
    assert lines[0] == {
        "index": 0,
        "id": "r0",
        "outcome": "disagreement",
        "right": None,
        "scores": None,
        "reason": "Response 1 | Response 1",
        "answers": {"chosen_first": "Response 1", "rejected_first": "Response 1"},
    }
    assert lines[39]["scores"] == [1, 0] and lines[39]["answers"]["rejected_first"] == "Response 2"
    shown = table(found)
    assert "accuracy of decided   0.833 (" in shown and "of 36; 30 right" in shown
    assert "pairs                 40: 36 ranked, 4 disagreement" in shown
    assert "told from chance      yes, better (p = 7" in shown and "0.550 (" in shown


@pytest.mark.parametrize(
    "answer, outcome, first",
    [
        ("Response 1", "disagreement", (1.0, 10)),
        ("Response 2", "disagreement", (0.0, 10)),
        ("Tie", "tie", (None, 0)),
        ("No idea", "unparsable", (None, 0)),
        (None, "failed", (None, 0)),
    ],
)
def test_judges_that_decide_nothing(asking, answer, outcome, first):
    found, lines, _ = asking(lambda *_: answer, pairs(5))
    assert found["outcomes"][outcome] == 5 and (found["decided"], found["right"]) == (0, 0)
    assert share(found["accuracy"]) == (None, 0) and share(found["accuracy_of_all"]) == (0, 5)
    assert not found["apart_from_chance"] and found["p_of_chance"] == 1
    assert share(found["first"]) == first
    orders = [share(each)[0] for each in found["orders"].values()]
    assert orders == [first[0], None if first[0] is None else 1 - first[0]]
    assert all(line["right"] is None and line["answers"]["chosen_first"] == answer for line in lines)
    assert "accuracy of decided   none; 0 right" in table(found) and "no (p = 1)" in table(found)
    assert ("No answer could be read" in table(found)) is (outcome == "unparsable")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_to_try_where_no_answer_can_be_read(asking):
    """Pairs that are never asked about do not hide it; one answer that can be read does."""
    same = [record("same", images=0, chosen="9 dogs.", rejected="9 dogs.")]
    told = table(asking(lambda *_: "What a picture", pairs(3) + same)[0])
    assert (
        'must be "Response 1", "Response 2" or "Tie", and none is' in told and "--annotator.model" in told
    )
    assert all(len(line) < 115 for line in told.splitlines())
    assert "No answer could" not in table(asking(lambda *_: "What a picture", same)[0])
    one = asking(lambda name, _: "Tie" if name == "r1" else "What a picture", pairs(3))[0]
    assert one["outcomes"]["unparsable"] == 2 and "No answer could" not in table(one)


@pytest.mark.parametrize("count, apart", [(1, False), (5, False), (6, True)])
def test_few_pairs_that_are_all_right_say_little(asking, count, apart):
    """Their bootstrap interval has no width; the exact test knows better."""
    found, _, _ = asking(lambda _, chosen_first: f"Response {1 if chosen_first else 2}", pairs(count))
    assert found["accuracy"]["mean"] == 1 and found["apart_from_chance"] is apart
    assert ("yes, better" in table(found)) is apart


def test_a_judge_that_is_worse_than_chance(asking):
    found, _, _ = asking(lambda _, chosen_first: f"Response {2 if chosen_first else 1}", pairs(20))
    assert found["accuracy"]["mean"] == 0 and "yes, worse" in table(found)
    assert found["first"]["mean"] == 0.5


def test_only_the_first_two_responses_are_asked_about(asking):
    found, lines, _ = asking(lambda *_: "Tie", pairs(2, responses=["9 birds.", "8 fish."]))
    assert found["pairs"] == 2 and all(len(line["answers"]) == 2 for line in lines)


def test_a_judge_of_its_own_lies_on_the_mesh_of_the_config(monkeypatch):
    seen = []

    def opened(annotator, *_):
        seen.append(annotator)
        return Pairwise(lambda asked: ["Tie"] * len(asked))

    monkeypatch.setattr(module, "open_annotator", opened)
    mesh = MeshConfig(data=1, fsdp=-1)
    own = JudgeModel(model="other", mesh=MeshConfig(tensor=2))
    for annotator in (JudgeModel(), replace(own, mesh=None), own, Endpoint()):
        found, _ = accuracy(JudgeConfig(annotator, mesh=mesh), pairs(1))
        assert from_json({"annotator": found["annotator"]}, JudgeConfig).annotator == annotator
    assert [getattr(each, "mesh", None) for each in seen] == [None, mesh, own.mesh, None]


def test_a_scorer_is_asked_once_by_one_process(monkeypatch):
    """What the first process hears goes to the others as JSON."""
    asked = []

    class Lengths:
        def __call__(self, questions):
            from mllm_align.annotate.verdict import scored

            asked.append(len(questions))
            return [scored([len(r) for r in q.responses], "its length") for q in questions]

    monkeypatch.setattr(module, "open_annotator", lambda *_: Lengths())
    monkeypatch.setattr(module.processes, "on_first", lambda f: json.loads(json.dumps(f())))
    data = [*pairs(3), record("long", images=0, chosen="A large cat.", rejected="A cat.")]
    found, lines = accuracy(JudgeConfig(Scorer("a:b")), data)
    assert asked == [4] and found["outcomes"]["tie"] == 3 and found["right"] == 1
    assert (found["orders"], found["first"], found["first_expected"]) == (None, None, None)
    assert lines[3]["scores"] == [12, 6] and lines[3]["answers"] is None
    assert "takes the first" not in table(found)


def test_a_model_judges(base, answering):
    answering(likes("cat"))
    found, lines = accuracy(JudgeConfig(JudgeModel(max_tokens=8)), pairs(8), base)
    assert found["accuracy"]["mean"] == 1 and found["apart_from_chance"]
    assert lines[0]["answers"] == {
        "chosen_first": "Response 1\nIt has cat.",
        "rejected_first": "Response 2\nIt has cat.",
    }


# ---- on the command line -----------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the program in this process, in tmp_path: (status, stdout, stderr)."""
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("rules", None)
    Path("rules.py").write_text(
        "def long(questions):\n    return [[len(r) for r in q.responses] for q in questions]\n"
    )

    def run(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            cli.main(["judge", *map(str, argv)])
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    yield run
    sys.modules.pop("rules", None)


SCORER = (
    CONFIGS / "judge.py",
    "--annotator",
    "scorer",
    "--annotator.function",
    "rules:long",
    "--data",
    PAIRS,
)


def test_a_scorer_on_the_command_line(run):
    status, told, said = run(*SCORER, "--out", "new/result.json")
    assert (status, said) == (0, "")
    found = json.loads(Path("new/result.json").read_text())
    longer = [len(row["chosen"]) - len(row["rejected"]) for row in rows()]
    assert found["right"] == sum(each > 0 for each in longer)
    assert found["outcomes"]["tie"] == longer.count(0) and found["pairs"] == len(longer)
    assert found["annotator"] == {"kind": "scorer", "function": "rules:long"} and found["seconds"] >= 0
    assert (found["data"], found["model"]) == (str(PAIRS), None)
    assert told == table(found) + "\n" and told.startswith("pairs                 8: ")
    lines = [json.loads(line) for line in Path("new/result.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(8))
    assert {file.name for file in Path("new").iterdir()} == {"result.json", "result.jsonl"}
    assert run(*SCORER, "--out", "new/result.json")[0] == 0  # its own results are replaced


def test_a_model_on_the_command_line(run):
    """Random weights decide nothing, and that is counted."""
    argv = (CONFIGS / "judge.py", "--model", MODEL, "--data", PAIRS, "--out", "r.json")
    status, told, said = run(*argv, "--annotator.max-tokens", 2, "--annotator.batch-size", 4)
    assert (status, said) == (0, "")
    found = json.loads(Path("r.json").read_text())
    assert found["outcomes"]["unparsable"] + found["outcomes"]["failed"] == 8
    assert found["model"] == str(MODEL) and found["annotator"]["max_tokens"] == 2
    assert "takes the first       none" in told


def test_the_config_of_a_run_gives_its_annotator(run):
    Path("online.py").write_text(
        "from mllm_align import Config, OnlinePairs, Scorer, MeshConfig\n"
        "def get_config():\n"
        "    online = OnlinePairs(annotator=Scorer('rules:long'))\n"
        "    return Config(online=online, mesh=MeshConfig(data=1, fsdp=-1), dtype='bfloat16')\n"
    )
    status, told, _ = run("online.py", "--print-config")
    config = from_json(json.loads(told), JudgeConfig)
    assert status == 0 and config.annotator == Scorer("rules:long")
    assert (config.mesh.fsdp, config.dtype) == (-1, "bfloat16")
    assert run("online.py", "--data", PAIRS, "--out", "r.json")[0] == 0


@pytest.mark.parametrize(
    "options, wanted",
    [
        ((), {"kind": "judge", "max_tokens": 96}),
        (("--annotator", "judge", "--annotator.max-tokens", 8), {"kind": "judge", "max_tokens": 8}),
        (("--annotator=endpoint", "--annotator.url", "http://h/v1"), {"url": "http://h/v1", "retries": 5}),
        (("--annotator", "oracle", "--annotator.scenes", "s"), {"kind": "oracle", "scenes": "s"}),
        (("--annotator", "questions"), {"kind": "questions", "batch_size": 64}),
        (("--annotator", "scorer", "--annotator.function", "a:b"), {"kind": "scorer", "function": "a:b"}),
    ],
)
def test_annotators_by_name(run, options, wanted):
    status, told, _ = run(CONFIGS / "judge.py", *options, "--print-config")
    found = json.loads(told)["annotator"]
    assert status == 0 and {name: found[name] for name in wanted} == wanted


def test_help_of_judge(run):
    text = " ".join(run("--help")[1].split())
    for words in (
        "usage: mllm-align judge",
        *("endpoint", "judge", "scorer", "oracle", "questions"),
        "index, id, outcome, right, scores, reason, answers",
    ):
        assert words in text
    assert "--annotator.url" in run(CONFIGS / "judge.py", "--annotator", "endpoint", "--help")[1]


JUDGE = (CONFIGS / "judge.py",)
OUT = ("--data", PAIRS, "--out", "r.json")


@pytest.mark.parametrize(
    "argv, said",
    [
        ((), "judge needs a config first"),
        (JUDGE, "judge needs --data, --out;"),
        ((*JUDGE, *OUT), "judge needs --model: the annotator is the policy's own base"),
        ((*JUDGE, *OUT, "--annotator", "questions"), "judge needs --model"),
        ((*JUDGE, *OUT, "--model", "absent"), "absent"),
        ((*JUDGE, *OUT, "--annotator.model", "absent"), "absent"),
        ((*JUDGE, *OUT, "--annotator", "jury"), "--annotator is 'jury'; it must be one of "),
        ((*JUDGE, *OUT, "--annotator"), "--annotator is ''; it must be one of"),
        ((*JUDGE, *OUT, "--annotator.url", "http://h"), "unknown option --annotator.url"),
        (
            (*JUDGE, *OUT, "--annotator", "scorer", "--annotator.function", "rules"),
            "must be module:function",
        ),
        ((*SCORER, "--out", "r.json", "--annotator.function", "rules:short"), "has no 'short'"),
        ((*SCORER, "--out", "r.jsonl"), "give --out a name that ends in .json"),
        ((*SCORER, "--out", "."), "this is a folder; name a file"),
        ((*SCORER[:-1], "absent.jsonl", "--out", "r.json"), "absent.jsonl"),
        ((*JUDGE, *OUT, "--annotator", "oracle", "--annotator.scenes", "s"), "is not named after a scene"),
        ((CONFIGS / "dpo_tiny.py", *OUT), "its Config has no annotator (online is NoneType)"),
        ((CONFIGS / "bdhs.py", *OUT), "get_config() gives BDHSConfig, not a JudgeConfig or Config"),
    ],
    ids=lambda value: " ".join(str(v) for v in value[1:]) if isinstance(value, tuple) else "",
)
def test_what_is_refused(run, tmp_path, argv, said):
    pytest.importorskip("tensorflow_datasets")
    before = set(tmp_path.iterdir())
    status, told, line = run(*argv)
    assert status == 2 and not told
    assert line.startswith("mllm-align: error: ") and line.count("\n") == 1 and said in line
    assert {file for file in tmp_path.iterdir() if file.name != "__pycache__"} == before


def test_files_of_others_are_not_replaced(run, tmp_path):
    data = write_pairs(tmp_path, rows(2), "mine.jsonl")
    before = data.read_bytes()
    argv = (*SCORER[:-1], data, "--out")
    assert "mine.jsonl: is there without its .json" in run(*argv, "mine.json")[2]
    Path("mine.json").write_text("{}")
    assert "mine.jsonl: is the data file itself" in run(*argv, "mine.json")[2]
    assert run(*SCORER, "--out", "other.json")[0] == 0
    Path("other.json").unlink()
    status, _, line = run(*SCORER, "--out", "other.json")
    assert status == 2 and "other.jsonl: is there without its .json" in line
    assert data.read_bytes() == before and Path("mine.json").read_text() == "{}"


def test_intervals_are_the_same_each_time(asking):
    votes = np.random.default_rng(0).integers(1, 3, 60)
    one, two = (asking(lambda name, _: f"Response {votes[int(name[1:])]}", pairs(60))[0] for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
