"""LoRA over a base whose blocks are kept in int8, from the first step to what comes out."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import MODEL, PAIRS, TINY, EachStep, bundle, compiling, events, losses, one_device, same

from mllm_align import RLOO, InputError, OnlineRewards, SamplingConfig, load, score, train
from mllm_align.align.sft import SFT
from mllm_align.annotate.scorer import Scorer
from mllm_align.batch import Shape
from mllm_align.config import LoraConfig, MeshConfig
from mllm_align.sharding import make_mesh
from mllm_align.training.programs import batch_structs, train_program
from mllm_align.training.run_model import export_run

assert compiling  # a fixture
pytestmark = pytest.mark.slow
LORA = LoraConfig(rank=2, alpha=4.0, base="int8")
INT8 = replace(TINY, lora=LORA, steps=2, save_every=1)


def scores(of):
    return np.array([[row["chosen_logp"], row["rejected_logp"]] for row in score(of, PAIRS)])


@pytest.fixture(scope="module")
def run(compiling, tmp_path_factory):
    """(folder, what came of it) of two steps."""
    out = tmp_path_factory.mktemp("int8") / "run"
    return out, train(INT8, bundle(), PAIRS, out)


def test_no_gradient_of_a_frozen_matrix_is_formed():
    """No product of the step has the shape of the feed-forward's matrices, which nothing else has."""
    decoder = replace(bundle().config.decoder, mlp=88)
    model = replace(bundle().config, decoder=decoder, int8=True)
    config = replace(INT8, objective=SFT(), batch_size=1)
    made = train_program(config, model, one_device(), steps=1)
    batch = batch_structs(config, model, one_device(), Shape(40, 8, 1), config.objective.views)
    text = made.step.lower(made.state, made.base, batch).as_text()
    wide = decoder.hidden
    assert f"{wide}x88xi8>" in text and f"-> tensor<{LORA.rank}x88xf32>" in text
    assert not re.findall(rf"dot_general.*-> tensor<({wide}x88|88x{wide})xf32>", text)


def test_it_begins_at_its_reference_and_says_what_its_base_is(run):
    out, whole = run
    assert whole.config.int8 and not bundle().config.int8
    assert losses(out)[0] == pytest.approx(np.log(2), abs=1e-6)
    assert events(out, "train")[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert losses(out)[1] != losses(out)[0]
    assert json.loads((out / "run.json").read_text())["base_kept"] == "float32, blocks in int8"


def test_a_run_that_was_stopped_and_one_that_is_read_again(run, tmp_path):
    def stop(values):
        if values["step"] == 1:
            raise RuntimeError

    out, whole = run
    with pytest.raises(RuntimeError):
        train(INT8, bundle(), PAIRS, tmp_path / "again", callbacks=[EachStep(stop)])
    assert same(train(INT8, bundle(), PAIRS, tmp_path / "again").trained, whole.trained)
    read = load(out, "float32", one_device())
    assert same(read.params, whole.params) and (scores(read) == scores(whole)).all()
    with pytest.raises(InputError, match=r"lora\.base"):
        train(replace(INT8, lora=replace(LORA, base="full")), bundle(), PAIRS, out)


def test_what_comes_out_is_merged_into_the_folders_own_weights(run, tmp_path):
    out, whole = run
    over_full = scores(replace(bundle(), trained=whole.trained, lora=LORA))
    assert np.abs(over_full - scores(whole)).max() > 0
    for name in ("merged", "adapter"):
        assert export_run(out, tmp_path / name, adapter=name == "adapter")["trained_over"] == "int8"
        found = scores(load(tmp_path / name, "float32", one_device()))
        np.testing.assert_allclose(found, over_full, rtol=0, atol=1e-3)


def test_on_a_mesh_with_all_that_can_be_stored_as_on_one_device(run, tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    stored = replace(INT8, reference="stored", features="stored")
    train(stored, load(MODEL, "float32", mesh), PAIRS, tmp_path / "four")
    for one, four in zip(events(run[0], "train"), events(tmp_path / "four", "train"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for name, remedy in (("reference.npz", "delete it"), ("features", "delete the folder")):
        left = tmp_path / name.partition(".")[0]
        left.mkdir()
        (tmp_path / "four" / name).rename(left / name)
        kind = {name.partition(".")[0]: "stored"}
        with pytest.raises(InputError, match=f"blocks in int8.*{remedy}"):
            train(replace(INT8, lora=replace(LORA, base="full"), **kind), bundle(), PAIRS, left)


def test_rollouts_and_updates_see_the_same_base(compiling, tmp_path):
    online = OnlineRewards(Scorer("votes:short"), sampling=SamplingConfig(max_tokens=6))
    config = replace(INT8, online=online, objective=RLOO(responses=2), steps=1)
    train(config, bundle(), PAIRS, tmp_path / "run")
    (line,) = events(tmp_path / "run", "train")
    assert line["rollout/logp_gap"] < 1e-4 and line["grad_norm"] > 0
