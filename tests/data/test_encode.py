"""Records to ids and pixels, against transformers' own processor and templates of every kind."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from coders import PAIRS, TEXT_ONLY, encoder, processor, record
from goldens import FIXTURES, NAMES, goldens, of_transformers
from pieces import pieces
from PIL import Image
from refusals import refusal
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor

from mllm_align.data.encode import Encoder, fingerprint
from mllm_align.data.records import Part, parse_record
from mllm_align.data.table import encode_all
from mllm_align.models.processor import load_processor

BOS, EOS, IMAGE = 1, 2, 4


def template(start="<s>", opening="assistant:", end="</s>", text="part.text"):
    """A chat template: what it begins with, opens and ends an assistant turn with, writes of a text."""
    part = "{% if part.type == 'image' %}<image>{% else %}{{ " + text + " }}{% endif %}"
    return (
        start + "{% for m in messages %}"
        "{% if m.role == 'assistant' %}" + opening + "{% else %}{{ m.role }}: {% endif %}"
        "{% for part in m.content %}" + part + "{% endfor %}"
        "{% if m.role == 'assistant' %}" + end + "{% else %}{{ '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"
    )


def rendered(encoder, record, answer=None):
    """The conversation with an answer; without, the prompt that opens the answer's turn."""
    chat = [message.chat() for message in record.messages]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return encoder.tokenizer.apply_chat_template(
        chat, chat_template=encoder.template, add_generation_prompt=answer is None, tokenize=False
    )


def joint(encoder, record, answer):
    return encoder.tokenizer(rendered(encoder, record, answer), add_special_tokens=False).input_ids


def whole(encoded):
    """Ids of prefix and response, for each response."""
    return [[*encoded.prefix.tolist(), *response.tolist()] for response in encoded.responses]


def decoded(encoder, ids):
    return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# ---- where the prompt ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_prefix_and_response_are_the_joint_tokenization(name, row):
    coder, pair = encoder(name), record(row)
    encoded = coder.encode(pair, 2)
    assert whole(encoded) == [joint(coder, pair, answer) for answer in pair.responses]
    assert all(r.dtype == np.int32 and r[-1] == EOS for r in encoded.responses)


def same(ours, theirs):
    """Whether two groups have the same ids, image rows and pixels."""
    pairs = zip(
        (*ours.prefix.pixels, ours.prefix.tokens, ours.prefix.image, *ours.responses),
        (*theirs.prefix.pixels, theirs.prefix.tokens, theirs.prefix.image, *theirs.responses),
        strict=True,
    )
    return all(np.array_equal(a, b) for a, b in pairs)


def test_as_trl_where_prompt_and_answer_tokenize_alike_apart():
    coder, stored = encoder(), goldens("llava15").groups()
    assert len(stored) == 4
    for row, theirs in zip(PAIRS, stored, strict=False):
        assert same(coder.group(coder.encode(record(row), 2)), theirs)


def test_a_space_that_merges_into_the_answer_belongs_to_the_answer():
    coder, pair = encoder("llavanext"), record(PAIRS[0])
    prompt = rendered(coder, pair)
    assert prompt.endswith("ASSISTANT: ")
    encoded = coder.encode(pair, 2)
    assert decoded(coder, encoded.prefix) == prompt[:-1]
    for ids, answer in zip(encoded.responses, pair.responses, strict=True):
        assert decoded(coder, ids) == f" {answer}</s>"
        assert coder.tokenizer.convert_ids_to_tokens(int(ids[0])).startswith("Ġ")


def test_a_space_of_the_prompt_that_stays_a_token_of_its_own_is_prompt():
    coder = encoder("llavanext")
    encoded = coder.encode(record(chosen="\nku.", rejected="\npoge."), 2)
    assert decoded(coder, encoded.prefix).endswith("ASSISTANT: ")
    assert [decoded(coder, ids) for ids in encoded.responses] == ["\nku.</s>", "\npoge.</s>"]


@pytest.mark.parametrize("name", NAMES)
def test_words_that_all_answers_begin_with_are_answer(name):
    coder = encoder(name)
    encoded = coder.encode(record(chosen="tuku der dame zi.", rejected="tuku der dame nuzu."), 2)
    chosen, rejected = encoded.responses
    assert np.array_equal(chosen[:5], rejected[:5])
    assert decoded(coder, encoded.prefix).endswith("ASSISTANT:")
    assert decoded(coder, chosen) == " tuku der dame zi.</s>"
    assert decoded(coder, rejected) == " tuku der dame nuzu.</s>"


