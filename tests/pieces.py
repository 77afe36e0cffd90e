"""A small tokenizer in the manner of SentencePiece, as Llama's."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from goldens import FIXTURES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mllm_align.models.processor import load_processor


@cache
def pieces() -> Any:
    """The stored LLaVA 1.5's processor with a tokenizer that writes spaces as ▁ and puts one in front, has
    bytes for what it has no letter for, and an image token that does not count as special."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    merges = [("▁", letter) for letter in string.ascii_letters]
    merges += [("▁t", "u"), ("k", "u"), ("▁tu", "ku"), (".", "\n")]
    tokens += [*string.ascii_letters, *".,!?:\n", *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    bpe.decoder = decoders.Sequence(strip)
    own = load_processor(FIXTURES / "llava15")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    own.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
    own.tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=False)])
    return own
