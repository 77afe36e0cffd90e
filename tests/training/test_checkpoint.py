"""Which checkpoint of a run is taken, by every verb, when some are damaged or others stand beside them."""

import hashlib
import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import MODEL, PAIRS, TINY, bundle, compiling, events, one_device, same

from mllm_align import InputError, load_run, processes, train
from mllm_align.cli import main
from mllm_align.models.bundle import load
from mllm_align.training.checkpoint import DIGESTS, Checkpoints, choose
from mllm_align.training.online.maker import MakerState
from mllm_align.training.run_model import open_run
from mllm_align.training.step import TrainState

assert compiling  # a fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, each saved and evaluated; 1 evaluates best."""
    out = tmp_path_factory.mktemp("checkpoints") / "run"
    said = iter([0.2, 0.4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm_align.training.loop._Run._evaluate", lambda *_: next(said))
        held_out = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        train(replace(TINY, steps=2, save_every=1, eval_every=1), bundle(), PAIRS, out, held_out)
    return out


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def write(text):
    return lambda place: (place / DIGESTS).write_text(text)


def alter_about(place):
    file = place / "run" / "metadata"
    file.write_bytes(file.read_bytes().replace(b'"step": 2', b'"step": 3'))


def alter_weights(place):
    file = max((place / "trained" / "d").iterdir(), key=lambda p: p.stat().st_size)
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))


def drop(name):
    def harm(place):
        digests = json.loads((place / DIGESTS).read_text())
        kept = {key: value for key, value in digests.items() if not key.startswith(name)}
        (place / DIGESTS).write_text(json.dumps(kept))

    return harm


def become_file(place):
    shutil.rmtree(place)
    place.write_text("")


def become_first(place):
    shutil.rmtree(place)
    shutil.copytree(place.parent / "1", place)


def become_empty(place):
    shutil.rmtree(place)
    place.mkdir()


HARMS = {
    "about altered": (alter_about, "run/metadata is altered"),
    "about gone": (lambda place: shutil.rmtree(place / "run"), "run/metadata is missing"),
    "weights altered": (alter_weights, "trained/d/.* is altered"),
    "optimizer gone": (lambda place: shutil.rmtree(place / "optimizer"), "optimizer/.* is missing"),
    "of another step": (become_first, "it is that of step 1$"),
    "list": (write("[]"), "digests.json holds no digests"),
    "null": (write("null"), "digests.json holds no digests"),
    "nothing": (write("{}"), "digests.json holds no digests"),
    "numbers": (write('{"run/metadata": 1, "trained/d": 2}'), "digests.json holds no digests"),
    "no JSON": (write("{"), "digests.json can't be read"),
    "deep": (write("[" * 100_000), "digests.json can't be read .*nested too deeply"),
    "binary": (
        lambda place: (place / DIGESTS).write_bytes(b"\xff\xfe\0"),
        "digests.json can't be read",
    ),
    "unsealed": (lambda place: (place / DIGESTS).unlink(), "digests.json can't be read"),
    "about unsealed": (drop("run/"), "digests.json holds no digests"),
    "weights unsealed": (drop("trained/"), "digests.json holds no digests"),
    "file": (become_file, "it is no folder"),
    "empty": (become_empty, "digests.json can't be read"),
}


