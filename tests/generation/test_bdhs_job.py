"""BDHS as a job: what its file says, and that it can be stopped, continued and repeated at any point."""

import io
import json
import random
import resource
import signal
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from decoding import Scripted
from mutants import mutant
from PIL import Image
from refusals import refusal
from runs import MODEL, bundle, rows, write_pairs

from mllm_align.config import BDHSConfig, DataConfig, SamplingConfig, to_json
from mllm_align.data.images import load_rgb
from mllm_align.data.readers import records_from
from mllm_align.errors import InputError, Interrupted, NotFinite, Preempted
from mllm_align.generation import bdhs_job as module
from mllm_align.generation.bdhs_job import Shard, bdhs
from mllm_align.generation.sampling import random_key
from mllm_align.generation.similarity import Lexical
from mllm_align.part_file import PartFile
from mllm_align.prepare import prepare

CONFIG = BDHSConfig(
    similarity="lexical",
    iterations=2,
    sentence_tokens=6,
    batch_size=2,
    mask_rate=0.5,
    sampling=SamplingConfig(max_tokens=8),
)
TEXTS = ("Yes, tuku der. Dame faza!", "No 🙂 manki fina.", "Reva nago zi. Te nuzu. Pe.", "Kerpe rer rubi.")


@pytest.fixture(autouse=True)
def decoders(monkeypatch):
    """The decoders that jobs made, which take tokens by the keys of the forks; `say` changes that."""
    made = []

    def decoder(bundle, sampling, size):
        made.append(Scripted(bundle.config.decoder.vocab, size, say.tokens))
        return made[-1]

    say = SimpleNamespace(made=made, tokens=None)
    monkeypatch.setattr(module, "Generator", decoder)
    return say


def records():
    """Records with their images in a folder beside them; ids of every kind."""
    names = ["first", "a/b", "é", None]
    return [
        {"id": id, "images": row["images"], "prompt": f"<image>\n{row['prompt']}", "chosen": text}
        for id, row, text in zip(names, rows(), TEXTS, strict=False)
    ]


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path, records(), "records.jsonl")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "pairs.jsonl"


def run(source, out, shard=None, **changes):
    return bdhs(replace(CONFIG, **changes), bundle(), source, out, shard)


def refused(*args, **changes):
    """The one line of a refusal, which leaves the folder of `out` as it was."""
    folder = args[1].parent
    before = contents(folder)
    message = refusal(run, *args, **changes)
    assert contents(folder) == before
    return message


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(out):
    return lines(out.with_name(out.name + ".log.jsonl"))


def part(out):
    return out.with_name(out.name + ".part")


# ---- what is written ---------------------------------------------------------------------------------


def test_a_pair_says_how_it_was_made(data, out, decoders):
    summary = run(data, out)
    made = lines(out)
    assert [row["id"] for row in made] == ["first", "a/b", "é", "3"]
    assert [row["chosen"] for row in made] == list(TEXTS)
    for row, record in zip(made, records(), strict=True):
        assert set(row) == {"index", "id", "images", "prompt", "chosen", "rejected", "bdhs"}
        assert row["images"] == record["images"] and row["rejected"] != row["chosen"]
        about = row["bdhs"]
        assert about["iterations"] == len(about["similarities"]) in (1, 2)
        assert about["guided"] == (about["iterations"] == 1) and about["similarity_by"] == "lexical"
        assert about["similarity"] == about["similarities"][-1] and about["threshold"] == 0.915
        assert about["similarities"][0] < 0.915 or about["iterations"] == 2
        assert about["distortion"] == "attention" and 0.1 < about["mask_share"] < 0.9
        assert about["seed"] == 0 and about["model"] == bundle().folder.fingerprint
        assert about["trained"] is None and about["unfinished"] >= 0
        if about["guided"]:
            for sentence in about["sentences"]:
                start, stop = sentence["sentence"]
                assert start < sentence["cut"] < stop and sentence["written"] in row["rejected"]
                assert sentence["swapped"] in (None, ["Yes", "No"], ["No", "Yes"])
    count = Counter(row["bdhs"]["iterations"] for row in made)
    assert summary["pairs"] == 4 and not summary["left_out"] and not summary["over_long"]
    assert summary["differ_after"][0] == count[1] / 4 <= summary["differ_after"][1]
    assert summary["unfinished"] == sum(row["bdhs"]["unfinished"] for row in made)
    (event,) = log(out)
    assert event["event"] == "bdhs" and event["summary"] == summary
    assert event["stamp"]["config"] == to_json(CONFIG) and event["stamp"]["shard"] == "0/1"
    assert not part(out).exists() and len(decoders.made) == 1


