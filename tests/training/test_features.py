"""Stored features: what lies on disk, how a computation goes on, and runs that read it."""

import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from runs import PAIRS, TINY, bundle, compiling, events, losses, rows, write_pairs

from mllm_align import GRPO, InputError, OnlineBDHS, OnlineRewards, Scorer, train
from mllm_align.config import SamplingConfig
from mllm_align.generation.decode import Generator
from mllm_align.models.bundle import make_model
from mllm_align.models.vlm import variables
from mllm_align.prepare import prepare
from mllm_align.training import features
from mllm_align.training.features import StoredFeatures

assert compiling  # a fixture
STORED = replace(TINY, features="stored")


def prepared(data=PAIRS):
    encoder, records, _ = prepare(bundle(), data, TINY.data, 2)
    return encoder, records


def made(folder, data=PAIRS):
    return StoredFeatures(folder, bundle(), *prepared(data)).load_or_make(rows=4, threads=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole") / "features")


def test_they_are_the_towers(whole):
    encoder, records = prepared()
    model, params = make_model(bundle().config), variables(bundle().params)
    for number in (0, 3, 7):
        pixels = encoder.pixels(records[number])
        batch = type(pixels)(*(x[None] for x in pixels))
        expected = np.asarray(model.apply(params, batch, method="features"))[0]
        (found,) = whole(number)
        assert found.shape == (records[number].shape.tiles, *whole.shape[1:])
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


def test_records_with_one_image_share_its_features(tmp_path):
    first, second = rows(2)
    other = dict(first, id="other", prompt="What else?")
    stored = made(tmp_path / "features", write_pairs(tmp_path, [first, second, other]))
    (one,), (two,), (three,) = map(stored, range(3))
    assert len(stored.table) == len(one) + len(two)
    assert np.array_equal(three, one) and not np.array_equal(two, one)


def test_records_without_images(tmp_path):
    first, second = rows(2)
    blind = {name: value for name, value in second.items() if name != "images"}
    stored = made(tmp_path / "features", write_pairs(tmp_path, [blind, first]))
    (none,), (one,) = stored(0), stored(1)
    assert len(none) == 0 and len(one) == len(stored.table) > 0


def test_a_computation_that_was_stopped_goes_on(whole, tmp_path, monkeypatch):
    seen, of_tower = [], Generator.features

    def counted(self, pictures):
        seen.append(len(pictures))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return of_tower(self, pictures)

    monkeypatch.setattr(Generator, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "features")
    part = tmp_path / "features" / "tiles.part"
    with part.open("ab") as file:
        file.write(b"half a tile")
    stored = made(tmp_path / "features")
    assert seen == [4, len(stored.firsts) - 4, len(stored.firsts) - 4]
    assert np.array_equal(stored.table, whole.table) and not part.exists()
    made(tmp_path / "features")
    assert len(seen) == 3, "read, not computed again"


def test_features_of_other_images_are_refused(tmp_path):
    data = write_pairs(tmp_path, rows(2))
    made(tmp_path / "features", data)
    here, there = (tmp_path / row["images"][0] for row in rows(2))
    shutil.copy(there, here)
    with pytest.raises(InputError, match=r"features belongs to .* this run is .*delete the folder"):
        made(tmp_path / "features", data)


def test_files_that_are_not_whole_are_refused(tmp_path):
    data = write_pairs(tmp_path, rows(1))
    tiles = made(tmp_path / "features", data).tiles
    tiles.write_bytes(tiles.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"can't read .*tiles .*disk that all processes share.*delete"):
        made(tmp_path / "features", data)
    (tmp_path / "features" / "stamp.json").write_text("{")
    with pytest.raises(InputError, match=r"stamp\.json.*delete the folder"):
        made(tmp_path / "features", data)


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage(100))
    with pytest.raises(InputError, match=r"stored features need 0\.0 GiB in .* make room"):
        made(tmp_path / "features")


# ---- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_computes_what_it_computes_from_pixels(tmp_path):
    """Held-out records, too; with stored references, a second start reads both."""
    held_out = [{**row, "images": [str(PAIRS.parent / row["images"][0])]} for row in rows(7)]
    train(TINY, bundle(), PAIRS, tmp_path / "live", held_out)
    config = replace(STORED, reference="stored", save_every=2)
    train(replace(config, steps=2), bundle(), PAIRS, tmp_path / "run", held_out)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"features", "features_eval"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredFeatures, "_make", None)
        train(config, bundle(), PAIRS, tmp_path / "run", held_out)
    expected = [e["loss"] for e in events(tmp_path / "live", "eval")][-1]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "live"), abs=1e-5)
    assert [e["loss"] for e in events(tmp_path / "run", "eval")][-1] == pytest.approx(expected, abs=1e-5)


SAMPLING = SamplingConfig(max_tokens=8)
SHORTEST = Scorer(function="votes:short")
ONLINE = {
    "bdhs": {"online": OnlineBDHS(similarity="lexical", sampling=SAMPLING, sentence_tokens=4)},
    "rewards": {
        "online": OnlineRewards(annotator=SHORTEST, sampling=SAMPLING),
        "objective": GRPO(responses=2),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_the_policy_responds_to_what_is_stored(tmp_path, kind):
    for name, config in (("live", TINY), ("stored", STORED)):
        train(replace(config, steps=2, **ONLINE[kind]), bundle(), PAIRS, tmp_path / name)
    live, stored = ([e["responses"] for e in events(tmp_path / n, "example")] for n in ("live", "stored"))
    assert stored == live and len(live) == 2
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), abs=1e-5)
