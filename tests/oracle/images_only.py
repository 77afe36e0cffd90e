"""transformers' processors without their part for videos, which needs torchvision; these need no torch."""

import re

from transformers import (
    InternVLProcessor,
    LlavaOnevisionProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)


class Images(LlavaOnevisionProcessor):
    """Of LLaVA-OneVision."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [image_token, video_token]
        )
        self.vision_aspect_ratio = vision_aspect_ratio
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class InternVLImages(InternVLProcessor):
    """Of InternVL."""

    def __init__(
        self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None, **kwargs
    ):
        self.image_seq_length = image_seq_length
        for name in ("start_image", "end_image"):
            for field in (f"{name}_token", f"{name}_token_id"):
                setattr(self, field, getattr(tokenizer, field))
        self.image_token, self.video_token = tokenizer.context_image_token, tokenizer.video_token
        self.image_token_id = tokenizer.context_image_token_id
        tokens = {"image": self.image_token, "video": self.video_token}
        named = (f"(?P<{name}>{re.escape(token)})" for name, token in tokens.items())
        self.multimodal_pattern = re.compile("|".join(named))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen:
    """Of both below."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        names = ("image", "video", "vision_start", "vision_end")
        tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        for name, token in zip(names, tokens, strict=True):
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen3Images(Qwen, Qwen3VLProcessor):
    """Of Qwen3-VL."""


class Qwen25Images(Qwen, Qwen2_5_VLProcessor):
    """Of Qwen2.5-VL."""
