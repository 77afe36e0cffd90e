"""Bias-driven hallucination sampling: cuts, tries and stops on given tokens, the rest on a small model."""

import re
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from decoding import Scripted
from pieces import pieces
from refusals import assert_refusal
from runs import MODEL, bundle, compiling
from tokenizers import Tokenizer, decoders, models, normalizers

from mllm_align.config import BDHSConfig, DataConfig, SamplingConfig
from mllm_align.data.encode import Encoder
from mllm_align.data.records import parse_record
from mllm_align.errors import InputError
from mllm_align.generation import bdhs as module
from mllm_align.generation.bdhs import (
    BDHS,
    boundaries,
    candidates,
    check,
    cuts,
    full_stops,
    neighbour,
    until_full_stop,
)
from mllm_align.generation.decode import Fork, Generator, Row
from mllm_align.generation.sampling import random_key
from mllm_align.generation.sentences import split, yes_no
from mllm_align.generation.similarity import Lexical
from mllm_align.prepare import make_encoder

assert compiling  # a fixture
SHORT = "Tuku der dame. Faza manki fina. Reva nago zi te."
MIXED = "Yes, tuku der 🙂 dame.\n\nNo. Pe kerpe 日本語 rer rubi!\n- no der\n- Nuzu"
SPOKEN = "The tag </s> closes it. No, <s> opens <unk> it. <pad> Reva </s></s>."
LONG = 8192  # tokens that a record may have
FREE = SamplingConfig(max_tokens=10)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(bundle(), DataConfig())


def record(chosen, image="0_L", id="r", prompt="gi dan?"):
    row = {"id": id, "prompt": prompt, "images": [f"images/{image}.png"], "chosen": chosen}
    return parse_record(row, index=0, where="data.jsonl record", root=MODEL.parent, responses=1)


def encoded(encoder, *records):
    return [encoder.encode(each, 1, index) for index, each in enumerate(records)]


class Scores:
    """A similarity that says what it is told to: of the text that holds a word, try by try."""

    name, threshold = "told", 0.5

    def __init__(self, **scores):
        self.scores = {word: list(values) for word, values in scores.items()}

    def __call__(self, first, second):
        words = [next((w for w in self.scores if w in chosen), None) for chosen in second]
        return np.array([0.9 if word is None else self.scores[word].pop(0) for word in words], np.float32)


def making(encoder, similarity=None, say=None, size=4, gather=True, **config):
    """A maker on a scripted decoder."""
    config = {"iterations": 3, "sampling": FREE, "similarity": "lexical", **config}
    decoder = Scripted(len(encoder.tokenizer), size, say)
    made = BDHSConfig(**config)
    return BDHS(decoder, encoder, made, similarity or Scores(), made.seed, gather)


# ---- where a sentence is cut -------------------------------------------------------------------------


def all_cuts(encoder, chosen, seeds=40):
    (one,) = encoded(encoder, record(chosen))
    return [cut for seed in range(seeds) for cut in cuts(encoder, one, seed, 0)]


@pytest.mark.parametrize("kind", ["encoder", "like_llama"])
@pytest.mark.parametrize(
    "chosen", [SHORT, MIXED, f" \n{MIXED} ", SPOKEN], ids=["short", "mixed", "spaced", "spoken"]
)
def test_a_cut_keeps_a_token_of_the_sentence_and_leaves_one(request, kind, chosen):
    encoder = request.getfixturevalue(kind)
    found = all_cuts(encoder, chosen)
    for cut in found:
        sentence = chosen[cut.start : cut.stop]
        grown = len(cut.text) - len(chosen)
        assert (cut.start, cut.stop) in split(chosen)
        assert cut.start < cut.at < cut.stop + grown
        kept, left = cut.text[cut.start : cut.at], cut.text[cut.at : cut.stop + grown]
        assert kept.strip() and left.strip()
        word = yes_no(sentence)
        if cut.swapped is not None:
            assert cut.swapped == (sentence[word[0] : word[1]], word[2])
            assert kept.startswith(sentence[: word[0]] + word[2])
        else:
            assert cut.text == chosen
        # the tokens say what the text says, cut between two characters
        written = encoder.text(cut.ids[cut.begin : cut.fork])
        assert written.strip() == cut.text[: cut.at].strip() and "\ufffd" not in written
    assert {(cut.start, cut.stop) for cut in found} == set(split(chosen))


