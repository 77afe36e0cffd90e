"""Images that show less: a small part of one, or one under diffusion noise."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from PIL import Image

from mllm_align.data.layout import Layout

NOISE_STEPS = 500
"""Steps of diffusion behind a noisy rejected image, as in CHiP's released code (arXiv 2501.16629)."""
CROP_SCALE = (0.01, 0.2)  # share of the area that a crop keeps
CROP_RATIO = (3 / 4, 4 / 3)  # width to height of a crop, relative to the image's own


def numbers(seed: int, id: str, number: int) -> np.random.Generator:
    """Random numbers for a record's images in one pass over the data."""
    name = json.dumps(["rejected image", seed, id, number])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16]))


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random part of an image, scaled to the image's size.

    Its area is uniform in CROP_SCALE, the logarithm of its ratio in CROP_RATIO, its place uniform: the
    random resized crop of mDPO's released code (arXiv 2406.11839; torchvision's RandomResizedCrop), which
    crops a square image.
    """
    low, high = CROP_RATIO
    area, ratio = rng.uniform(*CROP_SCALE), math.exp(rng.uniform(math.log(low), math.log(high)))
    width = max(image.width * math.sqrt(area * ratio), 1)
    height = max(image.height * math.sqrt(area / ratio), 1)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box)


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