def test_a_token_over_the_boundary_is_answer_even_where_all_answers_share_it():
    coder = encoder(template=template(opening="assistant: m"))
    encoded = coder.encode(record(chosen="e ku.", rejected="e der."), 2)
    assert decoded(coder, encoded.prefix).endswith("\nassistant:")
    assert [decoded(coder, ids) for ids in encoded.responses] == [" me ku.</s>", " me der.</s>"]
    assert encoded.responses[0][0] == encoded.responses[1][0]


def test_a_template_whose_answer_turn_differs_from_its_own_opening():
    """As of models that think: what the two have in common is prompt, the rest is answer."""
    ask = "{% if add_generation_prompt %}assistant"
    coder = encoder(template=template().replace(f"{ask}:", f"{ask}!"))
    encoded = coder.encode(record(), 2)
    assert decoded(coder, encoded.prefix).endswith("\nassistant")
    assert decoded(coder, encoded.responses[0]) == ":tuku der.</s>"


def test_an_answer_follows_the_opening_that_asks_for_it():
    """Where that of an answer's turn has other white space."""
    ask = "{% if add_generation_prompt %}assistant"
    coder = encoder(template=template(opening="assistant \n").replace(f"{ask} \n", f"{ask}\n"))
    pair = record(chosen=" tuku der.", rejected="poge\nku.")
    encoded = coder.encode(pair, 2, opening=True)
    assert decoded(coder, encoded.prefix).endswith("\nassistant\n")
    assert [decoded(coder, ids) for ids in encoded.responses] == [" tuku der.</s>", "poge\nku.</s>"]
    ids, spans = coder.response_spans(pair, (), " tuku der.")
    assert ids.tolist()[: len(encoded.prefix)] == encoded.prefix.tolist()
    assert spans[len(encoded.prefix)][0] == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_responses(count):
    coder = encoder("llavanext")
    pair = record({**PAIRS[1], "responses": ["gi.", "zi."]}, responses=count)
    encoded = coder.encode(pair, count)
    assert len(encoded.responses) == count
    assert whole(encoded) == [joint(coder, pair, answer) for answer in pair.responses[:count]]
    assert encoded.shape.response == max(map(len, encoded.responses))
    assert encoded.length == encoded.shape.prefix + encoded.shape.response


def test_a_response_that_is_not_there_has_no_token():
    coder, pair = encoder(), record()
    for k in (0, 1):
        alone = replace(pair, responses=tuple("" if i == k else pair.responses[i] for i in (0, 1)))
        encoded = coder.encode(alone, 2)
        assert [len(ids) > 0 for ids in encoded.responses] == [k != 0, k != 1]
        only = coder.encode(replace(pair, responses=(pair.responses[1 - k],)), 1)
        assert encoded.responses[1 - k].tolist() == only.responses[0].tolist()
        assert encoded.prefix.tolist() == only.prefix.tolist() and encoded.shape == only.shape


@pytest.mark.parametrize("opening", ["", "assistant:", "assistant: ", "assistant:\n"])
@pytest.mark.parametrize(
    "answers",
    [
        ("🙃 yes", "🙂 no"),
        ("é", "è"),
        ("日本", "日曜"),
        ("👩\u200d👧 a", "👩\u200d👦 a"),
        ("\u0301a", "\u0301b"),
        ("\n\n", " x"),
    ],
)
def test_characters_of_several_bytes_at_the_boundary_stay_whole(opening, answers):
    coder = encoder(template=template(opening=opening).replace("{{ '\\n' }}", ""))
    prompt = "dan 🙂"
    pair = record(prompt=prompt, chosen=answers[0] + "!", rejected=answers[1] + "?")
    encoded = coder.encode(pair, 2)
    assert whole(encoded) == [joint(coder, pair, answer) for answer in pair.responses]
    prefix = decoded(coder, encoded.prefix)
    assert f"<s>user: {prompt}{opening}".startswith(prefix)
    for ids, answer in zip(encoded.responses, pair.responses, strict=True):
        assert prefix + decoded(coder, ids) == f"<s>user: {prompt}{opening}{answer}</s>"