def test_pairs_can_be_read_back_and_encoded(data, out):
    run(data, out)
    _, encoded, _ = prepare(bundle(), out, DataConfig(), responses=2)
    _, sources, _ = prepare(bundle(), data, DataConfig(), responses=1)
    for pair, source in zip(encoded, sources, strict=True):
        assert pair.record.messages == source.record.messages and pair.sizes == source.sizes
        assert pair.record.images[0].path == source.record.images[0].path
        np.testing.assert_array_equal(pair.prefix, source.prefix)
        np.testing.assert_array_equal(pair.responses[0], source.responses[0])


def test_over_long_records_are_left_out_by_name(data, out):
    _, encoded, _ = prepare(bundle(), data, DataConfig(), responses=1)
    limit = sorted(each.length for each in encoded)[2]
    summary = run(data, out, data=DataConfig(max_length=limit, over_long="skip"))
    assert summary["pairs"] == 3 and len(summary["over_long"]) == 1
    assert [row["id"] for row in lines(out)] == [each.record.id for each in encoded if each.length <= limit]
    assert "the limit is" in refused(data, out.with_name("other.jsonl"), data=DataConfig(max_length=limit))


def spelled(encoder, text):
    return encoder.tokenizer(text, add_special_tokens=False).input_ids


def test_empty_and_equal_responses_are_left_out_and_counted(data, out, decoders):
    encoder, _, _ = prepare(bundle(), data, DataConfig(), responses=1)
    image = [i for piece in ("<", "image", ">") for i in spelled(encoder, piece)]
    said = {
        "first": [encoder.end],
        "a/b": [*spelled(encoder, f" {TEXTS[1]} "), encoder.end],
        "é": [*spelled(encoder, "a"), *image],  # would be taken for the place of an image
        "3": spelled(encoder, " tuku"),
    }
    keys = {random_key(0, name, 0, 0).tobytes(): ids for name, ids in said.items()}
    decoders.tokens = lambda fork: keys[fork.key.tobytes()]
    summary = run(data, out, guided=False, iterations=1)
    assert summary["left_out"] == ["first", "a/b", "é"] and summary["pairs"] == 1
    (row,) = lines(out)
    assert row["rejected"] == "tuku" and row["bdhs"]["sentences"] == []

    decoders.tokens = lambda fork: [encoder.end]
    with pytest.raises(InputError, match="no rejected response of 4 is usable"):
        run(data, out.with_name("none.jsonl"), guided=False, iterations=1)
    assert not out.with_name("none.jsonl").exists()


def without_seconds(summary):
    return {**summary, "seconds": 0}


def test_records_whose_logits_are_not_finite_are_told_and_tried_again(data, out, decoders, monkeypatch):
    """All others are kept; nothing appears at `out`."""
    whole = run(data, out.with_name("whole.jsonl"))
    keys = {random_key(0, "a/b", i, n, 1).tobytes() for i in range(2) for n in range(4)}
    keys.add(random_key(0, "a/b", 1, 0).tobytes())

    def tokens(self, fork, stops):
        return None if fork.key.tobytes() in keys else plain(self, fork, stops)

    plain = Scripted._tokens
    monkeypatch.setattr(Scripted, "_tokens", tokens)
    said = "logits are not finite for 1 of 4 records: a/b; 3 pairs are kept, and the same command tries"
    with pytest.raises(NotFinite, match=said):
        run(data, out)
    assert not out.exists() and len(lines(part(out))) == 1 + 3
    with pytest.raises(NotFinite, match=said):
        run(data, out)
    monkeypatch.setattr(Scripted, "_tokens", plain)
    assert without_seconds(run(data, out)) == without_seconds(whole)
    assert lines(out) == lines(out.with_name("whole.jsonl")) and not part(out).exists()


