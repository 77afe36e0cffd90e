"""Records to what the model gets: token ids, the place of every image embedding, pixels.

The whole conversation is tokenized once for each response, under the checkpoint's chat template. The
shared prefix is the longest run of tokens that all responses' conversations have in common and that
ends inside the prompt; a token that reaches over the boundary belongs to the response. A response ends
at its first end-of-sequence token; what the template writes after it is dropped, a missing one is added.
Control tokens are those that the template writes; their characters in a record are text (`control.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from mllm_align.batch import Group, HostPrefix, Pixels, Shape
from mllm_align.data import distortion
from mllm_align.data.control import ControlTokens, Spans
from mllm_align.data.images import ImageSource, image_size, load_rgb
from mllm_align.data.layout import Layout, counts, mixed, ordered, rotary
from mllm_align.data.preferences import conversation
from mllm_align.data.records import Record
from mllm_align.data.template import ChatTemplate
from mllm_align.errors import InputError, one_line, quoted, refusal

MARK = "\ue000"  # a private-use character: stands for a response, in no template
KEPT_BYTES = 1 << 29
Sizes = tuple[tuple[int, int], ...]
"""(width, height) of each image of a record, after EXIF orientation."""
Draw = tuple[int, int]
"""A seed, and the number of a pass over the data."""


class Identical(InputError):
    """Two responses of a record are the same, but for white space around them, or have the same tokens."""


@dataclass(frozen=True)
class Encoded:
    """A record as ids, images still unread: what lengths, order and batch shapes follow from.

    prefix [p]: each run of embeddings (see `layout.Run`) is one image token here. responses: K arrays of
    ids, end of sequence included. sizes: (width, height) of each image after EXIF orientation. index: place
    in the data. shown: "whole" images, or a "crop" or "noise" made of them. second: what the group's
    second prefix shows, with the responses that continue it.
    """

    record: Record
    prefix: np.ndarray
    responses: tuple[np.ndarray, ...]
    sizes: Sizes
    shape: Shape
    index: int = 0
    shown: str = "whole"
    second: Encoded | None = None

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """What each prefix shows, with the responses that continue it."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def alone(self) -> Encoded:
        """The record with its own prefix only."""
        return replace(self, second=None, shape=replace(self.shape, others=()))

    @property
    def tokens(self) -> int:
        """Of all prefixes, each with the responses that continue it."""
        return sum(part.shape.prefix + sum(map(len, part.responses)) for part in self.parts)

    @property
    def identity(self) -> str:
        """What its images follow from beside their files: nothing, or the record they are drawn for."""
        return "" if self.shown == "whole" else f"{self.shown} {self.record.id}"

    def answered(self, responses: tuple[np.ndarray, ...]) -> Encoded:
        """The record with other responses."""
        second = self.second and replace(self.second, responses=responses[:1])
        return replace(self, responses=responses, second=second)

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest response, image tokens included."""
        return self.shape.prefix + self.shape.response


class Encoder:
    """Encodes records for one checkpoint.

    processor: the checkpoint's tokenizer, image processor and chat template. layout, image_token: how its
    images become tokens. ends: token ids that end a sequence. template: Jinja text in place of the
    checkpoint's own.
    """

    def __init__(
        self,
        processor: Any,
        layout: Layout,
        image_token: int,
        ends: frozenset[int] = frozenset(),
        template: str | None = None,
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.layout = layout
        self.image_token = image_token
        own = processor.chat_template or self.tokenizer.chat_template
        source = template or (own.get("default") if isinstance(own, dict) else own)
        name = one_line(getattr(self.tokenizer, "name_or_path", "the tokenizer"))
        if not source or not isinstance(source, str):
            raise InputError(f"{name} has no chat template; give one with --data.chat-template FILE")
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"{name} names no end-of-sequence token (eos_token); add it")
        if not self.tokenizer.is_fast:
            raise InputError(f"{name} has no tokenizer.json; save it again as a fast tokenizer")
        self.template = source
        self._rendered = ChatTemplate(source, self.tokenizer.special_tokens_map)
        # Pixels of the first images, as many as fit: small data are read once and not every epoch.
        self._kept: dict[Any, Pixels] = {}
        self._room = KEPT_BYTES
        self.end = int(self.tokenizer.eos_token_id)
        self.eos_ids = ends | {self.end}
        token, found = layout.token, self.tokenizer.convert_tokens_to_ids(layout.token)
        if found != image_token:
            raise InputError(
                f"{name}: the tokenizer's {token!r} is id {found}, config.json has image token "
                f"{image_token}; take tokenizer and model from one folder"
            )
        self._control = ControlTokens(self.tokenizer, {image_token, *self.eos_ids})

    # ---- text --------------------------------------------------------------------------------------

    def encode(self, record: Record, responses: int, index: int = 0, opening: bool = False) -> Encoded:
        """Ids and sizes of a record with its first `responses` responses (0: of its prompt alone).

        opening: refuse prompts that end otherwise where an answer is asked for, so that a model does not go
        on where the responses do. Reads image headers, not pixels. Raises InputError for an image or a text
        that can't be used, and `Identical` for two responses that are the same.
        """
        sizes = tuple(image_size(image) for image in record.images)
        return self.encoded(record, *self.tokens(record, sizes, responses, opening), sizes, index)

    def encoded(
        self,
        record: Record,
        prefix: np.ndarray,
        responses: tuple[np.ndarray, ...],
        sizes: Sizes,
        index: int,
    ) -> Encoded:
        """A record whose ids and image sizes are known."""
        each = [counts(self.layout, height, width, len(sizes)) for width, height in sizes]
        tiles, runs, embeddings = (sum(count) for count in zip((0, 0, 0), *each, strict=True))
        shape = Shape(
            prefix=len(prefix) - runs + embeddings,
            response=max((len(answer) for answer in responses), default=0),
            tiles=tiles,
        )
        return Encoded(record, prefix, responses, sizes, shape, index)

    @property
    def fingerprint(self) -> str:
        """Names all that a record's ids and embeddings follow from beside the record."""
        told = self.tokenizer.backend_tokenizer.to_str(), self.template, self.layout, sorted(self.eos_ids)
        return hashlib.sha256(repr((told, self.image_token)).encode()).hexdigest()[:24]

    def tokens(
        self, record: Record, sizes: Sizes, responses: int, opening: bool = False
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """(prefix, responses) of `encode`; no image is looked at."""
        given = record.responses[:responses]  # an empty text: none
        said = [self._guarded(answer, record) for answer in given if answer]
        prompt, texts = self._conversations(self._chat(record), said, record, sizes)
        if not responses:
            prefix = np.array(self._tokenize(prompt, record)[0], np.int32)
            self._check(record, sizes, prefix, [], len(prefix))
            return prefix, ()
        # A template may write the answer's turn otherwise than its own opening of that turn.
        boundary = common_length([prompt, *texts])
        rows, inside = [], []
        for text in texts:
            ids, spans = self._tokenize(text, record)
            rows.append(ids)
            inside.append(next((i for i, (_, stop) in enumerate(spans) if stop > boundary), len(ids)))
        shared = min(common_length(rows), *inside)
        prefix = np.array(rows[0][:shared], np.int32)
        self._check(record, sizes, prefix, rows, shared)
        if opening and self._tokenize(prompt, record)[0] != prefix.tolist():
            problem = "the chat template opens an answer that is asked for otherwise than one that is there"
            raise refusal(record.where, problem, "use one that does not (--data.chat-template)")
        ended = iter([self._ended(row[shared:]) for row in rows])
        answers = tuple(next(ended) if answer else np.zeros(0, np.int32) for answer in given)
        _check_differ(record, answers)
        return prefix, answers

    def response_spans(self, record: Record, sizes: Sizes, response: str) -> tuple[np.ndarray, Spans]:
        """Ids of the prompt followed by a response, and where each id stands in the response.

        Spans are in characters of `response`; ids of the prompt and of what the template writes after the
        response are not inside it: their spans end at or before 0, or begin at or after its length.
        Raises InputError where the template changes the response.
        """
        chat, response = self._chat(record), self._guarded(response, record)
        _, (text, marked) = self._conversations(chat, [response, MARK], record, sizes)
        place = marked.rfind(MARK)
        start = text.find(response.strip(), place)  # templates may trim it
        if min(place, start) < 0 or text[place:start].strip():
            remedy = "use one that writes it as it is (--data.chat-template)"
            raise refusal(record.where, "the chat template changes the response", remedy)
        start -= len(response) - len(response.lstrip())
        ids, spans = self._tokenize(text, record)
        return np.array(ids, np.int32), [(begin - start, end - start) for begin, end in spans]

    def _chat(self, record: Record) -> list[dict[str, Any]]:
        """The prompt as templates take it, with guards in its texts."""
        chat = [message.chat() for message in conversation(record)]
        for part in (part for turn in chat for part in turn["content"] if "text" in part):
            part["text"] = self._guarded(part["text"], record)
        return chat

    def _conversations(
        self, chat: list[dict[str, Any]], answers: Sequence[str], record: Record, sizes: Sizes
    ) -> tuple[str, list[str]]:
        """The prompt as it asks for an answer, and with each of the answers.

        These go on where the model does: of a template that opens an answer's turn otherwise than where it
        asks for one, but for white space alone, the latter's opening is taken.
        """
        prompt = self._render(chat, record, sizes, ask=True)
        texts = [self._conversation(chat, answer, record, sizes) for answer in answers]
        if not all(text.startswith(prompt) for text in texts):
            opening = self._conversation(chat, MARK, record, sizes).rpartition(MARK)[0]
            alike, known = common_length([prompt, opening]), all(text.startswith(opening) for text in texts)
            if opening and known and not (prompt[alike:] + opening[alike:]).strip():
                texts = [prompt + text[len(opening) :] for text in texts]
        return prompt, texts

    def _conversation(self, chat: list[dict[str, Any]], answer: str, record: Record, sizes: Sizes) -> str:
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return self._render([*chat, turn], record, sizes, ask=False)

    def _guarded(self, text: str, record: Record) -> str:
        with _told(record, "its text can't be tokenized", "take it out"):
            return self._control.guard(text)

    def _render(self, chat: list[dict[str, Any]], record: Record, sizes: Sizes, ask: bool) -> str:
        with _told(record, "the chat template refuses it", "mend the messages or --data.chat-template"):
            return self._placed(self._rendered(chat, ask), sizes)

    def _placed(self, text: str, sizes: Sizes) -> str:
        """The text with each image's own text in place of its mark: only the template writes marks, in a
        record they are guarded. Where their number is not that of the images, `_check` refuses."""
        before, *after = text.split(self.layout.mark)
        if len(after) != len(sizes):
            return text
        images = (self.layout.text(height, width, len(sizes)) for width, height in sizes)
        return before + "".join(image + rest for image, rest in zip(images, after, strict=True))

    def _tokenize(self, text: str, record: Record) -> tuple[list[int], Spans]:
        begun = self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        with _told(record, "its text can't be told from control tokens", "take their characters out"):
            return self._control.tokenize(text, special=not begun)

    def _check(
        self, record: Record, sizes: Sizes, prefix: np.ndarray, rows: list[list[int]], shared: int
    ) -> None:
        places = int((prefix == self.image_token).sum())
        with _told(record, "an image can't be cut into patches", "take it out"):
            wanted = sum(counts(self.layout, height, width, len(sizes))[1] for width, height in sizes)
        late = any(self.image_token in row[shared:] for row in rows)
        if late or places != wanted:
            what = f"{wanted} images" if wanted == len(sizes) else f"the {wanted} of {len(sizes)} images"
            found = "an image place after the prompt" if late else f"{places} image places for {what}"
            remedy = "use a template that places images (--data.chat-template)"
            raise refusal(record.where, f"the chat template writes {found}", remedy)
        if not shared:
            raise refusal(record.where, "its responses share no prompt token", "check the chat template")

    def _ended(self, ids: list[int]) -> np.ndarray:
        stop = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return np.array([*ids, self.end] if stop is None else ids[: stop + 1], np.int32)

    def text(self, ids: np.ndarray, after: Sequence[int] = ()) -> str:
        """The text of generated ids, without special and image tokens; `after`: the ids they continue.

        A tokenizer may write a token otherwise at the start of a text than inside it.
        """

        def decode(*ids: int) -> str:
            ids = tuple(int(i) for i in ids if i != self.image_token)
            return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        before, whole = decode(*after), decode(*after, *ids)
        # bytes that make no character may spoil the ones before them
        return whole[len(before) :] if whole.startswith(before) else decode(*ids)

    def eos_mask(self, vocab: int) -> np.ndarray:
        """[vocab] bool: the ids that end a sequence."""
        mask = np.zeros(vocab, bool)
        mask[[end for end in self.eos_ids if end < vocab]] = True
        return mask

    # ---- images ------------------------------------------------------------------------------------

    def group(
        self, encoded: Encoded, features: Sequence[np.ndarray] | None = None, draw: Draw = (0, 0)
    ) -> Group:
        """Put every embedding in its place. features: for each prefix the tower's [t, I, F], of all tiles;
        without them the images are read. draw: see `pixels`."""
        if features is None:
            images = [self.pixels(part, draw)._asdict() for part in encoded.parts]
        else:
            images = [{"features": each} for each in features]
        prefixes = [
            replace(self.prefix(part), **own) for part, own in zip(encoded.parts, images, strict=True)
        ]
        return Group(tuple(prefixes), encoded.responses)

    def prefix(self, encoded: Encoded) -> HostPrefix:
        """The prompt with every image token repeated for its embeddings; no image is read."""
        tokens: list[np.ndarray] = []
        image: list[np.ndarray] = []
        runs, tile, start = [], 0, 0
        for width, height in encoded.sizes:
            runs += self.layout.runs(height, width, len(encoded.sizes), tile)
            tile += counts(self.layout, height, width, len(encoded.sizes))[0]
        for place, run in zip(np.flatnonzero(encoded.prefix == self.image_token), runs, strict=True):
            text = encoded.prefix[start:place]
            tokens += [text, np.full(len(run.rows), self.image_token, np.int32)]
            image += [np.full(len(text), -1, np.int32), run.rows]
            start = place + 1
        text = encoded.prefix[start:]
        rows = np.concatenate([*image, np.full(len(text), -1, np.int32)])
        shares = mixed(rows, runs, self.layout.taps)
        prefix = HostPrefix.causal(np.concatenate([*tokens, text]), rows, **shares)
        return replace(prefix, order=ordered(rows, runs), rope=rotary(rows, runs, self.layout.axes))

    def pixels(self, encoded: Encoded, draw: Draw = (0, 0)) -> Pixels:
        """Of all of a record's images: patches [t, N, C] float32, place [t, N, 2] int16. draw: the seed and
        the pass over the data that a crop or noise follows from, beside the record's id."""
        rng = distortion.numbers(draw[0], encoded.record.id, draw[1])
        images = [self._pixels(encoded, i, rng) for i in range(len(encoded.sizes))]
        pixels = Pixels(*map(np.concatenate, zip(self.layout.empty(), *images, strict=True)))  # type: ignore
        if encoded.shown != "noise":
            return pixels
        return pixels._replace(
            patches=distortion.noisy(pixels.patches, distortion.NOISE_STEPS, rng, self.layout)  # type: ignore[arg-type]
        )

    def _pixels(self, encoded: Encoded, index: int, rng: np.random.Generator) -> Pixels:
        source, (width, height) = encoded.record.images[index], encoded.sizes[index]
        images, crop = len(encoded.sizes), encoded.shown == "crop"
        key = None if source.key is None or crop else (source.key, images)
        if key in self._kept:
            return self._kept[key]
        image = distortion.cropped(load_rgb(source), rng) if crop else load_rgb(source)
        try:
            pixels = self.layout.pixels(self.processor.image_processor, image, images)
            if pixels.patches.shape[:2] != (wanted := self.layout.tiles(height, width, images)):
                raise ValueError(f"it gives {pixels.patches.shape[:2]} tiles and patches, not {wanted}")
        except ValueError as error:
            remedy = "take it and config.json from one folder"
            raise refusal(source.label, f"the image processor can't be used: {error}", remedy) from error
        size = sum(array.nbytes for array in pixels)
        if key is not None and self._room >= size:
            self._room -= size
            self._kept[key] = pixels
        return pixels


@contextmanager
def _told(record: Record, problem: str, remedy: str) -> Iterator[None]:
    """A ValueError of the body as one line about the record."""
    try:
        yield
    except ValueError as error:
        raise refusal(record.where, f"{problem} ({one_line(error, 120)})", remedy) from error


def _check_differ(record: Record, answers: Sequence[np.ndarray]) -> None:
    for first, second in combinations(range(len(answers)), 2):
        texts = record.responses[first], record.responses[second]
        if texts[0].strip() == texts[1].strip():
            problem = f"the response is identical to that of {_name(first)}"
        elif np.array_equal(answers[first], answers[second]):
            problem = f"{quoted(texts[1])} has the same tokens as {quoted(texts[0])} of {_name(first)}"
        else:
            continue
        remedy = "give two that differ, or leave such records out: --data.identical skip"
        raise Identical(str(refusal(f"{record.where}, {_name(second)}", problem, remedy)))


def _name(response: int) -> str:
    return ("chosen", "rejected")[response] if response < 2 else f"responses[{response - 2}]"


def common_length(rows: Sequence[Any]) -> int:
    """How many leading items all rows share; rows: strings, or lists of numbers."""
    first, last = min(rows), max(rows)  # in the order of words: what these two share, all do
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def fingerprint(records: Sequence[Encoded], settings: str = "") -> str:
    """Digest of ids and image bytes, in order, and of the image processor's settings: names the data
    that stored figures belong to.
    """
    digest = hashlib.sha256(settings.encode())
    for encoded in records:
        for ids in (encoded.prefix, *encoded.responses):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        digest.update(encoded.identity.encode())
        for source in encoded.record.images:
            digest.update(image_digest(source))
    return digest.hexdigest()[:16]


def image_digest(source: ImageSource) -> bytes:
    """Names the image's bytes; those of a decoded one mean nothing without size and palette."""
    data = source.read()
    if data is None:
        pixels = load_rgb(source)
        data = repr(pixels.size).encode() + pixels.tobytes()
    return hashlib.sha256(data).digest()