def test_content_that_the_template_trims():
    coder = encoder(template=template(text="part.text | trim"))
    encoded = coder.encode(record(prompt="  gi? \n", chosen=" tuku. ", rejected="\nku.\n"), 2)
    assert decoded(coder, encoded.prefix) == "<s>user: gi?\nassistant:"
    assert [decoded(coder, ids) for ids in encoded.responses] == ["tuku.</s>", "ku.</s>"]


# ---- where a response ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "!\n", "</s>", "</s>\n", "</s></s>\nuser: "])
def test_one_end_of_sequence_and_nothing_after_it(end):
    coder = encoder(template=template(end=end))
    texts = [decoded(coder, ids) for ids in coder.encode(record(), 2).responses]
    kept = end.partition("</s>")[0]
    assert texts == [f"tuku der.{kept}</s>", f"poge ku.{kept}</s>"]


def test_any_end_token_of_the_checkpoint_ends_a_response():
    """As <|eot_id|> beside <|end_of_text|>: no second end is added."""
    golden, own = goldens("llava15"), template(end="<pad>\n")
    pad = processor().tokenizer.pad_token_id
    coder = Encoder(processor(), golden.layout, IMAGE, frozenset({pad}), own)
    assert [ids[-1] for ids in coder.encode(record(), 2).responses] == [pad, pad]
    assert all(EOS not in ids for ids in coder.encode(record(), 2).responses)


@pytest.mark.parametrize("name", NAMES)
def test_earlier_turns_are_prompt_with_their_ends(name):
    coder = encoder(name)
    messages = [
        {"role": "system", "content": "zi te."},
        {"role": "user", "content": "<image>\ngi?"},
        {"role": "assistant", "content": "dan."},
        {"role": "user", "content": "ku?"},
    ]
    pair = record(PAIRS[0], prompt=messages)
    encoded = coder.encode(pair, 2)
    assert whole(encoded) == [joint(coder, pair, answer) for answer in pair.responses]
    # these templates write the system turn as an assistant's, with its end
    assert (encoded.prefix == EOS).sum() == 2 and (encoded.prefix == IMAGE).sum() == 1
    assert [np.flatnonzero(ids == EOS).tolist() for ids in encoded.responses] == [
        [len(ids) - 1] for ids in encoded.responses
    ]


# ---- beginning of sequence ---------------------------------------------------------------------------


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("start", ["<s>", ""])
def test_beginning_of_sequence_as_transformers_writes_it(adds, start):
    own = load_processor(FIXTURES / "llava15")
    if adds:
        own.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    coder = encoder(template=template(start=start), processor=lambda name: own)
    pair = record()
    encoded = coder.encode(pair, 2)
    assert (encoded.prefix == BOS).sum() == (1 if adds or start else 0)
    assert decoded(coder, encoded.prefix).removeprefix("<s>") == "user: gi dan?\nassistant:"
    for ids, answer in zip(whole(encoded), pair.responses, strict=True):
        chat = [message.chat() for message in pair.messages]
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        theirs = LlavaProcessor(own.image_processor, own.tokenizer).apply_chat_template(
            chat, chat_template=coder.template, tokenize=True, return_dict=True
        )
        assert ids == np.ravel(theirs["input_ids"]).tolist()


# ---- what is refused ---------------------------------------------------------------------------------


def test_a_template_that_refuses_a_message():
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem turn') }}{% endif %}"
    coder = encoder(template=check + template())
    assert coder.encode(record(), 2).length
    messages = [{"role": "system", "content": "zi."}, {"role": "user", "content": "gi?"}]
    message = refusal(lambda: coder.encode(record(prompt=messages), 2))
    assert (
        "pairs.jsonl record 3" in message
        and "no system turn" in message
        and "--data.chat-template" in message
    )


def test_a_template_with_a_fault_of_its_own():
    message = refusal(lambda: encoder(template="{% for m in messages %}").encode(record(), 2))
    assert "pairs.jsonl record 3: the chat template refuses it" in message


@pytest.mark.parametrize(
    "change, places", [(("<image>", ""), 0), (("<image>", "<image><image>"), 2), (("<s>", "<s><image>"), 2)]
)
def test_a_template_that_miscounts_image_places(change, places):
    coder = encoder(template=template().replace(*change))
    message = refusal(lambda: coder.encode(record(PAIRS[0]), 2))
    assert f"pairs.jsonl record 3: the chat template writes {places} image places for 1 images" in message


