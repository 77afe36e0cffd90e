"""Conversations about pictures of every shape, for families whose prompts hang on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.records import parse_record


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
    "large": (chat([None, "gi?"]), [(1100, 900)]),
    "text": (chat(["gi dan?"]), []),
}
ANSWERS = ("tuku der.", "poge\nku.")


def same_ids(
    coder: Encoder, theirs: Any, messages: Any, images: list, whole: Callable[[str], str], given: Any
) -> tuple[Encoded, Any]:
    """A conversation with ANSWERS as it is encoded, and what transformers' processor makes of the last;
    fails where ids differ.

    whole: the text of a conversation with an answer. given: the images as that processor takes them.
    """
    row = {"images": images, "prompt": messages, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    one = coder.encode(parse_record(row, index=0, where="row", root=None), 2, opening=True)
    prefix, made = coder.prefix(one).tokens, None
    for answer, response in zip(ANSWERS, one.responses, strict=True):
        made = theirs(text=whole(answer), images=given, add_special_tokens=False)
        (ids,) = made["input_ids"]
        assert [*prefix, *response] == ids[: len(prefix) + len(response)]
        assert response[-1] in coder.eos_ids
    return one, made
