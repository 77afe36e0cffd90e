"""Matrix products against float64, their gradients against the automatic rule."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from mllm_align.ops.linear import Quantised, matmul


def operands(dtype, *lead, width=24, out=10, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (*lead, width), (width, out), (*lead, out)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def exact(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("lead", [(7,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])
def test_product_and_gradient_in_float64(dtype, tolerance, lead):
    """Within the rounding of the result's own dtype: sums are not rounded on their way."""
    x, kernel, g = operands(dtype, *lead)
    found, pull = jax.vjp(matmul, x, kernel)
    d_x, d_kernel = pull(g)
    flat_x, flat_g = exact(x).reshape(-1, x.shape[-1]), exact(g).reshape(-1, g.shape[-1])
    wanted = exact(x) @ exact(kernel), exact(g) @ exact(kernel).T, flat_x.T @ flat_g
    for ours, theirs in zip((found, d_x, d_kernel), wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        np.testing.assert_allclose(
            exact(ours), theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max()
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_many_terms_are_kept_in_32_bits(dtype):
    """A thousand ones and a thousand times 2^-9, which 16 bits would lose one by one."""
    x = jnp.concatenate([jnp.full((1, 1000), 1.0), jnp.full((1, 1024), 2.0**-9)], axis=1).astype(dtype)
    ones = jnp.ones((2024, 1), dtype)
    (total,), (of_kernel,) = (
        matmul(x, ones),
        jax.grad(lambda k: matmul(x.T, k).sum())(jnp.ones((1, 1), dtype)),
    )
    assert float(total[0]) == float(of_kernel[0]) == float(jnp.asarray(1002.0, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_automatic_rule(dtype):
    x, kernel, g = operands(dtype, 4, 6)
    ours, theirs = (jax.vjp(f, x, kernel)[1](g) for f in (matmul, jnp.matmul))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(exact(one), exact(other), atol=1e-5 if dtype == jnp.float32 else 0.1)


def test_no_output_gradient_is_transposed():
    """What the rule is for: XLA's automatic kernel gradient ends in a transpose, ours does not."""
    x, kernel, g = operands(jnp.float32, 3, 4)

    def pulled(f):
        return str(jax.make_jaxpr(lambda x, k, g: jax.vjp(f, x, k)[1](g))(x, kernel, g))

    assert "transpose" in pulled(jnp.matmul) and "transpose" not in pulled(matmul)


def test_it_maps_over_a_batch():
    x, kernel, g = operands(jnp.float32, 5, 3)
    one = jax.vmap(lambda x, g: jax.vjp(matmul, x, kernel)[1](g)[1])(x, g)
    np.testing.assert_allclose(one, np.einsum("bni,bno->bio", x, g), rtol=1e-5, atol=1e-5)


def quantised(dtype, out=10):
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.integers(-127, 128, (24, out)), jnp.int8)
    return Quantised(values, jnp.asarray(rng.uniform(0.001, 0.1, out), dtype))


@pytest.mark.parametrize("lead", [(7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1.2e-2)])
def test_an_int8_product_and_its_gradient_in_float64(dtype, tolerance, lead):
    """The matrix is values * scale; in 16 bits product and scaling round once each."""
    (x, _, g), kernel = operands(dtype, *lead), quantised(dtype)
    found, pull = jax.vjp(lambda x: matmul(x, kernel), x)
    whole = np.asarray(kernel.values, np.float64) * exact(kernel.scale)
    for ours, theirs in zip((found, *pull(g)), (exact(x) @ whole, exact(g) @ whole.T), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        np.testing.assert_allclose(
            exact(ours), theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max()
        )


def test_the_gradient_through_an_int8_product_by_differences():
    (x, _, g), kernel = operands(jnp.float32, 5), quantised(jnp.float32)

    def loss(x):
        return (jnp.sin(matmul(x, kernel)) * g).sum()

    jax.test_util.check_grads(loss, (x,), order=1, modes=["rev"], eps=1e-3, rtol=2e-2)


def test_frozen_int8_weights_get_no_gradient_and_are_kept_as_they_are():
    """Neither a product for a weight gradient nor a cast matrix that lasts until the backward pass."""
    (x, _, g), kernel = operands(jnp.float32, 5), quantised(jnp.float32)
    pulled = jax.make_jaxpr(lambda x, g: jax.vjp(lambda x: matmul(x, kernel), x)[1](g))(x, g)
    assert str(pulled).count("dot_general") == 2, "one forward, one backward"
    _, pull = jax.vjp(lambda x: matmul(x, kernel), x)
    alike = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == kernel.values.shape]
    assert alike and {leaf.dtype for leaf in alike} == {jnp.dtype(jnp.int8)}