@pytest.mark.parametrize("place", ["<image>", ""])
def test_a_template_that_writes_an_image_into_the_answer(place):
    own = template(end="<image></s>").replace("'image' %}<image>", f"'image' %}}{place}")
    message = refusal(lambda: encoder(template=own).encode(record(PAIRS[0]), 2))
    assert "pairs.jsonl record 3: the chat template writes an image place after the prompt" in message


def test_a_template_that_shares_nothing():
    coder = encoder(template="{{ messages[-1].content[0].text }}")
    assert "share no prompt token" in refusal(lambda: coder.encode(record(), 2))


def folder_copy(tmp_path, name, *without):
    """A folder with all but the weights and the files named."""
    ignored = shutil.ignore_patterns("*.safetensors", *without)
    return shutil.copytree(FIXTURES / name, tmp_path / name, ignore=ignored)


def test_no_chat_template(tmp_path):
    own = load_processor(folder_copy(tmp_path, "llava15", "chat_template.jinja"))
    message = refusal(lambda: encoder(processor=lambda name: own))
    assert "has no chat template" in message and "--data.chat-template" in message
    coder = encoder(processor=lambda name: own, template=template())
    assert decoded(coder, coder.encode(record(), 2).prefix) == "<s>user: gi dan?\nassistant:"


def test_of_several_chat_templates_the_default_one():
    own = load_processor(FIXTURES / "llava15")
    own.chat_template = {"tools": "", "default": template(opening="a:")}
    coder = encoder(processor=lambda name: own)
    assert decoded(coder, coder.encode(record(), 2).prefix) == "<s>user: gi dan?\na:"
    own.chat_template = {"tools": template()}
    assert "has no chat template" in refusal(lambda: encoder(processor=lambda name: own))


def test_no_end_of_sequence_token():
    own = load_processor(FIXTURES / "llava15")
    own.tokenizer.eos_token = None
    assert "eos_token" in refusal(lambda: encoder(processor=lambda name: own))


def test_tokenizer_of_another_model():
    message = refusal(lambda: Encoder(processor(), goldens("llava15").layout, 32000))
    assert "'<image>' is id 4" in message and "image token 32000" in message


# ---- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_ids_and_pixels_of_transformers_own_processor(name, row):
    coder, pair = encoder(name), record(row)
    encoded = coder.encode(pair, 2)
    group = coder.group(encoded)
    picture = Image.open(FIXTURES / row["images"][0])
    for answer, ids in zip(pair.responses, group.responses, strict=True):
        text = rendered(coder, pair, answer)
        theirs = of_transformers(name)(
            images=picture, text=text, return_tensors="np", add_special_tokens=False
        )
        assert np.array_equal([*group.prefix.tokens, *ids], theirs["input_ids"][0])
        pixels = theirs["pixel_values"].reshape(-1, 3, 56, 56)
        wanted = coder.layout.patched(pixels.transpose(0, 2, 3, 1))
        assert all(np.array_equal(a, b) for a, b in zip(group.prefix.pixels, wanted, strict=True))
    assert np.array_equal(group.prefix.tokens == IMAGE, group.prefix.image >= 0)
    assert group.shape == encoded.shape and encoded.sizes == (picture.size,)
    assert group.prefix.patches.dtype == np.float32 and group.prefix.image.dtype == np.int32


@pytest.mark.parametrize("name", NAMES)
def test_a_second_image_goes_on_after_the_tiles_of_the_first(name):
    coder = encoder(name)
    names = ["images/3_RGB.png", "images/1_P.png"]
    pair = record(PAIRS[0], images=names, prompt="<image>\ngi <image> ku?")
    encoded = coder.encode(pair, 2)
    group = coder.group(encoded)
    (w0, h0), (w1, h1) = encoded.sizes
    first, _ = coder.layout.tiles(h0, w0)
    wanted = np.concatenate([coder.layout.rows(h0, w0, 0), coder.layout.rows(h1, w1, first)])
    assert np.array_equal(group.prefix.image[group.prefix.image >= 0], wanted)
    assert len(group.prefix.patches) == encoded.shape.tiles == first + coder.layout.tiles(h1, w1)[0]
    alone = [coder.group(coder.encode(record(PAIRS[0], images=[file]), 2)).prefix.pixels for file in names]
    for ours, each in zip(group.prefix.pixels, zip(*alone, strict=True), strict=True):
        assert np.array_equal(ours, np.concatenate(each))
    # every embedding of the table stands in the prompt at most once, in the order of the places
    rows = group.prefix.image[group.prefix.image > 0]
    assert len(set(rows)) == len(rows) and rows.max() <= len(group.prefix.patches) * coder.layout.tokens
    pictures = [Image.open(FIXTURES / file) for file in names]
    text = rendered(coder, pair, pair.responses[0])
    theirs = of_transformers(name)(
        images=[pictures], text=[text], return_tensors="np", add_special_tokens=False
    )
    assert np.array_equal([*group.prefix.tokens, *group.responses[0]], theirs["input_ids"][0])


