"""Scores token rows with transformers (and PEFT): does an exported folder mean the same there?

    python check_export.py --folder HF_FOLDER --data pairs.jsonl --ids ids.npz --out out.npz \
        [--adapter ADAPTER_FOLDER] [--dtype float32]

ids.npz     input_ids, attention_mask, completion_mask [N, S]; optional row_index [N], each row's
            line in pairs.jsonl (default: chosen half, then rejected half, in file order)
out.npz     per_token_logps [N, S] ([:, t] scores token t + 1, 0 outside completions), logps [N],
            modules_to_save (names, empty without an adapter)

An adapter with missing or unexpected keys is refused: PEFT itself would only warn, or say nothing.
Logits come from the plain forward pass, not from TRL's fused head.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from transformers import (
    AutoImageProcessor,
    Gemma3ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "idefics3": Idefics3ForConditionalGeneration,
    "smolvlm": SmolVLMForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "gemma3": Gemma3ForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
}


def load_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model, info = CLASSES[kind].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    refuse(folder, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model.eval()


def load_adapter(model: torch.nn.Module, folder: Path) -> tuple[PeftModel, list[str]]:
    model = PeftModel.from_pretrained(model, folder)
    # from_pretrained drops its report; loading the same adapter again returns it.
    report = model.load_adapter(folder, "default")
    refuse(folder, report.missing_keys, report.unexpected_keys)
    saved = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return model.eval(), saved


def refuse(folder: Path, *problems) -> None:
    if any(problems):
        raise SystemExit(f"{folder}: missing, unexpected or misshapen keys: {problems}")


def read_pictures(data: Path, rows: np.ndarray) -> list[Image.Image]:
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    names = [line["images"][0] if "images" in line else line["image"] for line in lines]
    return [Image.open(data.parent / names[i]) for i in rows]


@torch.no_grad()
def score(model, inputs: dict[str, torch.Tensor], completion: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    targets = inputs["input_ids"][:, 1:, None]
    logps = logits.log_softmax(-1).gather(-1, targets).squeeze(-1) * completion[:, 1:]
    return torch.nn.functional.pad(logps, (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    model, saved = load_model(args.folder, dtype), []
    if args.adapter:
        model, saved = load_adapter(model, args.adapter)
    with np.load(args.ids) as stored:
        ids = {k: stored[k] for k in stored.files if "/" not in k}
    half = np.arange(len(ids["input_ids"]) // 2)
    rows = ids.get("row_index", np.tile(half, 2))
    processor = AutoImageProcessor.from_pretrained(args.folder, backend="pil")
    pictures = read_pictures(args.data, rows)
    nested = not model.config.model_type.startswith("llava")  # the pictures of each row by themselves
    images = [[picture] for picture in pictures] if nested else pictures
    cut = {"crop_to_patches": True} if model.config.model_type == "internvl" else {}
    inputs = dict(processor(images=images, return_tensors="pt", **cut))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for k in ("input_ids", "attention_mask"):
        inputs[k] = torch.from_numpy(ids[k]).long()
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()

    for k in ("num_crops", "num_patches"):
        inputs.pop(k, None)
    if model.config.model_type == "gemma3":  # without them embeddings of an image see only those before
        inputs["token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()

    logps = score(model, inputs, torch.from_numpy(ids["completion_mask"]).long())
    np.savez(
        args.out,
        per_token_logps=logps.numpy(),
        logps=logps.sum(1).numpy(),
        modules_to_save=np.array(saved, dtype=str),
    )
    report = {"rows": len(rows), "logps": logps.sum(1).tolist(), "modules_to_save": saved}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
