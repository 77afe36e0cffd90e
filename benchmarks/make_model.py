"""Makes the benchmark's tiny random model, shaped as LLaVA-1.6 or OneVision, and synthetic pairs.

    python benchmarks/make_model.py --out DIR [--family llava_onevision]     # needs the extra `oracle`

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

VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 14,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# width : height. Together they meet all five canvases, so tile counts and lengths differ.
ASPECTS = [(1, 1), (4, 3), (3, 4), (2, 1), (1, 2), (16, 9), (3, 1), (1, 3)]
LONG_SIDE = 448  # pixels, jittered by 30%
PROMPT_TOKENS, RESPONSE_TOKENS = (8, 30), (20, 120)


def write_pairs(folder: Path, tokenizer, count: int) -> None:
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
            unit = LONG_SIDE * texts.uniform(0.7, 1.3) / max(width, height)
            name = f"{i:04d}.png"
            smooth_picture(rng, (round(width * unit), round(height * unit))).save(folder / name)
            row = {"images": [name], "prompt": sentence(PROMPT_TOKENS)}
            row |= {"chosen": sentence(RESPONSE_TOKENS), "rejected": sentence(RESPONSE_TOKENS)}
            f.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--family", choices=["llava_next", "llava_onevision"], default="llava_next")
    args = parser.parse_args()
    model = args.out / "model"
    common = {"vision": VISION, "tokenizer_vocab": TEXT["vocab_size"]}
    if args.family == "llava_next":
        save_llava(model, kind="llava_next", text=TEXT, template_space=True, **common)
    else:  # four tiles are scaled down to three
        grids = five_grids(VISION["image_size"])
        save_onevision(model, text=TEXT | {"model_type": "qwen2"}, grids=grids, most=3, **common)
    write_pairs(args.out / "pairs", AutoTokenizer.from_pretrained(model), args.pairs)


if __name__ == "__main__":
    main()
