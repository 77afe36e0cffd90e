"""A generated demo: a tiny random LLaVA folder, and pictures with pairs of descriptions.

It demonstrates the whole path from files to an exported model, and that pairs are learnt. It shows nothing
about hallucination: a model with random weights cannot describe a picture.

In each pair the wrong text is as likely a description as the true one (see `_misdescribed`), so text alone
ranks unseen pairs at chance, and held-out accuracy above 0.5 means that the model uses the pictures. During
training the loss falls, and the training pairs become correctly ranked. The default 64 pairs are memorized,
and held-out accuracy stays near 0.5. With `count=1024`, 400 steps of DPO with 8 pairs each (AdamW, rate
2e-3 with cosine decay, beta 0.1, tower frozen, the rest trained) reached 0.72 on `held_out=256`; on 16
pairs the standard error alone is 0.12.

Everything is determined by the seed; the bytes also depend on the versions of Pillow and tokenizers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import save

from mllm_align.data.images import one_line, quoted, refusal
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.registry import family_of, parse_config
from mllm_align.models.names import same

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]

# LLaVA's conversation format. The tokenizer prepends <s>, like Llama's, so the template must not.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """Make the folder; any OSError while writing into it becomes an InputError."""
    remedy = "give a new or an empty folder that can be written to"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise refusal(quoted(out), "the folder is not empty", remedy)
        yield
    except OSError as error:
        raise refusal(quoted(out), f"cannot be written ({one_line(error)})", remedy) from error


# --- the model ----------------------------------------------------------------------------------


def make_model(
    out: str | Path,
    kind: Literal["llava_next", "llava"] = "llava_next",
    seed: int = 0,
    *,
    image_size: int = 56,
    patch_size: int = 14,
    vision_hidden: int = 32,
    vision_mlp: int = 64,
    vision_layers: int = 3,
    vision_heads: int = 4,
    hidden: int = 64,
    mlp: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 512,
    embedding: float = 1.0,
    corpus: Iterable[str] | None = None,
) -> Path:
    """Write a small random LLaVA 1.6 (`llava_next`) or 1.5 (`llava`) Hugging Face folder to `out`.

    It has all files of a published llava-hf folder, with the same tensor names, including the unused last
    vision layer. `vocab` must be large enough for the 256 bytes and the five special tokens; the remaining
    tokens are learnt from `corpus` (default: the demo's own sentences). `embedding`: about the norm of a
    token's embedding. Returns `out`. Raises `InputError` if `out` exists and is not empty, or cannot be
    written.
    """
    if kind not in ("llava_next", "llava"):
        raise refusal("kind", f"found {quoted(kind)}", "give 'llava_next' or 'llava'")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing torch
    import transformers as hf

    anyres, side = kind == "llava_next", image_size
    canvases = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)) if anyres else ()  # LLaVA-1.6's, in tiles
    grids = [[down * side, across * side] for down, across in canvases]
    tokenizer = _tokenizer(vocab, corpus or _corpus())
    named = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    ids: dict[str, Any] = {f"{name}_token_id": SPECIALS.index(token) for name, token in named.items()}
    vision = hf.CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=vision_mlp,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=vision_hidden,
    )
    text = hf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=tokenizer.model_max_length,
        **ids,
    )
    common: dict[str, Any] = {"image_grid_pinpoints": grids} if anyres else {}
    whole = (hf.LlavaNextConfig if anyres else hf.LlavaConfig)(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIALS.index("<image>"),
        image_seq_length=(side // patch_size) ** 2,
        architectures=[f"{'LlavaNext' if anyres else 'Llava'}ForConditionalGeneration"],
        dtype="float32",
        **common,
    )
    pixels = (hf.LlavaNextImageProcessorPil if anyres else hf.CLIPImageProcessorPil)(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **common
    )
    processor = (hf.LlavaNextProcessor if anyres else hf.LlavaProcessor)(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    out = Path(out)
    ours = parse_config(out, whole.to_dict())
    # The config counts the vision layers that are run; the folder holds one more.
    ours = replace(ours, vision=replace(ours.vision, layers=vision_layers))  # type: ignore[type-var]
    with _new_folder(out):
        (out / "model.safetensors").write_bytes(save(_weights(ours, seed, embedding), {"format": "pt"}))
        whole.save_pretrained(out)
        hf.GenerationConfig(**ids).save_pretrained(out)
        processor.save_pretrained(out)
    return out


def _tokenizer(vocab: int, corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus; other texts are encoded as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        add_bos_token=True,
        padding_side="left",
        model_max_length=2048,
    )


def _weights(config: ModelConfig, seed: int, embedding: float) -> dict[str, np.ndarray]:
    """Every tensor of the folder, large enough to matter.

    The usual initialisation (0.02, unit gains, zero biases) would give flat logits, and tests would hardly
    notice two swapped tensors.
    """
    rng = np.random.default_rng(seed)
    norm = "vision_tower.post_layernorm"  # like the last vision layer, there but never read
    unread = [same((), f"{norm}.{leaf}", (config.vision.features,)) for leaf in ("weight", "bias")]
    tensors = {}
    for entry in (*family_of(config).entries(config), *unread):
        x = rng.standard_normal(entry.shape, dtype=np.float32)
        if len(entry.shape) > 1:
            # an embedding [vocab, D] has no fan-in; rows of norm near 1
            x /= np.float32(np.sqrt(np.prod(entry.shape[1:])))
            x *= np.float32(embedding if "embed_tokens" in entry.name else 1)
        elif "norm" in entry.name and entry.name.endswith("weight"):
            x = 1 + np.float32(0.1) * x
        else:
            x *= np.float32(0.1)
        tensors[_published(entry.name)] = x
    return tensors


def _published(name: str) -> str:
    """Undo `ModelFamily.canonical`: the name in the layout of llava-hf."""
    for start, published in (
        ("vision_tower.", "vision_tower.vision_model."),
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(start):
            return published + name.removeprefix(start)
    return name


# --- the pairs ----------------------------------------------------------------------------------

COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
}
GROUNDS = {"white": (255, 255, 255), "grey": (150, 150, 150), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "star")
COUNTS = (1, 2, 3)
SIZES = ((112, 112), (168, 112), (112, 168), (180, 84), (84, 180), (96, 72))  # (width, height)

QUESTIONS = (
    "What is in this picture?",
    "Describe the image.",
    "Which shapes do you see, and how many?",
    "What has been drawn here?",
    "Please tell me what the picture shows.",
    "What colours and shapes are there?",
)
# The verb does not depend on the number of things, so that a pair differs only in the mistake.
ANSWERS = (
    "The picture shows {things} on a {ground} background.",
    "I can see {things}.",
    "This is a drawing of {things} on {ground}.",
    "Someone has drawn {things} on a plain {ground} sheet.",
    "You see {things} here, and nothing else.",
    "On the {ground} background I find {things}.",
)


@dataclass(frozen=True)
class Group:
    """`count` equal shapes of one colour."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        number = {1: article, 2: "two", 3: "three"}[self.count]
        return f"{number} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


Scene = tuple[Group, ...]
"""The contents of a picture: one group of up to three, or two single shapes of different shape and
colour."""


def make_pairs(out: str | Path, count: int = 64, seed: int = 0, *, held_out: int = 16) -> Path:
    """Write `pairs.jsonl` (`count` records), `held_out.jsonl` (further ones) and pictures to `out`.

    The pictures are one to three coloured shapes on a plain ground, PNG and JPEG of several aspect
    ratios. Records are in TRL's format: `chosen` describes the picture, `rejected` says the same
    with one wrong shape, colour or number. Returns the path of `pairs.jsonl`. Raises `InputError`
    for a number below 1 and when `out` exists and is not empty, or cannot be written.
    """
    for name, value in (("count", count), ("held_out", held_out)):
        if value < 1:
            raise refusal(name, f"found {value}", "give a number of at least 1")
    rng = np.random.default_rng(seed)
    out = Path(out)
    with _new_folder(out):
        (out / "images").mkdir()
        rows = [_pair(out, i, rng) for i in range(count + held_out)]
        for name, part in (("pairs.jsonl", rows[:count]), ("held_out.jsonl", rows[count:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (out / name).write_text(lines, encoding="utf-8")
    return out / "pairs.jsonl"


def _pair(out: Path, index: int, rng: np.random.Generator) -> dict[str, Any]:
    scene, ground = _scene(rng), _pick(rng, GROUNDS)
    name = f"images/{index:04}.{_pick(rng, ('png', 'jpg'))}"
    _draw(scene, ground, rng).save(out / name)
    question, answer = _pick(rng, QUESTIONS), _pick(rng, ANSWERS)
    return {
        "id": f"demo-{index:04}",
        "images": [name],
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": _say(answer, scene, ground)}],
        "rejected": [{"role": "assistant", "content": _say(answer, _misdescribed(scene, rng), ground)}],
    }


def _pick(rng: np.random.Generator, among: Any) -> Any:
    options = list(among)
    return options[rng.integers(len(options))]


def _scene(rng: np.random.Generator) -> Scene:
    if rng.integers(2):
        return (Group(_pick(rng, COUNTS), _pick(rng, COLOURS), _pick(rng, SHAPES)),)
    colours, shapes = rng.permutation(list(COLOURS))[:2], rng.permutation(SHAPES)[:2]
    return tuple(Group(1, str(c), str(s)) for c, s in zip(colours, shapes, strict=True))


def _misdescribed(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change one attribute of the scene, to a value that `_scene` could have sampled.

    Scenes are uniformly distributed and every change is as likely as its inverse, so true and wrong
    descriptions have the same distribution: they are indistinguishable without the picture.
    """
    what = _pick(rng, ("colour", "shape", "count") if len(scene) == 1 else ("colour", "shape"))
    values = {"colour": COLOURS, "shape": SHAPES, "count": COUNTS}[what]
    taken = [getattr(group, what) for group in scene]
    wrong = _pick(rng, [value for value in values if value not in taken])
    at = rng.integers(len(scene))
    return (*scene[:at], replace(scene[at], **{what: wrong}), *scene[at + 1 :])


def _say(answer: str, scene: Scene, ground: str) -> str:
    return answer.format(things=" and ".join(map(str, scene)), ground=ground)


def _corpus() -> Iterator[str]:
    """All words of the demo, in conversations."""
    groups = [Group(*each) for each in product(COUNTS, COLOURS, SHAPES)]
    for question, answer, group, ground in product(QUESTIONS, ANSWERS, groups, GROUNDS):
        yield f"USER: \n{question} ASSISTANT: {_say(answer, (group, group), ground)}"


def _draw(scene: Scene, ground: str, rng: np.random.Generator) -> Image.Image:
    """Draw the shapes in random order along the longer side, each at a random position in its own part."""
    size = np.array(_pick(rng, SIZES))
    image = Image.new("RGB", (int(size[0]), int(size[1])), GROUNDS[ground])
    pen = ImageDraw.Draw(image)
    shapes = [group for group in scene for _ in range(group.count)]
    cell, along = size.astype(float), int(size.argmax())
    cell[along] /= len(shapes)
    for i, at in enumerate(rng.permutation(len(shapes))):
        radius = cell.min() / 2 * rng.uniform(0.7, 0.9)
        centre = radius + rng.uniform(size=2) * (cell - 2 * radius)
        centre[along] += i * cell[along]
        points = centre + radius * _outline(shapes[at].shape)
        pen.polygon([(float(x), float(y)) for x, y in points], COLOURS[shapes[at].colour])
    return image


def _outline(shape: str) -> np.ndarray:
    """Corners [N, 2] of the shape in the unit circle, the first one up."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
    turn = 0.5 if shape == "square" else 0.0  # a square rests on its side, not on a corner
    angle = 2 * np.pi * (np.arange(corners) + turn) / corners
    reach = np.where(np.arange(corners) % 2, 0.4, 1.0) if shape == "star" else np.ones(corners)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * reach[:, None]
