"""A tiny random Idefics3 or SmolVLM checkpoint with tokenizer and processor, made without a download."""

from pathlib import Path
from typing import Any

from tiny_llava import draw_weights, train_tokenizer
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

NAMED = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
AROUND = ["<image>", "<fake_token_around_image>", "<global-img>"]
TAGS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]

# A colon follows the role; what follows the colon begins with a space unless it is a picture.
CHAT_TEMPLATE = (
    "<|im_start|>{% for turn in messages %}{{ turn.role | capitalize }}:"
    "{% if turn.content is string %} {{ turn.content }}{% else %}"
    "{% if turn.content[0].type != 'image' %} {% endif %}"
    "{% for part in turn.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{{ '<end_of_utterance>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CLASSES = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}


def save_idefics3(
    folder: Path,
    *,
    kind: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    shuffle: int,
    longest: int,
    tokenizer_vocab: int,
    tags: bool = True,
    tied: bool = False,
    **settings: Any,
) -> None:
    """Writes a normal HF folder; kind: idefics3 or smolvlm.

    text, vision: config fields. longest: pixels of an image's longer side. tags: names of tiles are tokens,
    as SmolVLM has them, and not text as in Idefics3. settings: of the image processor.
    """
    special = [*NAMED.values(), *AROUND, *(TAGS if tags else [])]
    tokenizer = train_tokenizer(tokenizer_vocab, special, **NAMED)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in NAMED.items()}
    ids.pop("unk_token_id")
    config_class, model_class = CLASSES[kind]
    config = config_class(
        vision_config=vision,
        text_config=LlamaConfig(max_position_embeddings=8192, **ids, **text),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=shuffle,
        tie_word_embeddings=tied,
    )
    side = vision["image_size"]
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": side}, **settings
    )
    length = (side // vision["patch_size"] // shuffle) ** 2
    processor = Idefics3Processor(images, tokenizer, image_seq_len=length, chat_template=CHAT_TEMPLATE)
    model = model_class(config)
    draw_weights(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
