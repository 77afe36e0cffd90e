"""The command line as a user meets it: what it prints, what it writes, how it refuses.

Every refusal is one line on stderr and status 2, and leaves no file behind.
"""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import run
from decoding import Scripted
from PIL import Image
from runs import MODEL, PAIRS, TINY, bundle, compiling, events, one_device, rows, write_pairs
from safetensors.numpy import load_file, save_file

from mllm_align import cli
from mllm_align.config import save_json
from mllm_align.errors import InputError, NotFinite, Preempted
from mllm_align.locks import alone

assert compiling and run  # fixtures
VERBS = ("train", "bdhs", "generate", "score", "judge", "inspect", "export", "plan", "quickstart")
KEYS = ["index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    """The programs of the other tests are there then, compiled."""
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    monkeypatch.setattr("mllm_align.training.loop.make_mesh", one_device)


@pytest.fixture
def refused(run):
    """The one line that a command is refused with; around --out, nothing came or went."""

    def around(out: Path | None) -> list[Path]:
        return [] if out is None else sorted(out.parent.rglob("*"))

    def refuse(*argv) -> str:
        out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else None
        before = around(out)
        status, told, line = run(*argv)
        assert status == 2, (told, line)
        assert line.startswith("mllm-align: error: ") and line.count("\n") == 1, line
        assert not told
        assert around(out) == before
        return line

    return refuse


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """TINY as a config file."""
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    text = "import json\nfrom mllm_align.config import from_json\n"
    file.write_text(f"{text}def get_config():\n    return from_json(json.loads('''{save_json(TINY)}'''))\n")
    return file


# ---- help and verbs --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_defaults_and_what_is_required(run, verb):
    status, out, err = run(verb, "--help")
    assert status == 0 and not err
    assert f"usage: mllm-align {verb}" in out and "(default: " in out
    assert verb == "quickstart" or "(required)" in out


@pytest.mark.parametrize(
    "verb, words",
    [
        (
            "train",
            ["nats", "--optim.learning-rate", "1e-06", "tokens", "--online none|pairs|bdhs|distorted"],
        ),
        ("score", ["nats, summed over response tokens", *KEYS, "Records at once"]),
        ("generate", ["--sampling.temperature", "Most tokens of a response", "index, responses", "JSONL"]),
        ("bdhs", ["--mask-rate", "0.99", "Most tokens that complete a sentence", "rejected", "each host"]),
        ("inspect", ["from 0"]),
        ("export", ["16-bit", "PEFT"]),
        ("quickstart", ["about ten minutes", "report.html", "Share of the image"]),
    ],
)
def test_help_names_units(run, verb, words):
    text = " ".join(run(verb, "--help")[1].split())
    assert [word for word in words if word not in text] == []


def test_help_of_train_shows_the_given_files_defaults(run, config_file):
    status, out, _ = run("train", config_file, "--help")
    assert status == 0 and "Columns of each low-rank term. (default: 2)" in " ".join(out.split())


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_verb_it_lists_them(run, argv):
    status, out, _ = run(*argv)
    assert status == 0 and all(f"\n  {verb} " in out for verb in VERBS)


def test_version(run):
    status, out, _ = run("--version")
    assert status == 0 and out.count(".") == 2


@pytest.mark.parametrize(
    "argv, said",
    [
        (["scor"], "no verb 'scor'; did you mean score?"),
        (["frobnicate"], "no verb 'frobnicate'; mllm-align --help"),
        (["train"], "train needs a config file first"),
        (["train", "--model", "x"], "train needs a config file first"),
        (["score"], "score needs --model, --data, --out"),
        (["score", "--model", "x", "--out", "y"], "score needs --data;"),
        (["export", "--run", "x"], "export needs --out"),
        (["score", "--model", "x", "--data", "y", "--out", "z", "--batchsize", "3"], "--batch-size"),
        (["score", "--model", "x", "--data", "y", "--out", "z", "--dtype", "float16"], "float16"),
        (["export", "--run", "x", "--out", "y", "--adaptor"], "did you mean --adapter?"),
        (["quickstart", "--seeds", "0"], "--seeds is 0"),
        (["quickstart", "--mask-rate", "1.5"], "--mask-rate is 1.5"),
    ],
)
def test_commands_that_are_refused(refused, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*argv)
    assert not list(tmp_path.iterdir())


def test_required_options_of_train(refused, config_file):
    assert "train needs --data, --out;" in refused("train", config_file, "--model", "x")


def test_interrupts_are_told_apart(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "inspect", interrupt)
    assert run("inspect", "--model", "x", "--data", "y") == (130, "", "mllm-align: interrupted\n")


def program(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mllm_align.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


def test_as_a_program(tmp_path):
    done = program("score", "--model", tmp_path, "--data", PAIRS, "--out", tmp_path / "s")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("mllm-align: error: ") and done.stderr.count("\n") == 1
    assert program("--help").returncode == 0


# ---- score and inspect -----------------------------------------------------------------------------


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


def test_inspect_shows_a_record(run):
    status, table, _ = run("inspect", "--model", MODEL, "--data", PAIRS, "--index", 3)
    assert status == 0 and "pairs.jsonl record 3" in table and "3_RGB.png" in table
    status, text, _ = run("inspect", "--model", MODEL, "--data", PAIRS, "--index", 3, "--json")
    told = json.loads(text)
    assert status == 0 and told["where"] == "pairs.jsonl record 3"
    assert told["images"][0]["embeddings"] == 16 and told["pixels"]["shape"] == [1, 16, 588]
    assert [len(r) for r in told["responses"]] == told["response_tokens"]
    assert all(token["loss"] == 1 for r in told["responses"] for token in r)
    assert all(entry["loss"] == 0 for entry in told["prefix"])
    assert f"prefix {told['prefix_tokens']}" in table


def test_inspect_of_single_responses(run, tmp_path):
    data = write_pairs(tmp_path, [{k: v for k, v in rows()[0].items() if k != "rejected"}])
    status, text, _ = run("inspect", "--model", MODEL, "--data", data, "--responses", 1, "--json")
    assert status == 0 and len(json.loads(text)["responses"]) == 1


@pytest.mark.parametrize("index", [-1, 8])
def test_inspect_of_a_record_that_is_not_there(refused, index):
    line = refused("inspect", "--model", MODEL, "--data", PAIRS, "--index", index)
    assert f"--index is {index}; {PAIRS} has records 0 to 7" in line


def test_inspect_of_no_response(refused):
    argv = ("inspect", "--model", MODEL, "--data", PAIRS, "--responses", 0)
    assert "--responses is 0; it must be 1 or more" in refused(*argv)


# ---- bad records -----------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 30000 x 30000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def damaged_jpeg() -> bytes:
    """Whole at both ends; the pixels between are not."""
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    data = stream.getvalue()
    return data[:1500] + b"\xff\xdb" * 50 + data[1600:]


@pytest.mark.parametrize(
    "contents, said",
    [
        (None, "no such file"),
        (b"", "0 bytes"),
        (b"GIF89a but no more", "damaged"),
        (b"once upon a time", "is not an image"),
        ((PAIRS.parent / "images" / "3_RGB.png").read_bytes()[:3000], "cut short"),
        (bomb(), "900000000 pixels"),
    ],
    ids=["missing", "empty", "broken", "no image", "truncated", "bomb"],
)
def test_bad_images(refused, tmp_path, contents, said):
    data = write_pairs(tmp_path, [*rows(2), {**rows()[0], "images": ["images/bad.png"]}])
    if contents is not None:
        (tmp_path / "images" / "bad.png").write_bytes(contents)
    line = refused("score", "--model", MODEL, "--data", data, "--out", tmp_path / "scores")
    assert "pairs.jsonl record 2, images[0]" in line and "bad.png" in line and said in line


@pytest.mark.parametrize(
    "change, at, said",
    [
        ({"prompt": "<image>\n<image>\nTwo?"}, "images", "2 image places but the record has 1 images"),
        ({"images": ["images/0_L.png"] * 2, "prompt": "<image> One?"}, "images", "1 image places"),
        ({"chosen": " "}, "chosen", "the response is empty"),
        ({"rejected": None}, "rejected", "is missing"),
        ({"rejected": "tuku", "chosen": "tuku "}, "rejected", "identical to that of chosen"),
        ({"chosen": 3}, "chosen", "found int"),
        ({"prompt": {"a": 1}}, "prompt", "found dict"),
        ({"images": "images/0_L.png"}, "images", "found str"),
        ({"images": [7]}, "images[0]", "found int"),
        ({"images": ["../secret.png"]}, "images[0]", "leaves the image folder"),
        ({"images": ["https://example.org/a.png"]}, "images[0]", "is a URL"),
    ],
    ids=str,
)
def test_bad_records(refused, tmp_path, change, at, said):
    data = write_pairs(tmp_path, [rows()[0], {**rows()[1], **change}])
    line = refused("score", "--model", MODEL, "--data", data, "--out", tmp_path / "scores")
    assert f"pairs.jsonl record 1, {at}" in line and said in line


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


def test_a_template_that_loops_for_ever(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_align.data.template.SECONDS", 0.1)
    file = tmp_path / "loops.jinja"
    again = "{% for i in range(9999) %}"
    file.write_text(again * 3 + "{% endfor %}" * 3)
    argv = ("--model", MODEL, "--data", PAIRS, "--data.chat-template", file)
    for verb in (("score", "--out", tmp_path / "s"), ("inspect",), ("generate", "--out", tmp_path / "g")):
        line = refused(verb[0], *argv, *verb[1:])
        assert "record 0: the chat template refuses it (it takes longer than 0.1 seconds)" in line


def test_lines_that_are_not_json(refused, tmp_path):
    data = write_pairs(tmp_path, rows(2))
    data.write_text(data.read_text() + "{'id': 3}\n")
    argv = ("score", "--model", MODEL, "--data", data, "--out", tmp_path / "scores")
    assert "pairs.jsonl line 3, column 2: is not JSON" in refused(*argv)
    data.write_text("[]\n")
    assert "pairs.jsonl line 1: found list" in refused(*argv)
    data.write_text("")
    assert "holds no records" in refused(*argv)
    data.unlink()
    assert "no such file" in refused(*argv)


def test_paths_outside_are_accepted_when_asked(run, tmp_path):
    outside = [{**row, "images": [str(PAIRS.parent / row["images"][0])]} for row in rows()]
    data = write_pairs(tmp_path, outside)
    argv = ("inspect", "--model", MODEL, "--data", data)
    assert run(*argv)[0] == 2
    assert run(*argv, "--data.allow-outside")[0] == 0
    assert run(*argv, "--data.image-root", PAIRS.parent)[0] == 0


@pytest.mark.slow
def test_pixels_that_turn_out_damaged_stop_in_one_line(refused, run, tmp_path, config_file):
    """Headers are checked first, pixels when batches are made: by other threads, in the midst of work."""
    data = write_pairs(tmp_path, [{**row, "images": ["images/late.jpg"]} for row in rows()])
    late = tmp_path / "images" / "late.jpg"
    Image.open(PAIRS.parent / "images" / "3_RGB.png").convert("RGB").save(late)
    whole, out = late.read_bytes(), tmp_path / "run"
    argv = ("train", config_file, "--model", MODEL, "--data", data, "--out", out, "--save-every", 2)
    status, told, said = run(*argv)
    assert status == 0 and "step 4/4  loss" in told and not said
    shutil.rmtree(out / "checkpoints" / "4")
    kept = {p: p.read_bytes() for p in (out / "checkpoints" / "2").rglob("*") if p.is_file()}

    late.write_bytes(damaged_jpeg())
    line = refused("score", "--model", MODEL, "--data", data, "--out", tmp_path / "s", "--data.shapes", 1)
    assert "images[0]" in line and "late.jpg" in line and "damaged or cut short" in line
    assert "late.jpg" in refused(*argv)
    assert {p: p.read_bytes() for p in kept} == kept

    late.write_bytes(whole)
    assert run(*argv)[0] == 0
    assert [e["step"] for e in events(out, "start")] == [0, 2, 2]


# ---- bad models ------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def change_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def change_weights(model: Path, change) -> str:
    tensors = load_file(model / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight") and "language" in n)
    change(tensors, name)
    save_file(tensors, model / "model.safetensors")
    return name


def missing(tensors, name):
    del tensors[name]


def misshapen(tensors, name):
    tensors[name] = tensors[name][:-1].copy()


def pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda m: change_config(m, model_type="llama"), "model_type 'llama'"),
        (lambda m: change_config(m, mm_vision_tower="openai/clip"), "liuhaotian"),
        (lambda m: (m / "config.json").unlink(), "config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json"),
        (lambda m: change_weights(m, missing), "q_proj.weight' missing"),
        (lambda m: change_weights(m, misshapen), "q_proj.weight' has shape"),
        (pickled, "pickled .bin files"),
        (truncated, "is not a whole safetensors file"),
        (lambda m: (m / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=[
        "type",
        "liuhaotian",
        "no-config",
        "bad-config",
        "missing",
        "misshapen",
        "bin",
        "truncated",
        "none",
        "tokenizer",
    ],
)
def test_bad_models(refused, tmp_path, config_file, model, spoil, said):
    spoil(model)
    lines = [
        refused("score", "--model", model, "--data", PAIRS, "--out", tmp_path / "scores"),
        refused("train", config_file, "--model", model, "--data", PAIRS, "--out", tmp_path / "run"),
        refused("inspect", "--model", model, "--data", PAIRS),
    ]
    for line in lines:
        assert said in line and str(model) in line


# ---- bad places ------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(refused, tmp_path, config_file):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("dear")
    (folder / "kept").mkdir(parents=True)
    scoring = ("score", "--model", MODEL, "--data", PAIRS, "--out")
    assert "can't write" in refused(*scoring, file / "scores")
    assert "folder" in refused(*scoring, folder)
    training = ("train", config_file, "--model", MODEL, "--data", PAIRS, "--out")
    assert "can't write" in refused(*training, file / "run")
    assert "is a file" in refused(*training, file)
    assert "holds other files" in refused(*training, folder)
    assert "something else" in refused("quickstart", "--out", folder)
    assert file.read_text() == "dear" and [p.name for p in folder.iterdir()] == ["kept"]
    assert "is no run folder" in refused("export", "--run", folder, "--out", tmp_path / "aligned")


def test_batches_and_meshes_that_do_not_fit(refused, tmp_path, config_file, monkeypatch):
    monkeypatch.undo()
    argv = ("train", config_file, "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "run")
    assert "it must be a multiple of 8" in refused(*argv, "--batch-size", 12)
    assert "data 3 x fsdp 1 x tensor 1 does not make 8 devices" in refused(*argv, "--mesh.data", 3)
    scoring = ("score", "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "scores")
    assert "does not make 8 devices" in refused(*scoring, "--mesh.fsdp", 3)
    assert "batch_size is 0" in refused(*scoring, "--batch-size", 0)


# ---- the whole path --------------------------------------------------------------------------------


def test_train_score_and_export(run, refused, tmp_path, config_file):
    out, data = tmp_path / "run", write_pairs(tmp_path, rows())
    training = ("train", config_file, "--model", MODEL, "--data", data, "--out", out)
    assert run(*training)[0] == 0
    line = refused(*training, "--seed", 3)
    assert "seed differ" in line and str(out) in line
    assert run("score", "--model", out, "--data", data, "--out", tmp_path / "s", "--data.shapes", 1)[0] == 0
    status, told, _ = run("export", "--run", out, "--out", tmp_path / "aligned")
    assert status == 0 and json.loads(told)["step"] == 4
    assert events(out)[-1]["event"] == "export"
    assert "not empty" in refused("export", "--run", out, "--out", tmp_path / "aligned")
    status, told, _ = run("export", "--run", out, "--out", tmp_path / "adapter", "--adapter")
    assert status == 0 and (tmp_path / "adapter" / "adapter_config.json").is_file()

    (tmp_path / "moved").mkdir()
    moved = json.loads((out / "run.json").read_text()) | {"model": str(tmp_path / "moved")}
    (out / "run.json").write_text(json.dumps(moved))
    assert "moved" in refused("export", "--run", out, "--out", tmp_path / "again")


# ---- generate --------------------------------------------------------------------------------------

IMAGE = PAIRS.parent / "images" / "0_L.png"
ASKING = ("generate", "--model", MODEL, "--image", IMAGE, "--prompt", "gi dan?")
SHORT = ("--sampling.max-tokens", 8)


@pytest.fixture
def scripted(monkeypatch):
    """Decoders that take tokens by the keys of the forks: nothing is loaded or compiled."""

    def decoder(bundle, sampling, size):
        return Scripted(bundle.config.decoder.vocab, size)

    monkeypatch.setattr(cli, "_open", lambda *_: bundle())
    monkeypatch.setattr("mllm_align.generate.respond.Generator", decoder)
    monkeypatch.setattr("mllm_align.generate.bdhs_job.Generator", decoder)


@pytest.mark.slow
def test_generate_prints_a_response(run):
    status, told, said = run(*ASKING, *SHORT, "--sampling.temperature", 0)
    assert (status, said) == (0, "") and told.strip()


def test_generate_prints_samples_of_a_seed(run, scripted):
    told = run(*ASKING, *SHORT, "--samples", 2)[1]
    assert len(told.splitlines()) >= 2 and run(*ASKING, *SHORT, "--samples", 2)[1] == told
    assert run(*ASKING, *SHORT, "--samples", 2, "--seed", 1)[1] != told


def test_generate_writes_a_line_a_record(run, tmp_path, scripted):
    long = {**rows()[1], "prompt": "gi " * 300}
    given = [{k: row[k] for k in ("prompt", "images")} for row in (rows()[0], long, rows()[2])]
    data, out = write_pairs(tmp_path, given), tmp_path / "new" / "responses.jsonl"
    argv = ("generate", "--model", MODEL, "--data", data, "--out", out, *SHORT, "--samples", 2)
    argv += ("--data.over-long", "skip", "--data.max-length", 100)
    assert run(*argv) == (0, f"responses to 2 records in {out}\n", "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2] and lines[1]["responses"] is None
    assert all(set(line) == {"index", "responses"} for line in lines)
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


@pytest.mark.parametrize("verb", ["score", "generate", "bdhs"])
def test_numbers_that_are_not_finite_end_with_status_3(run, tmp_path, monkeypatch, verb):
    """The records are named, and all files are as before."""
    broken = replace(bundle(), params=jax.tree.map(lambda x: x * np.float32("nan"), bundle().params))
    monkeypatch.setattr(cli, "_open", lambda *_: broken)
    folder = tmp_path / "out"
    folder.mkdir()
    data = sft_records(tmp_path) if verb == "bdhs" else PAIRS
    words = {"score": (), "generate": SHORT, "bdhs": (BDHS, *LEXICAL, "--batch-size", 4)}[verb]
    if verb != "bdhs":  # it refuses what stands there
        (folder / "made.jsonl").write_text("before")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = (verb, *words, "--model", MODEL, "--data", data, "--out", folder / "made.jsonl")
    status, told, said = run(*argv)
    assert (status, told) == (3, "") and said.count("\n") == 1
    what, ids = ("log-probs" if verb == "score" else "logits"), ("0, 1, 2, 3, 4, ...", 8)
    ids = ("0, 1, 2, 3", 4) if verb == "bdhs" else ids
    assert f"error: {what} are not finite for {ids[1]} of {ids[1]} records: {ids[0]}; " in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_result_does_not_replace_its_data(refused, tmp_path, verb):
    data = sft_records(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(data)
    before = data.read_bytes()
    for out in (data, tmp_path / "link.jsonl"):
        line = refused(verb, "--model", MODEL, "--data", data, "--out", out)
        assert "is the data file itself; give another --out" in line
        assert data.read_bytes() == before


# ---- bdhs ------------------------------------------------------------------------------------------

BDHS = Path(__file__).parent.parent / "configs" / "bdhs.py"
LEXICAL = ("--similarity", "lexical", "--iterations", 2, "--sentence-tokens", 8, *SHORT)


def sft_records(folder: Path) -> Path:
    """Records of one response, two sentences each."""
    given = [
        {**{k: row[k] for k in ("prompt", "images")}, "chosen": f"Yes, {row['rejected']} {row['chosen']}"}
        for row in rows(4)
    ]
    return write_pairs(folder, given, "records.jsonl")


def test_bdhs_makes_pairs(run, refused, tmp_path, scripted):
    data, out = sft_records(tmp_path), tmp_path / "pairs.jsonl"
    argv = ("bdhs", BDHS, "--model", MODEL, "--data", data, "--out", out, *LEXICAL)
    status, told, said = run(*argv)
    assert (status, said) == (0, "")
    first, second = told.splitlines()
    assert first == f"4 pairs in {out}; share that differs enough after"
    assert [each.split(": ")[0] for each in second.split("  ")] == ["try 1", "try 2"]
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [pair["index"] for pair in pairs] == list(range(4))
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert {p.name for p in tmp_path.iterdir()} == {
        "images",
        "records.jsonl",
        "pairs.jsonl",
        "pairs.jsonl.log.jsonl",
    }
    before = out.read_bytes()
    assert run(*argv) == (0, told, "") and out.read_bytes() == before
    assert "exists and is not this job's output" in refused(*argv, "--seed", 1)

    for part in (0, 1):
        status, told, _ = run(*argv, "--shard", f"{part}/2")
        assert status == 0 and told.startswith(f"2 pairs in {tmp_path}/pairs-0000{part}-of-00002.jsonl;")


def test_pairs_of_a_model_can_be_read_back(run, tmp_path):
    data, out = sft_records(tmp_path), tmp_path / "pairs.jsonl"
    argv = ("bdhs", BDHS, "--model", MODEL, "--data", data, "--out", out, *LEXICAL, "--iterations", 1)
    assert run(*argv, "--batch-size", 4)[0] == 0
    assert run("inspect", "--model", MODEL, "--data", out, "--index", 3)[0] == 0


@pytest.mark.slow
def test_pairs_of_a_trained_model_can_be_trained_on(run, tmp_path, config_file):
    data = sft_records(tmp_path)
    training = ("train", config_file, "--model", MODEL, "--steps", 1)
    assert run(*training, "--data", write_pairs(tmp_path, rows()), "--out", tmp_path / "first")[0] == 0
    argv = ("bdhs", BDHS, "--model", tmp_path / "first", "--data", data, "--out", tmp_path / "made.jsonl")
    assert run(*argv, *LEXICAL)[0] == 0
    (pair, *_) = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert pair["bdhs"]["trained"] is not None
    assert run(*training, "--data", tmp_path / "made.jsonl", "--out", tmp_path / "second")[0] == 0


@pytest.mark.parametrize(
    "argv, said",
    [
        ((), "bdhs needs a config file first"),
        (("--model", "x"), "bdhs needs a config file first"),
        (("absent.py",), "config file absent.py is not there"),
        ((BDHS,), "bdhs needs --model, --data, --out;"),
        (
            (BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.jsonl", "--shard", "2/2"),
            "give part/parts",
        ),
        (
            (BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.jsonl", "--mask-rat", 1),
            "mean --mask-rate?",
        ),
        ((BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.txt"), "ends in .jsonl"),
        ((BDHS, "--model", "absent", "--data", PAIRS, "--out", "o.jsonl"), "absent"),
        ((BDHS, "--model", MODEL, "--data", "d.jsonl", "--out", "o.jsonl", *LEXICAL), "no such file"),
        (
            (BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.jsonl", "--similarity", "/no/folder"),
            "lexical",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[1:])) if isinstance(value, tuple) else "",
)
def test_bdhs_refuses(refused, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("bdhs", *argv)
    assert not list(tmp_path.iterdir())


# ---- how a run may end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, status, said",
    [
        (NotFinite("step 3: loss or gradient is not finite"), 3, "mllm-align: error: step 3: loss"),
        (Preempted("preempted; step 3 of 9 is saved"), 75, "the same command goes on from there"),
    ],
)
def test_exit_statuses_of_runs_that_end_early(run, config_file, tmp_path, monkeypatch, error, status, said):
    def ends(*_, **__):
        raise error

    monkeypatch.setattr("mllm_align.training.loop.train", ends)
    options = ("--model", MODEL, "--data", PAIRS, "--out", tmp_path / "run")
    found, _, err = run("train", config_file, *options)
    assert found == status and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is '2' and JAX_NUM_PROCESSES '2'; wanted 0 to N - 1",
        ),
    ],
)
def test_an_environment_that_says_half_of_it(refused, config_file, tmp_path, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ("--model", MODEL, "--data", PAIRS, "--out", tmp_path / "run")
    assert said in refused("train", config_file, *options)
    assert not (tmp_path / "run").exists()


# ---- plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (("--topology", "v9z:2x2"), "v9z"),
        (
            ("--topology", "v5e:4x4", "--model", "llava-9"),
            "model 'llava-9' is no folder and none of llava-1.5",
        ),
        (("--sweep",), "plan --sweep needs --topology"),
        (("--topology", "v5e:4x4", "--programs", "dance"), "has no program 'dance'"),
    ],
)
def test_plans_of_what_is_not_known_are_refused(refused, config_file, options, said):
    assert said in refused("plan", config_file, *options)


def test_plan_takes_configs_of_both_kinds(run, config_file, tmp_path):
    bdhs = tmp_path / "bdhs.py"
    bdhs.write_text("from mllm_align import BDHSConfig\ndef get_config():\n    return BDHSConfig()\n")
    for file, options, field in (
        (config_file, ("--lora.rank", 3), "lora"),
        (bdhs, ("--iterations", 3), "iterations"),
    ):
        status, out, _ = run("plan", file, *options, "--print-config")
        found = json.loads(out)[field]
        assert status == 0 and 3 in (found, found["rank"] if isinstance(found, dict) else None)


@pytest.mark.slow
def test_plan_for_the_devices_of_this_machine(run, config_file, tmp_path):
    options = ("--model", MODEL, "--programs", "train", "--json", tmp_path / "plan.json")
    status, out, err = run("plan", config_file, *options, "--batch-size", 8)
    assert status == 0, err
    (program,) = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert program["program"] == "train" and program["flops"] > program["model_flops"] / 2 > 0
    assert "train" in out


# ---- outputs that others write, and starts that fail ---------------------------------------------------


@pytest.mark.parametrize(
    "verb, name, argv",
    [
        ("train", "run", ["CONFIG", "--model", MODEL, "--data", PAIRS]),
        ("score", "scores.jsonl", ["--model", MODEL, "--data", PAIRS]),
        ("generate", "said.jsonl", ["--model", MODEL, "--data", PAIRS]),
        ("bdhs", "pairs.jsonl", ["BDHS", "--model", MODEL, "--data", PAIRS, "--similarity", "lexical"]),
        ("judge", "judged.json", ["CONFIG", "--model", MODEL, "--data", PAIRS]),
        ("export", "folder", ["--run", "nowhere"]),
        ("quickstart", "quick", []),
    ],
)
def test_an_output_has_one_writer(refused, tmp_path, config_file, verb, name, argv):
    if verb == "judge":
        config_file = Path(__file__).parents[1] / "configs" / "judge.py"
    files = {"CONFIG": config_file, "BDHS": Path(__file__).parents[1] / "configs" / "bdhs.py"}
    with alone(tmp_path / name):
        line = refused(verb, *[files.get(word, word) for word in argv], "--out", tmp_path / name)
    assert f"{name}: is in use by process {os.getpid()} on " in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (InputError("no"), 2)])
def test_a_start_that_fails_leaves_nothing(run, tmp_path, config_file, monkeypatch, error, status):
    """And the mended command, with another config, goes its way."""

    def fails(*_):
        raise error

    words = ["train", config_file, "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "a" / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("mllm_align.training.loop._Run.begin", fails)
        assert run(*words)[0] == status
    assert not list(tmp_path.iterdir())
    assert run(*words, "--steps", 1, "--seed", 1)[0] == 0


@pytest.mark.parametrize(
    "verb, options, said",
    [
        ("score", ["--batch-size", 10**9], "batch_size is 1000000000; it must be from 1 to 65536"),
        ("score", ["--batch-size", 60000], "batch_size is 60000, and the data have 8 records"),
        ("generate", ["--samples", 10**9], "samples is 1000000000; it must be from 1 to 1024"),
        ("generate", ["--seed", 2**70], "seed is 1180591620717411303424"),
        ("generate", ["--sampling.max-tokens", 10**12], "sampling.max_tokens is 1000000000000"),
    ],
)
def test_huge_numbers_are_refused(refused, tmp_path, verb, options, said):
    line = refused(verb, "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "out.jsonl", *options)
    assert said in line