@pytest.mark.parametrize("name", NAMES)
def test_a_record_without_images(name):
    coder = encoder(name)
    encoded = coder.encode(record(), 2)
    group = coder.group(encoded)
    assert encoded.shape.tiles == 0 and group.prefix.patches.shape == (0, 16, 588)
    assert np.array_equal(group.prefix.tokens, encoded.prefix) and (group.prefix.image == -1).all()


@pytest.mark.parametrize("name", NAMES)
def test_processors_saved_without_the_vision_encoders_numbers(name, tmp_path):
    """Older folders leave them out; the model's configuration has them."""
    folder = folder_copy(tmp_path, name)
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del config[key]
    file.write_text(json.dumps(config))
    own = load_processor(folder)
    with_it, without = (encoder(name, processor=p) for p in (processor, lambda name: own))
    for row in PAIRS[:3]:
        a, b = (coder.group(coder.encode(record(row), 2)) for coder in (with_it, without))
        assert same(a, b)


def test_an_image_processor_of_another_model():
    own = load_processor(FIXTURES / "llava15")
    own.image_processor.crop_size = {"height": 28, "width": 28}
    coder = encoder(processor=lambda name: own)
    encoded = coder.encode(record(PAIRS[0]), 2)
    message = refusal(lambda: coder.group(encoded))
    assert "1 x [3, 28, 28]" in message and "1 x [3, 56, 56]" in message and "0_L.png" in message


# ---- responses of the same tokens --------------------------------------------------------------------


@pytest.mark.parametrize("chosen, rejected", [(" tuku.", "tuku.\n"), ("tuku.", "tuku.")])
@pytest.mark.parametrize("text", ["part.text", "part.text | trim"])
def test_identical_responses_are_refused(chosen, rejected, text):
    coder = encoder(template=template(text=text))
    message = refusal(lambda: coder.encode(record(chosen=chosen, rejected=rejected), 2))
    assert "pairs.jsonl record 3, rejected: the response is identical to that of chosen" in message
    assert "--data.identical skip" in message
    pair = record({**TEXT_ONLY, "rejected": "ku.", "responses": ["gi.", " ku. "]})
    assert pair.responses == ("tuku der.", "ku.", "gi.", " ku. ")
    assert "responses[1]: the response is identical to that of rejected" in refusal(
        lambda: coder.encode(pair, 4)
    )
    assert len(coder.encode(pair, 3).responses) == 3
    assert coder.encode(record(chosen=chosen, rejected=rejected), 1).responses


@pytest.mark.parametrize("change, rejected", [("lower", "KU tu."), ("replace('!', '.')", "ku tu!")])
def test_responses_that_the_template_makes_the_same_are_refused(change, rejected):
    coder = encoder(template=template(text=f"part.text | {change}"))
    message = refusal(lambda: coder.encode(record(chosen="ku tu.", rejected=rejected), 2))
    assert f"rejected: '{rejected}' has the same tokens as 'ku tu.' of chosen" in message


def test_responses_that_a_normalizer_makes_the_same_are_refused():
    own = load_processor(FIXTURES / "llava15")
    own.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    coder = encoder(processor=lambda name: own)
    message = refusal(lambda: coder.encode(record(chosen="ﬁ ku", rejected="fi ku"), 2))
    assert "rejected: 'fi ku' has the same tokens as 'ﬁ ku' of chosen" in message
    assert encoder().encode(record(chosen="ﬁ ku", rejected="fi ku"), 2)


