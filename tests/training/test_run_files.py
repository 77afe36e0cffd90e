"""Every JSON of a run folder, hostile: what reads it works, or refuses it in one line."""

import random
import shutil
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import mutant
from runs import PAIRS, TINY, bundle, compiling, one_device

from mllm_align import InputError, export, load_run, train
from mllm_align.training import run_facts
from mllm_align.training import run_folder as module
from mllm_align.training.checkpoint import Checkpoints
from mllm_align.training.loop import _newest
from mllm_align.training.run_model import open_run

assert compiling  # a fixture
CONFIG = replace(TINY, steps=1)
FILES = ["config.json", "run.json", "checkpoints/1/digests.json", "checkpoints/1/run/metadata"]
FILES += ["checkpoints/1/_CHECKPOINT_METADATA", "checkpoints/1/trained/_METADATA"]
SHARES = [4, 4, 3, 3, 1, 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("files") / "run"
    train(CONFIG, bundle(), PAIRS, out)
    return out


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def survives(work, said):
    """Whether the work was done; it may only end with one line."""
    try:
        work()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, said
        return False
    return True


def resumed(out):
    """What a continued run checks before it computes."""
    module.check_folder(out, CONFIG)
    described = run_facts.metadata(CONFIG, bundle(), PAIRS, None, [])
    place = module.checkpoints_folder(out, CONFIG)
    module.check(out, CONFIG, described | {"data_fingerprint": "other"})
    if step := _newest(place):
        about = Checkpoints(place).about(step)
        module.check_checkpoint(place / str(step), about, CONFIG, described)
        module.goes_on(out, about, replace(CONFIG, steps=3), 8, step, False)


def opened(out):
    _, _, checkpoints, step = open_run(out)
    with closing(checkpoints):
        checkpoints.restore_trained(step)


@pytest.mark.parametrize("count", [96, pytest.param(250, marks=pytest.mark.slow)])
def test_hostile_files_of_a_run(copy, count, capsys):
    rng, whole = random.Random(count), {name: (copy / name).read_bytes() for name in FILES}
    done = []
    for number in range(count):
        name = rng.choices(FILES, SHARES)[0]
        hostile = mutant(whole[name].decode(), rng)
        (copy / name).write_bytes(hostile)
        said = f"number {number}, {name}: {hostile[:2000]!r}"
        try:
            done.append(survives(lambda: opened(copy), said))
            survives(lambda: resumed(copy), said)
        except Exception as error:
            raise AssertionError(said) from error
        if (aside := copy / "checkpoints" / "damaged-1").exists():
            aside.rename(copy / "checkpoints" / "1")
        (copy / name).write_bytes(whole[name])
    capsys.readouterr()
    assert survives(lambda: opened(copy), "as it was")
    assert 0 < sum(done) < 0.5 * count, "most are refused, and some change nothing that is needed"


@pytest.mark.slow
def test_hostile_files_and_whole_verbs(copy, tmp_path):
    """The same through the verbs themselves; a run that begins anew where nothing whole is left is fine."""
    rng, fresh = random.Random(1), shutil.copytree(copy, tmp_path / "fresh")
    for number in range(10):
        name = rng.choices(FILES, SHARES)[0]
        hostile = mutant((fresh / name).read_text(), rng)
        said = f"number {number}, {name}: {hostile[:2000]!r}"
        for verb, work in (
            ("load", lambda: load_run(copy, mesh=one_device())),
            ("export", lambda: export(copy, tmp_path / "exported")),
            ("train", lambda: train(CONFIG, bundle(), PAIRS, copy)),
        ):
            shutil.rmtree(copy)
            shutil.copytree(fresh, copy)
            (copy / name).write_bytes(hostile)
            try:
                survives(work, f"{verb}, {said}")
            except Exception as error:
                raise AssertionError(f"{verb}, {said}") from error
            with suppress(FileNotFoundError):
                shutil.rmtree(tmp_path / "exported")
