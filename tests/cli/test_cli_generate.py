"""`mllm-align generate`."""

import json

import pytest
from runs import MODEL, PAIRS, rows, write_pairs

IMAGE = PAIRS.parent / "images" / "0_L.png"


ASKING = ("generate", "--model", MODEL, "--image", IMAGE, "--prompt", "gi dan?")


SHORT = ("--sampling.max-tokens", 8)


@pytest.mark.slow
def test_generate_prints_a_response(run):
    status, told, said = run(*ASKING, *SHORT)
    assert (status, said) == (0, "decoding: greedy, at most 8 tokens\n") and told.strip()
    assert run(*ASKING, *SHORT, "--seed", 1)[1] == told


def test_generate_prints_samples_of_a_seed(run, scripted):
    two = (*ASKING, *SHORT, "--samples", 2, "--sampling.temperature", 1)
    status, told, said = run(*two)
    assert (status, said) == (0, "decoding: temperature 1, seed 0, at most 8 tokens\n")
    assert len(told.splitlines()) >= 2 and run(*two)[1] == told
    assert run(*two, "--seed", 1)[1] != told


def test_generate_writes_a_line_a_record(run, tmp_path, scripted):
    long = {**rows()[1], "prompt": "gi " * 300}
    given = [{k: row[k] for k in ("prompt", "images")} for row in (rows()[0], long, rows()[2])]
    data, out = write_pairs(tmp_path, given), tmp_path / "new" / "responses.jsonl"
    argv = ("generate", "--model", MODEL, "--data", data, "--out", out, *SHORT, "--samples", 2)
    argv += ("--data.over-long", "skip", "--data.max-length", 100, "--sampling.temperature", 0.5)
    said = "decoding: temperature 0.5, seed 0, at most 8 tokens\n"
    assert run(*argv) == (0, f"responses to 2 records in {out}\n", said)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2] and lines[1]["responses"] is None
    assert all(set(line) == {"index", "id", "responses"} for line in lines)
    assert [len(line["responses"]) for line in (lines[0], lines[2])] == [2, 2]


@pytest.mark.parametrize(
    "argv, said",
    [
        (("generate",), "generate needs --model"),
        (("generate", "--model", MODEL), "needs either --prompt (with --image) or --data FILE --out FILE"),
        (("generate", "--model", MODEL, "--image", IMAGE), "needs either --prompt"),
        ((*ASKING, "--data", PAIRS), "needs either --prompt"),
        ((*ASKING, "--out", "x"), "--out goes with --data FILE"),
        (("generate", "--model", MODEL, "--data", PAIRS), "needs --out FILE"),
        (
            ("generate", "--model", MODEL, "--data", PAIRS, "--out", "x", "--image", IMAGE),
            "from the file alone",
        ),
        (("generate", "--model", MODEL, "--data", "absent.jsonl", "--out", "x"), "no such file"),
        (("generate", "--model", "absent", "--prompt", "gi?"), "absent"),
        ((*ASKING[:3], "--image", "absent.png", "--prompt", "gi?"), "absent.png): no such file"),
        ((*ASKING[:5], IMAGE, "--prompt", "<image> gi?"), "1 image places but the record has 2 images"),
        (
            (*ASKING, "--samples", 2),
            "greedy responses to one prompt are all the same; set sampling",
        ),
        ((*ASKING, "--samples", 0), "samples is 0; it must be 1 or more"),
        ((*ASKING, "--sampling.temperature", -1), "sampling.temperature is -1.0; it must be 0 or more"),
        ((*ASKING, "--sampling.top-p", 1.5), "sampling.top_p is 1.5; it must be above 0 and at most 1"),
        ((*ASKING, "--sampling.top-k", "few"), "--sampling.top-k"),
        ((*ASKING, "--sampling.max-tokens", 0), "sampling.max_tokens is 0"),
        (
            (*ASKING, "--temperature", 0.5),
            "unknown option --temperature; did you mean --sampling.temperature?",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[3:])) if isinstance(value, tuple) else "",
)
def test_generate_refuses(refused, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*argv)
    assert not list(tmp_path.iterdir())