@pytest.mark.parametrize("name", HARMS)
def test_the_one_before_a_damaged_one_is_taken_and_said(copy, name, capsys):
    harm, said = HARMS[name]
    harm(copy / "checkpoints" / "2")
    step, ((damaged, problem),) = choose(copy / "checkpoints")
    assert (step, damaged) == (1, 2)
    assert re.search(said, problem)
    assert open_run(copy)[3] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoints/2 is damaged (" in line and line.endswith("step 1 is taken")
    with pytest.raises(InputError, match=r"checkpoints/2 is damaged \(.*take another step, or `last`"):
        open_run(copy, 2)
    assert open_run(copy, "best")[3] == 1


def test_best_is_the_best_of_the_whole_ones(copy, capsys):
    assert open_run(copy, "best")[3] == 1
    alter_weights(copy / "checkpoints" / "1")
    assert open_run(copy, "best")[3] == 2
    assert "checkpoints/1 is damaged" in capsys.readouterr().err
    alter_about(copy / "checkpoints" / "2")
    for wanted in ("best", "last"):
        with pytest.raises(InputError, match="no whole checkpoint"):
            open_run(copy, wanted)


def test_export_and_score_take_the_one_before(copy, tmp_path, capsys):
    alter_about(copy / "checkpoints" / "2")
    (copy / "checkpoints" / "99").mkdir()
    main(["export", "--run", str(copy), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert json.loads(said.out)["step"] == 1
    assert said.err.count("step 1 is taken") == 2 and "Traceback" not in said.err
    left = load_run(copy, mesh=one_device())
    (copy / "checkpoints" / "99").rmdir()
    shutil.rmtree(copy / "checkpoints" / "2")
    assert same(left.trained, load_run(copy, mesh=one_device()).trained)


STRAYS = ("abc", "007", "12.tmp", "damaged-5", "²", "٣", "1_000", "-4", " 3", "9" * 200, "98765432109")


def test_names_that_no_checkpoint_has_are_left_alone(copy):
    """Neither read, nor counted, nor in the way of a save."""
    place = copy / "checkpoints"
    for number, name in enumerate(STRAYS):
        (place / name).mkdir() if number % 2 else (place / name).write_text("")
    (place / "1" / "run" / "metadata").write_text("{")  # older than the one that is taken: not looked at
    (place / "99").mkdir()
    assert choose(place) == (2, [(99, choose(place)[1][0][1])])
    config = replace(TINY, steps=4, save_every=1, eval_every=1)
    train(config, bundle(), PAIRS, copy)
    assert events(copy, "start")[-1]["step"] == 2
    assert {p.name for p in place.iterdir()} == {*STRAYS, "damaged-99", "2", "3", "4"}, "2 evaluated best"


def test_files_are_digested_once_and_only_what_is_restored(copy, monkeypatch, tmp_path):
    """All that is read of other checkpoints is what they say of themselves."""
    digest, seen = hashlib.file_digest, []

    def counting(file, *args):
        seen.append(str(file.name))
        return digest(file, *args)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    train(
        replace(TINY, steps=2, save_every=1, eval_every=1),
        load(MODEL, "float32", one_device()),
        PAIRS,
        copy,
    )
    assert len(seen) == len(set(seen)), "nothing twice"
    weights = [name for name in seen if name.endswith(".safetensors")]
    assert len(weights) == len(list(MODEL.glob("*.safetensors")))
    assert not [name for name in seen if "/checkpoints/1/" in name]
    assert [name for name in seen if "/checkpoints/2/trained" in name]
    seen.clear()
    load_run(copy, mesh=one_device())
    assert len(seen) == len(set(seen)) and not [name for name in seen if "/checkpoints/1/" in name]


def test_other_processes_digest_nothing(copy, monkeypatch):
    """They are told by the first one."""
    folder = bundle().folder
    about = json.loads((copy / "checkpoints" / "2" / "run" / "metadata").read_text())
    answers = iter([[folder.fingerprint, folder.projector_fingerprint], 2, about])
    monkeypatch.setattr(processes, "on_first", lambda f: next(answers))
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert open_run(copy)[3] == 2


# ---- what the maker of responses keeps -----------------------------------------------------------------


def state():
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, {"params": {"a": jnp.arange(6.0).reshape(2, 3)}}, {"m": jnp.ones(3)})


@pytest.fixture
def saved(tmp_path):
    """saved(begun) -> a folder with one checkpoint that keeps this of the maker."""

    def save(begun):
        with closing(Checkpoints(tmp_path / "checkpoints", write=True)) as checkpoints:
            checkpoints.save(state(), 1, {"step": 1}, None, begun)
        return tmp_path / "checkpoints"

    return save


def test_arrays_of_a_maker_come_back_to_the_last_bit(saved):
    """In every dtype: advantages are float64, which a device would round."""
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.integers(0, 9, (2, 3, 4)).astype(np.int32),
        "advantages": rng.standard_normal((2, 3)),
        "logps": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "finite": np.array([True, False]),
        "number": np.array([2**40 + 1]),
    }
    folder = saved(MakerState({"made_at": 3, "names": ["a", None]}, arrays))
    assert choose(folder) == (1, [])
    found = Checkpoints(folder).begun(1)
    assert found.metadata == {"made_at": 3, "names": ["a", None]} and found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype and np.array_equal(found.arrays[name], array), name
    assert same(Checkpoints(folder).restore(state(), 1), state())


def test_a_maker_may_keep_json_alone_or_nothing(saved, tmp_path):
    found = Checkpoints(saved(MakerState({"rows": [1]}))).begun(1)
    assert found.metadata == {"rows": [1]} and found.arrays == {}
    assert not (tmp_path / "checkpoints" / "1" / "begun_arrays").exists()
    shutil.rmtree(tmp_path / "checkpoints")
    assert Checkpoints(saved(None)).begun(1) is None


def test_arrays_of_a_maker_that_are_altered_are_damage(saved):
    folder = saved(MakerState({}, {"a": np.arange(1000)}))
    file = max((folder / "1" / "begun_arrays").rglob("d/*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    newest, ((step, problem),) = choose(folder)
    assert (newest, step) == (None, 1) and "begun_arrays" in problem and "altered" in problem


def test_the_state_of_an_objective_comes_back_and_its_damage_is_seen(tmp_path):
    ours = replace(state(), objective={"mean": jnp.float32(0.25), "count": jnp.arange(3)})
    with closing(Checkpoints(tmp_path / "checkpoints", write=True)) as checkpoints:
        checkpoints.save(ours, 1, {"step": 1}, None, None)
    place = tmp_path / "checkpoints" / "1"
    assert same(Checkpoints(place.parent).restore(jax.tree.map(jnp.zeros_like, ours), 1), ours)
    assert any(name.startswith("objective/") for name in json.loads((place / DIGESTS).read_text()))
    shutil.rmtree(place / "objective")
    newest, ((_, problem),) = choose(place.parent)
    assert newest is None and "objective/" in problem and "missing" in problem


def test_without_a_state_a_checkpoint_is_what_it_was_before_there_were_any(saved):
    place = saved(None) / "1"
    digests = json.loads((place / DIGESTS).read_text())
    assert {name.partition("/")[0] for name in digests} == {"trained", "optimizer", "run"}
    assert not (place / "objective").exists()


def test_a_host_needs_no_device_for_what_was_trained(saved):
    found = Checkpoints(saved(None)).restore_trained(1)
    assert isinstance(found["params"]["a"], np.ndarray) and same(found, state().trained)
