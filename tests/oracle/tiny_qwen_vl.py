"""A tiny random Qwen2.5-VL or Qwen3-VL checkpoint with tokenizer and processor, without a download."""

import json
from pathlib import Path
from typing import Any

from images_only import Qwen3Images, Qwen25Images
from tiny_llava import draw_weights, train_tokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
AROUND = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
EXTRA = ["<|im_start|>", *AROUND]
SPECIAL = ["<|endoftext|>", "<|im_end|>", *EXTRA]

CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role + '\\n' }}"
    "{% if turn.content is string %}{{ turn.content }}{% else %}"
    "{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# as published, a system turn of its own where none is given
SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nder.<|im_end|>\\n' }}{% endif %}"
CLASSES = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen25Images),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3Images),
}


def save_qwen_vl(
    folder: Path,
    kind: str,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    area: tuple[int, int],
    tokenizer_vocab: int,
    tied: bool = False,
    **settings: Any,
) -> None:
    """Writes a normal HF folder.

    kind: one of CLASSES. text, vision: config fields. area: fewest and most pixels of an image.
    settings: of the image processor.
    """
    trained = json.loads(train_tokenizer(tokenizer_vocab, SPECIAL, **NAMED)._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Qwen2Tokenizer(trained["vocab"], merges, **NAMED, extra_special_tokens=EXTRA)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config_class, model_class, processor_class = CLASSES[kind]
    config = config_class(
        vision_config=vision,
        text_config={"eos_token_id": tokenizer.eos_token_id, **text},
        tie_word_embeddings=tied,
        **dict(zip(names, tokenizer.convert_tokens_to_ids(AROUND), strict=True)),
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": area[0], "longest_edge": area[1]},
        patch_size=vision["patch_size"],
        merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        **settings,
    )
    template = (SYSTEM if kind == "qwen2_5_vl" else "") + CHAT_TEMPLATE
    processor = processor_class(images, tokenizer, chat_template=template)
    model = model_class(config)
    draw_weights(model)
    model.generation_config.bos_token_id = None  # a default is beyond the small vocabulary
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # as published folders name it
    for file in (folder / "processor_config.json", folder / "tokenizer_config.json"):
        file.write_text(
            file.read_text().replace(processor_class.__name__, processor_class.__bases__[1].__name__)
        )
    (folder / "model.safetensors").chmod(0o644)
