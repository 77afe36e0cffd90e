"""Similarity of two responses: by sentence embeddings, or by words."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from mllm_align.errors import one_line, quoted, refusal
from mllm_align.models.sentence_encoder import SentenceEncoder, open_encoder

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# the files that `open_encoder` reads; a hub repository also has the weights in other formats
_FILES = ["*.json", "*.txt", "model.safetensors", "*/model.safetensors"]


class Similarity(Protocol):
    """Similarity of pairs of texts.

    name: written to output records. threshold: pairs below it count as different.
    """

    name: str
    threshold: float

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """[n] float32: similarity of first[i] and second[i]; 1 for equal texts."""
        ...


class Embedded:
    """Cosine similarity of sentence embeddings. The threshold is the paper's, for all-mpnet-base-v2.

    With all-MiniLM-L6-v2, the same threshold separates about as many pairs (docs/similarity.md).
    """

    threshold = 0.97

    def __init__(self, name: str, encoder: SentenceEncoder):
        self.name = name
        self.encoder = encoder

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        unique = {text: row for row, text in enumerate(dict.fromkeys([*first, *second]))}
        vectors = self.encoder.embed(list(unique))
        left, right = (vectors[[unique[text] for text in texts]] for texts in (first, second))
        return np.sum(left * right, axis=-1)


class Lexical:
    """F1 of the word bigrams, ignoring case and punctuation: symmetric, and needs no weights.

    The start and end of a text count as words. Texts without words have similarity 1 to each other and 0 to
    all others. One changed word among n gives (n - 1) / (n + 1): below the threshold for up to 22 words.
    """

    name = "lexical"
    threshold = 0.915  # separates as many pairs as all-mpnet-base-v2 at 0.97 (docs/similarity.md)

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        return np.array([_overlap(a, b) for a, b in zip(first, second, strict=True)], np.float32)


def _overlap(first: str, second: str) -> float:
    left, right = _word_pairs(first), _word_pairs(second)
    total = left.total() + right.total()
    return 2 * (left & right).total() / total


def _word_pairs(text: str) -> Counter[tuple[str, str]]:
    words = ["", *_WORD.findall(text.casefold()), ""]
    return Counter(pairwise(words))


def open_similarity(name: str) -> Similarity:
    """Open "lexical", a sentence-transformers folder, or the name of one on the Hugging Face hub.

    Hub folders are stored in Hugging Face's cache; with HF_HUB_OFFLINE=1 only the cache is used. Raises
    InputError for other names, and for unsupported encoders.
    """
    if name == "lexical":
        return Lexical()
    return Embedded(name, open_encoder(name if os.path.isdir(name) else _download(name)))


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=_FILES)
    except Exception as error:  # from the hub, the connection or the disk
        problem = f"no such folder, and the Hugging Face hub does not have it ({one_line(error, 200)})"
        remedy = "give 'lexical', a sentence-transformers folder, or the name of one on the hub"
        raise refusal(f"similarity {quoted(name)}", problem, remedy) from error
