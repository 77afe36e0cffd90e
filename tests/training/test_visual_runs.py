"""Runs by objectives that compare images: where they begin, what is stored, how they go on."""

from dataclasses import replace
from math import log

import jax
import pytest
from goldens import FIXTURES
from runs import FULL, PAIRS, TINY, EachStep, bundle, compiling, events, losses, one_device, rows, same

import mllm_align
from mllm_align import (
    MDPO,
    RDPO,
    SFT,
    CHiP,
    InputError,
    OnlineBDHS,
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
@pytest.mark.parametrize(
    "config, data",
    [
        (MDPO_TINY, PAIRS),
        (replace(MDPO_TINY, objective=RDPO()), with_rejected()),
        (replace(FULL, objective=MDPO(rejected_image="noise")), PAIRS),
    ],
    ids=["mdpo", "rdpo", "full, noise"],
)
def test_what_is_stored_changes_nothing(config, data, tmp_path):
    """Reference log-probs and features, of both prefixes; micro-batches; one pass, as stored crops stay."""
    config = replace(config, steps=2)
    train(config, bundle(), data, tmp_path / "live", with_rejected())
    stored = replace(config, reference="stored", features="stored", micro_batches=2)
    train(stored, bundle(), data, tmp_path / "stored", with_rejected())
    held_out = [[e["loss"] for e in events(tmp_path / name, "eval")] for name in ("live", "stored")]
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), abs=1e-5)
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-5)
    start = (
        2 if isinstance(config.objective, RDPO) and not isinstance(config.objective, MDPO) else 3
    ) * log(2)
    assert losses(tmp_path / "live")[0] == pytest.approx(start, rel=1e-5)
    assert (tmp_path / "stored" / "reference_second.npz").exists()
    train(stored, bundle(), data, tmp_path / "stored", with_rejected())  # all of it is read again
    with pytest.raises(InputError, match="another configuration"):
        train(replace(stored, seed=1), bundle(), data, tmp_path / "stored")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llavanext", "onevision", "qwen3_vl"])
def test_eight_devices_compute_what_one_computes_in_every_family(family, tmp_path):
    """A crop and another image at once would be two second prefixes: the image has the longer one."""
    config = replace(MDPO_TINY, objective=RDPO(), steps=2, batch_size=8)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), jax.devices())
    for name, devices in (("one", one_device()), ("eight", mesh)):
        model = mllm_align.load(FIXTURES / family, "float32", devices)
        train(config, model, with_rejected(), tmp_path / name)
    for one, eight in zip(*(events(tmp_path / name, "train") for name in ("one", "eight")), strict=True):
        assert eight["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert eight["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert one["rewards/visual_margin"] == pytest.approx(eight["rewards/visual_margin"], abs=1e-4)


SHORT = SamplingConfig(max_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "online",
    [
        OnlinePairs(annotator=Scorer(function="votes:short"), sampling=SHORT),
        OnlineBDHS(similarity="lexical", sampling=SHORT, sentence_tokens=4),
    ],
    ids=["pairs", "bdhs"],
)
def test_the_policy_may_make_the_responses(online, tmp_path):
    train(replace(MDPO_TINY, online=online, steps=2), bundle(), PAIRS, tmp_path / "run")
    first, second = events(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(3 * log(2), rel=1e-5) and second["loss"] != first["loss"]
    assert second["rewards/visual_margin"] != 0


@pytest.mark.slow
def test_chip_begins_at_ln_2_where_nothing_diverges(tmp_path):
    """In micro-batches as in one; the divergence grows with training."""
    config = replace(MDPO_TINY, objective=CHiP(), steps=2)
    for micro in (1, 2):
        train(replace(config, micro_batches=micro), bundle(), PAIRS, tmp_path / str(micro))
    one, two = (events(tmp_path / str(micro), "train") for micro in (1, 2))
    assert one[0]["loss"] == pytest.approx(log(2), rel=1e-5)
    assert one[0]["kl/chosen"] == pytest.approx(0, abs=1e-5) and one[1]["kl/chosen"] > 1e-4
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_in_a_sum(tmp_path):
    objective = Sum((Part(MDPO(), 0.5), Part(Visual(0.2), 0.5), Part(SFT(), 0.1)))
    train(replace(MDPO_TINY, objective=objective, steps=1), bundle(), PAIRS, tmp_path / "run")
    (first,) = events(tmp_path / "run", "train")
    assert first["loss/mdpo/image"] == pytest.approx(0.5 * log(2), rel=1e-5)
    assert first["loss/visual"] == pytest.approx(0.5 * log(2), rel=1e-5) and first["loss/sft"] > 0


def test_what_it_cannot_do_is_one_line_and_leaves_nothing(tmp_path):
    text = {name: value for name, value in rows(1)[0].items() if name != "images"}
    for config, data, said in (
        (MDPO_TINY, [text], "has no image, and the objective compares images"),
        (replace(MDPO_TINY, objective=RDPO()), PAIRS, "pairs.jsonl record 0, rejected_images: is missing"),
    ):
        with pytest.raises(InputError, match=said) as error:
            train(config, bundle(), data, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
