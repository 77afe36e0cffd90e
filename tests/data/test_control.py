"""Text of records and control tokens of templates, for tokenizers of every kind.

The oracle is the same tokenizer with its control tokens under names that no text has.
"""

import itertools
import re

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocabularies import BOS, EOS, IMAGE, KINDS, NAMES, OTHER_NAMES, PAD, UNK, tokenizer

from mllm_align.data.control import LAST, ControlTokens
from mllm_align.errors import InputError

TEXTS = [
    "tuku ku.",
    " tuku  ku \n",
    "🙂 tuku.\nku 日本。",
    "a < b > c / s",
    "Wow!! e\u0301",
    "",
    "s>",
]
SPOKEN = [
    "</s>",
    "</s> tuku",
    "tuku </s>",
    "The tag </s> closes it",
    "a<s></s>b",
    "<unk> <pad><image>\n<|im_end|>",
    "<<s>>",
    "</</s>s>",
    "  </s>  ",
    "🙂</s>🙂",
    "</s>\u0301",
]


def control(kind, **settings):
    return ControlTokens(tokenizer(kind, **settings), {IMAGE})


def written(text, names):
    """A text as a template may write it, {0} to {5} being control tokens."""
    return re.sub(r"{(\d)}", lambda found: names[int(found[1])], text)


def oracle(kind, text, special=False, **settings):
    made = tokenizer(kind, OTHER_NAMES, **settings)
    return made(written(text, OTHER_NAMES), add_special_tokens=special)["input_ids"]


def ids_of(of, text, special=False):
    """Of a text whose {0} to {5} the template writes, while the rest is of records."""
    pieces = re.split(r"({\d})", text)
    guarded = "".join(p if i % 2 else of.guard(p) for i, p in enumerate(pieces))
    whole = written(guarded, NAMES)
    ids, spans = of.tokenize(whole, special)
    assert len(ids) == len(spans) and all(0 <= a <= b <= len(whole) for a, b in spans)
    return ids


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_texts_keep_their_ids(kind, normalized):
    of, own = control(kind, normalized=normalized), tokenizer(kind, normalized=normalized)
    for text in TEXTS:
        whole = f"<s>USER: {text}<image>\n ASSISTANT: {text}</s> more {text}</s>"
        theirs = own(whole, add_special_tokens=False, return_offsets_mapping=True)
        assert of.guard(text) == text
        assert of.tokenize(whole, False) == (theirs["input_ids"], theirs["offset_mapping"])
        # what ends in a part of a control token goes the other way, with the same result
        ended = of.guard(f"{whole} <"[-2:])
        theirs = own(f"{whole} <", add_special_tokens=False, return_offsets_mapping=True)
        assert ended == " " + ended[1] != " <"
        assert of.tokenize(whole + ended, False) == (theirs["input_ids"], theirs["offset_mapping"])


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_a_text_are_text(kind):
    of = control(kind)
    for text in (*SPOKEN, *TEXTS):
        for frame in ("{1}USER: {4}\n@ ASSISTANT: @{2}", "@{2}", "@", "{1}@{5}@", "{1} @{2} {2}@{2}"):
            whole = frame.replace("@", text)
            ids = ids_of(of, whole)
            assert ids == oracle(kind, whole), whole
            said = [i for i in ids if i in of._names and i != UNK]
            assert said == [of._own.token_to_id(NAMES[int(n)]) for n in re.findall(r"{(\d)}", frame)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("unigram", "bytes, whole words")])
