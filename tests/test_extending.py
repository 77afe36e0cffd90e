"""docs/extending.md: its examples run as they stand there, and its table counts what the tree has."""

import json
import re
import shlex
from pathlib import Path

import pytest
from chat_server import chat_server, said
from runs import compiling, one_device

from mllm_align import Config, LoraConfig, load_run, train
from mllm_align.cli import main
from mllm_align.data.readers import records_from
from mllm_align.registry import load_part
from mllm_align.testbed.demo import make_model, make_pairs

assert compiling  # a fixture
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)
COMMANDS = [
    shlex.split(line) for language, text in BLOCKS if language == "bash" for line in text.splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Demo model and data, and the page's files."""
    folder = tmp_path_factory.mktemp("extending")
    make_model(folder / "model", layers=1, vision_layers=2)
    make_pairs(folder / "demo", 8)
    for language, text in BLOCKS:
        name = re.match(r"# (\w+\.py)\n", text)
        if name:
            (folder / name[1]).write_text(text)
        if language == "json":
            (folder / "rated.jsonl").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    """Programs for eight take longer to compile."""
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """Run a verb's command of the page; what it prints."""
    monkeypatch.chdir(folder)

    def run(verb, number=0):
        main([command for command in COMMANDS if command[1] == verb][number][1:])
        return capfd.readouterr().out

    return run


def test_every_example_is_short_and_run_below():
    assert [command[1] for command in COMMANDS] == [
        "train",
        "inspect",
        "judge",
        "train",
        "evaluate",
        "evaluate",
    ]
    examples = [text for language, text in BLOCKS if language == "python"]
    assert all(len(text.split("\n\n", 1)[-1].splitlines()) <= 24 for text in examples)


@pytest.mark.slow
def test_the_objective(run, folder):
    run("train")
    saved = json.loads((folder / "runs/hinge/config.json").read_text())["objective"]
    assert saved == {"kind": f"{folder / 'my_losses.py'}:Hinge", "beta": 0.5}
    assert load_run(folder / "runs/hinge").trained


def test_the_reader(run):
    assert run("inspect").startswith("record a ")
    (record,) = records_from("rated.jsonl", format="my_reader.py:read")
    assert record.responses == ("A square.", "A cat.") and record.messages[0].text == "What is it?"


def test_the_annotator_judges(run, folder):
    run("judge")
    result = json.loads((folder / "brief.json").read_text())
    assert result["annotator"] == {"kind": f"{folder / 'my_annotator.py'}:Brief", "words": 12}
    assert result["pairs"] == 8 and sum(result["outcomes"].values()) == 8


@pytest.mark.slow
def test_the_annotator_ranks_while_a_run_trains(run, folder):
    run("train", 1)
    facts = json.loads((folder / "runs/brief/run.json").read_text())
    assert list(facts["part_files"]) == [str(folder / "my_annotator.py")]
    assert load_run(folder / "runs/brief").trained


@pytest.mark.slow
def test_the_callback(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    best = load_part("my_program.py:Best", "callback")()
    config = Config(lora=LoraConfig(rank=2), batch_size=8, steps=1)
    train(config, "model", "demo/pairs.jsonl", "runs/best", "demo/pairs.jsonl", callbacks=[best])
    assert 0 < best.loss < 1 and f"saved {folder / 'runs/best/checkpoints/1'}\n" in capfd.readouterr().out


def test_the_evaluator(run, folder):
    assert "recall" in run("evaluate")
    result = json.loads((folder / "overlap/results.json").read_text())
    assert result["config"]["shortest"] == 3 and set(result["scores"]) == {"recall", "words"}
    assert len((folder / "overlap/answers.jsonl").read_text().splitlines()) == result["n"] == 8


def test_the_evaluator_that_asks_a_judge(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server() as chat:
        chat.reply = lambda request, number: said("7")
        words = [command for command in COMMANDS if command[1] == "evaluate"][1][1:]
        main([chat.url if word.startswith("http:") else word for word in words])
    assert "score                   7.0000" in capfd.readouterr().out
    result = json.loads((folder / "polite/results.json").read_text())
    assert result["judge"]["name"] == "NAME" and len(chat.requests) <= result["n"] == 8
