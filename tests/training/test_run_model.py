"""Another run as the model: its policy is the new base and the reference; what comes out holds both."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from refusals import refusal
from runs import FULL, MODEL, PAIRS, TINY, compiling, events, losses, one_device, same

from mllm_align import InputError, load, load_run, score, train
from mllm_align.cli import main
from mllm_align.models.bundle import load as load_bundle
from mllm_align.training.run_folder import read_config
from mllm_align.training.run_model import base_folder, export_run, is_run, open_base, open_run

assert compiling  # a fixture


def scores(bundle):
    return np.array([[row["chosen_logp"], row["rejected_logp"]] for row in score(bundle, PAIRS)])


@pytest.fixture(scope="module", autouse=True)
def single():
    """All on one device, for speed."""
    from mllm_align.training import inputs

    whole, inputs.make_mesh = inputs.make_mesh, one_device
    yield
    inputs.make_mesh = whole


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "full")]


@pytest.fixture(scope="module", params=SLOW)
def chain(request, tmp_path_factory):
    """A run of two steps, and one of LoRA from it."""
    place = tmp_path_factory.mktemp(request.param)
    first = replace(TINY if request.param == "lora" else FULL, steps=2, save_every=1)
    train(first, MODEL, PAIRS, place / "first")
    train(replace(TINY, steps=2), place / "first", PAIRS, place / "second")
    return place


def test_the_policy_of_a_run_is_the_new_base_and_reference(chain):
    base = load_bundle(open_base(chain / "first"), "float32", one_device())
    policy = load_run(chain / "first", "float32", one_device())
    np.testing.assert_allclose(scores(base), scores(policy), rtol=0, atol=2e-4)
    assert np.abs(scores(base) - scores(load(MODEL, "float32", one_device()))).max() > 0.05
    assert losses(chain / "second")[0] == pytest.approx(np.log(2), abs=1e-6)
    assert events(chain / "second", "train")[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)
    described = json.loads((chain / "second" / "run.json").read_text())
    assert described["model"] == str(chain / "first") and described["model_step"] == 2
    assert base_folder(chain / "second") == str(MODEL.resolve())


def test_what_comes_out_holds_both(chain, tmp_path):
    """Merged folder and adapter score as the run itself does."""
    expected = scores(load_run(chain / "second", "float32", one_device()))
    export_run(chain / "second", tmp_path / "merged")
    found = scores(load(tmp_path / "merged", "float32", one_device()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    if "full" in chain.name:
        with pytest.raises(InputError, match="export the merged folder"):
            export_run(chain / "second", tmp_path / "adapter", adapter=True)
        return
    export_run(chain / "second", tmp_path / "adapter", adapter=True)
    found = scores(load(tmp_path / "adapter", "float32", one_device()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_a_longer_first_run_does_not_move_the_base_of_the_second(chain, tmp_path):
    """The second takes the step that it began from; where that is gone, it says so."""
    for name in ("first", "second"):
        shutil.copytree(chain / name, tmp_path / name)
    moved = json.loads((tmp_path / "second" / "run.json").read_text()) | {"model": str(tmp_path / "first")}
    (tmp_path / "second" / "run.json").write_text(json.dumps(moved))
    newest = tmp_path / "first" / "checkpoints" / "2"
    longer = replace(read_config(tmp_path / "first"), steps=3)
    train(longer, MODEL, PAIRS, tmp_path / "first")
    assert open_base(tmp_path / "first").step == 3
    whole = load_run(chain / "second", "float32", one_device())
    config = replace(TINY, steps=2)
    again = train(config, tmp_path / "first", PAIRS, tmp_path / "second")
    assert same(again.trained, whole.trained) and again.folder.step == 2
    newest.rename(newest.with_name("damaged-2"))
    with pytest.raises(InputError, match="has no checkpoint 2"):
        train(config, tmp_path / "first", PAIRS, tmp_path / "second")


def test_a_run_that_began_from_itself(chain, tmp_path):
    shutil.copytree(chain / "first", tmp_path / "first")
    described = json.loads((tmp_path / "first" / "run.json").read_text())
    (tmp_path / "first" / "run.json").write_text(json.dumps(described | {"model": str(tmp_path / "first")}))
    with pytest.raises(InputError, match="began from itself"):
        open_run(tmp_path / "first")
    with pytest.raises(InputError, match="itself"):
        base_folder(tmp_path / "first")


def test_verbs_take_a_run(chain, capsys, tmp_path):
    """inspect reads no weights; score reads those of both runs."""
    run = ["--model", str(chain / "second"), "--data", str(PAIRS)]
    main(["inspect", *run, "--json"])
    assert json.loads(capsys.readouterr().out)["responses"]
    main(["score", *run, "--out", str(tmp_path / "scores.jsonl")])
    found = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    expected = scores(load_run(chain / "second", "float32", one_device()))
    found = [[row["chosen_logp"], row["rejected_logp"]] for row in found]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_the_model_that_a_chain_of_runs_began_from(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def began(run, model):
        run.mkdir(exist_ok=True)
        (run / "run.json").write_text(json.dumps({"model": str(model), "model_fingerprint": "1"}))

    began(first, "/models/llava")
    began(second, first)
    assert is_run(second) and not is_run(tmp_path)
    assert base_folder(second) == "/models/llava" and base_folder("name") == "name"
    began(first, second)
    assert "began from itself" in refusal(base_folder, second)
