"""Responses to prompts, from rows to texts."""

import numpy as np
import pytest
from decoding import Scripted
from goldens import goldens
from runs import MODEL, PAIRS, bundle, compiling, nan_for_one, rows

from mllm_align.config import DataConfig, SamplingConfig
from mllm_align.errors import InputError, NotFinite
from mllm_align.generation import respond as module
from mllm_align.generation.decode import Generator
from mllm_align.generation.respond import generate, prompt_row, respond, shared_rows
from mllm_align.prepare import prepare

assert compiling  # a fixture
SAMPLED = SamplingConfig(max_tokens=12)
PROMPTS = [
    {"prompt": row["prompt"], "images": [str(MODEL.parent / row["images"][0])], "id": f"r{i}"}
    for i, row in enumerate(rows(4))
]


@pytest.fixture
def scripted(monkeypatch):
    """Decoders that take tokens by the keys of the forks."""
    made = []

    def decoder(bundle, sampling, size):
        made.append(Scripted(bundle.config.decoder.vocab, size))
        return made[-1]

    monkeypatch.setattr(module, "Generator", decoder)
    return made


# ---- on a model --------------------------------------------------------------------------------------


def test_greedy_responses_are_those_of_transformers():
    wanted = goldens("llava15").arrays["base/greedy_tokens"]
    greedy = SamplingConfig(temperature=0.0, max_tokens=wanted.shape[1])
    encoder, records, _ = prepare(bundle(), PROMPTS, DataConfig(), responses=0)
    out = respond(Generator(bundle(), greedy, 4), encoder, records, greedy)
    np.testing.assert_array_equal([ids for (ids,) in out], wanted)


def test_samples_hang_on_seed_and_id_alone():
    """Of a prompt without an image, too."""
    given = [*PROMPTS[:3], {"prompt": "gi dan?", "id": "text"}]
    out = generate(bundle(), given, SAMPLED, samples=2, seed=5, batch_size=4)
    assert [len(each) for each in out] == [2] * 4 and len({text for each in out for text in each}) == 8
    assert all(text == text.strip() for each in out for text in each)
    again = generate(bundle(), given[::-1], SAMPLED, samples=2, seed=5, batch_size=4)
    assert again == out[::-1]
    other = generate(bundle(), given, SAMPLED, samples=2, seed=6, batch_size=4)
    assert not {text for each in out for text in each} & {text for each in other for text in each}


# ---- around it ---------------------------------------------------------------------------------------


def test_every_response_comes_to_its_place(scripted):
    many = [{**PROMPTS[i % 4], "prompt": "gi " * (1 + 7 * i % 5), "id": str(i)} for i in range(7)]
    encoder, records, _ = prepare(bundle(), many, DataConfig(), responses=0)
    out = generate(bundle(), many, SAMPLED, samples=3, batch_size=2)
    alone = [generate(bundle(), [each], SAMPLED, samples=3)[0] for each in many]
    assert out == alone
    assert [len(rows) for rows in scripted[0].seen] == [2, 2]  # a row for each image
    row = prompt_row(encoder, [records[0]], np.zeros((16, 1)), 12, 3, 0)
    assert len({fork.key.tobytes() for fork in row.forks}) == 3
    assert {(fork.at, fork.forced.tolist()[0], fork.limit) for fork in row.forks} == {
        (len(row.prefix.tokens) - 1, int(row.prefix.tokens[-1]), 12)
    }


def questions(counts: list[int]) -> list[dict]:
    """So many questions about each image, in turn."""
    asked = [(image, n) for image, count in enumerate(counts) for n in range(count)]
    asked.sort(key=lambda each: each[1])
    return [{**PROMPTS[i], "prompt": "gi dan " * (1 + n) + "?", "id": f"{i}-{n}"} for i, n in asked]


