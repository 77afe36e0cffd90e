"""Writes tiny Idefics3 and SmolVLM folders, and what transformers makes of conversations with them.

    python check_idefics3.py --rows ROWS.json --out FOLDER

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
from PIL import Image
from tiny_idefics3 import CLASSES, save_idefics3
from transformers import Idefics3Processor
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

TEXT = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
VARIANTS = {
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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, variant in VARIANTS.items():
        side = variant.pop("image_size")
        patch = 8 if variant["shuffle"] < 4 else 4
        vision = VISION | {"image_size": side, "patch_size": patch}
        save_idefics3(args.out / name, text=TEXT, vision=vision, tokenizer_vocab=384, **variant)
        model = CLASSES[variant["kind"]][1].from_pretrained(args.out / name, dtype=torch.float32).eval()
        processor, arrays = Idefics3Processor.from_pretrained(args.out / name), {}
        for i, row in enumerate(json.loads(args.rows.read_text())):
            turn = {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
            text = processor.apply_chat_template([*row["messages"], turn], tokenize=False)
            images = [Image.open(file) for file in row["images"]] or None
            inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
            ids = inputs["input_ids"]
            logps = model(**inputs).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            arrays |= {f"ids_{i}": ids[0].numpy(), f"logps_{i}": logps[:, 0].numpy()}
        np.savez(args.out / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
