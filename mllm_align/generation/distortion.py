"""Distortions that hide the image from the policy: masked embeddings, or diffusion noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mllm_align.data.layout import Layout
from mllm_align.generation.decode import Row


def visible_embeddings(image: np.ndarray, mask_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Visible tokens [p] bool: all text, and each image embedding (`image_newline` too) whose
    U(0, 1) >= mask_rate (arXiv 2407.02477, Algorithm 1). image [p]: -1 at text."""
    return (image < 0) | (rng.random(len(image)) >= mask_rate)


def gathered(row: Row) -> Row:
    """The row without its invisible tokens; the others keep their order and rotary positions.

    Nothing attends to a masked key, so removing it leaves all other outputs unchanged. At mask rate 0.99, a
    prefix of 2,900 tokens shrinks to a few dozen.
    """
    visible = row.prefix.visible
    prefix = row.prefix.keep(visible)
    rows = [prefix.image] if prefix.taps is None else [prefix.image, *prefix.taps]
    used = np.unique(np.concatenate([each[each > 0] for each in rows]))
    image, *taps = (
        np.where(each > 0, 1 + np.searchsorted(used, each), each).astype(np.int32) for each in rows
    )
    prefix = replace(prefix, image=image, taps=np.stack(taps) if taps else None)
    before = np.cumsum(visible) - visible  # number of visible tokens before each token
    forks = tuple(replace(fork, at=int(before[fork.at])) for fork in row.forks)
    return Row(row.features[used - 1], prefix, forks)


def noisy(patches: np.ndarray, steps: int, rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """Patches [..., N, C] after `steps` steps of diffusion: sqrt(abar) x + sqrt(1 - abar) eps.

    beta_k = sigmoid(-6 + 12 k / 1000) (0.5e-2 - 1e-5) + 1e-5, abar = prod_{k <= steps} (1 - beta_k)
    (arXiv 2407.02477, Appendix E.1).
    """
    left = signal_share(steps)
    noise = layout.noise(lambda shape: rng.standard_normal(shape, np.float32), patches.shape)
    return (np.sqrt(left) * patches + np.sqrt(1 - left) * noise).astype(np.float32)


def signal_share(steps: int) -> float:
    """abar: the share of the image's variance that remains after `steps` steps (see `noisy`)."""
    k = np.arange(1, steps + 1)
    beta = (0.5e-2 - 1e-5) / (1 + np.exp(6 - 12 * k / 1000)) + 1e-5
    return float(np.prod(1 - beta))