def test_similarities_that_are_not_finite_are_told(data, out, monkeypatch):
    class Blank(Lexical):
        def __call__(self, first, second):
            return np.full(len(first), np.nan, np.float32)

    monkeypatch.setattr(module, "open_similarity", lambda name: Blank())
    said = "similarities are not finite for 4 of 4 records: first, a/b, é, 3; 0 pairs are kept"
    with pytest.raises(NotFinite, match=said):
        run(data, out)
    assert not out.exists() and not part(out).exists()


# ---- images ------------------------------------------------------------------------------------------


def picture(seed, size=(70, 50)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def in_memory():
    """Images as users hold them: modes that PNG lacks, turned by EXIF, arrays, files as bytes."""
    turned, exif = picture(1), Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "JPEG", exif=exif)
    opened = Image.open(io.BytesIO(stream.getvalue()))
    images = [picture(2).convert("CMYK"), opened, np.asarray(picture(3)), {"bytes": stream.getvalue()}]
    return [{**row, "images": [image]} for row, image in zip(records(), images, strict=True)]


def test_images_in_memory_are_written_beside_the_pairs(tmp_path):
    out, rows = tmp_path / "new" / "pairs.jsonl", in_memory()
    run(rows, out)
    read, given = records_from(out), records_from(rows, responses=1)
    for pair, source in zip(read, given, strict=True):
        assert pair.images[0].path.parent == out.parent / "pairs-images"
        ours, theirs = load_rgb(pair.images[0]), load_rgb(source.images[0])
        np.testing.assert_array_equal(ours, theirs)
    assert read[1].images[0].path.suffix == ".png" and read[3].images[0].path.suffix == ".jpeg"
    assert len(list((out.parent / "pairs-images").iterdir())) == 4
    again = run(in_memory(), out)
    assert again == log(out)[-1]["summary"]


@pytest.mark.parametrize("folder", [False, True])
def test_images_in_parquet(tmp_path, folder):
    stored = [(MODEL.parent / row["images"][0]).read_bytes() for row in records()]
    table = [
        {**row, "images": [{"bytes": b, "path": None}]} for row, b in zip(records(), stored, strict=True)
    ]
    place = tmp_path / "data" / ("parts" if folder else "")
    place.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table), place / "records.parquet")
    out = tmp_path / "made" / "pairs.jsonl"
    run(place if folder else place / "records.parquet", out)
    assert [pair.images[0].path.read_bytes() for pair in records_from(out)] == stored


