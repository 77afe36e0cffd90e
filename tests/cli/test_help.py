"""Help fits a screen and names units; all of it is a word further."""

import pytest

from mllm_align.cli.options import field_docs, options
from mllm_align.cli.verbs import VERBS
from mllm_align.config import OptimConfig

KEYS = ["index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("argv", [[], ["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_fits_a_screen(run, argv):
    status, out, err = run(*argv)
    assert (status, err) == (0, "") and out.startswith("usage: mllm-align ")
    assert len(out.splitlines()) <= 50 and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    "file", ["online_dpo_llava16_7b", "online_bdhs_llava16_7b", "averaged_bdhs_scenes"]
)
def test_help_with_a_config_fits_a_screen(run, file):
    assert len(run("train", file, "--help")[1].splitlines()) <= 50


@pytest.mark.parametrize("asked", ["--help", "--help-all"])
def test_help_is_no_wider_than_the_terminal(run, monkeypatch, asked):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (*([verb] for verb in VERBS), ["train", "online_dpo_llava16_7b"], ["judge", "judge"]):
        lines = run(*words, asked)[1].splitlines()
        assert len(lines) > 3 and [line for line in lines if len(line) > 80 or line != line.rstrip()] == []


@pytest.mark.parametrize(
    "verb, words",
    [
        ("train", ["nats", "--optim.learning-rate", "1e-06", "tokens", "--online KIND", "none, pairs"]),
        ("score", ["nats, summed over response tokens", *KEYS, "Records at once"]),
        (
            "generate",
            ["--sampling.temperature", "Most tokens of a response", "index, id, responses", "JSONL"],
        ),
        ("bdhs", ["--mask-rate", "0.99", "Most tokens that complete a sentence", "rejected", "each host"]),
        ("inspect", ["from 0"]),
        ("export", ["16-bit", "PEFT"]),
        ("quickstart", ["about eight minutes", "report.html", "Share of the image"]),
    ],
)
def test_help_names_units(run, verb, words):
    text = " ".join(run(verb, "--help")[1].split())
    assert [word for word in words if word not in text] == []


def test_help_of_train_shows_the_given_files_defaults(run, config_file):
    status, out, _ = run("train", config_file, "--help")
    assert status == 0 and "Columns of each low-rank term (default: 2)" in " ".join(out.split())


@pytest.mark.parametrize("verb, cls", VERBS.items())
def test_the_common_options_exist_and_are_shown(run, verb, cls):
    """Those of kinds that a config may have are there when it has them."""
    known, later = (
        options(cls),
        {"annotator.url", "annotator.function", "online.annotator", "evaluator.prompt"},
    )
    shown = run(verb, "--help")[1]
    for name in set(getattr(cls, "COMMON", ())) - later:
        assert f"--{name}" in known and (f"--{name}" in shown or f"--[no-]{name}" in shown)


@pytest.mark.parametrize("verb", VERBS)
def test_all_help_has_every_option(run, verb):
    status, out, err = run(verb, "--help-all")
    assert (status, err) == (0, "") and f"usage: mllm-align {verb}" in out
    branches = {"--objective", "--online", "--lora", "--annotator", "--annotator.mesh"}
    assert [name for name in options(VERBS[verb]) if name not in out and name not in branches] == []
    assert verb in ("configs", "quickstart") or "(required)" in out


def test_all_help_of_a_config_shows_its_defaults_and_kinds(run):
    out = run("train", "online_bdhs_scenes", "--help-all")[1]
    assert "--online.mask-rate" in out and "(default: 0.0003)" in out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_verb_it_lists_them(run, argv):
    status, out, _ = run(*argv)
    assert status == 0 and all(f"\n  {verb} " in out for verb in VERBS)


def test_the_docs_of_fields_are_the_strings_below_them():
    docs = field_docs(OptimConfig)
    assert docs["clip"] == "Largest global norm of the gradient; longer ones are scaled to it."
    assert set(docs) == set(OptimConfig.__dataclass_fields__)