def test_text_is_as_transformers_has_it_without_special_tokens(kind):
    of, own = control(kind), tokenizer(kind)
    for text in SPOKEN:
        assert (
            ids_of(of, text) == own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_cover_a_text_that_reads_like_control_tokens(kind):
    of = control(kind)
    text = "a </s> b <|im_end|> c"
    guarded = of.guard(text)
    assert len(guarded) == len(text) and "</s>" not in guarded
    _, spans = of.tokenize(f"<s>{guarded}</s>", False)
    covered = {i for start, stop in spans for i in range(start, stop)}
    assert covered >= set(range(3, 3 + len(text)))  # where ▁ is put in front, it has no place


@pytest.mark.parametrize("kind", ["prepend", "bytes"])
@pytest.mark.parametrize("size", range(1, 5))
def test_texts_that_only_together_are_a_control_token(kind, size):
    of = control(kind)
    for first, second in (("</s>"[:size], "</s>"[size:]), ("a </s>"[:size], "</s>"[size - 2 :])):
        for gap in ("", " "):
            text = of.guard(first + gap).strip() + of.guard(second)  # as a template that trims
            assert EOS not in of.tokenize(text, False)[0]


def test_a_template_that_changes_the_case():
    of = control("bytes")
    for text in ("</S>", "a </s> b", "<|IM_end|>", "</ſ>"):
        for change in (str.lower, str.upper, str.title, str.swapcase):
            ids, _ = of.tokenize(f"<s>{change(of.guard(text))}</s>", False)
            assert [i for i in ids if i in of._names] == [BOS, EOS]


def test_a_template_that_cuts_and_joins():
    of = control("bytes")
    guarded = of.guard("a</s>b")
    whole = f"<s>{guarded[:3]}</s>{guarded[3:]}{guarded.replace('a', '')}"
    ids, _ = of.tokenize(whole, False)
    assert ids == oracle("bytes", "{1}a</{2}s>b</s>b")


@pytest.mark.parametrize("text", ["＜/s＞", "＜/s＞ a </s>", "<／s>"])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_normalizer_makes_no_control_token_of_a_text(text, normalized):
    own = tokenizer("unigram", normalized=normalized)
    if text == "＜/s＞":
        assert EOS in own(text, add_special_tokens=False)["input_ids"]
    of = ControlTokens(own, {IMAGE})
    ids, _ = of.tokenize(f"<s>{of.guard(text)}</s>", False)
    assert [i for i in ids if i in of._names] == [BOS, EOS]


def test_what_the_tokenizer_does_not_take_for_control_stays_as_it_is():
    """A normalizer that puts ▁ in front does so to names, too, where they count as normalized: the
    tokenizer of the first Llama has </s> only after a space."""
    own = tokenizer("prepend", normalized=True)
    of = ControlTokens(own, {IMAGE})
    plain = own("<s>a</s>b </s>", add_special_tokens=False)["input_ids"]
    assert plain.count(EOS) == 1
    assert of.tokenize("<s>a</s>b </s>", False)[0] == plain
    spoken, _ = of.tokenize(f"<s>a</s>b{of.guard(' </s>')} </s>", False)
    assert spoken.count(EOS) == 1 and spoken[-1] == EOS
    assert spoken[: len(plain) - 1] == plain[:-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["tuku", "tuku </s>", "<s>"])
def test_what_the_post_processor_puts_behind_is_left_out(kind, text):
    of = control(kind, adds=True)
    whole = of.guard(text) + " a"
    ids, spans = of.tokenize(whole, True)
    assert ids == oracle(kind, text + " a", special=True, adds=True)[:-1]
    assert ids[0] == BOS and EOS not in ids and spans[0] == (0, 0)
    assert of.tokenize(f"{whole}</s>", True)[0][-2:] != [EOS, EOS]
    assert of.tokenize(f"{whole}</s>", True)[0][-1] == EOS
    assert of.tokenize(whole, False)[0] == ids[1:]


def test_private_use_characters():
    of = control("bytes")
    used = len(of._guards) + len(of._aliases)
    for clash in (LAST, LAST + 1 - used):
        with pytest.raises(ValueError, match=f"U\\+{clash:X}"):
            of.guard(f"a {chr(clash)}")
    for others in ("\ue000", "\U000f0000", chr(LAST - used), "\U0010ffff"):
        assert of.guard(others) == others
        assert ids_of(of, f"{{1}}{others} </s>{{2}}") == oracle("bytes", f"{{1}}{others} </s>{{2}}")


# ---- control tokens of other forms -------------------------------------------------------------------


def with_tokens(*tokens, **settings):
    backend = KINDS["bytes"](NAMES)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    backend.add_special_tokens(list(tokens))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **settings})


@pytest.mark.parametrize(
    "names",
    [("<a>", "<a>b", "<a><a>"), ("b<a>", "<a>"), ("⊥", "⊥⊥"), ("a", "b"), ("🙂", "🙃x"), ("EOS", "eos")],
    ids=lambda names: names[0],
)
def test_control_tokens_that_overlap_or_are_short(names):
    own = with_tokens(*(AddedToken(name, normalized=False) for name in names))
    of = ControlTokens(own, ())
    for size in (1, 2, 3):
        for parts in itertools.product((*names, "k"), repeat=size):
            text = "".join(parts)
            plain = own(text, add_special_tokens=False)["input_ids"]
            assert of.tokenize(text, False)[0] == plain
            known = own(f"<s>{text}</s>", add_special_tokens=False, split_special_tokens=True)
            ids, _ = of.tokenize(f"<s>{of.guard(text)}</s>", False)
            bare = own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert ids == [BOS, *bare, EOS] and known["input_ids"] != ids


