"""A tiny random Gemma 3 checkpoint with tokenizer and processor, made without a download."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny_llava import draw_weights, pseudo_words
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
)

NAMED = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
EXTRA = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
TURNS = ["<start_of_turn>", "<end_of_turn>"]
LINES = [
    "\n" * count for count in range(1, 6)
]  # tokens, but no control tokens, as in the published vocabulary

# A system turn becomes the beginning of the user's; roles take turns; texts are trimmed.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set lead = namespace(text='') %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}"
    "{% set turns = messages[1:] %}{% set first = messages[0].content %}"
    "{% set lead.text = (first if first is string else first[0].text) + '\\n\\n' %}{% endif %}"
    "{% for turn in turns %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns, user first') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\\n' }}"
    "{{ lead.text if loop.first else '' }}"
    "{% if turn.content is string %}{{ turn.content | trim }}{% else %}"
    "{% for part in turn.content %}"
    "{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def train_tokenizer(size: int) -> GemmaTokenizer:
    """BPE over characters, bytes where a character is unknown; spaces are written as their own."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    known = [*NAMED.values(), *TURNS, *EXTRA.values(), *LINES, *bytes_]
    rng, words = random.Random(1), pseudo_words()
    corpus = [f"user model {' '.join(rng.choices(words, k=60))}." for _ in range(500)]
    bpe = Tokenizer(models.BPE(unk_token=NAMED["unk_token"]))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    )
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = GemmaTokenizer(trained["vocab"], merges, **NAMED, extra_special_tokens=EXTRA)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in TURNS])
    tokenizer.add_tokens([AddedToken(lines, normalized=False) for lines in LINES])
    return tokenizer


def save_gemma3(
    folder: Path,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    tokens: int,
    tokenizer_vocab: int,
    tied: bool = False,
    **settings: Any,
) -> None:
    """Writes a normal HF folder.

    text, vision: config fields. tokens: embeddings of an image. settings: of the image processor.
    """
    tokenizer = train_tokenizer(tokenizer_vocab)
    image, begin, end, stop = tokenizer.convert_tokens_to_ids(
        [EXTRA["image_token"], EXTRA["boi_token"], EXTRA["eoi_token"], "<end_of_turn>"]
    )
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        text_config=text,
        mm_tokens_per_image=tokens,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
        tie_word_embeddings=tied,
    )
    side = vision["image_size"]
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side}, **settings)
    processor = Gemma3Processor(images, tokenizer, CHAT_TEMPLATE, image_seq_length=tokens)
    model = Gemma3ForConditionalGeneration(config)
    draw_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "vision_tower" not in name:
                parameter -= 1  # gains are stored less 1
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