def test_every_place_is_as_likely_as_another(encoder):
    (one,) = encoded(encoder, record(SHORT))
    _, spans = encoder.response_spans(one.record, one.sizes, SHORT)
    start, stop = split(SHORT)[1]
    options = [spans[i - 1][1] for i in boundaries(spans, start + 1, stop)]
    at = [cuts(encoder, one, seed, 0)[1].at for seed in range(60 * len(options))]
    counts = np.array([at.count(option) for option in options])
    assert counts.sum() == len(at) and counts.min() > 30 and counts.max() < 100


def test_yes_and_no_are_swapped_half_of_the_time(encoder):
    found = [cut for cut in all_cuts(encoder, MIXED, 200) if yes_no(MIXED[cut.start : cut.stop])]
    swapped = [cut.swapped for cut in found if cut.swapped is not None]
    assert set(swapped) == {("Yes", "No"), ("No", "Yes")} and len(found) == 400
    assert 160 < len(swapped) < 240


def test_a_sentence_of_one_token_is_left_alone(encoder):
    assert all_cuts(encoder, ".a") and not all_cuts(encoder, "a") and not all_cuts(encoder, "好")
    assert not [cut for cut in all_cuts(encoder, "Yes") if cut.swapped]  # nothing after the word
    assert {cut.start for cut in all_cuts(encoder, f"{SHORT}\n\na")} == {s for s, _ in split(SHORT)}


def test_cuts_differ_by_try_and_record_and_never_by_chance(encoder):
    one, two = encoded(encoder, record(SHORT), record(SHORT, id="other"))

    def at(*args):
        return [cut.at for cut in cuts(encoder, *args)]

    assert at(one, 0, 0) == at(one, 0, 0)
    assert len({tuple(at(*args)) for args in [(one, 0, 0), (one, 0, 1), (one, 1, 0), (two, 0, 0)]}) == 4


def test_boundaries():
    spans = [(-3, 0), (0, 2), (2, 3), (3, 4), (3, 4), (4, 6), (6, 6), (6, 9), (9, 12)]
    assert boundaries(spans, 1, 9) == [2, 3, 5, 7]  # not in a character, nor before a token without any
    assert boundaries(spans, 3, 4) == [3] and boundaries(spans, 5, 6) == []


# ---- stops -------------------------------------------------------------------------------------------


