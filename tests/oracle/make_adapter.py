"""Trains nothing: writes a PEFT adapter with random terms over a folder, as PEFT itself saves it.

    python make_adapter.py --folder HF_FOLDER --out ADAPTER_FOLDER [--settings '{"use_rslora": true}']

The projector is a module to save, moved from where it was; target modules are the settings', or all linear
maps named q_proj, v_proj and down_proj, the vision tower's among them.
"""

import argparse
import json
from pathlib import Path

import torch
from check_export import load_model
from peft import LoraConfig, get_peft_model

LLAVA = ("llava", "llava_next", "llava_onevision", "gemma3", "internvl")
QWEN = dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), "visual.merger")
PROJECTORS = dict.fromkeys(LLAVA, "multi_modal_projector") | QWEN | {"idefics3": "connector"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    model = load_model(args.folder, torch.float32)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "modules_to_save": [PROJECTORS[model.config.model_type]],
    }
    adapted = get_peft_model(model, LoraConfig(**(settings | args.settings)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                moved = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + moved if "modules_to_save" in name else moved)
    adapted.save_pretrained(args.out)


if __name__ == "__main__":
    main()
