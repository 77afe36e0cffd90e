"""Writes tiny folders of families beside LLaVA, and what transformers makes of conversations with them.

    python check_families.py --rows ROWS.json --out FOLDER

ROWS.json      a list of {"messages": chat, "images": [files], "answer": text}
FOLDER/<name>  a folder of each of VARIANTS
<name>.npz     of each row i: ids_i, of prompt and answer by transformers' own processor; logps_i [len - 1],
               the log-probability of every id after the first
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from images_only import Images, InternVLImages
from PIL import Image
from tiny_gemma3 import save_gemma3
from tiny_idefics3 import CLASSES as IDEFICS3_CLASSES
from tiny_idefics3 import save_idefics3
from tiny_internvl import save_internvl
from tiny_onevision import canvases, save_onevision
from tiny_qwen_vl import CLASSES, save_qwen_vl
from transformers import (
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Processor,
    InternVLForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

TEXT = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
IDEFICS3 = {
    # published SmolVLM2; its own processor needs torchvision, and writes the same texts
    "smolvlm": {"kind": "smolvlm", "tied": True, "shuffle": 4, "longest": 128, "image_size": 32},
    # of 50 pixels a side, 2 fill no patch
    "text": {"kind": "idefics3", "tags": False, "shuffle": 3, "longest": 120, "image_size": 50},
    "whole": {
        "kind": "idefics3",
        "do_image_splitting": False,
        "shuffle": 2,
        "longest": 90,
        "image_size": 32,
    },
}
ONEVISION = {
    # as published: six by six tiles, nine of them at most
    "onevision": {"tied": True, "grids": canvases(32, 6), "most": 9, "image_size": 32},
    "onevision scaled": {"grids": canvases(50, 3), "most": 1, "image_size": 50, "layer": -2},
}
MROPE = {"head_dim": 24, "rope_parameters": {"rope_type": "default", "mrope_section": [6, 3, 3]}}
EYES = {"hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 32}
QWEN = {
    "qwen2.5": {
        "kind": "qwen2_5_vl",
        "tied": True,
        "text": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision": {"depth": 5, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1, 4]},
        "area": (16 * 16, 64 * 64),
    },
    "qwen2.5 cells of nine": {
        "kind": "qwen2_5_vl",
        "text": {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "rope_theta": 1e4},
        "vision": {"depth": 3, "patch_size": 6, "window_size": 60, "fullatt_block_indexes": []}
        | {"spatial_merge_size": 3, "temporal_patch_size": 1, "hidden_act": "gelu"},
        "area": (18 * 18, 90 * 90),
    },
    "qwen3": {
        "kind": "qwen3_vl",
        "tied": True,
        "text": MROPE | {"num_hidden_layers": 4, "attention_bias": True},
        "vision": {"depth": 5, "patch_size": 4, "deepstack_visual_indexes": [1, 2, 4]}
        | {"num_position_embeddings": 25},
        "area": (16 * 16, 64 * 64),
    },
    "qwen3 cells of nine": {
        "kind": "qwen3_vl",
        "text": MROPE,
        "vision": {"depth": 2, "patch_size": 6, "deepstack_visual_indexes": [], "spatial_merge_size": 3}
        | {"temporal_patch_size": 1, "hidden_act": "gelu", "num_position_embeddings": 9},
        "area": (18 * 18, 90 * 90),
    },
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3 = {
    # as published, in small: every sixth layer sees everything, the last one a window
    "gemma3": {
        "tied": True,
        "text": {"num_hidden_layers": 7, "head_dim": 12, "query_pre_attn_scalar": 9, "sliding_window": 12}
        | {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}}},
        "image_size": 64,
        "tokens": 16,
    },
    "gemma3 windows everywhere": {
        "text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "attention_bias": True}
        | {"layer_types": [SLIDING, SLIDING], "hidden_activation": "silu"},
        "image_size": 50,
        "tokens": 9,
    },
}
INTERNVL = {
    # as the towers of 38B and 78B are; up to twelve tiles
    "internvl": {
        "tied": True,
        "vision": {"use_qk_norm": True, "norm_type": "rms_norm"},
        "layer": -2,
        "image_size": 32,
    },
    # as 3.5; of 50 pixels a side, 2 fill no patch
    "internvl qwen3": {
        "text": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True},
        "vision": {"attention_bias": True},
        "shuffle": 1,
        "min_patches": 2,
        "max_patches": 5,
        "image_size": 50,
    },
}


def save(folder: Path, name: str, variant: dict) -> tuple[type, type]:
    """Writes a folder; its classes of model and processor."""
    common = {"text": TEXT | variant.pop("text", {}), "tokenizer_vocab": 384}
    if name in QWEN:
        save_qwen_vl(folder, vision=EYES | variant.pop("vision"), **common, **variant)
        return CLASSES[variant["kind"]][1:]
    if name in GEMMA3:
        vision = VISION | {"image_size": variant.pop("image_size"), "patch_size": 8}
        save_gemma3(folder, vision=vision, **common, **variant)
        return Gemma3ForConditionalGeneration, Gemma3Processor
    patch = 4 if variant.get("shuffle") == 4 else 8
    vision = VISION | {"image_size": variant.pop("image_size"), "patch_size": patch}
    if name in INTERNVL:
        save_internvl(folder, vision=vision | variant.pop("vision"), **common, **variant)
        return InternVLForConditionalGeneration, InternVLImages
    if name in ONEVISION:
        save_onevision(folder, vision=vision, **common, **variant)
        return LlavaOnevisionForConditionalGeneration, Images
    save_idefics3(folder, vision=vision, **common, **variant)
    return IDEFICS3_CLASSES[variant["kind"]][1], Idefics3Processor


def ask(processor, messages: list, answer: str) -> str:
    """The conversation; OneVision's answers follow the opening that the template asks with."""
    if isinstance(processor, Images):
        asked = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return f"{asked}{answer}<|im_end|>"
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return processor.apply_chat_template([*messages, turn], tokenize=False)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, variant in (IDEFICS3 | ONEVISION | QWEN | GEMMA3 | INTERNVL).items():
        model_class, processor_class = save(args.out / name, name, variant)
        model = model_class.from_pretrained(args.out / name, dtype=torch.float32).eval()
        processor, arrays = processor_class.from_pretrained(args.out / name), {}
        for i, row in enumerate(json.loads(args.rows.read_text())):
            images = [Image.open(file) for file in row["images"]] or None
            if name in ONEVISION | GEMMA3 and images:
                images = [images]  # of one conversation
            text = ask(processor, row["messages"], row["answer"])
            inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
            ids = inputs["input_ids"]
            logps = model(**inputs).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            arrays |= {f"ids_{i}": ids[0].numpy(), f"logps_{i}": logps[:, 0].numpy()}
        np.savez(args.out / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
