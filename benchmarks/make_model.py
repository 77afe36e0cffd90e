"""Makes the benchmark's random model, shaped as LLaVA-1.6, OneVision or Qwen3-VL, and synthetic pairs.

    python benchmarks/make_model.py --out DIR [--family qwen3_vl] [--shape lifelike]

Needs the extra `oracle`. `tiny` compiles and steps fast. `lifelike` has what makes real steps expensive:
8 layers of 384, a vocabulary of 32,000 and tiles of 336 pixels, with prompts of 1,400 to 3,000 tokens.

Writes DIR/model (a normal HF folder) and DIR/pairs (pairs.jsonl + PNGs). Nothing is downloaded, and
the same versions write the same bytes: both sides of a comparison read these files.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracle"))
from tiny_llava import five_grids, pseudo_words, save_llava, smooth_picture
from tiny_onevision import save_onevision
from tiny_qwen_vl import save_qwen_vl

FAMILIES = ("llava_next", "llava_onevision", "qwen3_vl")
TOKENIZER = 1024  # its tokens; a vocabulary may have more
SHAPES = {
    "tiny": {
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
        },
        "text": {
            "vocab_size": TOKENIZER,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    },
    "lifelike": {
        "vision": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": 336,
            "patch_size": 14,
        },
        "text": {
            "vocab_size": 32000,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
        },
    },
}
# width : height. Together they meet all five canvases, so tile counts and lengths differ.
ASPECTS = [(1, 1), (4, 3), (3, 4), (2, 1), (1, 2), (16, 9), (3, 1), (1, 3)]
LONG_SIDES = 2.0  # times the tower's side, jittered by 30%
PROMPT_TOKENS, RESPONSE_TOKENS = (8, 30), (20, 120)


def write_pairs(folder: Path, tokenizer, count: int, long_side: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng, texts, words = np.random.default_rng(0), random.Random(0), pseudo_words()

    def sentence(tokens: tuple[int, int]) -> str:
        budget, text = texts.randint(*tokens), texts.choice(words)
        while True:
            longer = f"{text} {texts.choice(words)}"
            if len(tokenizer(longer + ".", add_special_tokens=False)["input_ids"]) > budget:
                return text + "."
            text = longer

    with open(folder / "pairs.jsonl", "w") as f:
        for i in range(count):
            width, height = ASPECTS[i % len(ASPECTS)]
            unit = long_side * texts.uniform(0.7, 1.3) / max(width, height)
            name = f"{i:04d}.png"
            smooth_picture(rng, (round(width * unit), round(height * unit))).save(folder / name)
            row = {"images": [name], "prompt": sentence(PROMPT_TOKENS)}
            row |= {"chosen": sentence(RESPONSE_TOKENS), "rejected": sentence(RESPONSE_TOKENS)}
            f.write(json.dumps(row) + "\n")


def write_model(folder: Path, family: str, text: dict, vision: dict) -> None:
    side, common = vision["image_size"], {"vision": vision, "tokenizer_vocab": TOKENIZER}
    if family == "llava_next":
        text = text | {"model_type": "llama"}
        save_llava(folder, kind=family, text=text, template_space=True, **common)
    elif family == "llava_onevision":  # four tiles are scaled down to three
        text = text | {"model_type": "qwen2"}
        save_onevision(folder, text=text, grids=five_grids(side), most=3, **common)
    else:
        common["vision"], text = _qwen(text, vision)
        most = 16 * side**2  # 1,024 tokens in the tiny shape
        save_qwen_vl(folder, family, text=text, area=(side**2 // 4, most), **common)


def _qwen(text: dict, vision: dict) -> tuple[dict, dict]:
    """The same sizes under Qwen3-VL's names; four patches are one token."""
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    axis = half // 3
    text = text | {
        "head_dim": 2 * half,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [half - 2 * axis, axis, axis],
            "mrope_interleaved": True,
        },
    }
    same = {name: vision[name] for name in ("hidden_size", "intermediate_size", "patch_size")}
    tower = same | {
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "num_position_embeddings": (vision["image_size"] // vision["patch_size"]) ** 2,
        "out_hidden_size": text["hidden_size"],
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return tower, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--family", choices=FAMILIES, default="llava_next")
    parser.add_argument("--shape", choices=[*SHAPES], default="tiny")
    args = parser.parse_args()
    shape, model = SHAPES[args.shape], args.out / "model"
    write_model(model, args.family, **shape)
    long_side = LONG_SIDES * shape["vision"]["image_size"]
    if args.family == "qwen3_vl":
        long_side *= 2  # a token is 28 by 28 pixels, four times that of the others
    write_pairs(args.out / "pairs", AutoTokenizer.from_pretrained(model), args.pairs, long_side)


if __name__ == "__main__":
    main()
