"""A tiny random InternVL checkpoint with tokenizer and processor, made without a download."""

import json
from pathlib import Path
from typing import Any

from images_only import InternVLImages
from tiny_llava import draw_weights, train_tokenizer
from tokenizers import AddedToken
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2Tokenizer,
)

NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
EXTRA = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRA.values()]

# A picture stands where it is, and a line after it.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\\n' }}"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{{ '<IMG_CONTEXT>\\n' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_internvl(
    folder: Path,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    tokenizer_vocab: int,
    shuffle: int = 2,
    layer: int = -1,
    tied: bool = False,
    **settings: Any,
) -> None:
    """Writes a normal HF folder.

    text, vision: config fields. shuffle: side, in patches, of the cell that becomes an embedding. layer:
    whose hidden states are features. settings: of the image processor.
    """
    trained = json.loads(train_tokenizer(tokenizer_vocab, SPECIAL, **NAMED)._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Qwen2Tokenizer(trained["vocab"], merges, **NAMED, extra_special_tokens=EXTRA)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    side, patch = vision["image_size"], vision["patch_size"]
    length = (side // patch // shuffle) ** 2
    config = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", "eos_token_id": tokenizer.eos_token_id, **text},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=length,
        downsample_ratio=1 / shuffle,
        vision_feature_layer=layer,
        tie_word_embeddings=tied,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        **settings,
    )
    processor = InternVLImages(images, tokenizer, length, chat_template=CHAT_TEMPLATE)
    model = InternVLForConditionalGeneration(config)
    draw_weights(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # as published folders name it
    for file in (folder / "processor_config.json", folder / "tokenizer_config.json"):
        file.write_text(file.read_text().replace('"InternVLImages"', '"InternVLProcessor"'))
    (folder / "model.safetensors").chmod(0o644)