def test_identical_records_are_skipped_and_counted_beside_over_long_ones():
    coder = encoder(template=template(text="part.text | trim"))
    rows = [{}, {"rejected": "tuku der."}, {"rejected": "tuku der. "}, {"chosen": "ku " * 99}]
    records = [record(id=f"r{i}", **row) for i, row in enumerate(rows)]
    settings = {"responses": 2, "max_length": 90, "over_long": "skip"}
    kept, left_out = encode_all(records, coder, identical="skip", **settings)
    assert [e.index for e in kept] == [0]
    assert left_out == [(1, "r1", "identical"), (2, "r2", "identical"), (3, "r3", "over-long")]
    assert "identical to that of chosen" in refusal(lambda: encode_all(records, coder, **settings))
    message = refusal(lambda: encode_all(records[1:], coder, identical="skip", **settings))
    assert "all 3 records are left out, 2 identical and 1 over-long" in message
    kept, left_out = encode_all(records, coder, responses=1, max_length=999)
    assert len(kept) == 4 and not left_out


# ---- control tokens in a record ----------------------------------------------------------------------

TAGS = ("The tag </s> closes it and the dog is red.", "The tag </s> opens it and two cups are blue.")
SAID = "<s> </s> <unk><pad></s>"


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_sequence_in_a_response_is_text(name):
    coder = encoder(name)
    encoded = coder.encode(record(chosen=TAGS[0], rejected=TAGS[1]), 2)
    for ids, text in zip(encoded.responses, TAGS, strict=True):
        assert ids.tolist().count(EOS) == 1 and ids[-1] == EOS
        assert decoded(coder, ids[:-1]).strip() == text
        bare = coder.tokenizer(
            decoded(coder, ids[:-1]), add_special_tokens=False, split_special_tokens=True
        )
        assert ids[:-1].tolist() == bare.input_ids


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_every_turn_are_text(name):
    coder = encoder(name)
    turns = [
        {"role": "system", "content": SAID},
        {"role": "user", "content": f"<image>\n{SAID} {SAID}"},
        {"role": "assistant", "content": f"{SAID}<image"},
        {"role": "user", "content": [{"type": "text", "text": "</"}, {"type": "text", "text": "s>"}]},
    ]
    plain = json.loads(json.dumps(turns).replace("s>", "x>").replace("<unk>", "u").replace("<pad>", "p"))
    for count in (0, 2):
        answers = {} if not count else {"chosen": SAID, "rejected": f"a {SAID}"}
        encoded = coder.encode(record(PAIRS[0], prompt=turns, responses=count, **answers), count)
        wanted = coder.encode(record(PAIRS[0], prompt=plain, responses=count), count)
        control = [i for i in encoded.prefix if i < 5]
        assert control == [i for i in wanted.prefix if i < 5] and control.count(IMAGE) == 1
        assert decoded(coder, encoded.prefix).count(SAID) == 4
        assert [[i for i in ids if i < 5] for ids in encoded.responses] == [[EOS]] * count
    alone = coder.encode(record(PAIRS[0], prompt=turns, responses=0), 0)
    assert np.array_equal(alone.prefix, coder.tokens(alone.record, alone.sizes, 0)[0])


def test_a_text_at_the_very_start_that_reads_like_the_beginning_of_sequence():
    own = load_processor(FIXTURES / "llava15")
    own.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    bare = template(start="").replace("{{ m.role }}: ", "")
    coder = encoder(template=bare, processor=lambda name: own)
    encoded = coder.encode(record(prompt="<s>gi"), 2)
    assert encoded.prefix.tolist().count(BOS) == 1 == encoded.prefix[0]
    assert decoded(coder, encoded.prefix[1:]) == "<s>gi\nassistant:"


def test_an_image_mark_in_the_text_of_a_record_made_in_python():
    coder = encoder()
    pair = record(PAIRS[0])
    said = replace(pair.messages[-1], content=(*pair.messages[-1].content, Part(" <image>")))
    encoded = coder.encode(replace(pair, messages=(said,), responses=("a <image>", "b")), 2)
    assert (encoded.prefix == IMAGE).sum() == 1 and not (encoded.responses[0] == IMAGE).any()
    assert decoded(coder, encoded.responses[0]) == " a <image></s>"


def test_private_use_characters_of_our_own_are_refused():
    message = refusal(lambda: encoder().encode(record(chosen="a \U0010fffd"), 2))
    assert "pairs.jsonl record 3: its text can't be tokenized" in message and "U+10FFFD" in message