def test_paths_in_a_folder_of_parquet(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "pairs.jsonl"
    write_pairs(parts, []).unlink()
    pq.write_table(pa.Table.from_pylist(records()), parts / "0.parquet")
    run(parts, out)
    assert [row["images"] for row in lines(out)] == [row["images"] for row in records()]
    assert len(records_from(out, image_root=parts)) == 4


def test_pairs_in_another_folder_than_the_data(data, tmp_path):
    out = tmp_path / "deep" / "er" / "pairs.jsonl"
    run(data, out)
    assert [row["images"] for row in lines(out)] == [row["images"] for row in records()]
    assert len(records_from(out, image_root=data.parent)) == 4
    with pytest.raises(InputError, match="no such file"):
        prepare(bundle(), out, DataConfig(), responses=2)


def test_paths_out_of_the_image_folder_stay_whole(tmp_path):
    names = [row["images"][0] for row in records()]
    absolute = [{**row, "images": [str(MODEL.parent / n)]} for row, n in zip(records(), names, strict=True)]
    data, out = write_pairs(tmp_path / "data", absolute), tmp_path / "pairs.jsonl"
    run(data, out, data=DataConfig(allow_outside=True))
    found = records_from(out, allow_outside=True)
    assert [pair.images[0].path for pair in found] == [(MODEL.parent / name).resolve() for name in names]
    rooted = tmp_path / "rooted.jsonl"
    run(data, rooted, data=DataConfig(image_root=MODEL.parent))
    assert [row["images"] for row in lines(rooted)] == [[name] for name in names]


# ---- stopped and continued ---------------------------------------------------------------------------


@contextmanager
def stopped_at(step):
    """As if the power failed before this method of the job."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Output, step, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_job_that_was_stopped_at_any_line_gives_the_same_file(data, out, decoders):
    wanted = out.with_name("wanted.jsonl")
    run(data, wanted)
    with stopped_at("close"):
        run(data, out)
    whole = part(out).read_bytes().splitlines(keepends=True)
    assert len(whole) == 5 and not out.exists()
    cut_short = [b"", b'{"index": ', None]
    for kept in range(5):
        for torn in cut_short:
            if torn is None:  # all of a line but its end
                torn = whole[kept + 1][:-1] if kept < 4 else b"{}"
            part(out).write_bytes(b"".join(whole[: kept + 1]) + torn)
            summary = run(data, out)
            assert out.read_bytes() == wanted.read_bytes() and not part(out).exists()
            assert summary | {"seconds": 0} == log(wanted)[-1]["summary"] | {"seconds": 0}
            tried = {row.prefix.tokens.tobytes() for rows in decoders.made[-1].seen for row in rows}
            assert bool(tried) == (kept < 4)
            out.unlink()


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)])
def test_ctrl_c_and_sigterm_keep_what_they_say(data, out, tmp_path, monkeypatch, number, kind, capsys):
    run(data, tmp_path / "whole.jsonl")
    add = PartFile.add

    def signalled(job, index, row):
        add(job, index, row)
        if len(job.finished) == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch, pytest.raises(kind, match="3 of 4 records are done"):
        patch.setattr(PartFile, "add", signalled)
        run(data, out)
    capsys.readouterr()
    run(data, out)
    assert f"resuming {out}: 3 of 4 records are done" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_job_that_was_stopped_before_its_first_pair_leaves_nothing(data, out, tmp_path):
    before = contents(tmp_path)
    with stopped_at("add"):
        run(data, out)
    assert contents(tmp_path) == before


def test_a_job_that_was_stopped_while_it_closed(data, out, monkeypatch):
    with stopped_at("close"):
        run(data, out)
    whole = part(out).read_bytes()

    def fails(path, mode="w"):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after the log, before OUT
        patch.setattr(module, "new_file", fails)
        run(data, out)
    assert not out.exists() and part(out).read_bytes() == whole and len(log(out)) == 1
    summary = run(data, out)
    final = out.read_bytes()
    part(out).write_bytes(whole)  # after OUT, before its end
    assert run(data, out) == summary and out.read_bytes() == final and not part(out).exists()


def test_a_finished_job_says_the_same_and_changes_nothing(data, out, tmp_path, decoders):
    summary = run(data, out)
    before = {p: (p.stat().st_mtime_ns, text) for p, text in contents(tmp_path).items()}
    assert run(data, out) == summary and len(decoders.made) == 1
    assert {p: (p.stat().st_mtime_ns, text) for p, text in contents(tmp_path).items()} == before


@pytest.mark.parametrize(
    "change, name",
    [
        ({"seed": 3}, "config.seed"),
        ({"mask_rate": 0.25, "iterations": 3}, "config.mask_rate, config.iterations"),
        ({"sampling": SamplingConfig(temperature=0.5)}, "config.sampling"),
    ],
    ids=["seed", "two", "sampling"],
)
def test_jobs_of_another_config_are_told_apart(data, out, change, name):
    with stopped_at("close"):
        run(data, out)
    assert f"pairs.jsonl.part: was begun with another {name}; remove it or" in refused(data, out, **change)
    run(data, out)
    assert "pairs.jsonl: exists and is not this job's output; give another --out" in refused(
        data, out, **change
    )


def test_jobs_on_other_data_or_models_are_told_apart(data, out, tmp_path):
    with stopped_at("close"):
        run(data, out)
    changed = [records(), records(), records()]
    changed[0][1]["prompt"] += "?"
    changed[1][1]["id"] = "other"
    changed[2][1]["chosen"] += " "
    for i, given in enumerate(changed):
        other = write_pairs(tmp_path, given, f"other{i}.jsonl")
        assert "was begun with another data;" in refused(other, out)
    first, *rest = part(out).read_text().splitlines()
    for name, value in (("model", "0123"), ("trained", "4567"), ("dtype", "bfloat16"), ("shard", "0/2")):
        head = json.loads(first)
        head["bdhs"][name] = value
        part(out).write_text("\n".join([json.dumps(head), *rest]) + "\n")
        assert f"was begun with another {name};" in refused(data, out)
    assert bundle().folder.fingerprint == json.loads(first)["bdhs"]["model"]


def test_what_a_run_has_trained_names_the_model():
    plain = bundle()
    tree = {"params": {"projector": {"linear_1": {"bias": np.zeros(3, np.float32)}}}}
    other = {"params": {"projector": {"linear_1": {"bias": np.ones(3, np.float32)}}}}
    assert module.trained_digest(plain.trained) is None
    assert module.trained_digest(tree) != module.trained_digest(other)
    assert module.trained_digest(tree) == module.trained_digest({"params": dict(tree["params"])})


@pytest.mark.parametrize(
    "text",
    ["", "mine", "[]\n", "{}\n", '{"bdhs": 3}\n', '{"bdhs": {}}\n', '{"bdhs": {"config": 1}}\n', "\0\n"],
)
def test_part_files_of_something_else(data, out, text):
    part(out).write_text(text)
    assert "pairs.jsonl.part: can't be resumed; remove it" in refused(data, out)


def test_part_files_that_are_damaged(data, out):
    with stopped_at("close"):
        run(data, out)
    whole = part(out).read_text().splitlines(keepends=True)
    for bad in ("{\n", "[1]\n", '{"id": 3}\n', "\n"):
        part(out).write_text("".join([*whole[:2], bad, *whole[3:]]))
        assert "pairs.jsonl.part line 3: is damaged; remove" in refused(data, out)


def test_an_out_of_something_else_is_left_alone(data, out, tmp_path):
    out.write_text("dear")
    assert "pairs.jsonl: exists and is not this job's output" in refused(data, out)
    out.with_name("pairs.jsonl.log.jsonl").write_text("[]\n")
    assert "is not this job's output" in refused(data, out)
    (tmp_path / "folder.jsonl").mkdir()
    assert "is not this job's output" in refused(data, tmp_path / "folder.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    assert "is not this job's output" in refused(data, tmp_path / "link.jsonl")
    assert "ends in .jsonl" in refused(data, tmp_path / "pairs.json")
    assert "is not this job's output" in refused(data, data)
    assert "can't" in refused(data, out / "under" / "pairs.jsonl")


# ---- parts of the data -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shards_together_are_the_whole(data, out, count):
    run(data, out)
    shards = [Shard(i, count) for i in range(count)]
    summaries = [run(data, out, shard=shard) for shard in shards]
    files = [shard.name(out) for shard in shards]
    assert files[0].name == f"pairs-00000-of-0000{count}.jsonl"
    both = sorted((row for file in files for row in lines(file)), key=lambda row: row["index"])
    assert both == lines(out) and sum(s["pairs"] for s in summaries) == 4


def test_shards_without_a_record(data, out):
    assert "--shard 4/5 has none of the 4 records" in refused(data, out, shard=Shard(4, 5))


@pytest.mark.parametrize("text", ["", "1", "2/2", "0/0", "-1/2", "1/2/3", "a/b", "0.5/2", " 0/1", "0/1\n"])
def test_bad_shards(text):
    with pytest.raises(InputError, match="give part/parts, as 0/4"):
        Shard.parse(text)
    assert Shard.parse("1/2") == Shard(1, 2) and Shard.parse("0/1").name(MODEL) == MODEL


# ---- bad data and full disks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        ({"chosen": None}, "record 2, chosen: is missing"),
        ({"images": [], "prompt": "gi?"}, "record 2: has no image; leave it out"),
        ({"chosen": "--- !"}, "record 2: the response has no sentence"),
        ({"images": ["images/absent.png"]}, "record 2, images[0] "),
        ({"images": ["records.jsonl"]}, "is not an image"),
    ],
    ids=["response", "image", "sentence", "file", "no image"],
)
def test_bad_records_are_named_and_nothing_is_written(tmp_path, out, change, said):
    given = records()
    given[2] |= change
    data = write_pairs(tmp_path, given, "records.jsonl")
    line = refused(data, out)
    assert said in line and "records.jsonl record 2" in line


def test_pixels_that_turn_out_damaged_stop_the_job_in_one_line(tmp_path, out, data):
    file = tmp_path / "images" / "late.jpg"
    picture(0, (80, 80)).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:1000] + b"\xff\xdb" * 50 + whole[1100:])
    given = records()
    given[3]["images"] = ["images/late.jpg"]
    write_pairs(tmp_path, given, "records.jsonl")
    with pytest.raises(InputError, match="record 3, images") as error:
        run(data, out)
    assert "late.jpg" in str(error.value) and not out.exists()


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_a_job_that_can_go_on(data, out):
    wanted = out.with_name("wanted.jsonl")
    run(data, wanted)
    with stopped_at("close"):
        run(data, out)
    sizes = np.cumsum([len(line) for line in part(out).read_bytes().splitlines(keepends=True)])
    part(out).unlink()
    for size in (10, int(sizes[0]) + 5, int(sizes[2]) - 3, int(sizes[3])):
        with room(size), pytest.raises(InputError) as error:
            run(data, out)
        assert "File too large" in str(error.value) and str(out) in str(error.value)
        assert not out.exists()
        kept = int((sizes[1:] <= size).sum())
        assert part(out).exists() == (kept > 0)
        if kept:
            assert len(part(out).read_bytes().splitlines()) >= kept + 1
    run(data, out)
    assert out.read_bytes() == wanted.read_bytes()


def test_a_disk_that_fills_up_at_the_end(data, out, monkeypatch):
    close = module._Output.close

    def full(*args):
        with room(10):
            return close(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module._Output, "close", full)
        with pytest.raises(InputError, match="File too large"):
            run(data, out)
    assert not out.exists() and len(part(out).read_bytes().splitlines()) == 5
    assert run(data, out)["pairs"] == 4 and len(lines(out)) == 4


# ---- hostile files -----------------------------------------------------------------------------------


def survives(data, out, said):
    """Whether the job was done; it may only end with one line, or be stopped before it closes."""
    try:
        run(data, out)
    except InputError as error:
        assert "\n" not in str(error), said
        return False
    except Exception as error:
        raise AssertionError(said) from error
    return True


@pytest.mark.parametrize("count", [60, pytest.param(250, marks=pytest.mark.slow)])
def test_hostile_files_of_a_job(data, out, count):
    rng, outcomes = random.Random(count), []
    with stopped_at("close"):
        run(data, out)
    growing = part(out).read_bytes().split(b"\n")
    run(data, out)
    finished, told = out.read_bytes(), log(out)[-1]
    for number in range(count):
        if number % 3:
            out.unlink(missing_ok=True)
            where = rng.randrange(len(growing) - 1)
            hostile = mutant(growing[where].decode(), rng)
            part(out).write_bytes(b"\n".join([*growing[:where], hostile, *growing[where + 1 :]]))
        else:
            out.write_bytes(finished)
            hostile = mutant(json.dumps(told), rng)
            out.with_name(out.name + ".log.jsonl").write_bytes(hostile + b"\n")
        outcomes.append(survives(data, out, f"number {number}: {hostile[:2000]!r}"))
    assert 0 < sum(outcomes) < count


def test_a_pair_names_the_image_that_misled(tmp_path, out):
    others = ["images/5_RGB.png", "images/6_RGB.png"]
    made = [row | {"neighbour_images": others} for row in records()]
    data = write_pairs(tmp_path, made, "records.jsonl")
    run(data, out, distortion="retrieved")
    for row in lines(out):
        assert row["rejected_images"] == [others[row["bdhs"]["iterations"] - 1]]
        assert row["bdhs"]["distortion"] == "retrieved" and row["bdhs"]["mask_share"] == 0
    first = records_from(out, responses=2)[0]
    assert first.rejected_images[0].path.name in {Path(name).name for name in others}
    data.write_text(data.read_text().replace("6_RGB", "7_RGB"))
    assert "exists and is not this job's output" in refused(data, out, distortion="retrieved")
