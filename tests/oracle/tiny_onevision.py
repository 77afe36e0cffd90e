"""A tiny random LLaVA-OneVision checkpoint with tokenizer and processor, made without a download."""

import json
from pathlib import Path
from typing import Any

from images_only import Images
from tiny_llava import draw_weights, train_tokenizer
from tokenizers import AddedToken
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2Tokenizer,
)

NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
EXTRA = {"image_token": "<image>", "video_token": "<video>"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRA.values()]

# Pictures stand before a turn's text. An answer's turn has a space before its line, the opening of one that
# is asked for has none.
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }} "
    "{% if turn.content is string %}{{ '\\n' + turn.content }}{% else %}"
    "{% for part in turn.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in turn.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def canvases(side: int, most: int) -> list[list[int]]:
    """Canvases of up to `most` tiles a side."""
    return [[side * down, side * across] for down in range(1, most + 1) for across in range(1, most + 1)]


def save_onevision(
    folder: Path,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    grids: list[list[int]],
    most: int,
    tokenizer_vocab: int,
    layer: int = -1,
    tied: bool = False,
    **settings: Any,
) -> None:
    """Writes a normal HF folder.

    text, vision: config fields. grids: canvases (height, width). most: tiles that more are scaled to.
    layer: whose hidden states are features. settings: of the image processor.
    """
    trained = json.loads(train_tokenizer(tokenizer_vocab, SPECIAL, **NAMED)._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Qwen2Tokenizer(trained["vocab"], merges, **NAMED, extra_special_tokens=EXTRA)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    side, image = vision["image_size"], tokenizer.convert_tokens_to_ids("<image>")
    strategy = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": f"anyres_max_{most}"}
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        text_config={"model_type": "qwen2", "eos_token_id": tokenizer.eos_token_id, **text},
        image_token_index=image,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
        tie_word_embeddings=tied,
        vision_feature_layer=layer,
        **strategy,
    )
    images = LlavaOnevisionImageProcessorPil(
        image_grid_pinpoints=grids, size={"height": side, "width": side}, **settings
    )
    length = (side // vision["patch_size"]) ** 2
    processor = Images(images, tokenizer, length, chat_template=CHAT_TEMPLATE, **strategy)
    model = LlavaOnevisionForConditionalGeneration(config)
    draw_weights(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # as published folders name it
    for file in (folder / "processor_config.json", folder / "tokenizer_config.json"):
        file.write_text(file.read_text().replace('"Images"', '"LlavaOnevisionProcessor"'))
    (folder / "model.safetensors").chmod(0o644)
