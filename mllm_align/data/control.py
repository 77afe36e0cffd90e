"""Control tokens of a tokenizer, told from text that has the same characters.

A tokenizer finds its control tokens (<s>, <|im_end|>, <image>, ...) by their characters, whoever wrote
them. Here they are control where the chat template writes them; in the text of a record they are text.

Before the template sees a text, the characters of control tokens in it become private-use characters
(`guard`), so what still reads as a control token after rendering is the template's. A rendered text with
guards is tokenized by a twin of the tokenizer, in which control tokens go by other names: the template's
get those names, the guarded characters become what they were, and no name of the twin reads like them. All
of these replacements keep lengths, so offsets keep their meaning. Other texts are left to the tokenizer.
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
LONGEST = 256  # characters of a control token; all of its beginnings are looked for
LAST = 0x10FFFD  # private-use characters are taken from here downwards


class ControlTokens:
    """Of one fast tokenizer of transformers; ids: tokens that are control without being marked special."""

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
        if names and len(names[0]) > LONGEST:
            problem = f"the control token {quoted(names[0])} has {len(names[0])} characters"
            raise refusal("tokenizer.json", problem, "copy the tokenizer's files from where they came from")
        letters = sorted({c for name in names for c in name + name.lower() + name.upper()})
        first = LAST + 1 - len(letters) - len(names)
        guards = [chr(first + i) for i in range(len(letters))]
        self._guards = str.maketrans(dict(zip(letters, guards, strict=True)))
        self._letters = str.maketrans(dict(zip(guards, letters, strict=True)))
        # A name for each: one private-use character, as often as the token has characters.
        self._aliases = {name: chr(first + len(letters) + i) * len(name) for i, name in enumerate(names)}
        self._private = re.compile(f"[{chr(first)}-{chr(LAST)}]" if names else "(?!)")
        # What a text ends in may begin a control token that the next text completes.
        begun = {name[:i] for name in names for i in range(1, len(name)) if name[:i].strip()}
        whole = "|".join(map(re.escape, names)) or "(?!)"
        parts = "|".join(map(re.escape, sorted(begun, key=len, reverse=True))) or "(?!)"
        # Templates may write texts in another case. Most characters begin none, and are passed over soon.
        initials = "".join(sorted({re.escape(name[0]) for name in names})) or " "
        self._likenesses = re.compile(rf"(?=[{initials}])(?:{whole}|(?:{parts})(?=\s*\Z))", re.IGNORECASE)

    def guard(self, text: str) -> str:
        """A record's text as the template may see it: no control token, and of the same length.

        Raises ValueError for a text that has one of the private-use characters.
        """
        clash = self._private.search(text)
        if clash:
            raise ValueError(f"the private-use character U+{ord(clash[0]):X} is in the text")
        return self._likenesses.sub(lambda found: found[0].translate(self._guards), text)

    def tokenize(self, text: str, special: bool) -> tuple[list[int], Spans]:
        """Ids of a rendered text, and where each stands in it, in characters.

        special: whether the tokenizer adds its own tokens; those that it puts at the end are left out: a
        prompt goes on there, and a response has its own end. Raises ValueError where text and control
        tokens can't be told apart.
        """
        ids, spans, front = _encoded(self._own, text, special)
        written, told, done = [], True, 0
        for place in [i for i, number in enumerate(ids) if number in self._names and i >= front]:
            number, (start, stop) = ids[place], spans[place]
            name = self._names[number]
            size = len(name)  # spans may leave out white space
            at = text.find(name, max(done, start - size), stop + size)
            if at >= 0:
                written.append((at, number))
                done = at + size
            elif number != self._unknown:  # a normalizer made it of other characters
                told = False
        if told and not self._private.search(text):
            return ids, spans
        return self._apart(text, written, special)

    def _apart(self, text: str, written: list[tuple[int, int]], special: bool) -> tuple[list[int], Spans]:
        """As `tokenize`, by the twin; written: (place, id) of the template's control tokens."""
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
            raise ValueError("the tokenizer makes control tokens of plain text")
        return ids, spans

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer with its control tokens under their aliases; made when a text first needs it."""
        own, alias = json.loads(self._own.to_str()), self._aliases
        for token in own["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        model = own["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {alias.get(piece, piece): number for piece, number in vocab.items()}
        else:  # Unigram: the place is the id
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
    """Whether the model itself makes the token of plain text and needs it for that, as "!" where it serves
    as the padding, too."""
    if model.token_to_id(name) != number:
        return False
    merged = isinstance(model, models.BPE) and not model.ignore_merges
    return len(name) == 1 or (merged and [token.id for token in model.tokenize(name)] == [number])


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> tuple[list[int], Spans, int]:
    """Ids, spans, number of tokens that the post-processor puts in front; those it puts behind are cut."""
    if tokenizer.truncation or tokenizer.padding or tokenizer.encode_special_tokens:
        tokenizer.no_truncation()  # the tokenizer is transformers', whose calls leave such settings behind
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
