"""Conversations about pictures of every shape, for families whose prompts hang on it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def chat(*turns):
    """Turns of user and assistant by turns; None is an image."""
    parts = [
        [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn]
        for turn in turns
    ]
    return [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(parts)]


CHATS = {
    "one": (chat([None, "gi dan?"]), [(90, 60)]),
    "text before": (chat(["gi", None, "dan?"]), [(60, 90)]),
    "two": (chat([None, None, "tuku?"]), [(90, 90), (20, 600)]),
    "apart": (chat(["gi ", None, " or ", None]), [(1, 1), (600, 3)]),
    "turns": (chat([None, "gi?"], ["tuku."], ["der ", None, "?"]), [(33, 31), (2000, 1500)]),
    "system": (
        [{"role": "system", "content": [{"type": "text", "text": "der."}]}, *chat([None, "gi"])],
        [(5, 700)],
    ),
    "text": (chat(["gi dan?"]), []),
}
