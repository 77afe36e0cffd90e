"""The train step: accumulation, devices, what is trained and what is shared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens, union
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from signals import computed, signals

from mllm_align.align.pairwise import DPO
from mllm_align.align.sft import SFT
from mllm_align.batch import Group, pad, stack, with_responses
from mllm_align.models.lora import init_lora, scaled
from mllm_align.models.policy import overlay, policy_variables
from mllm_align.models.vlm import variables
from mllm_align.training.step import TrainState, by_source, make_evaluation, make_step

GOLDEN = goldens("llava15")
GROUPS = GOLDEN.groups()
CHOSEN = [Group(group.prefixes, group.responses[:1]) for group in GROUPS]  # what SFT takes
SHAPE = union(GROUPS)
LORA_SCALE = 2.0

# Plain gradient descent that keeps the last gradient as its state.
DESCENT = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, _, params=None: (jax.tree.map(lambda g: -0.1 * g, grads), grads),
)
STEPS = {
    objective: jax.jit(make_step(GOLDEN.model, objective, DESCENT, LORA_SCALE, jnp.float32))
    for objective in (DPO(), SFT())
}


def run(trained, batch, objective=None, base=None):
    """(state, metrics as plain numbers) after one step."""
    state = TrainState(jnp.zeros((), jnp.int32), trained, DESCENT.init(trained))
    if base is None:  # where the step returns it, so that a second step compiles nothing
        state = jax.device_put(state, jax.devices()[0])
    base = GOLDEN.base if base is None else base
    state, metrics, health = STEPS[objective or DPO()](state, base, batch)
    assert health.finite and not health.rows.any()
    metrics = numbers(metrics)
    assert metrics.pop("skipped") == 0
    return state, metrics


def numbers(metrics):
    return {name: float(total / weight) for name, (total, weight) in metrics.items()}


def whole_batch(groups=GROUPS):
    return stack([pad(groups, SHAPE, 4)])


def without_tower(params):
    return {name: part for name, part in params.items() if name != "vision_tower"}


def assert_trees_close(found, expected, atol, rtol=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=rtol)


@pytest.mark.parametrize("objective", [DPO(), SFT()], ids=lambda each: type(each).__name__)
def test_figures_of_a_set_are_those_of_a_batch_of_its_groups(objective):
    rng, count = np.random.default_rng(0), objective.responses
    policy, reference = rng.normal(-1, 0.5, (2, 5, count, 4))
    mask, weight = rng.random((5, count, 4)) < 0.8, np.array([1, 1, 1, 1, 0])
    source, names = np.array([1, 0, 1, 1, 0]), ("few", "many", "none")

    def given(rows):
        return signals(policy[rows], reference[rows], mask[rows], weight[rows])

    found = by_source(objective, given(slice(None)), (), source, names)
    for number, name in enumerate(names):
        total, divisor, metrics = computed(objective, given(source == number))
        figures = {"loss": (total, divisor)}
        if "rewards/margin" in metrics:
            figures["margin"] = metrics["rewards/margin"]
        assert {each.rpartition("/")[2] for each in found if f"/{name}/" in each} == figures.keys()
        for figure, pair in figures.items():
            np.testing.assert_allclose(found[f"source/{name}/{figure}"], pair, rtol=1e-5, atol=1e-6)
    assert found["source/none/loss"] == (0, 0)


def test_figures_of_a_set_that_are_not_finite_weigh_nothing():
    policy = np.full((2, 2, 3), -1.0)
    policy[1] = np.nan
    broken = signals(policy, policy, np.ones((2, 2, 3), bool), np.ones(2))
    found = by_source(DPO(), broken, (), np.array([0, 1]), ("whole", "broken"))
    assert all(np.isfinite(pair).all() for pair in found.values())
    assert found["source/broken/loss"] == (0, 0)


@pytest.mark.slow
def test_uneven_micro_batches_are_the_whole_batch():
    """With SFT, where a batch weighs as many tokens as it holds."""
    trained = {"params": GOLDEN.policy}
    parts = [CHOSEN[:1], CHOSEN[1:3], CHOSEN[3:]]
    parts = stack([pad(part, SHAPE, 2) for part in parts])
    found, metrics = run(trained, parts, SFT())
    expected, expected_metrics = run(trained, whole_batch(CHOSEN), SFT())
    assert_trees_close(found.trained, expected.trained, atol=1e-6)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    assert int(found.step) == 1

    evaluate = jax.jit(make_evaluation(GOLDEN.model, SFT(), LORA_SCALE, jnp.float32))
    del expected_metrics["grad_norm"]
    evaluated = numbers(evaluate(trained, GOLDEN.base, parts, ())[0])
    assert evaluated == pytest.approx(expected_metrics, rel=1e-5)


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    """One group a device; every group twice has the mean of every group once."""
    trained = {"params": GOLDEN.policy}
    batch = stack([pad(GROUPS * 2, SHAPE, 8)])
    expected, expected_metrics = run(trained, whole_batch())

    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
    copied = jax.device_put(trained, everywhere)
    found, metrics = run(copied, spread, base=jax.device_put(GOLDEN.base, everywhere))
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)
    assert_trees_close(found.trained, expected.trained, atol=1e-6)


@pytest.fixture(scope="module")
def plain():
    """Loss and gradient of everything by two whole forward passes: no features are shared."""
    batch = pad(GROUPS, SHAPE, 4)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        both = [GOLDEN.model.apply({"params": p}, batch)[0] for p in (params, GOLDEN.base)]
        given = signals(*both, batch.responses.mask, batch.responses.weight)
        total, weight, _ = computed(DPO(), given)
        return total / weight

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("tower", [True, False], ids=["tower trained", "tower frozen"])
def test_loss_and_gradient_without_shared_features(plain, tower):
    trained = GOLDEN.policy if tower else without_tower(GOLDEN.policy)
    value, gradient = plain(overlay(GOLDEN.base, trained))
    gradient = gradient if tower else without_tower(gradient)
    state, metrics = run({"params": trained}, whole_batch())
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert_trees_close(state.optimizer, {"params": gradient}, atol=1e-5)
    if tower:
        assert float(optax.tree.norm(gradient["vision_tower"])) > 0.01


def test_stored_reference_log_probs_stand_in_for_the_reference():
    trained, batch = {"params": without_tower(GOLDEN.policy)}, whole_batch()
    apply = jax.jit(lambda params, batch: GOLDEN.model.apply({"params": params}, batch)[0])
    stored = apply(GOLDEN.base, jax.tree.map(lambda x: x[0], batch))
    evaluate = jax.jit(make_evaluation(GOLDEN.model, DPO(), LORA_SCALE, jnp.float32))
    found = numbers(evaluate(trained, GOLDEN.base, with_responses(batch, reference=(stored[None],)), ())[0])
    _, expected = run(trained, batch)
    del expected["grad_norm"]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_low_rank_terms_start_at_the_reference_and_are_trained_with_the_projector():
    lora = init_lora(GOLDEN.config.decoder, 4, ("q", "v", "down"), jax.random.key(0))
    trained = {"lora": lora, "params": {"projector": GOLDEN.base["projector"]}}
    state, metrics = run(trained, whole_batch())
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics["rewards/margin"] == pytest.approx(0, abs=1e-5)

    assert jax.tree.structure(state.trained) == jax.tree.structure(trained)
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), state.trained, trained)
    for block in changed["lora"]["decoder"].values():
        # a has no gradient while b is 0
        assert all(target == {"a": False, "b": True} for target in block.values())
    assert all(jax.tree.leaves(changed["params"]))

    _, later = run(state.trained, whole_batch())
    assert later["loss"] < metrics["loss"] and later["rewards/margin"] > 0


def test_low_rank_terms_equal_merged_weights():
    lora = init_lora(GOLDEN.config.decoder, 4, ("q", "o", "gate"), jax.random.key(0))
    merged = {}
    for block, targets in lora["decoder"].items():
        base = GOLDEN.base["decoder"][block]
        for i, (name, terms) in enumerate(targets.items()):
            terms["b"] = 0.3 * jax.random.normal(jax.random.key(i), terms["b"].shape)
            kernel = base[name]["kernel"] + LORA_SCALE * terms["a"] @ terms["b"]
            merged.setdefault(block, {})[name] = {"kernel": kernel}
    merged = overlay(GOLDEN.base, {"decoder": merged})
    batch = pad(GROUPS, SHAPE, 4)
    apply = jax.jit(lambda v: GOLDEN.model.apply(v, batch)[0])
    policy = policy_variables(GOLDEN.base, {"lora": lora}, LORA_SCALE, jnp.float32)
    assert policy["lora"].keys() == scaled(lora, LORA_SCALE).keys()
    found = apply(policy)
    np.testing.assert_allclose(found, apply(variables(merged)), atol=2e-5)
    assert np.abs(found - apply(variables(GOLDEN.base))).max() > 0.1


def test_overlay_replaces_only_what_it_is_given():
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert overlay(base, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}
