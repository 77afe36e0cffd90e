"""Separation of a tokenizer's control tokens from text with the same characters.

A tokenizer recognizes control tokens (<s>, <|im_end|>, <image>, ...) by their characters, wherever they
come from. Here those written by the chat template are control tokens; in the text of a record they are
text.

Before rendering, `guard` replaces the characters of control tokens in a record's text by private-use
characters, so that every control token found after rendering comes from the template. If the rendered text
contains guards, a twin of the tokenizer encodes it, in which control tokens have other names (aliases): the
template's control tokens are replaced by the aliases, and the guards by the original characters, which
match no alias. All replacements keep lengths, so offsets stay valid. Other texts go to the tokenizer
unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, models

from mllm_align.errors import quoted, refusal

Spans = list[tuple[int, int]]
MAX_NAME = 256  # characters of a control token: all of its prefixes are searched for
LAST = 0x10FFFD  # the last private-use character; guards and aliases are allocated downwards from it


class ControlTokens:
    """Control tokens of a fast tokenizer of transformers.

    ids: further control tokens, which the tokenizer does not mark as special.
    """

    def __init__(self, tokenizer: Any, ids: Iterable[int]):
        own: Tokenizer = tokenizer.backend_tokenizer
        listed = {*tokenizer.all_special_ids, *ids}
        self._own, self._unknown = own, tokenizer.unk_token_id
        self._names = {
            number: token.content
            for number, token in own.get_added_tokens_decoder().items()
            if (token.special or number in listed) and not _is_text(own.model, token.content, number)
        }
        names = sorted(self._names.values(), key=len, reverse=True)
        if names and len(names[0]) > MAX_NAME:
            problem = f"the control token {quoted(names[0])} has {len(names[0])} characters"
            raise refusal("tokenizer.json", problem, "copy the tokenizer's files from where they came from")
        letters = sorted({c for name in names for c in name + name.lower() + name.upper()})
        first = LAST + 1 - len(letters) - len(names)
        guards = [chr(first + i) for i in range(len(letters))]
        self._guards = str.maketrans(dict(zip(letters, guards, strict=True)))
        self._letters = str.maketrans(dict(zip(guards, letters, strict=True)))
        # An alias is one private-use character, repeated to the length of the token's name.
        self._aliases = {name: chr(first + len(letters) + i) * len(name) for i, name in enumerate(names)}
        self._private = re.compile(f"[{chr(first)}-{chr(LAST)}]" if names else "(?!)")
        # The end of one text and the start of the next may together form a control token.
        prefixes = {name[:i] for name in names for i in range(1, len(name)) if name[:i].strip()}
        full = "|".join(map(re.escape, names)) or "(?!)"
        parts = "|".join(map(re.escape, sorted(prefixes, key=len, reverse=True))) or "(?!)"
        # Case is ignored, because templates may change it. The look-ahead skips most characters quickly.
        initials = "".join(sorted({re.escape(name[0]) for name in names})) or " "
        self._lookalikes = re.compile(rf"(?=[{initials}])(?:{full}|(?:{parts})(?=\s*\Z))", re.IGNORECASE)

    def guard(self, text: str) -> str:
        """A record's text for the template: without control tokens, and of the same length.

        Raises ValueError for a text that contains one of the reserved private-use characters.
        """
        clash = self._private.search(text)
        if clash:
            raise ValueError(f"the private-use character U+{ord(clash[0]):X} is in the text")
        return self._lookalikes.sub(lambda found: found[0].translate(self._guards), text)

    def tokenize(self, text: str, special: bool) -> tuple[list[int], Spans]:
        """Ids of a rendered text, and the span of each in it, in characters.

        special: whether the tokenizer adds its own tokens. Those it appends at the end are removed, because
        a prompt continues there, and a response has its own end. Raises ValueError if text and control
        tokens can't be separated.
        """
        ids, spans, front = _encoded(self._own, text, special)
        written, found_all, done = [], True, 0
        for place in [i for i, number in enumerate(ids) if number in self._names and i >= front]:
            number, (start, stop) = ids[place], spans[place]
            name = self._names[number]
            size = len(name)  # spans may leave out white space
            at = text.find(name, max(done, start - size), stop + size)
            if at >= 0:
                written.append((at, number))
                done = at + size
            elif number != self._unknown:  # a normalizer produced it from other characters
                found_all = False
        if found_all and not self._private.search(text):
            return ids, spans
        return self._by_twin(text, written, special)

    def _by_twin(self, text: str, written: list[tuple[int, int]], special: bool) -> tuple[list[int], Spans]:
        """`tokenize` with the twin; written: (offset, id) of the template's control tokens."""
        pieces, done = [], 0
        for at, number in written:
            name = self._names[number]
            pieces += [text[done:at], self._aliases[name]]
            done = at + len(name)
        text = "".join([*pieces, text[done:]]).translate(self._letters)
        ids, spans, front = _encoded(self._twin, text, special)
        control = self._names.keys() - {self._unknown}
        wanted = [number for _, number in written if number in control]
        if [number for number in ids[front:] if number in control] != wanted:
            raise ValueError("the tokenizer turns plain text into control tokens")
        return ids, spans

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer with its control tokens renamed to their aliases; built when first needed."""
        own, alias = json.loads(self._own.to_str()), self._aliases
        for token in own["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        model = own["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {alias.get(piece, piece): number for piece, number in vocab.items()}
        else:  # Unigram: the index is the id
            model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token") is not None:
            model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
        try:
            twin = Tokenizer.from_str(json.dumps(own))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"the tokenizer can't do without its control tokens: {error}") from error
        if any(twin.token_to_id(token["content"]) != token["id"] for token in own["added_tokens"]):
            raise ValueError("the ids of the tokenizer's added tokens depend on their names")
        return twin


def _is_text(model: Any, name: str, number: int) -> bool:
    """Whether plain text needs the token, such as a "!" that also serves as the padding token: the model
    itself produces it from its characters."""
    if model.token_to_id(name) != number:
        return False
    merged = isinstance(model, models.BPE) and not model.ignore_merges
    return len(name) == 1 or (merged and [token.id for token in model.tokenize(name)] == [number])


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> tuple[list[int], Spans, int]:
    """Ids, spans, and number of tokens that the post-processor prepends; tokens it appends are removed."""
    if tokenizer.truncation or tokenizer.padding or tokenizer.encode_special_tokens:
        tokenizer.no_truncation()  # transformers shares this tokenizer, and its calls leave settings behind
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
    coded = tokenizer.encode(text, add_special_tokens=special)
    ids, spans, added = coded.ids, coded.offsets, coded.special_tokens_mask
    stop = len(ids)
    while stop and added[stop - 1]:
        stop -= 1
    front = 0
    while front < stop and added[front]:
        front += 1
    return ids[:stop], spans[:stop], front
