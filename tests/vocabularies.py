"""Small tokenizers of every kind that LLaVA models have, under any names of their control tokens."""

from __future__ import annotations

import string
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

NAMES = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_end|>")
OTHER_NAMES = ("⟦0⟧", "⟦1⟧", "⟦2⟧", "⟦3⟧", "⟦4⟧", "⟦5⟧")
UNK, BOS, EOS, PAD, IMAGE, IM_END = range(6)
LETTERS = string.ascii_letters + string.digits + ".,!?:\n'" + "<>/|_"
MERGES = [("▁", letter) for letter in LETTERS]
MERGES += [
    ("▁t", "u"),
    ("k", "u"),
    ("▁tu", "ku"),
    (".", "\n"),
    ("<", "/"),
    ("</", "s"),
    ("▁<", "s"),
    ("!", "!"),
]


def _bpe(names: tuple[str, ...], merges: list[tuple[str, str]], letters: str, **settings) -> Tokenizer:
    tokens = [*names[:5], *(f"<0x{i:02X}>" for i in range(256)), *letters]
    tokens += [a + b for a, b in merges]
    return Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, **settings))


def _llama(names: tuple[str, ...], **settings) -> Tokenizer:
    return _bpe(names, MERGES, "▁" + LETTERS, unk_token=names[0], byte_fallback=True, **settings)


def prepended(names: tuple[str, ...]) -> Tokenizer:
    bpe = _llama(names)
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe


def metaspace(scheme: str) -> Callable[[tuple[str, ...]], Tokenizer]:
    def make(names: tuple[str, ...]) -> Tokenizer:
        bpe = _llama(names)
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        return bpe

    return make


def byte_level(names: tuple[str, ...], ignore_merges: bool = False) -> Tokenizer:
    letters = "".join(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges = [("Ġ", "t"), ("Ġt", "u"), ("k", "u"), ("Ġtu", "ku"), ("<", "/"), ("</", "s"), ("!", "!")]
    bpe = _bpe(names, merges, letters, ignore_merges=ignore_merges)
    split = pre_tokenizers.Split(Regex(r"\s?\w+|\s?[^\s\w]+|\s+"), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    return bpe


def unigram(names: tuple[str, ...]) -> Tokenizer:
    pieces = [(name, 0.0) for name in names[:5]]
    pieces += [(letter, -5.0 - i / 100) for i, letter in enumerate("▁" + LETTERS)]
    pieces += [("▁tuku", -6.0), ("</", -6.5), ("s>", -6.6)]
    made = Tokenizer(models.Unigram(pieces, 0))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


KINDS: dict[str, Callable[[tuple[str, ...]], Tokenizer]] = {
    "prepend": prepended,
    "always": metaspace("always"),
    "first": metaspace("first"),
    "never": metaspace("never"),
    "bytes": byte_level,
    "bytes, whole words": lambda names: byte_level(names, ignore_merges=True),
    "unigram": unigram,
}


def tokenizer(
    kind: str, names: tuple[str, ...] = NAMES, normalized: bool = False, adds: bool = False
) -> PreTrainedTokenizerFast:
    """normalized: as of the control tokens. adds: put <s> in front and </s> behind."""
    backend = KINDS[kind](names)
    backend.add_special_tokens([AddedToken(name, normalized=normalized) for name in names])
    ids = [backend.token_to_id(name) for name in names]
    assert ids[:5] == [0, 1, 2, 3, 4] and ids[5] == backend.get_vocab_size() - 1
    if adds:
        ends = [(names[i], i) for i in (BOS, EOS)]
        backend.post_processor = TemplateProcessing(
            single=f"{names[BOS]} $A {names[EOS]}", special_tokens=ends
        )
    unk, bos, eos, pad = names[:4]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )
