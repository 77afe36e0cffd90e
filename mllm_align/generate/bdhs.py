"""Bias-driven hallucination sampling: the policy rewrites a response without quite seeing the image.

Each sentence of the chosen response is cut at a random token; the policy, kept from looking at the image,
completes it, given all earlier sentences of the chosen response (arXiv 2407.02477, section 4, Algorithm 1).
What it puts there follows its language prior: a rejected response that is plausible and often wrong.

The prompt with the whole chosen response is run once for each (record, iteration). Every sentence forks
from that cache: it sees what stands before its cut, which is all that a run of its own would see.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm_align.batch import Pixels
from mllm_align.config import BDHSMethod
from mllm_align.data.encode import Encoded, Encoder, common_length
from mllm_align.errors import refusal
from mllm_align.generate.decode import Decoder, Fork, Row
from mllm_align.generate.distortion import gathered, noisy, visible_embeddings
from mllm_align.generate.respond import prompt_row
from mllm_align.generate.sampling import random_key
from mllm_align.generate.sentences import split, yes_no
from mllm_align.generate.similarity import Similarity
from mllm_align.prepare import pixels_ahead

FULL_STOPS = ".。"


@dataclass(frozen=True)
class Cut:
    """A sentence and where it is rewritten from. Offsets in characters of `text`, in ids of `ids`.

    start, stop: the sentence in the chosen response. text: the chosen response, with the sentence's yes or
    no swapped if `swapped` (from, to) says so. at: text[:at] is kept. ids: tokens of the conversation with
    `text`; the response begins at ids[begin], ids[:fork] are kept, and ids[:shared] are those of the
    conversation with the chosen response, too.
    """

    start: int
    stop: int
    text: str
    at: int
    ids: np.ndarray
    fork: int
    shared: int
    begin: int
    swapped: tuple[str, str] | None = None


@dataclass(frozen=True)
class Made:
    """What came of one record.

    rejected: the response. iterations: tries it took. guided: False if it was generated freely.
    similarity: of every try with the chosen response. mask_share: of the image embeddings, hidden in the
    last try. sentences: per rewritten sentence its span and cut in the chosen response, what was written
    after the cut, and the swapped words. unfinished: continuations that reached their token limit.
    broken: what was not finite, "logits" or "similarities"; then there is no response.
    """

    index: int
    rejected: str
    iterations: int
    guided: bool
    similarity: tuple[float, ...]
    mask_share: float
    sentences: tuple[dict[str, Any], ...]
    unfinished: int
    broken: str | None = None


@dataclass
class _Job:
    """A record on its way: its number, tries so far, and what the tower said of its image."""

    record: Encoded
    iteration: int = 0
    features: np.ndarray | None = None
    similarity: tuple[float, ...] = ()


def full_stops(encoder: Encoder, vocab: int) -> np.ndarray:
    """[vocab] bool: entries whose text contains a full stop, alone or inside (".\\n", "3.5")."""
    tokenizer = encoder.tokenizer
    count = min(vocab, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(count)], skip_special_tokens=True)
    mask = np.zeros(vocab, bool)
    mask[:count] = [any(stop in text for stop in FULL_STOPS) for text in texts]
    return mask


def until_full_stop(text: str) -> str:
    """The text up to and with its first full stop."""
    ends = [text.find(stop) for stop in FULL_STOPS if stop in text]
    return text[: min(ends) + 1] if ends else text


def cuts(encoder: Encoder, encoded: Encoded, seed: int, iteration: int) -> list[Cut]:
    """One cut for every sentence of the chosen response that can be cut.

    A cut falls on a token boundary: after at least one token of the sentence (after the swapped word where
    there is one) and before its last. A sentence of a single token is left as it is.
    """
    record, chosen = encoded.record, encoded.record.responses[0]
    ids, spans = encoder.response_spans(record, encoded.sizes, chosen)
    made = []
    for number, (start, stop) in enumerate(split(chosen)):
        rng = np.random.default_rng(random_key(seed, record.id, iteration, number, 0))
        text, words, length, floor, swapped = chosen, (ids, spans), stop, start + 1, None
        found = yes_no(chosen[start:stop])
        if found is not None and rng.random() < 0.5:
            first, last, opposite = found
            swapped = chosen[start + first : start + last], opposite
            text = chosen[: start + first] + opposite + chosen[start + last :]
            words = encoder.response_spans(record, encoded.sizes, text)
            length, floor = stop + len(text) - len(chosen), start + first + len(opposite)
        options = boundaries(words[1], floor, length)
        if not options:
            continue
        fork = int(rng.choice(options))
        shared = min(common_length([ids.tolist(), words[0].tolist()]), fork)
        begin = next(i for i, (_, end) in enumerate(words[1]) if end > 0)
        made.append(Cut(start, stop, text, words[1][fork - 1][1], words[0], fork, shared, begin, swapped))
    return made


def boundaries(spans: Sequence[tuple[int, int]], floor: int, stop: int) -> list[int]:
    """Numbers of the tokens that may come first after a cut in text[floor - 1 : stop].

    The token before ends in [floor, stop), and the two share no character (as the bytes of one would).
    """
    return [
        i
        for i in range(1, len(spans))
        if floor <= spans[i - 1][1] < stop and spans[i][1] > spans[i - 1][1] <= spans[i][0]
    ]


def guided_row(
    encoder: Encoder,
    encoded: Encoded,
    features: np.ndarray,
    made: Sequence[Cut],
    limit: int,
    seed: int,
    iteration: int,
) -> Row:
    """The prompt and the whole chosen response, with a fork at every cut."""
    ids, _ = encoder.response_spans(encoded.record, encoded.sizes, encoded.record.responses[0])
    prefix = encoder.prefix(replace(encoded, prefix=ids))
    moved = len(prefix.tokens) - len(ids)  # image tokens repeated; all of them stand before the response
    forks = tuple(
        Fork(
            cut.shared - 1 + moved,
            cut.ids[cut.shared - 1 : cut.fork],
            limit,
            random_key(seed, encoded.record.id, iteration, number, 1),
        )
        for number, cut in enumerate(made)
    )
    return Row(features, prefix, forks)


class BDHS:
    """Makes rejected responses, records and iterations batched; a finished record makes room for another.

    seed: of masks, noise, cuts, swaps and tokens; it may be exchanged between calls. gather: drop masked
    embeddings (the fast path) or keep them and mask them (the definition).
    """

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        config: BDHSMethod,
        similarity: Similarity,
        seed: int,
        gather: bool = True,
    ):
        self.decoder, self.encoder, self.config, self.similarity = decoder, encoder, config, similarity
        self.seed, self.gather = seed, gather
        self.ends = encoder.end_mask(decoder.vocab)
        self.stops = self.ends | full_stops(encoder, decoder.vocab)
        self.threshold = similarity.threshold if config.threshold is None else config.threshold

    def __call__(
        self, records: Sequence[Encoded], features: Mapping[int, np.ndarray] | None = None
    ) -> Iterator[Made]:
        """Each record's result as soon as it is there; `records` have their chosen response first.

        features [n, F]: of the records' images by their index, where they are known; else images are read.
        """
        size, waiting = self.decoder.size, {False: deque[_Job](), True: deque[_Job]()}
        records = sorted(records, key=lambda r: r.shape)
        for record in records:
            job = _Job(record, features=features[record.index] if features else None)
            waiting[self._free(job)].append(job)
        pictures = pixels_ahead(self.encoder, records, 2 * size)  # first tries keep this order
        while any(waiting.values()):
            free = len(waiting[True]) >= size or not waiting[False]  # long: they wait to fill a batch
            wave = [waiting[free].popleft() for _ in range(min(len(waiting[free]), size))]
            self._look(wave, pictures)
            results = self._try(wave, free)
            scores = self.similarity(
                [made.rejected for made in results], [job.record.record.responses[0] for job in wave]
            )
            for job, made, score in zip(wave, results, scores, strict=True):
                job.iteration += 1
                job.similarity += (float(score),)
                if made.broken or not np.isfinite(score):
                    yield replace(made, rejected="", broken=made.broken or "similarities")
                elif score < self.threshold or job.iteration == self.config.iterations:
                    yield replace(made, similarity=job.similarity)
                else:
                    waiting[self._free(job)].appendleft(job)

    def _free(self, job: _Job) -> bool:
        """Whether the record's next try is a whole response without guidance."""
        last = self.config.iterations > 1 and job.iteration == self.config.iterations - 1
        return last or not self.config.guided

    def _try(self, wave: Sequence[_Job], free: bool) -> list[Made]:
        c, encoder = self.config, self.encoder
        made = [[] if free else cuts(encoder, job.record, self.seed, job.iteration) for job in wave]
        rows = []
        for job, each in zip(wave, made, strict=True):
            features: Any = job.features
            if free:
                row = prompt_row(
                    encoder, job.record, features, c.sampling.max_tokens, 1, self.seed, job.iteration
                )
            else:
                limit = c.sentence_tokens
                row = guided_row(encoder, job.record, features, each, limit, self.seed, job.iteration)
            rows.append(self._hidden(row, job))
        shown = [gathered(row) if self.gather else row for row in rows]
        ends = self.ends if free else self.stops
        tokens = self.decoder(shown, ends)
        results = []
        for job, row, each, out in zip(wave, rows, made, tokens, strict=True):
            good = [ids for ids in out if ids is not None]
            broken = "logits" if len(good) < len(out) else None
            text, sentences = "", ()
            if free and good:
                text = encoder.text(good[0]).strip()
            elif not broken:
                text, sentences = self._joined(job.record, each, good)
            share = float((~row.prefix.visible[row.prefix.image >= 0]).mean())
            unfinished = sum(not ends[ids[-1]] for ids in good)
            told = job.iteration + 1, not free, (), share, sentences, unfinished, broken
            results.append(Made(job.record.index, text, *told))
        return results

    def _look(self, wave: Sequence[_Job], pictures: Iterator[Pixels]) -> None:
        """Features of the images: once a record, or under fresh noise in every try."""
        noise = self.config.distortion == "noise"
        blank = [job for job in wave if noise or job.features is None]
        seen = [self.encoder.pixels(job.record) if job.iteration else next(pictures) for job in blank]
        if noise:
            seen = [self._noisy(pixels, job) for pixels, job in zip(seen, blank, strict=True)]
        if seen:
            for job, features in zip(blank, self.decoder.features(seen), strict=True):
                job.features = features

    def _noisy(self, pixels: Pixels, job: _Job) -> Pixels:
        patches: Any = pixels.patches
        layout, steps = self.encoder.layout, self.config.noise_steps
        return pixels._replace(patches=noisy(patches, steps, self._rng(job), layout))

    def _hidden(self, row: Row, job: _Job) -> Row:
        if self.config.distortion == "noise":
            return row
        visible = visible_embeddings(row.prefix.image, self.config.mask_rate, self._rng(job))
        return replace(row, prefix=replace(row.prefix, visible=visible))

    def _rng(self, job: _Job) -> np.random.Generator:
        return np.random.default_rng(random_key(self.seed, job.record.record.id, job.iteration))

    def _joined(
        self, encoded: Encoded, made: Sequence[Cut], out: Sequence[np.ndarray]
    ) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The chosen response with its sentences rewritten; all between them byte for byte."""
        chosen = encoded.record.responses[0]
        pieces, sentences, done = [], [], 0
        for cut, ids in zip(made, out, strict=True):
            written = until_full_stop(self.encoder.text(ids, cut.ids[cut.begin : cut.fork].tolist()))
            pieces += [chosen[done : cut.start], cut.text[cut.start : cut.at], written]
            done = cut.stop
            grown = len(cut.text) - len(chosen)
            sentences.append(
                {
                    "sentence": [cut.start, cut.stop],
                    "cut": cut.at - grown,
                    "written": written,
                    "swapped": None if cut.swapped is None else list(cut.swapped),
                }
            )
        return "".join([*pieces, chosen[done:]]), tuple(sentences)


def check(records: Sequence[Encoded], encoder: Encoder, config: BDHSMethod) -> None:
    """Refuse what would stop the work later: a record without an image, a response without a sentence
    or one that the chat template changes."""
    for encoded in records:
        record = encoded.record
        if not record.images:
            raise refusal(record.where, "has no image", "leave it out: there is nothing to hide")
        if config.guided:
            if not split(record.responses[0]):
                raise refusal(record.where, "the response has no sentence", "mend it or leave it out")
            encoder.response_spans(record, encoded.sizes, record.responses[0])
