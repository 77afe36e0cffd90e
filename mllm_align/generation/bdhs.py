"""Bias-driven hallucination sampling: the policy rewrites a response with the image mostly hidden.

Each sentence of the chosen response is cut at a random token. The policy, with a distorted image, completes
it, given all earlier sentences of the chosen response (arXiv 2407.02477, section 4, Algorithm 1). The
completions follow its language prior, so the rejected response is plausible and often wrong.

With distortion `retrieved` it sees a neighbour of the image instead, the next one in every try, and writes
what is true of that (Re-Align, arXiv 2502.13146).

The prompt with the whole chosen response is prefilled once per (record, iteration). Every sentence forks
from that cache and attends to the tokens before its cut, as it would in a separate run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from mllm_align.batch import Pixels
from mllm_align.config import BDHSMethod
from mllm_align.data.distortion import noisy
from mllm_align.data.encode import Encoded, Encoder, common_length
from mllm_align.data.images import ImageSource
from mllm_align.data.records import Record
from mllm_align.errors import refusal
from mllm_align.generation.decode import Fork, Generator, Row, Tokens
from mllm_align.generation.distortion import gathered, visible_embeddings
from mllm_align.generation.respond import prompt_row
from mllm_align.generation.sampling import random_key
from mllm_align.generation.sentences import split, yes_no
from mllm_align.generation.similarity import Similarity
from mllm_align.prepare import pixels_ahead

FULL_STOPS = ".。"


@dataclass(frozen=True)
class Cut:
    """A sentence and the position from which it is rewritten. Offsets in characters of `text`, in ids of
    `ids`.

    start, stop: the sentence in the chosen response. swapped: (from, to) if the sentence's yes or no was
    swapped. text: the chosen response, with the swap. at: text[:at] is kept. ids: tokens of the
    conversation with `text`; the response begins at ids[begin], ids[:fork] are kept, and ids[:shared] equal
    those of the conversation with the chosen response.
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
class BDHSResult:
    """The result for one record.

    rejected: the response. iterations: number of iterations. guided: False if it was generated freely.
    similarity: of each iteration's response to the chosen one. mask_share: share of the image embeddings
    hidden in the last iteration. sentences: per rewritten sentence its span and cut in the chosen response,
    the text written after the cut, and the swapped words. unfinished: number of continuations that reached
    their token limit. broken: what was not finite, "logits" or "similarities"; then there is no response.
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
class _Pending:
    """A record in progress: as the policy sees it, iterations so far, features of its image, similarities
    so far."""

    record: Encoded
    iteration: int = 0
    features: np.ndarray | None = None
    similarity: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Try:
    """A record's next iteration. row: with masked places in it. cuts: None where a whole response is
    generated freely."""

    job: _Pending
    row: Row
    cuts: list[Cut] | None


def full_stops(encoder: Encoder, vocab: int) -> np.ndarray:
    """Mask [vocab] bool of the tokens whose text contains a full stop, such as ".\\n" or "3.5"."""
    tokenizer = encoder.tokenizer
    count = min(vocab, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(count)], skip_special_tokens=True)
    mask = np.zeros(vocab, bool)
    mask[:count] = [any(stop in text for stop in FULL_STOPS) for text in texts]
    return mask


def until_full_stop(text: str) -> str:
    """The text up to and including its first full stop."""
    stops = [text.find(stop) for stop in FULL_STOPS if stop in text]
    return text[: min(stops) + 1] if stops else text


def cuts(encoder: Encoder, encoded: Encoded, seed: int, iteration: int) -> list[Cut]:
    """One cut for every sentence of the chosen response that can be cut.

    A cut is at a token boundary: after at least one token of the sentence (after the swapped word, if there
    is one) and before its last token. A sentence of a single token is not rewritten.
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
    """Indices of the tokens that may come first after a cut in text[floor - 1 : stop].

    The token before must end in [floor, stop), and the two must not share a character (as byte tokens may).
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
    moved = len(prefix.tokens) - len(ids)  # expanded image tokens, all of them before the response
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
    """Generates rejected responses, batched over records and iterations: a waiting try begins where others
    have ended, while the rest goes on.

    seed: of masks, noise, cuts, swaps and tokens; it may be changed between calls. gather: remove masked
    embeddings (the fast path) or keep and mask them (the definition).
    """

    def __init__(
        self,
        generator: Generator,
        encoder: Encoder,
        config: BDHSMethod,
        similarity: Similarity,
        seed: int,
        gather: bool = True,
    ):
        self.generator, self.encoder, self.config, self.similarity = generator, encoder, config, similarity
        self.seed, self.gather = seed, gather
        self.eos_mask = encoder.eos_mask(generator.vocab)
        self.stop_mask = self.eos_mask | full_stops(encoder, generator.vocab)
        self.threshold = similarity.threshold if config.threshold is None else config.threshold

    def __call__(
        self, records: Sequence[Encoded], features: Mapping[int, np.ndarray] | None = None
    ) -> Iterator[BDHSResult]:
        """Each record's result as soon as it is finished; the first response of `records` is the chosen
        one.

        features: record index -> features [n, F] of its images; without it, images are read.
        """
        size, waiting = self.generator.size, {False: deque[_Pending](), True: deque[_Pending]()}
        records = sorted((self._seen(record, 0) for record in records), key=lambda r: r.shape)
        for record in records:
            job = _Pending(record, features=features[record.index] if features else None)
            waiting[self._free(job)].append(job)
        pictures = pixels_ahead(self.encoder, records, 2 * size)  # first tries keep this order
        while any(waiting.values()):
            free = len(waiting[True]) >= size or not waiting[False]  # long responses wait for a full batch
            yield from self._tries(waiting, free, pictures)

    def _tries(
        self, waiting: dict[bool, deque[_Pending]], free: bool, pictures: Iterator[Pixels]
    ) -> Iterator[BDHSResult]:
        """Tries of one kind, until none waits, or a full batch of free ones does."""
        size, ready, begun, numbers = self.generator.size, deque[_Try](), dict[int, _Try](), count()

        def ask() -> Row | None:
            if not ready and (free or len(waiting[True]) < size):
                jobs = [waiting[free].popleft() for _ in range(min(len(waiting[free]), size))]
                self._compute_features(jobs, pictures)
                ready.extend(self._begun(job, free) for job in jobs)
            if not ready:
                return None
            begun[next(numbers)] = each = ready.popleft()
            return gathered(each.row) if self.gather else each.row

        for ended in self.generator.stream(ask, self._stops(free)):
            tries = [begun.pop(number) for number, _ in ended]
            results = [self._result(each, tokens) for each, (_, tokens) in zip(tries, ended, strict=True)]
            scores = self.similarity(
                [result.rejected for result in results],
                [each.job.record.record.responses[0] for each in tries],
            )
            for each, result, score in zip(tries, results, scores, strict=True):
                job = each.job
                job.iteration += 1
                job.similarity += (float(score),)
                if result.broken or not np.isfinite(score):
                    yield replace(result, rejected="", broken=result.broken or "similarities")
                elif score < self.threshold or job.iteration == self.config.iterations:
                    yield replace(result, similarity=job.similarity)
                else:
                    job.record = self._seen(job.record, job.iteration)
                    waiting[self._free(job)].appendleft(job)

    def _seen(self, record: Encoded, iteration: int) -> Encoded:
        """The record as the policy sees it in a try."""
        if self.config.distortion != "retrieved":
            return record
        return _under(self.encoder, record, neighbour(record.record, iteration))

    def _free(self, job: _Pending) -> bool:
        """Whether the record's next iteration generates a whole response without guidance."""
        last = self.config.iterations > 1 and job.iteration == self.config.iterations - 1
        return last or not self.config.guided

    def _stops(self, free: bool) -> np.ndarray:
        """What ends a continuation: of a whole response, or of a sentence."""
        return self.eos_mask if free else self.stop_mask

    def _begun(self, job: _Pending, free: bool) -> _Try:
        c, encoder, features = self.config, self.encoder, job.features
        assert features is not None
        if free:
            row = prompt_row(
                encoder, [job.record], features, c.sampling.max_tokens, 1, self.seed, job.iteration
            )
            return _Try(job, self._masked(row, job), None)
        made = cuts(encoder, job.record, self.seed, job.iteration)
        row = guided_row(encoder, job.record, features, made, c.sentence_tokens, self.seed, job.iteration)
        return _Try(job, self._masked(row, job), made)

    def _result(self, each: _Try, tokens: Tokens) -> BDHSResult:
        """What a try has written. tokens: of each fork of its row."""
        job, free = each.job, each.cuts is None
        good = [ids for ids in tokens if ids is not None]
        broken = "logits" if len(good) < len(tokens) else None
        text, sentences = "", ()
        if each.cuts is None and good:
            text = self.encoder.text(good[0]).strip()
        elif each.cuts is not None and not broken:
            text, sentences = self._joined(job.record, each.cuts, good)
        prefix = each.row.prefix
        share = float((~prefix.visible[prefix.image >= 0]).mean())
        unfinished = sum(not self._stops(free)[ids[-1]] for ids in good)
        details = job.iteration + 1, not free, (), share, sentences, unfinished, broken
        return BDHSResult(job.record.index, text, *details)

    def _compute_features(self, wave: Sequence[_Pending], pictures: Iterator[Pixels]) -> None:
        """Features of the images: once a record, or anew in every try, under fresh noise or of others."""
        noise, anew = self.config.distortion == "noise", self.config.distortion != "attention"
        blank = [job for job in wave if anew or job.features is None]
        seen = [self.encoder.pixels(job.record) if job.iteration else next(pictures) for job in blank]
        if noise:
            seen = [self._noisy(pixels, job) for pixels, job in zip(seen, blank, strict=True)]
        if seen:
            for job, features in zip(blank, self.generator.features(seen), strict=True):
                job.features = features

    def _noisy(self, pixels: Pixels, job: _Pending) -> Pixels:
        patches: Any = pixels.patches
        layout, steps = self.encoder.layout, self.config.noise_steps
        return pixels._replace(patches=noisy(patches, steps, self._rng(job), layout))

    def _masked(self, row: Row, job: _Pending) -> Row:
        if self.config.distortion != "attention":
            return row
        visible = visible_embeddings(row.prefix.image, self.config.mask_rate, self._rng(job))
        return replace(row, prefix=replace(row.prefix, visible=visible))

    def _rng(self, job: _Pending) -> np.random.Generator:
        return np.random.default_rng(random_key(self.seed, job.record.record.id, job.iteration))

    def _joined(
        self, encoded: Encoded, made: Sequence[Cut], out: Sequence[np.ndarray]
    ) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The chosen response with its sentences rewritten; the text between them is unchanged."""
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


def candidates(record: Record) -> list[tuple[ImageSource, ...]]:
    """What may stand in the place of a record's images, the nearest first."""
    others, count = record.neighbour_images or record.rejected_images, len(record.images)
    return [others[start : start + count] for start in range(0, len(others), count)]


