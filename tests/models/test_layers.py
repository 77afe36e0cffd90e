"""Modules that the vision tower and the decoder share."""

import jax.numpy as jnp
import pytest
from flax.errors import ScopeParamShapeError

from mllm_align.models.layers import Linear


def test_a_parameter_has_the_shape_that_its_module_says():
    layer, x = Linear(3, ("embed", "mlp")), jnp.ones((2, 4))
    out = layer.apply({"params": {"kernel": jnp.ones((4, 3))}}, x)
    assert out.tolist() == [[4.0] * 3] * 2
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        layer.apply({"params": {"kernel": jnp.ones((4, 5))}}, x)
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        layer.apply({"params": {"kernel": jnp.ones((1, 3))}}, x)