# ---- what a template may take ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 9999999 }}"]
)
def test_a_template_that_has_no_end(source):
    message = refusal(lambda: encoder(template=source).encode(record(), 2))
    assert "pairs.jsonl record 3: the chat template refuses it" in message


# ---- what the tokenizer puts behind a text -----------------------------------------------------------


@pytest.mark.parametrize("behind", ["</s>", "<pad>"])
def test_a_prompt_to_go_on_from_has_no_end_of_sequence(behind):
    own = load_processor(FIXTURES / "llava15")
    own.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A {behind}", special_tokens=[("<s>", BOS), ("</s>", EOS), ("<pad>", 3)]
    )
    for end in ("", "</s>", "</s>\n"):
        coder = encoder(template=template(start="", end=end), processor=lambda name: own)
        plain = encoder(template=template(end=end))
        for pair in (record(), record(PAIRS[0]), record(chosen="tuku </s> der.")):
            theirs = plain.encode(pair, 2)
            assert np.array_equal(
                coder.tokens(pair, theirs.sizes, 0)[0], plain.tokens(pair, theirs.sizes, 0)[0]
            )
            assert np.array_equal(coder.encode(pair, 0).prefix, theirs.prefix)
            assert whole(coder.encode(pair, 2)) == whole(theirs)
            for answer in pair.responses:
                ours, wanted = (c.response_spans(pair, theirs.sizes, answer) for c in (coder, plain))
                assert np.array_equal(ours[0], wanted[0])
                assert ours[1][1:] == [(a - 0, b - 0) for a, b in wanted[1][1:]]


# ---- fingerprint -------------------------------------------------------------------------------------


def named(*rows):
    coder = encoder()
    return fingerprint([coder.encode(record(row), 2) for row in rows])


def test_fingerprint_changes_with_a_token_and_the_order():
    first, second = PAIRS[:2]
    same = named(first, second)
    assert same == named(first, second)
    others = [
        named(second, first),
        named(first),
        named({**first, "chosen": first["chosen"] + "!"}, second),
        named({**first, "chosen": first["rejected"], "rejected": first["chosen"]}, second),
        named({**first, "prompt": first["prompt"] + "!"}, second),
        named({**first, "images": second["images"]}, second),
    ]
    assert len({same, *others}) == 7


def test_fingerprint_changes_with_a_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    other = pixels.copy()
    other[5, 3, 2] ^= 1
    palette = Image.fromarray(pixels[..., 0]).convert("P")
    recoloured = palette.copy()
    recoloured.putpalette(palette.getpalette()[::-1])
    images = [pixels, other, pixels.reshape(4, 6, 3), palette, recoloured]
    prints = [named({**PAIRS[0], "images": [image]}) for image in images]
    assert len(set(prints)) == len(prints)
    assert named({**PAIRS[0], "images": [pixels.copy()]}) == prints[0]


def test_fingerprint_changes_with_a_file(tmp_path):
    def of_file():
        row = {**PAIRS[0], "images": [file.name]}
        pair = parse_record(row, index=0, where="pairs.jsonl record", root=tmp_path)
        return fingerprint([encoder().encode(pair, 2)])

    file = tmp_path / "a.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(file)
    before = of_file()
    assert before == of_file() == named({**PAIRS[0], "images": [file.read_bytes()]})
    Image.new("RGB", (9, 9), (1, 2, 4)).save(file)
    assert before != of_file()


# ---- the prompt alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", PAIRS[:3], ids=range(3))
def test_a_prompt_alone_is_what_transformers_makes_of_it(name, row):
    coder, pair = encoder(name), record({k: row[k] for k in ("images", "prompt")}, responses=0)
    encoded = coder.encode(pair, 0)
    prompt = rendered(coder, pair)
    assert encoded.prefix.tolist() == coder.tokenizer(prompt, add_special_tokens=False).input_ids
    assert encoded.prefix.dtype == np.int32 and encoded.responses == () and encoded.shape.response == 0
    with_answers = coder.encode(record(row), 2)
    assert encoded.sizes == with_answers.sizes and encoded.shape.tiles == with_answers.shape.tiles
    assert all(map(np.array_equal, coder.pixels(encoded), coder.group(with_answers).prefix.pixels))


def test_a_prompt_of_text_alone_has_no_tiles():
    coder = encoder()
    encoded = coder.encode(record({"prompt": "gi dan?"}, responses=0), 0)
    assert decoded(coder, encoded.prefix) == "<s>USER: gi dan? ASSISTANT:"
    assert coder.pixels(encoded).patches.shape == (0, 16, 588)


