"""The data set on disk: written once, read back as it was made, refused where it is not what was asked."""

import io
import json
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow_datasets")

from mllm_align.data.readers import records_from
from mllm_align.data.records import parse_record
from mllm_align.errors import InputError
from mllm_align.testbed.scenes import builder as scenes
from mllm_align.testbed.scenes.draw import picture
from mllm_align.testbed.scenes.world import LESSONS, Settings

SETTINGS = Settings(
    bias=0.8, grain=20.0, fog=0.3, lessons=4, train=12, held_out=3, unbiased=0, broken=2, seed=5
)
SIZES = ("train", "held_out", "unbiased", "broken", "lessons")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    scenes.prepare(path, SETTINGS)
    return path


def few(**sizes):
    return Settings(**(dict.fromkeys(SIZES, 0) | sizes))


def copy(folder, to):
    home = scenes._home(folder)
    there = scenes._home(to)
    there.mkdir(parents=True)
    for file in home.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    return there


def test_what_is_read_is_what_was_made_in_order(folder):
    for split in ("train", "held_out", "broken", *LESSONS):
        examples = list(scenes.read(folder, split))
        assert examples == [scenes.make_example(split, i, SETTINGS) for i in range(SETTINGS.size(split))]
        first = examples[0]
        image = Image.open(io.BytesIO(first.png))
        clear = split in LESSONS
        grain, fog = (0.0, 0.0) if clear else (SETTINGS.grain, SETTINGS.fog)
        drawn = picture(first.scene, grain, SETTINGS.seed, fog)
        assert np.array_equal(np.asarray(image), np.asarray(drawn))


def test_reading_is_random_access_and_pickles(folder):
    examples = scenes.read(scenes.prepare(folder, SETTINGS), "train")
    assert len(examples) == 12
    assert examples[7].id == "train-000007"
    assert pickle.loads(pickle.dumps(examples))[7] == examples[7]


def test_preparing_again_writes_nothing(folder, capfd):
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    scenes.prepare(folder, SETTINGS)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == files
    assert capfd.readouterr().out == ""


def test_preparing_is_silent_and_leaves_only_the_data(tmp_path, capfd, monkeypatch):
    log = logging.getLogger("absl")
    monkeypatch.setattr(log, "level", logging.CRITICAL)  # what the command line chose
    scenes.prepare(tmp_path, few(train=1))
    assert capfd.readouterr().out == ""
    assert log.level == logging.CRITICAL
    assert [file.name for file in tmp_path.iterdir()] == ["scenes"]


def test_other_settings_are_refused(folder):
    with pytest.raises(
        InputError, match=r"holds pictures of bias 0.8, fog 0.3, train 12; remove the folder"
    ):
        scenes.prepare(folder, replace(SETTINGS, train=13, bias=0.5, fog=0.0))


def test_a_folder_of_before_a_setting_was_there_is_refused(folder, tmp_path):
    """Its pictures were drawn otherwise, whatever the other settings say."""
    file = copy(folder, tmp_path) / "metadata.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("fog", "lessons")}))
    with pytest.raises(InputError, match=r"holds pictures of fog unknown, lessons unknown; remove"):
        scenes.prepare(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
def test_damaged_folder_is_refused(folder, tmp_path, name):
    (copy(folder, tmp_path) / name).write_text("{")
    with pytest.raises(InputError, match="remove the folder or give another one"):
        scenes.prepare(tmp_path, SETTINGS)


def test_damaged_pictures_are_refused(folder, tmp_path):
    home = copy(folder, tmp_path)
    (file,) = home.glob("*train*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        scenes.read(tmp_path, "train")


def test_missing_folder_and_split_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="holds no pictures; prepare them first"):
        scenes.read(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="'unbiased' has no pictures; give one of"):
        scenes.read(folder, "unbiased")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="scenes, folder"):
        scenes.prepare(tmp_path / "file", SETTINGS)


def test_what_is_everywhere_has_a_caption_and_questions_about_presence(folder):
    for example in scenes.read(folder, "everywhere"):
        assert [qa.kind for qa in example.qas] == ["caption", "presence", "presence"]
        assert "again and again" in example.qas[0].answer


def test_rows_are_records_of_the_house(folder):
    examples = list(scenes.read(folder, "train"))
    rows = scenes.sft_rows(examples)
    assert len(rows) == 3 * len(examples) == len({row["id"] for row in rows})
    record = parse_record(rows[0], index=0, where="rows", root=None, responses=1)
    assert record.responses == (examples[0].qas[0].answer,)
    assert record.messages[-1].text == examples[0].qas[0].question
    assert record.images[0].data == examples[0].png
    assert [row["completion"] for row in scenes.sft_rows(examples, {"caption"})] == [
        example.qas[0].answer for example in examples
    ]


def test_files_are_records_of_the_house(folder, tmp_path):
    examples = list(scenes.read(folder, "broken"))
    path = scenes.write_files(examples, tmp_path / "out", "test")
    assert path == tmp_path / "out" / "test.jsonl"
    assert set(json.loads(path.read_text().splitlines()[0])) == {"id", "image", "prompt", "chosen"}
    records = records_from(path, responses=1)
    rows = scenes.sft_rows(examples)
    assert [(r.id, r.responses[0]) for r in records] == [(row["id"], row["completion"]) for row in rows]
    assert records[0].images[0].path is not None
    assert records[0].images[0].path.read_bytes() == examples[0].png


def test_a_file_that_was_cut_off_is_not_there(folder, tmp_path, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_files(scenes.read(folder, "broken"), tmp_path, "test")
    assert not (tmp_path / "test.jsonl").exists()


def test_files_that_cannot_be_written_are_refused(folder, tmp_path):
    (tmp_path / "images").write_text("")
    with pytest.raises(InputError, match="give one that can be written"):
        scenes.write_files(scenes.read(folder, "broken"), tmp_path, "test")
