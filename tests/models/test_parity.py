"""The numbers of torch, transformers and TRL on tiny LLaVA 1.5 and 1.6 models."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import ALL, goldens, packed_images, responses, union
from signals import computed, signals

from mllm_align.align.pairwise import DPO, IPO, RobustDPO, SLiC
from mllm_align.align.sft import SFT
from mllm_align.batch import pad, stack
from mllm_align.models.huggingface import load_params, open_folder
from mllm_align.training.step import TrainState, make_step

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sft")


# The first families to fail are those of most traits of their own; the others take as long to compile.
SLOW = dict.fromkeys(("onevision", "idefics3", "qwen2_5_vl", "gemma3", "internvl"), pytest.mark.slow)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in ALL])
def golden(request):
    return goldens(request.param)


@pytest.fixture(scope="module")
def ours(golden):
    """Log-probs of base and policy, the compiled function, and the pull-back of the policy's."""
    batch = golden.batch()

    @jax.jit
    def logps(params, pixels):
        prefix = replace(batch.prefix, **pixels._asdict())
        return golden.model.apply({"params": params}, replace(batch, prefixes=(prefix,)))[0]

    @jax.jit
    def pullback(params, cotangent):
        return jax.vjp(lambda p: golden.model.apply({"params": p}, batch)[0], params)[1](cotangent)[0]

    values = {tag: logps(getattr(golden, tag), batch.prefix.pixels) for tag in ("base", "policy")}
    return SimpleNamespace(batch=batch, logps=logps, pullback=pullback, **values)


def objective(golden, loss):
    beta, smoothing = golden.numbers["beta"], golden.numbers["label_smoothing"]
    return {
        "sigmoid": DPO(beta),
        "ipo": IPO(beta),
        "hinge": SLiC(beta),
        "robust": RobustDPO(beta, smoothing),
        "sft": SFT(),
    }[loss]


def loss_of(golden, ours, loss, weight=None):
    """The loss as a function of the policy's log-probs."""
    weight = ours.batch.responses.weight if weight is None else weight

    def mean(policy):
        given = signals(policy, ours.base, ours.batch.responses.mask, weight)
        total, count, _ = computed(objective(golden, loss), given)
        return total / count

    return mean


def lenient(optimizer):
    """optax itself mixes dtypes."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("tag", ["base", "policy"])
def test_log_probs_of_every_token(golden, ours, tag, alone):
    stored = golden.arrays[f"{tag}/{'alone_' if alone else ''}per_token_logps"]
    found = responses(np.asarray(getattr(ours, tag)), ours.batch.responses.mask)
    expected = golden.rows(stored, alone)
    assert [len(x) for x in found] == golden.numbers["completion_tokens"]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-5)


def test_a_flag_that_ties_the_head_does_not_hide_the_stored_one(golden, ours, tmp_path):
    """transformers takes the stored head too: the folder scores as it did without the flag."""
    raw = json.loads((golden.folder.path / "config.json").read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(golden.folder.path / "model.safetensors")
    folder = open_folder(tmp_path)
    assert folder.config == golden.config
    logps = ours.logps(load_params(folder, np.float32), ours.batch.prefix.pixels)
    found = np.concatenate(responses(np.asarray(logps), ours.batch.responses.mask))
    expected = np.concatenate(golden.rows(golden.arrays["base/per_token_logps"]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tag", ["base", "policy"])
def test_black_images_change_the_log_probs_as_in_torch(golden, ours, tag):
    pixels = ours.batch.prefix.pixels
    dark = pixels._replace(patches=np.zeros_like(pixels.patches))
    black = ours.logps(getattr(golden, tag), dark).sum(-1).T.reshape(-1)
    expected = golden.numbers[tag]["logps_black_images"]
    np.testing.assert_allclose(black, expected, rtol=1e-5)
    assert np.abs(black - np.array(golden.numbers[tag]["logps"])).max() > 1


def test_packed_image_embeddings(golden, ours):
    found = np.concatenate(packed_images(golden.model, golden.policy, ours.batch))
    np.testing.assert_allclose(found, golden.arrays["policy/image_features"], atol=1e-5)


def test_every_picture_gets_the_image_tokens_of_the_processor(golden):
    counted = {}
    for step in range(golden.numbers["trajectory"]["steps"]):
        at = f"trajectory/step{step}/"
        for pair, tokens in zip(
            golden.arrays[f"{at}row_index"], golden.arrays[f"{at}input_ids"], strict=True
        ):
            counted[int(pair)] = int((tokens == golden.config.image_token).sum())
    assert sorted(counted) == list(range(8))
    for pair, count in counted.items():
        width, height = golden.pictures[pair].size
        assert len(golden.rows_of(height, width)) == count


def test_pictures_become_the_stored_tiles(golden):
    for pair, group in enumerate(golden.groups()):
        np.testing.assert_allclose(golden.processed(pair).patches, group.prefix.patches, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients(golden, ours, loss):
    value, cotangent = jax.value_and_grad(loss_of(golden, ours, loss))(ours.policy)
    assert float(value) == pytest.approx(golden.numbers["loss"][loss], rel=1e-4)

    grads = ours.pullback(golden.policy, np.asarray(cotangent))
    grads = jax.tree.map(np.float64, grads)
    assert float(optax.tree.norm(grads)) == pytest.approx(golden.numbers["grad_norm"][loss], rel=1e-3)
    if loss != "sigmoid":
        return
    where = {entry.name: entry for entry in golden.folder.entries}
    stored = {k: v for k, v in golden.arrays.items() if k.startswith("policy/grad/")}
    assert len(stored) == 4
    for name, expected in stored.items():
        entry = where[golden.folder.family.canonical(name.removeprefix("policy/grad/"))]
        leaf = grads
        for key in entry.path:
            leaf = leaf[key]
        found = entry.to_theirs(leaf if entry.layer is None else leaf[entry.layer])
        assert relative(found, expected) < 1e-3, name


@pytest.mark.parametrize("loss", LOSSES[:-1])
def test_losses_of_single_pairs(golden, ours, loss):
    found = [
        float(loss_of(golden, ours, loss, one)(ours.policy))
        for one in np.eye(len(ours.batch.responses.weight), dtype=np.float32)
    ]
    np.testing.assert_allclose(found, golden.numbers["loss_per_pair"][loss], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("golden", ["llavanext", "qwen3_vl"], indirect=True)  # gradients are of all
def test_four_steps_of_full_fine_tuning(golden):
    expected = golden.numbers["trajectory"]
    groups = [golden.groups(f"trajectory/step{i}/") for i in range(expected["steps"])]
    shape = union([group for pairs in groups for group in pairs])
    adamw = optax.adamw(expected["lr"], b1=0.9, b2=0.999, eps=1e-8, weight_decay=0)
    optimizer = lenient(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    dpo = DPO(golden.numbers["beta"])
    step = jax.jit(make_step(golden.model, dpo, optimizer, 1.0, jnp.float32))
    trained = {"params": golden.base}
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    state = jax.device_put(state, jax.devices()[0])  # as the step returns it: one compilation
    found = {"loss": [], "rewards/margin": [], "grad_norm": [], "logps/chosen": []}
    for pairs in groups:
        state, metrics, _ = step(state, golden.base, stack([pad(pairs, shape, len(pairs))]))
        for name, values in found.items():
            values.append(float(metrics[name][0] / metrics[name][1]))
    assert int(state.step) == expected["steps"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(found["rewards/margin"], expected["margin"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(found["logps/chosen"], expected["chosen_logps_mean"], rtol=1e-4)
