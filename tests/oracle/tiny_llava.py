"""Tiny random LLaVA checkpoints, tokenizers, processors and pictures, made without a download."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]

# LLaVA's conversation; %s is a space or nothing. With the space, prompt and completion tokenised
# apart (as TRL does) give other ids than the joined text, which a joint tokeniser gets wrong.
CHAT_TEMPLATE = (
    "<s>{%% for m in messages %%}{%% if m['role'] == 'user' %%}USER: {%% else %%}ASSISTANT: "
    "{%% endif %%}{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}"
    "{%% for part in m['content'] %%}{%% if part['type'] == 'image' %%}<image>\n"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}"
    "{%% if m['role'] == 'user' %%} {%% else %%}</s>{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}ASSISTANT:%s{%% endif %%}"
)


def pseudo_words(count: int = 400, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "er")]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count)]


def train_tokenizer(
    vocab_size: int, special: Sequence[str] = SPECIAL_TOKENS, **named: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over sentences of pseudo-words. named: bos_token, ..., as `special` has them."""
    named = named or {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    rng, words = random.Random(1), pseudo_words()
    corpus = [f"USER: \n{' '.join(rng.choices(words, k=60))}. ASSISTANT: " for _ in range(500)]
    bpe = Tokenizer(models.BPE(unk_token=named["unk_token"]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **named,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=8192,
    )


def five_grids(side: int) -> list[list[int]]:
    """LLaVA-1.6's five (height, width) canvases for a square encoder of this side."""
    s = side
    return [[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]]


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights under which every tensor matters.

    HF's 0.02 init gives flat logits, unit norm gains and zero biases: a wrong image path or a
    swapped gain would hardly move a log-prob.
    """
    rng = np.random.default_rng(seed)
    for name, p in sorted(model.named_parameters()):
        x = rng.standard_normal(tuple(p.shape), dtype=np.float32)
        if p.ndim >= 2:
            embedding = "embed" in name and p.ndim == 2
            x /= np.float32((p.shape[-1] if embedding else p[0].numel()) ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            x = 1 + np.float32(0.1) * x
        else:  # biases, class embedding, image_newline
            x *= np.float32(0.1)
        p.copy_(torch.from_numpy(x))


def save_llava(
    folder: Path,
    *,
    kind: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    tokenizer_vocab: int,
    template_space: bool,
) -> None:
    """Writes a normal HF folder: `kind` is llava (1.5, Llama) or llava_next (1.6).

    `text` and `vision` are config fields; `text["model_type"]` picks Llama or Mistral.
    """
    tokenizer = train_tokenizer(tokenizer_vocab)
    side, patch = vision["image_size"], vision["patch_size"]
    text = dict(text)
    text_class = {"llama": LlamaConfig, "mistral": MistralConfig}[text.pop("model_type")]
    config = {
        "vision_config": CLIPVisionConfig(projection_dim=vision["hidden_size"], **vision),
        "text_config": text_class(
            max_position_embeddings=8192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        ),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": (side // patch) ** 2,
    }
    pixels = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    common = {
        "tokenizer": tokenizer,
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE % (" " if template_space else ""),
        "image_token": "<image>",
    }
    if kind == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
        processor = LlavaProcessor(image_processor=CLIPImageProcessorPil(**pixels), **common)
    else:
        grids = five_grids(side)
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=grids, **config))
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **pixels)
        processor = LlavaNextProcessor(image_processor=images, **common)
    draw_weights(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def smooth_picture(rng: np.random.Generator, size: Sequence[int]) -> Image.Image:
    """A random RGB picture, (width, height), smooth as photographs are."""
    seed = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(seed).resize(tuple(size), Image.Resampling.BICUBIC)
