"""What keeps a policy from looking at the image: masked embeddings, or noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mllm_align.data.layout import Layout
from mllm_align.generate.decode import Row


def visible_embeddings(image: np.ndarray, mask_rate: float, rng: np.random.Generator) -> np.ndarray:
    """[p] bool: text stays; an image embedding, `image_newline` included, where U(0, 1) >= mask_rate.

    image [p]: -1 at text (arXiv 2407.02477, Algorithm 1).
    """
    return (image < 0) | (rng.random(len(image)) >= mask_rate)


def gathered(row: Row) -> Row:
    """The row without its invisible tokens; the others keep their order and rotary positions.

    A masked key is an absent key: nothing attends to it, so nothing that is read changes, and a prefix of
    2,900 tokens at mask rate 0.99 becomes one of a few dozen.
    """
    visible = row.prefix.visible
    prefix = row.prefix.keep(visible)
    used = np.unique(prefix.image[prefix.image > 0])
    place = np.where(prefix.image > 0, 1 + np.searchsorted(used, prefix.image), prefix.image)
    prefix = replace(prefix, image=place.astype(np.int32))
    before = np.cumsum(visible) - visible  # how many tokens are kept before each
    forks = tuple(replace(fork, at=int(before[fork.at])) for fork in row.forks)
    return Row(row.features[used - 1], prefix, forks)


def noisy(patches: np.ndarray, steps: int, rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """Patches [..., N, C] after `steps` steps of diffusion: sqrt(abar) x + sqrt(1 - abar) eps.

    beta_k = sigmoid(-6 + 12 k / 1000) (0.5e-2 - 1e-5) + 1e-5, abar = prod_{k <= steps} (1 - beta_k)
    (arXiv 2407.02477, Appendix E.1).
    """
    left = kept_after(steps)
    noise = layout.noise(lambda shape: rng.standard_normal(shape, np.float32), patches.shape)
    return (np.sqrt(left) * patches + np.sqrt(1 - left) * noise).astype(np.float32)


def kept_after(steps: int) -> float:
    """abar: the share of the picture's variance that is left after `steps` steps (see `noisy`)."""
    k = np.arange(1, steps + 1)
    beta = (0.5e-2 - 1e-5) / (1 + np.exp(6 - 12 * k / 1000)) + 1e-5
    return float(np.prod(1 - beta))
