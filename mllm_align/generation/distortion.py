"""Masked image embeddings, which hide the image from the policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

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