# ---- where a response's tokens stand -----------------------------------------------------------------


def coders(**settings):
    return [encoder("llavanext", **settings), encoder(processor=lambda name: pieces(), **settings)]


ANSWERS = [
    "tuku. Ku, tuku!",
    "🙂 tuku.\nku 日本。",
    " tuku  ku \n",
    "\n\ntuku",
    "s",
    "USER: gi dan?",
    "</s",
    "tuku </s> ku.",
    "</s><s>",
    ".\n.",
    "é\u0301 👩\u200d👧.",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("opening", ["assistant:", "assistant: ", "s s"])
@pytest.mark.parametrize("kind", [0, 1], ids=["bytes", "pieces"])
def test_spans_are_where_the_tokens_stand_in_the_response(kind, opening, answer):
    coder = coders(template=template(start="", opening=opening))[kind]
    pair = record(chosen=answer)
    ids, spans = coder.response_spans(pair, (), answer)
    assert ids.dtype == np.int32
    assert ids.tolist() == joint(coder, pair, answer) or "</s>" in answer
    assert len(ids) == len(spans) and ids[-1] == EOS and ids.tolist().count(EOS) == 1
    covered = {i for start, stop in spans for i in range(start, stop)}
    assert set(range(len(answer))) <= covered
    # whatever stands before a boundary and the text of what follows make up the response
    first = next(i for i, (_, stop) in enumerate(spans) if stop > 0)
    for at in range(first + 1, len(ids)):
        before, after = spans[at - 1][1], spans[at]
        if 0 < before <= after[0] < after[1] <= len(answer):
            rest = coder.text(ids[at:], ids[first:at].tolist())
            assert answer[:before] + rest.removesuffix("</s>") == answer


@pytest.mark.parametrize("answer", [" tuku. ", "\n tuku.\n", "tuku."])
@pytest.mark.parametrize("trim", ["trim", "replace('x', 'x')"])
def test_spans_where_the_template_trims(trim, answer):
    for coder in coders(template=template(text=f"part.text | {trim}")):
        ids, spans = coder.response_spans(record(chosen=answer), (), answer)
        start = answer.index("tuku.")
        (stop,) = [i for i, span in enumerate(spans) if span[0] == start + 4]
        assert coder.text(ids[stop : stop + 1]).rstrip() == "."
        assert spans[-1][0] >= start + 5


@pytest.mark.parametrize("change", ["upper", "replace('ku', '')", "first"])
def test_templates_that_change_the_response(change):
    coder = encoder(template=template(text=f"part.text | {change}"))
    message = refusal(lambda: coder.response_spans(record(chosen="tuku."), (), "tuku."))
    assert "pairs.jsonl record 3: the chat template changes the response" in message
    assert "--data.chat-template" in message


# ---- text of ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["bytes", "pieces"])
@pytest.mark.parametrize("text", ["tuku ku.", "🙂 tuku 日本", "a  b"])
def test_text_goes_on_after_what_was_there(kind, text):
    coder = coders()[kind]
    before = coder.tokenizer("gi 🙂", add_special_tokens=False).input_ids
    whole = coder.tokenizer(f"gi 🙂 {text}", add_special_tokens=False).input_ids
    assert coder.text(np.array(whole[len(before) :]), before) == f" {text}"
    assert coder.text(np.array([], np.int64), before) == ""


@pytest.mark.parametrize("kind", [0, 1], ids=["bytes", "pieces"])
def test_text_leaves_out_special_tokens_and_images_and_spoils_nothing(kind):
    coder = coders()[kind]
    emoji = coder.tokenizer("🙂", add_special_tokens=False).input_ids
    assert coder.text(np.array([IMAGE, *emoji, EOS]), [BOS, IMAGE]).strip() == "🙂"
    broken = coder.text(np.array(emoji[-3:-1]), emoji)  # bytes that make no character
    assert set(broken) == {"\ufffd"} and len(broken) <= 2


def test_eos_mask():
    golden = goldens("llava15")
    coder = Encoder(processor(), golden.layout, IMAGE, frozenset({7, 900}))
    assert np.flatnonzero(coder.eos_mask(384)).tolist() == [EOS, 7]
    assert not coder.eos_mask(2).any()
