"""From arguments to a verb: what tyro reads, configs that are printed, completion scripts."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refusal

from mllm_align.cli import verbs
from mllm_align.cli.plan import Plan
from mllm_align.cli.score import Score
from mllm_align.cli.verbs import SHELLS, VERBS, parse
from mllm_align.config import BDHSConfig, Config, MeshConfig, from_json, load_config


def test_a_verb_without_a_config():
    read = parse(
        "score", ["--model", "m", "--data", "d", "--out=o", "--mesh.fsdp", "2", "--batch_size", "3"]
    )
    assert read == Score(Path("m"), Path("d"), Path("o"), batch_size=3, mesh=MeshConfig(fsdp=2))


def test_a_verb_whose_config_is_of_either_kind():
    tiny = load_config("dpo_tiny")
    made = parse("plan", ["dpo_tiny", "--lora.rank", "3", "--sweep"])
    assert isinstance(made, Plan) and isinstance(made.config, Config) and made.sweep
    assert tiny.lora and made.config == replace(tiny, lora=replace(tiny.lora, rank=3))
    made = parse("plan", ["bdhs", "--iterations", "3"])
    assert made.config == BDHSConfig(iterations=3) and made.config_file == Path("bdhs")


def test_what_a_config_refuses_keeps_its_words():
    assert (
        refusal(parse, "plan", ["dpo_tiny", "--lora.rank", "0"]) == "lora.rank is 0; it must be 1 or more"
    )
    line = refusal(parse, "plan", ["dpo_tiny", "--batch-size", "6", "--micro-batches", "4"])
    assert line == "batch_size is 6; it must be a multiple of micro_batches (4)"


def test_where_tyro_refuses_after_all_its_own_message_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(verbs, "check", lambda *_, **__: None)
    with pytest.raises(SystemExit) as stop:
        parse("score", ["--modle", "m"])
    assert stop.value.code == 2 and "--modle" in capsys.readouterr().err


# ---- printed configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--print-config"], ["--print_config", "json"], ["--print-config=json"]])
def test_a_config_is_printed_as_json(run, words):
    status, out, _ = run("train", "dpo_tiny", *words, "--steps", 3)
    assert status == 0 and from_json(json.loads(out)) == replace(load_config("dpo_tiny"), steps=3)


def test_a_config_that_is_printed_as_yaml_can_be_fed_back(run, tmp_path):
    printed = run("train", "dpo_tiny", "--print-config", "yaml", "--objective", "ipo")[1]
    (tmp_path / "mine.yaml").write_text(printed)
    assert run("train", tmp_path / "mine.yaml", "--print-config", "yaml") == (0, printed, "")
    config = json.loads(run("train", tmp_path / "mine.yaml", "--print-config")[1])
    assert config["objective"]["kind"] == "ipo"


# ---- completion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_know_verbs_and_options(run, shell):
    status, out, err = run("--print-completion", shell)
    assert (status, err) == (0, "")
    assert all(f"'{word}': {{" in out for verb in VERBS for word in verb.split()) and "learning-rate" in out


def test_a_completion_script_completes(run, tmp_path):
    """In bash, as a user who presses the tabulator."""
    script = tmp_path / "complete.sh"
    script.write_text(
        run("--print-completion", "bash")[1]
        + "\ncomplete -p mllm-align | grep -o -- '-F [^ ]*' | cut -c4- > function\n"
        + "COMP_WORDS=(mllm-align train --optim.lear) COMP_CWORD=2\n"
        + "COMP_LINE='mllm-align train --optim.lear' COMP_POINT=${#COMP_LINE}\n"
        + "$(cat function); printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path)
    assert "--optim.learning-rate" in done.stdout, done.stderr
