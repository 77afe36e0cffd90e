"""The rule that turns a stored base checkpoint into the `policy` of the goldens (numpy only).

Storing noise as a rule instead of a second checkpoint halves the fixtures. Names are those in
model.safetensors; everything is float32, in sorted name order, from one generator.
"""

from collections.abc import Mapping

import numpy as np

SEED = 1
SCALE = 0.1  # of each tensor's mean magnitude


def perturb(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor plus 0.1 * mean|w| * standard normal noise."""
    rng = np.random.default_rng(SEED)
    out = {}
    for name in sorted(weights):
        w = np.asarray(weights[name], np.float32)
        # The mean is taken in float64, so that the order of summation cannot show in float32.
        scale = np.float32(SCALE * np.abs(w).mean(dtype=np.float64))
        out[name] = w + scale * rng.standard_normal(w.shape, dtype=np.float32)
    return out
