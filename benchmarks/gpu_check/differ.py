"""Differences between two trees of arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def largest(found: Any, expected: Any) -> float:
    """Largest absolute difference."""
    return float(np.abs(_flat(found) - _flat(expected)).max())


def root_mean_square(found: Any, expected: Any) -> float:
    return float(np.sqrt(np.square(_flat(found) - _flat(expected)).mean()))


def relative(found: Any, expected: Any) -> float:
    """Norm of the difference, relative to the norm of the expected tree."""
    return float(np.linalg.norm(_flat(found) - _flat(expected)) / np.linalg.norm(_flat(expected)))
