"""Runs by objectives that compare images: where they begin, what is stored, how they go on."""

from dataclasses import replace
from math import log

import pytest
from goldens import FIXTURES
from runs import FULL, PAIRS, TINY, EachStep, bundle, compiling, events, losses, one_device, rows, same

import mllm_align
from mllm_align import (
    MDPO,
    RDPO,
    CHiP,
    InputError,
    OnlinePairs,
    Part,
    Scorer,
    Sum,
    Visual,
    train,
)
from mllm_align.config import MeshConfig, SamplingConfig
from mllm_align.sharding import make_mesh

assert compiling  # a fixture
MDPO_TINY = replace(TINY, objective=MDPO(), data=replace(TINY.data, multiple=8))


def with_rejected(count=8):
    """The stored pairs, each with the next one's picture as its rejected image."""
    given = rows(count)
    paths = [str(PAIRS.parent / row["images"][0]) for row in given]
    following = [*paths[1:], paths[0]]
    return [
        row | {"images": [own], "rejected_images": [other]}
        for row, own, other in zip(given, paths, following, strict=True)
    ]


@pytest.fixture(scope="module")
def run(compiling, tmp_path_factory):
    """A whole run of mDPO with held-out records."""
    out = tmp_path_factory.mktemp("visual") / "run"
    trained = train(replace(MDPO_TINY, save_every=1), bundle(), PAIRS, out, with_rejected())
    return out, trained


@pytest.mark.slow
def test_it_begins_at_3_ln_2_and_learns_to_tell_the_images(run):
    first, *_, last = events(run[0], "train")
    terms = [first[f"loss/{name}"] for name in ("pairs", "image", "anchor")]
    assert terms == pytest.approx([log(2)] * 3, rel=1e-5) and first["loss"] == pytest.approx(3 * log(2))
    assert first["rewards/visual_margin"] == pytest.approx(0, abs=1e-4) and last["loss"] < first["loss"]
    assert last["rewards/visual_margin"] > 0.1 and last["rewards/visual_accuracy"] > 0.5
    (held_out,) = events(run[0], "eval")
    assert held_out["loss/image"] > 0 and 0 <= held_out["rewards/visual_accuracy"] <= 1
    (start,) = events(run[0], "start")
    (shape,) = start["shapes"]
    assert len(shape) == 5 and shape[3:] == [shape[0], shape[2]], "a crop has the image's size"


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_last_bit(run, tmp_path):
    def stop(values):
        if values["step"] == 3:  # in the second pass, whose crops are others
            raise RuntimeError

    config = replace(MDPO_TINY, save_every=1)
    with pytest.raises(RuntimeError):
        train(config, bundle(), PAIRS, tmp_path / "run", with_rejected(), callbacks=[EachStep(stop)])
    again = train(config, bundle(), PAIRS, tmp_path / "run", with_rejected())
    assert same(again.trained, run[1].trained)


@pytest.mark.slow
def test_what_is_stored_changes_nothing(tmp_path):
    """Reference log-probs and features of both prefixes, with all trained; in micro-batches. One pass, as
    stored crops stay."""
    config = replace(FULL, objective=MDPO(), steps=2)
    train(config, bundle(), PAIRS, tmp_path / "live")
    stored = replace(config, reference="stored", features="stored", micro_batches=2)
    train(stored, bundle(), PAIRS, tmp_path / "stored")
    # a first step of Adam turns rounding of small gradients into steps of another sign
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)
    assert losses(tmp_path / "live")[0] == pytest.approx(3 * log(2), rel=1e-5)
    assert (tmp_path / "stored" / "reference_second.npz").exists()


@pytest.mark.slow
def test_images_of_other_sizes_on_eight_devices(tmp_path):
    """Each prompt is padded to a length of its own; one device computes the same."""
    config = replace(MDPO_TINY, objective=RDPO(), steps=1, batch_size=8)
    found = []
    for name, mesh in {"one": one_device(), "eight": make_mesh(MeshConfig(data=4, fsdp=2))}.items():
        model = mllm_align.load(FIXTURES / "qwen3_vl", "float32", mesh)
        train(config, model, with_rejected(), tmp_path / name)
        (step,), (start,) = (events(tmp_path / name, kind) for kind in ("train", "start"))
        assert len(start["shapes"][0]) == 5 and step["loss"] == pytest.approx(2 * log(2), rel=1e-5)
        found.append(step["grad_norm"])
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-3)


SHORT = SamplingConfig(max_tokens=8)


@pytest.mark.slow
def test_the_policy_may_make_the_responses_of_a_sum(tmp_path):
    online = OnlinePairs(annotator=Scorer(function="votes:short"), sampling=SHORT)
    objective = Sum((Part(MDPO(), 0.5), Part(Visual(0.2), 0.5)))
    config = replace(MDPO_TINY, objective=objective, online=online, steps=2)
    train(config, bundle(), PAIRS, tmp_path / "run")
    first, second = events(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(2 * log(2), rel=1e-5) and second["loss"] != first["loss"]
    assert first["loss/visual"] == pytest.approx(0.5 * log(2), rel=1e-5)
    assert second["rewards/visual_margin"] != 0


@pytest.mark.slow
def test_chip_begins_at_ln_2_where_nothing_diverges(tmp_path):
    """In two micro-batches; the divergence grows with training."""
    config = replace(MDPO_TINY, objective=CHiP(), steps=2, micro_batches=2)
    train(config, bundle(), PAIRS, tmp_path / "run")
    first, second = events(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(log(2), rel=1e-5)
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-5) and second["kl/chosen"] > 1e-4


def test_what_it_cannot_do_is_one_line_and_leaves_nothing(tmp_path):
    text = {name: value for name, value in rows(1)[0].items() if name != "images"}
    for config, data, said in (
        (MDPO_TINY, [text], "has no image, and the objective compares images"),
        (replace(MDPO_TINY, objective=RDPO()), PAIRS, "pairs.jsonl record 0, rejected_images: is missing"),
    ):
        with pytest.raises(InputError, match=said) as error:
            train(config, bundle(), data, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