def test_questions_about_an_image_share_its_prefix_and_get_the_same_answers(monkeypatch):
    """At any place in the data; those about no image, or with the image elsewhere, are on their own."""
    seen = []
    whole = Generator.stream

    def stream(self, ask, mask):
        def told():
            if (row := ask()) is not None:
                seen.append(row)
            return row

        return whole(self, told, mask)

    monkeypatch.setattr(Generator, "stream", stream)
    given = [*questions([3, 2]), {"prompt": "gi dan?", "id": "none"}]
    content = [{"type": "text", "text": "gi"}, {"type": "image"}]
    late = {
        "messages": [{"role": "user", "content": content}],
        "images": PROMPTS[0]["images"],
        "id": "late",
    }
    given.append(late)
    together = generate(bundle(), given, SAMPLED, seed=3, batch_size=4)
    assert sorted(len(row.forks) for row in seen) == [1, 1, 2, 3]
    tokens = {len(row.forks): len(row.prefix.tokens) for row in seen}
    assert tokens[3] == tokens[2]  # where questions begin: what differs is left to the forks
    monkeypatch.setattr(module, "FORK_TOKENS", 1)
    seen.clear()
    assert generate(bundle(), given, SAMPLED, seed=3, batch_size=4) == together
    assert [len(row.forks) for row in seen] == [1] * len(given)


def test_rows_are_bounded_and_of_like_size(scripted, monkeypatch):
    encoder, records, _ = prepare(bundle(), questions([5, 1]), DataConfig(), responses=0)
    rows = shared_rows(records, encoder.image_token, 12, 2)
    assert sorted(map(len, rows)) == [1, 5]
    longest = max(len(record.prefix) for record in records)
    monkeypatch.setattr(module, "FORK_TOKENS", 4 * 2 * (longest + 12))
    rows = shared_rows(records, encoder.image_token, 12, 2)
    assert sorted(map(len, rows)) == [1, 2, 3] and sorted(i for row in rows for i in row) == list(range(6))


def test_over_long_prompts_have_no_response(scripted):
    long = {**PROMPTS[0], "prompt": "gi " * 300, "id": "long"}
    config = DataConfig(max_length=100, over_long="skip")
    out = generate(bundle(), [PROMPTS[0], long, PROMPTS[1]], SAMPLED, config=config)
    assert [len(each) for each in out] == [1, 0, 1]


@pytest.mark.parametrize(
    "given, settings, said",
    [
        (PROMPTS, {"samples": 0}, "samples is 0; it must be 1 or more"),
        (PROMPTS, {"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ([], {}, "holds no records"),
        ([{"prompt": "gi?", "images": ["absent.png"]}], {}, "record 0, images[0]"),
        ([{"prompt": "<image> gi?"}], {}, "1 image places but the record has 0 images"),
        ([{"prompt": " "}], {}, "the user turn is empty"),
    ],
    ids=str,
)
def test_what_is_refused(scripted, given, settings, said):
    with pytest.raises(InputError) as error:
        generate(bundle(), given, SAMPLED, **settings)
    assert said in str(error.value) and not scripted


def test_it_is_greedy_unless_told_otherwise_and_then_gives_one_response(monkeypatch):
    made = []

    def decoder(bundle, sampling, size):
        made.append(sampling)
        return Scripted(bundle.config.decoder.vocab, size)

    monkeypatch.setattr(module, "Generator", decoder)
    generate(bundle(), PROMPTS[:1])
    assert made == [SamplingConfig(temperature=0.0)]
    with pytest.raises(InputError, match="samples is 2, but greedy responses to one prompt are all"):
        generate(bundle(), PROMPTS[:1], samples=2)


def test_logits_that_are_not_finite_are_told_with_their_record():
    """All others are answered before; nothing of it comes out."""
    broken, culprit = nan_for_one(0)
    sampling = SamplingConfig(max_tokens=2)
    with pytest.raises(NotFinite, match=f"^logits are not finite for 1 of 8 records: {culprit}; "):
        generate(broken, PAIRS, sampling, samples=2, batch_size=4)