def neighbour(record: Record, iteration: int) -> tuple[ImageSource, ...]:
    """What the policy sees in the place of a record's images: the next neighbour in every try, and the
    nearest again after the last."""
    others = candidates(record)
    return others[iteration % len(others)]


def _under(encoder: Encoder, encoded: Encoded, images: tuple[ImageSource, ...]) -> Encoded:
    """The record with its chosen response under other images."""
    return encoder.encode(replace(encoded.record, images=images), 1, encoded.index)


def check(records: Sequence[Encoded], encoder: Encoder, config: BDHSMethod, limit: int) -> None:
    """Refuse records that would fail later: those without an image, those whose response has no sentence or
    is changed by the chat template, and those whose retrieved images are missing, can't be read, or make
    them longer than `limit` tokens."""
    for encoded in records:
        record = encoded.record
        if not record.images:
            raise refusal(record.where, "has no image", "leave it out: BDHS needs an image to distort")
        if config.distortion == "retrieved":
            _check_candidates(encoded, encoder, limit)
        if config.guided:
            if not split(record.responses[0]):
                raise refusal(record.where, "the response has no sentence", "mend it or leave it out")
            encoder.response_spans(record, encoded.sizes, record.responses[0])


def _check_candidates(encoded: Encoded, encoder: Encoder, limit: int) -> None:
    record = encoded.record
    if not (others := candidates(record)):
        remedy = "add it with `mllm-align data retrieve`, or take another distortion"
        raise refusal(record.where, "names no retrieved image", remedy)
    for number, images in enumerate(others):
        length = _under(encoder, encoded, images).length
        if length > limit:
            problem = f"has {length} tokens with retrieved image {number}, more than {limit}"
            raise refusal(record.where, problem, "raise --data.max-length, or leave it out")