def test_white_space_as_a_control_token():
    own = with_tokens(AddedToken("\n", normalized=False))
    newline = own.convert_tokens_to_ids("\n")
    of = ControlTokens(own, ())
    guarded = of.guard("ku\n")
    ids, _ = of.tokenize(f"<s>{guarded}\n\n</s>\n", False)
    bare = own("ku\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == [BOS, *bare, newline, newline, EOS, newline] and newline not in bare


@pytest.mark.parametrize("sides", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_control_tokens_that_take_white_space_with_them(sides):
    own = with_tokens(AddedToken("<a>", normalized=False, **sides))
    a = own.convert_tokens_to_ids("<a>")
    of = ControlTokens(own, ())
    whole = "ku <a> ku"
    assert of.tokenize(whole, False)[0] == own(whole, add_special_tokens=False)["input_ids"]
    ids, _ = of.tokenize(f"{of.guard('<a>')} ku <a> ku", False)
    plain = own(whole, add_special_tokens=False)["input_ids"]
    assert ids[-len(plain) + 1 :] == plain[1:] and ids.count(a) == 1


def test_a_control_token_that_must_stand_alone():
    own = with_tokens(AddedToken("END", normalized=False, single_word=True))
    end = own.convert_tokens_to_ids("END")
    of = ControlTokens(own, ())
    for text, count in (("END", 1), ("ENDS", 0), ("a END.", 1), ("END<s>END", 2)):
        whole = f"{text} {of.guard('END </s>')}"
        ids, _ = of.tokenize(whole, False)
        assert ids.count(end) == count and EOS not in ids


def test_an_ordinary_character_that_serves_as_padding_stays_ordinary():
    own = with_tokens(AddedToken("!", normalized=False), pad_token="!")
    of = ControlTokens(own, ())
    assert of.guard("Wow!!") == "Wow!!"
    assert of.tokenize("Wow!!", False)[0] == own("Wow!!", add_special_tokens=False)["input_ids"]
    assert EOS not in of.tokenize(of.guard("Wow!! </s>"), False)[0]


def test_a_token_that_is_not_special_stays_a_token():
    """As <think>: data may have it, and templates look for it."""
    own = with_tokens()
    own.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    think = own.convert_tokens_to_ids("<think>")
    text = "<think>a</s>"
    of = ControlTokens(own, ())
    assert of.guard(text).startswith("<think>a") and "</s>" not in of.guard(text)
    assert of.tokenize(of.guard(text), False)[0][0] == think
    assert "<think>" not in ControlTokens(own, {think}).guard(text)


def test_a_control_token_that_cannot_be_meant():
    own = with_tokens(AddedToken("<" + "x" * 5000, normalized=False))
    with pytest.raises(InputError, match=r"the control token '<xxx.* has 5001 characters; copy"):
        ControlTokens(own, [])


def test_a_tokenizer_without_added_tokens():
    backend = Tokenizer(models.BPE({"a": 0, "<": 1, "s": 2, ">": 3}, []))
    of = ControlTokens(PreTrainedTokenizerFast(tokenizer_object=backend), ())
    assert of.guard("a<s>") == "a<s>" and of.tokenize("a<s>", True)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_settings_of_the_file_that_cut_or_fill(setting):
    own = tokenizer("bytes")
    backend = own.backend_tokenizer
    backend.enable_truncation(3) if setting == "truncation" else backend.enable_padding(
        length=99, pad_id=PAD
    )
    of = ControlTokens(own, ())
    assert len(of.tokenize("tuku ku tuku", False)[0]) == len(
        of.tokenize(of.guard("tuku ku tuku"), False)[0]
    )
    assert 3 < len(of.tokenize(of.guard("a </s> tuku ku"), False)[0]) < 30


def test_a_tokenizer_that_needs_the_name_of_a_control_token():
    """Of its merges one makes the token of text, and words are looked up whole."""
    vocab = {t: i for i, t in enumerate(["a", "b", "ab", "<s>"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=True))
    backend.add_special_tokens(["ab", "<s>"])
    of = ControlTokens(PreTrainedTokenizerFast(tokenizer_object=backend), ())
    assert of.tokenize("abba", False)[0] == [2, 1, 0]
    with pytest.raises(ValueError, match="can't do without its control tokens"):
        of.tokenize(of.guard("<s>ab"), False)


def test_a_normalizer_that_drops_the_names_of_the_twin():
    backend = KINDS["bytes"](NAMES)
    backend.normalizer = normalizers.Replace(chr(LAST), "")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("<|a|>"), AddedToken("⊥", normalized=True)])
    of = ControlTokens(PreTrainedTokenizerFast(tokenizer_object=backend), ())
    with pytest.raises(ValueError, match=r"ids of|into control tokens"):
        of.tokenize(of.guard("<|a|>") + "⊥", False)