def vocabulary(*entries):
    """A tokenizer of just these entries; <0x2E> is the byte of a full stop."""
    tokens = {token: i for i, token in enumerate(["<unk>", "<0x2E>", *entries])}
    model = Tokenizer(models.BPE(tokens, [], unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Replace(" ", "▁")
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


def test_every_entry_with_a_full_stop_ends_a_sentence():
    ends = [".", ".\n", "▁.", "3.5", "e.g.", "...", "。", "▁好。\n", '."']
    others = ["a", "▁the", "!", "?", ",", "…", "\n", ":", "．"]
    own = vocabulary(*ends, *others)
    mask = full_stops(SimpleNamespace(tokenizer=own), 40)
    found = own.convert_ids_to_tokens(np.flatnonzero(mask).tolist())
    assert found == ["<0x2E>", *ends] and mask.shape == (40,)
    assert full_stops(SimpleNamespace(tokenizer=own), 5).sum() == 4  # a model may know fewer entries


@pytest.mark.parametrize(
    "text, kept",
    [
        (" a.\n\nB", " a."),
        (" 3.5 cm", " 3."),
        ("好。x.", "好。"),
        ("a.x。", "a."),
        ("none!", "none!"),
        ("", ""),
    ],
)
def test_nothing_stays_after_the_first_full_stop(text, kept):
    assert until_full_stop(text) == kept


# ---- how sentences are put together --------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen", [SHORT, MIXED, f" \n{MIXED}\n ", SPOKEN], ids=["short", "mixed", "spaced", "spoken"]
)
def test_all_but_what_is_written_is_the_chosen_response(encoder, chosen):
    maker = making(encoder, iterations=1, sentence_tokens=6)
    swaps = 0
    for made in maker(
        [replace(one, index=i) for i, one in enumerate(encoded(encoder, record(chosen)) * 6)]
    ):
        rebuilt, done = "", 0
        for each in made.sentences:
            (start, stop), cut, swapped = each["sentence"], each["cut"], each["swapped"]
            kept = chosen[start:cut]
            if swapped is not None:
                kept = re.sub(swapped[0], swapped[1], kept, count=1)
                swaps += 1
            rebuilt += chosen[done:start] + kept + each["written"]
            done = stop
            assert until_full_stop(each["written"]) == each["written"]
        assert made.rejected == rebuilt + chosen[done:] != chosen
        assert made.guided and made.iterations == 1 and len(made.sentences) == len(split(chosen))
    assert swaps or chosen in (SHORT, SPOKEN)


def spelled(encoder, text):
    """The ids that write a text inside another."""
    whole = encoder.tokenizer(f"a{text}", add_special_tokens=False).input_ids
    return whole[len(encoder.tokenizer("a", add_special_tokens=False).input_ids) :]


@pytest.fixture(scope="module")
def like_llama():
    """An encoder that writes the space before a word only inside a text."""
    own = make_encoder(bundle(), DataConfig())
    return Encoder(pieces(), own.layout, own.image_token)


@pytest.mark.parametrize("kind", ["encoder", "like_llama"])
def test_what_follows_a_stop_inside_a_token_goes(request, kind):
    """On the scripted decoder: ids of a text with its stop in the midst."""
    encoder = request.getfixturevalue(kind)
    maker = making(encoder, say=lambda fork: spelled(encoder, " zi. der"), iterations=1)
    maker.stop_mask = maker.eos_mask  # as if one token held it all
    (made,) = maker(encoded(encoder, record(SHORT)))
    assert [each["written"] for each in made.sentences] == [" zi."] * 3
    assert made.unfinished == 3 and made.rejected.count(" zi.") == 3 and " der" not in made.rejected[16:]


def test_what_is_written_may_read_like_a_control_token(encoder):
    """As it may where it is generated by its letters; what comes out is trained on as that text."""
    ids = encoder.tokenizer(" zi </s> ku.", add_special_tokens=False, split_special_tokens=True).input_ids
    assert encoder.end not in ids
    maker = making(encoder, say=lambda fork: ids, iterations=1)
    maker.stop_mask = maker.eos_mask
    (made,) = maker(encoded(encoder, record(SPOKEN)))
    assert [each["written"] for each in made.sentences] == [" zi </s> ku."] * len(made.sentences)
    pair = replace(record(SPOKEN), responses=(SPOKEN, made.rejected))
    (_, rejected) = encoder.encode(pair, 2).responses
    assert encoder.text(rejected).strip() == made.rejected.strip() and (rejected == encoder.end).sum() == 1


def test_the_end_of_sequence_ends_a_sentence_and_is_not_written(encoder):
    maker = making(encoder, say=lambda fork: [encoder.end, 50, 60], iterations=1)
    (made,) = maker(encoded(encoder, record(SHORT)))
    assert [each["written"] for each in made.sentences] == [""] * 3 and made.unfinished == 0


def test_the_image_token_is_not_written(encoder):
    ids = [encoder.image_token, *spelled(encoder, " zi")]
    (made,) = making(encoder, say=lambda fork: ids, iterations=1)(encoded(encoder, record(SHORT)))
    assert [each["written"] for each in made.sentences] == [" zi"] * 3


def test_a_free_response_goes_on_after_a_full_stop(encoder):
    ids = [*spelled(encoder, " zi. der. "), encoder.end, *spelled(encoder, "ku")]
    maker = making(encoder, say=lambda fork: ids, guided=False, iterations=1)
    (made,) = maker(encoded(encoder, record(SHORT)))
    assert made.rejected == "zi. der." and made.unfinished == 0


# ---- tries -------------------------------------------------------------------------------------------


def few(encoder):
    words = ("Tuku der.", "Dame faza.", "Manki fina.", "Reva nago.", "Zi te.")
    return encoded(encoder, *(record(text, id=text[:2]) for text in words))


def test_a_record_is_tried_until_it_differs_enough(encoder):
    scores = Scores(Tuku=[0.1], Dame=[0.6, 0.4], Manki=[0.7, 0.5, 0.9], Reva=[0.8, 0.8, 0.2], Zi=[0.49])
    made = list(making(encoder, scores)(few(encoder)))
    assert [each.index for each in made] != list(range(5))  # those that are done give way
    found = {each.index: each for each in made}
    assert [found[i].iterations for i in range(5)] == [1, 2, 3, 3, 1]
    assert [found[i].guided for i in range(5)] == [True, True, False, False, True]
    assert found[2].similarity == pytest.approx((0.7, 0.5, 0.9)) and not found[2].sentences
    assert found[2].rejected == found[2].rejected.strip()


class InTurns(Scripted):
    """A row at a time ends, and the next begins in its place."""

    def stream(self, ask, stop_mask):
        under_way, numbers, ended = [], count(), []
        self.seen.append(ended)
        while True:
            while len(under_way) < self.size and (row := ask()) is not None:
                under_way.append((next(numbers), row))
            if not under_way:
                return
            number, row = under_way.pop(0)
            ended.append(row)
            yield [(number, [self._tokens(fork, stop_mask) for fork in row.forks])]


def test_tries_take_the_places_of_those_that_ended(encoder):
    """One stream of rows for all guided tries, with the results of full batches."""
    scores = {"Tuku": [0.1], "Dame": [0.6, 0.4], "Manki": [0.7, 0.5, 0.9], "Reva": [0.8, 0.8, 0.2]}
    whole = {each.index: each for each in making(encoder, Scores(**scores), size=2)(few(encoder))}
    maker = making(encoder, Scores(**scores), size=2)
    maker.generator = InTurns(maker.generator.vocab, 2)
    found = {each.index: each for each in maker(few(encoder))}
    assert found == whole
    limits = [{fork.limit for row in rows for fork in row.forks} for rows in maker.generator.seen]
    assert limits == [{64}, {10}, {64}, {10}], "two free responses fill a batch"
    assert [len(rows) for rows in maker.generator.seen] == [8, 2, 1, 1]
    assert len(maker.generator.pictures) == len(found), "features are kept from try to try"


@pytest.mark.parametrize(
    "config, guided",
    [
        ({"iterations": 1}, [True]),
        ({"iterations": 2}, [True, False]),
        ({"iterations": 1, "guided": False}, [False]),
        ({"iterations": 3, "guided": False}, [False, False, False]),
    ],
    ids=str,
)
def test_the_last_of_several_tries_is_unguided(encoder, config, guided):
    maker = making(encoder, Scores(), **config)
    (made,) = maker(few(encoder)[:1])
    assert made.iterations == len(guided) and made.guided == guided[-1]
    free = [
        [fork.at for fork in row.forks] == [len(row.prefix.tokens) - 1] for (row,) in maker.generator.seen
    ]
    assert free == [not each for each in guided]
    limits = [{fork.limit for fork in row.forks} for (row,) in maker.generator.seen]
    assert limits == [{64} if each else {10} for each in guided]


def test_thresholds_of_the_config_come_before_the_measures_own(encoder):
    assert making(encoder).threshold == 0.5
    (made,) = making(encoder, threshold=0.95)(few(encoder)[:1])
    assert made.iterations == 1


def test_free_responses_wait_until_they_fill_a_batch(encoder):
    maker = making(encoder, size=2, iterations=2)
    assert sorted(each.index for each in maker(few(encoder))) == list(range(5))
    sizes = [(len(rows), rows[0].forks[0].limit) for rows in maker.generator.seen]
    assert sizes == [(2, 64), (2, 10), (2, 64), (2, 10), (1, 64), (1, 10)]


def test_every_try_has_cuts_masks_and_tokens_of_its_own(encoder):
    maker = making(encoder, iterations=4, mask_rate=0.5, gather=False)
    list(maker(encoded(encoder, record(SHORT))))
    rows = [rows[0] for rows in maker.generator.seen]
    assert len({row.prefix.visible[row.prefix.image >= 0].tobytes() for row in rows}) == 4
    assert len({tuple(fork.at for fork in row.forks) for row in rows[:3]}) > 1
    assert len({fork.key.tobytes() for row in rows for fork in row.forks}) == 3 * 3 + 1
    assert len(maker.generator.pictures) == 1, "the tower sees a clean image once"


def test_noise_is_drawn_anew_and_masks_nothing(encoder):
    maker = making(encoder, iterations=3, distortion="noise")
    (one,) = encoded(encoder, record(SHORT))
    (made,) = maker([one])
    clean, seen = encoder.pixels(one), maker.generator.pictures
    assert len(seen) == 3 and len({x.patches.tobytes() for x in (clean, *seen)}) == 4
    assert all(rows[0].prefix.visible.all() for rows in maker.generator.seen) and made.mask_share == 0
    again = making(encoder, iterations=3, distortion="noise")
    list(again([one]))
    for one, other in zip(seen, again.generator.pictures, strict=True):
        np.testing.assert_array_equal(one.patches, other.patches)


def with_neighbours(encoder, chosen, *names, image="0_L"):
    row = {"id": "r", "prompt": "gi dan?", "chosen": chosen, "images": [f"images/{image}.png"]}
    row["neighbour_images"] = [f"images/{name}.png" for name in names]
    record = parse_record(row, index=0, where="data.jsonl record", root=MODEL.parent, responses=1)
    return encoder.encode(record, 1, 7)


def test_under_neighbour_images_each_try_sees_the_next(encoder):
    maker = making(encoder, Scores(Tuku=[0.9, 0.9, 0.9, 0.4]), iterations=5, distortion="retrieved")
    one = with_neighbours(encoder, SHORT, "1_P", "4_RGB", "5_RGB")
    (made,) = maker([one])
    assert (made.iterations, made.index, made.mask_share, made.guided) == (4, 7, 0.0, True)
    wanted = [encoder.encode(replace(one.record, images=images), 1) for images in candidates(one.record)]
    for pixels, number in zip(maker.generator.pictures, (0, 1, 2, 0), strict=True):
        np.testing.assert_array_equal(pixels.patches, encoder.pixels(wanted[number]).patches)
    for (row,), number in zip(maker.generator.seen, (0, 1, 2, 0), strict=True):
        assert len(row.prefix.tokens) >= wanted[number].shape.prefix and row.prefix.visible.all()
    assert made.rejected.startswith("Tu"), "up to the cut it is the chosen response"
    freed = making(encoder, Scores(), iterations=2, distortion="retrieved")
    (made,) = freed([one])
    assert not made.guided and len(freed.generator.pictures) == 2


def test_one_rejected_image_is_a_neighbour_too(encoder):
    one = with_neighbours(encoder, SHORT)
    record = replace(one.record, rejected_images=one.record.images)
    assert neighbour(record, 3) == one.record.images


def test_neighbour_images_that_are_missing_or_too_long(encoder):
    config = BDHSConfig(distortion="retrieved")
    bare, full = with_neighbours(encoder, SHORT), with_neighbours(encoder, SHORT, "1_P")
    assert_refusal(lambda: check([bare], encoder, config, LONG), "no retrieved image", "data retrieve")
    check([full], encoder, config, full.length)
    few = full.length - 1
    assert_refusal(
        lambda: check([full], encoder, config, few), "retrieved image 0, more than", "max-length"
    )


@pytest.mark.parametrize("rate, share", [(0.0, 0.0), (1.0, 1.0)])
def test_mask_share(encoder, rate, share):
    (made,) = making(encoder, mask_rate=rate)(few(encoder)[:1])
    assert made.mask_share == share


def test_records_without_a_sentence_that_can_be_cut_go_along(encoder):
    made = {
        each.index: each
        for each in making(encoder, Lexical())(encoded(encoder, record("a"), record(SHORT, id="s")))
    }
    assert made[0].similarity[:2] == (1.0, 1.0) and not made[0].guided and made[1].guided
    (only,) = making(encoder, Lexical(), iterations=1)(encoded(encoder, record("a")))
    assert only.rejected == "a" and only.sentences == ()


# ---- refusals ----------------------------------------------------------------------------------------


def test_records_that_there_is_nothing_to_do_for(encoder):
    config = BDHSConfig()
    text = parse_record(
        {"prompt": "gi?", "chosen": "Ku."}, index=4, where="data.jsonl record", root=None, responses=1
    )
    with pytest.raises(InputError, match="record 4: has no image; leave it out"):
        check(encoded(encoder, text), encoder, config, LONG)
    wordless = encoded(encoder, record("... !"))
    with pytest.raises(InputError, match="record 0: the response has no sentence"):
        check(wordless, encoder, config, LONG)
    check(wordless, encoder, replace(config, guided=False), LONG)
    changing = encoder.template.replace("part['text']", "part['text'] | upper")
    other = Encoder(encoder.processor, encoder.layout, encoder.image_token, template=changing)
    with pytest.raises(InputError, match="record 0: the chat template changes the response"):
        check(encoded(other, record(SHORT)), other, config, LONG)


# ---- on a model --------------------------------------------------------------------------------------

SEED = 1  # swaps a yes and two noes, and leaves a yes
SETTINGS = BDHSConfig(iterations=1, sentence_tokens=8, sampling=FREE, mask_rate=0.5, similarity="lexical")
TEXTS = (
    "Yes, tuku der dame. No faza manki fina.",
    "No. Reva nago 🙂 zi te nuzu.",
    "Pe kerpe rer rubi. Yes der.",
)


@pytest.fixture(scope="module")
def decoder():
    return Generator(bundle(), FREE, 4)


def of_model(decoder, encoder, records, gather=True, **changes):
    settings = replace(SETTINGS, **changes)
    maker = BDHS(decoder, encoder, settings, Lexical(), settings.seed, gather)
    return {made.index: made for made in maker(records)}


def records(encoder, image="0_L"):
    return encoded(encoder, *(record(text, image, f"r{i}") for i, text in enumerate(TEXTS)))


def naive(decoder, encoder, one, visible=None, **changes):
    """The rewritten sentences, each from a prefill of its own prefix."""
    config = replace(SETTINGS, **changes)
    stop_mask = encoder.eos_mask(decoder.vocab) | full_stops(encoder, decoder.vocab)
    (features,) = decoder.features([encoder.pixels(one)])
    made = cuts(encoder, one, config.seed, 0)
    rows = []
    for number, cut in enumerate(made):
        ids = replace(one, prefix=cut.ids[: cut.fork])
        prefix = encoder.prefix(ids)
        tokens, image = prefix.tokens, prefix.image
        seen = np.ones(len(tokens), bool)
        if visible is not None:
            seen[image >= 0] = visible[: len(tokens)][image[: len(visible)] >= 0]
        key = random_key(config.seed, one.record.id, 0, number, 1)
        end = Fork(len(tokens) - 1, tokens[-1:], config.sentence_tokens, key)
        rows.append(Row(features, replace(prefix, visible=seen), (end,)))
    written = [
        until_full_stop(encoder.text(ids, cut.ids[cut.begin : cut.fork]))
        for cut, (ids,) in zip(made, decoder(rows, stop_mask), strict=True)
    ]
    return written, [cut.swapped for cut in made]


def test_sentences_forked_from_one_prefill_are_those_of_prefills_of_their_own(
    encoder, decoder, monkeypatch
):
    masks = {}

    def remembered(image, rate, rng):
        masks[len(masks)] = module_visible(image, rate, rng)
        return masks[len(masks) - 1]

    module_visible = module.visible_embeddings
    monkeypatch.setattr(module, "visible_embeddings", remembered)
    ones = records(encoder)
    made = of_model(decoder, encoder, ones, False, seed=SEED)
    order = sorted(range(3), key=lambda i: ones[i].shape)
    swaps = []
    for place, i in enumerate(order):
        written, swapped = naive(decoder, encoder, ones[i], masks[place], seed=SEED)
        assert [each["written"] for each in made[i].sentences] == written
        swaps += swapped
    assert ("No", "Yes") in swaps and ("Yes", "No") in swaps and None in swaps


def rejected(made):
    return [made[i].rejected for i in sorted(made)]


def test_with_the_whole_image_hidden_another_image_changes_nothing(encoder, decoder):
    first, second = (records(encoder, image) for image in ("0_L", "4_RGB"))
    blind = [of_model(decoder, encoder, ones, False, mask_rate=1.0, seed=SEED) for ones in (first, second)]
    assert rejected(blind[0]) == rejected(blind[1]) and blind[0][0].mask_share == 1.0
    seeing = [of_model(decoder, encoder, ones, False, mask_rate=0.0, seed=SEED) for ones in (first, second)]
    assert rejected(seeing[0]) != rejected(seeing[1])
    for i, one in enumerate(first):
        written, _ = naive(decoder, encoder, one, seed=SEED)
        assert [each["written"] for each in seeing[0][i].sentences] == written


def test_a_record_gets_the_same_alone_and_gathered(encoder, decoder):
    ones = records(encoder)
    together = of_model(decoder, encoder, ones, False, seed=SEED)
    alone = of_model(decoder, encoder, ones[:1], False, seed=SEED)
    assert alone[0] == together[0]
    assert of_model(decoder, encoder, ones, True, seed=SEED) == together


def test_unguided_responses_are_those_of_the_prompt(encoder, decoder):
    """The last try of two, and what `guided` False makes: the same prompt, other random numbers."""
    ones = records(encoder)
    last = of_model(decoder, encoder, ones, False, iterations=2, threshold=-1.0, seed=SEED)
    free = of_model(decoder, encoder, ones, False, guided=False, seed=SEED)
    assert all(not made.guided and made.rejected and not made.sentences for made in last.values())
    assert not set(rejected(last)) & set(rejected(free))
