"""Writes tests/fixtures/goldens: what torch, transformers and TRL compute on tiny random models.

    python tests/oracle/make_goldens.py [--out FOLDER]      # needs the extra `oracle`

    pairs.jsonl, images/   8 preference pairs; the first four pictures are L, P, RGBA and RGB
    llava15/, llavanext/, onevision/, idefics3/, qwen2_5_vl/, qwen3_vl/, gemma3/, internvl/
                           normal HF folders: the base (reference) model, tokenizer, processor
    <model>.npz            arrays, <model>.json: numbers and versions

The policy is the base moved by noise.py's rule. Everything runs in float32 on one thread, so a
second run writes the same bytes. Batches hold the chosen rows first, then the rejected ones.
"""

import argparse
import json
import os
import platform
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from images_only import Images, InternVLImages, Qwen3Images, Qwen25Images
from noise import perturb
from PIL import Image as PILImage
from safetensors.numpy import load_file, save_file
from tiny_gemma3 import save_gemma3
from tiny_idefics3 import save_idefics3
from tiny_internvl import save_internvl
from tiny_llava import five_grids, pseudo_words, save_llava, smooth_picture
from tiny_onevision import save_onevision
from tiny_qwen_vl import save_qwen_vl
from transformers import (
    AutoProcessor,
    Gemma3ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.data_utils import prepare_multimodal_messages

logging.set_verbosity_error()
logging.disable_progress_bar()

FIXTURES = Path(__file__).parents[1] / "fixtures" / "goldens"

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MISTRAL = {
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}  # as published
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
MODELS = {
    "llava15": {
        "kind": "llava",
        "text": TEXT | {"model_type": "llama", "num_key_value_heads": 4},
        "tokenizer_vocab": 384,
        "template_space": False,
    },
    "llavanext": {
        "kind": "llava_next",
        "text": TEXT | MISTRAL,
        "tokenizer_vocab": 320,  # the embedding is padded past it
        "template_space": True,
    },
    "onevision": {
        "kind": "llava_onevision",
        "text": TEXT | {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e6}},
        "grids": five_grids(56),
        "most": 2,  # three tiles and more are scaled down
        "tokenizer_vocab": 384,
    },
    "idefics3": {
        "kind": "idefics3",
        "text": TEXT | {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3},
        "vision": VISION | {"image_size": 32, "patch_size": 8},
        "shuffle": 2,
        "longest": 90,  # no multiple of a tile
        "tokenizer_vocab": 384,
    },
    "qwen2_5_vl": {
        "kind": "qwen2_5_vl",
        "text": TEXT | {"num_key_value_heads": 2, "rope_parameters": SECTIONS},
        "vision": {
            "depth": 4,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,  # of two by two cells: images have one to three of them a side
            "out_hidden_size": 32,
            "fullatt_block_indexes": [2],
        },
        "area": (32 * 32, 64 * 80),
        "tokenizer_vocab": 384,
    },
    "qwen3_vl": {
        "kind": "qwen3_vl",
        "text": TEXT
        | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": MROPE},
        "vision": {
            "depth": 4,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        "area": (32 * 32, 64 * 80),
        "tokenizer_vocab": 384,
    },
    "gemma3": {
        "kind": "gemma3",
        "text": TEXT
        | {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 12,  # not the size of a head
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,  # less than an image
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            "max_position_embeddings": 8192,
        },
        "vision": VISION | {"image_size": 84},
        "tokens": 9,
        "tokenizer_vocab": 384,
    },
    "internvl": {
        "kind": "internvl",
        "text": TEXT
        | {"num_key_value_heads": 2, "max_position_embeddings": 8192, "rope_parameters": DYNAMIC},
        "vision": VISION | {"attention_bias": True},
        "max_patches": 4,
        "tokenizer_vocab": 384,
    },
}
CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "idefics3": Idefics3ForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "gemma3": Gemma3ForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
}
SAVE = {
    "llava_onevision": lambda folder, kind, **spec: save_onevision(folder, **spec),
    "idefics3": save_idefics3,
    "qwen2_5_vl": save_qwen_vl,
    "qwen3_vl": save_qwen_vl,
    "gemma3": lambda folder, kind, **spec: save_gemma3(folder, **spec),
    "internvl": lambda folder, kind, **spec: save_internvl(folder, **spec),
}
PROCESSORS = {"llava_onevision": Images, "qwen2_5_vl": Qwen25Images, "qwen3_vl": Qwen3Images}
PROCESSORS |= {"internvl": InternVLImages}

# (width, height) and mode: LLaVA-1.6 cuts them into 3, 4 or 5 tiles, with rows or columns to unpad.
PICTURES = [
    ((90, 60), "L"),
    ((40, 100), "P"),
    ((64, 64), "RGBA"),
    ((120, 36), "RGB"),
    ((36, 120), "RGB"),
    ((100, 70), "RGB"),
    ((60, 66), "RGB"),
    ((110, 50), "RGB"),
]
BATCH = 4  # pairs of the golden batch: the first rows of pairs.jsonl
BETA, LABEL_SMOOTHING = 0.1, 0.1
LOSSES = ["sigmoid", "ipo", "hinge", "robust", "sft"]
NEW_TOKENS = 16
OF_TOKENS = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids", "token_type_ids")
TRAJECTORY = {"steps": 4, "batch": 2, "lr": 1e-3}
# Full gradients that are stored: name in model.safetensors -> name in the torch module.
GRADIENTS = {
    "language_model.lm_head.weight": "lm_head.weight",
    "multi_modal_projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight": (
        "model.language_model.layers.0.self_attn.q_proj.weight"
    ),
    "vision_tower.embeddings.patch_embedding.weight": (
        "model.vision_tower.embeddings.patch_embedding.weight"
    ),
}
OTHER_GRADIENTS = {
    "idefics3": (
        "lm_head.weight",
        "model.connector.modality_projection.proj.weight",
        "model.text_model.layers.0.self_attn.q_proj.weight",
        "model.vision_model.embeddings.position_embedding.weight",
    ),
    "qwen2_5_vl": (
        "model.language_model.layers.0.self_attn.k_proj.bias",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.visual.merger.ln_q.weight",
        "model.visual.patch_embed.proj.weight",
    ),
    "qwen3_vl": (
        "model.language_model.layers.0.self_attn.k_norm.weight",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.visual.deepstack_merger_list.1.linear_fc1.weight",
        "model.visual.pos_embed.weight",
    ),
    "gemma3": (
        "model.language_model.layers.0.self_attn.q_norm.weight",
        "model.language_model.layers.1.post_feedforward_layernorm.weight",
        "model.multi_modal_projector.mm_input_projection_weight",
        "model.vision_tower.embeddings.position_embedding.weight",
    ),
    "internvl": (
        "model.language_model.layers.0.self_attn.k_proj.bias",
        "model.multi_modal_projector.layer_norm.weight",
        "model.vision_tower.embeddings.cls_token",
        "model.vision_tower.encoder.layer.1.lambda_1",
    ),
}


def write_pairs(out: Path) -> None:
    rng, texts, words = np.random.default_rng(2), random.Random(2), pseudo_words()
    (out / "images").mkdir(parents=True, exist_ok=True)

    def sentence(low: int, high: int) -> str:
        return " ".join(texts.choices(words, k=texts.randint(low, high))) + "."

    with open(out / "pairs.jsonl", "w") as f:
        for i, (size, mode) in enumerate(PICTURES):
            picture = smooth_picture(rng, size)
            if mode == "RGBA":
                alpha = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[::-1])
                picture.putalpha(PILImage.fromarray(alpha))
            elif mode == "P":
                picture = picture.quantize(32)
            else:
                picture = picture.convert(mode)
            name = f"images/{i}_{mode}.png"
            picture.save(out / name, optimize=True)
            row = {"images": [name], "prompt": sentence(2, 8)}
            row |= {"chosen": sentence(2, 12), "rejected": sentence(2, 12)}
            f.write(json.dumps(row) + "\n")


def load_pairs(path: Path) -> Dataset:
    """Rows as TRL takes them: pictures and chat messages."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def messages(role: str, key: str) -> list:
        return [[{"role": role, "content": row[key]}] for row in rows]

    columns = {
        "images": [[str(path.parent / name) for name in row["images"]] for row in rows],
        "prompt": messages("user", "prompt"),
        "chosen": messages("assistant", "chosen"),
        "rejected": messages("assistant", "rejected"),
    }
    message = List({"role": Value("string"), "content": Value("string")})
    features = {"images": List(Image()), "prompt": message}
    return Dataset.from_dict(columns, Features(features | {"chosen": message, "rejected": message}))


def load_model(kind: str, folder: Path) -> torch.nn.Module:
    return CLASSES[kind].from_pretrained(folder, dtype=torch.float32).eval()


def load_policy(kind: str, base: Path) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder / "config.json").write_text((base / "config.json").read_text())
        weights = perturb(load_file(base / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return load_model(kind, folder)


def make_trainer(rows: Dataset, processor, policy, reference, **options) -> DPOTrainer:
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        beta=BETA,
        label_smoothing=LABEL_SMOOTHING,
        max_length=None,  # TRL's default of 1024 cuts into image tokens
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        seed=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=rows,
        processing_class=processor,
    )


@torch.no_grad()
def per_token_logps(model, batch: dict) -> torch.Tensor:
    """[rows, S - 1], as DPOTrainer gets them: [:, t] scores token t + 1, 0 outside completions."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs


def shares(batch: dict, image_token: int) -> list[int]:
    """How many entries of pixel_values, which are patches, tiles or pictures, belong to each row."""
    if "image_grid_thw" in batch:
        return batch["image_grid_thw"].prod(-1).tolist()
    tokens, entries = (batch["input_ids"] == image_token).sum(1), len(batch["pixel_values"])
    return [1] * len(tokens) if entries == len(tokens) else (tokens * entries // tokens.sum()).tolist()


def part(batch: dict, rows: list[int], shares: list[int]) -> dict:
    """Some rows of a batch."""
    each = batch["pixel_values"].split(shares)
    out = {k: v[rows] for k, v in batch.items() if k != "pixel_values"}
    return out | {"pixel_values": torch.cat([each[row] for row in rows])}


def alone_logps(model, collate, rows: list[dict], shape: tuple[int, int]) -> np.ndarray:
    """The same log-probs with each row collated and run by itself: no padding of any kind."""
    out = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        pair = dict(collate([dict(row)]))
        for j, at in ((0, i), (1, len(rows) + i)):
            one = {k: v.chunk(2)[j] for k, v in pair.items()}
            length = int(one["attention_mask"].sum())
            for k in OF_TOKENS:
                if k in one:
                    one[k] = one[k][:, :length]
            out[at, : length - 1] = per_token_logps(model, one)[0].numpy()
    return out


def greedy(model, processor, rows: list[dict]) -> tuple[np.ndarray, list[float], list[np.ndarray]]:
    """Each prompt decoded alone; the gap tells how near another token ever came to winning. Last, the
    prompts' ids."""
    tokens, gaps, prompts = [], [], []
    for row in rows:
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = processor(images=row["images"], text=text, return_tensors="pt", add_special_tokens=False)
        prompts.append(prompt["input_ids"][0].numpy().astype(np.int32))
        out = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(out.scores, 1).topk(2, -1).values
        tokens.append(out.sequences[0, -NEW_TOKENS:].numpy().astype(np.int32))
        gaps.append(float((top[..., 0] - top[..., 1]).min()))
        # Plain argmax and not the score with </s> ruled out, so a plain greedy decoder agrees.
        assert (torch.stack(out.logits, 1).argmax(-1)[0].numpy() == tokens[-1]).all()
    return np.stack(tokens), gaps, prompts


def trajectory(kind: str, base: Path, rows: Dataset, processor) -> tuple[dict, dict]:
    """Full fine-tuning from the base with TRL's own loop; arrays and numbers."""
    trainer = make_trainer(
        rows,
        processor,
        load_model(kind, base),
        load_model(kind, base),
        per_device_train_batch_size=TRAJECTORY["batch"],
        max_steps=TRAJECTORY["steps"],
        learning_rate=TRAJECTORY["lr"],
    )
    seen, collate = [], trainer.data_collator

    def record(examples):
        out = collate(examples)
        seen.append({k: v.numpy().copy() for k, v in out.items() if v.dtype == torch.int64})
        return out

    trainer.data_collator = record
    trainer.train()
    arrays = {}
    for i, batch in enumerate(seen[: TRAJECTORY["steps"]]):  # the loader may read one ahead
        for k in ("input_ids", "attention_mask", "completion_mask"):
            arrays[f"trajectory/step{i}/{k}"] = batch[k].astype(np.int32)
        pairs = np.arange(i * TRAJECTORY["batch"], (i + 1) * TRAJECTORY["batch"])
        arrays[f"trajectory/step{i}/row_index"] = np.tile(pairs, 2).astype(np.int32)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = {
        **TRAJECTORY,
        "optimizer": "AdamW, betas 0.9 0.999, eps 1e-8, weight decay 0, clip 1.0, constant lr",
        "trained": "all parameters; policy and reference start at the base; sigmoid loss",
        "loss": [entry["loss"] for entry in log],
        "margin": [entry["rewards/margins"] for entry in log],
        "grad_norm": [entry["grad_norm"] for entry in log],
        "chosen_logps_mean": [entry["logps/chosen"] for entry in log],
        "rejected_logps_mean": [entry["logps/rejected"] for entry in log],
    }
    return arrays, numbers


def goldens(name: str, kind: str, out: Path) -> None:
    base_folder = out / name
    processor = PROCESSORS.get(kind, AutoProcessor).from_pretrained(base_folder)
    dataset = load_pairs(out / "pairs.jsonl")
    rows = [dataset[i] for i in range(BATCH)]
    policy, base = load_policy(kind, base_folder), load_model(kind, base_folder)
    trainer = make_trainer(dataset, processor, policy, base)
    policy.eval()
    batch = dict(trainer.data_collator([dict(row) for row in rows]))

    of_pixels = ("pixel_values", "pixel_attention_mask")  # tiles are whole: the mask says nothing
    arrays = {k: batch[k].numpy().astype(np.int32) for k in batch if k not in of_pixels}
    # TRL repeats every picture for the rejected half.
    assert torch.equal(*batch["pixel_values"].chunk(2))
    each = shares(batch, base.config.image_token_id)
    own = part(batch, list(range(BATCH)), each)
    arrays["pixel_values"] = own["pixel_values"].numpy()
    arrays["row_index"] = np.tile(np.arange(BATCH, dtype=np.int32), 2)
    numbers: dict = {
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "transformers", "trl", "peft", "numpy")},
        "beta": BETA,
        "label_smoothing": LABEL_SMOOTHING,  # TRL uses it in `robust` alone
        "attention": base.config._attn_implementation,
        "image_token_id": base.config.image_token_id,
        "tokens": batch["attention_mask"].sum(1).tolist(),
        "image_tokens": (batch["input_ids"] == base.config.image_token_id).sum(1).tolist(),
        "completion_tokens": batch["completion_mask"].sum(1).tolist(),
    }

    for tag, model in (("base", base), ("policy", policy)):
        together = per_token_logps(model, batch)
        summed = torch.cat(trainer.compute_ref_log_probs(model, batch))
        assert torch.allclose(together.sum(1), summed, atol=1e-4)
        alone = alone_logps(model, trainer.data_collator, rows, tuple(together.shape))
        arrays[f"{tag}/per_token_logps"] = together.numpy()
        arrays[f"{tag}/alone_per_token_logps"] = alone
        arrays[f"{tag}/greedy_tokens"], gaps, prompts = greedy(model, processor, rows)
        for i, ids in enumerate(
            prompts
        ):  # where the template asks otherwise than it opens an answer's turn
            asked = batch["input_ids"][i][(batch["attention_mask"] > batch["completion_mask"])[i]]
            if not np.array_equal(ids, asked):
                arrays[f"prompt_ids_{i}"] = ids
        # Idefics3 takes a tile of zeros for padding
        black = batch | {"pixel_values": 1e-20 * batch["pixel_values"]}
        numbers[tag] = {
            "logps": summed.tolist(),
            "logps_black_images": per_token_logps(model, black).sum(1).tolist(),
            "alone_max_abs_diff": float(np.abs(alone - together.numpy()).max()),
            "greedy_min_gap": gaps,
        }

    with torch.no_grad():
        inputs = {k: own[k] for k in ("pixel_values", "image_sizes", "image_grid_thw") if k in own}
        features = policy.model.get_image_features(**inputs, return_dict=True).pooler_output
    arrays["policy/image_features"] = torch.cat([x.reshape(-1, x.shape[-1]) for x in features]).numpy()
    assert len(arrays["policy/image_features"]) == sum(numbers["image_tokens"][:BATCH])

    pairs = [part(batch, [i, BATCH + i], each) for i in range(BATCH)]
    numbers["loss"], numbers["loss_per_pair"], numbers["grad_norm"] = {}, {}, {}
    for loss in LOSSES:
        trainer.loss_types = [loss]
        policy.zero_grad()
        value = trainer.compute_loss(policy, batch)
        value.backward()
        grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm()
        numbers["loss"][loss] = float(value)
        numbers["grad_norm"][loss] = float(norm)
        if loss == "sigmoid":
            wanted = {n: n for n in OTHER_GRADIENTS[kind]} if kind in OTHER_GRADIENTS else GRADIENTS
            for stored, torch_name in wanted.items():
                arrays[f"policy/grad/{stored}"] = grads[torch_name].numpy().copy()
        if loss != "sft":  # TRL's sft is one mean over the tokens of the batch
            with torch.no_grad():
                numbers["loss_per_pair"][loss] = [
                    float(trainer.compute_loss(policy, pair)) for pair in pairs
                ]

    steps, numbers["trajectory"] = trajectory(kind, base_folder, dataset, processor)
    np.savez_compressed(out / f"{name}.npz", **(arrays | steps))
    (out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FIXTURES)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    write_pairs(out)
    for name, spec in MODELS.items():
        kind = spec["kind"]
        save = SAVE.get(kind, save_llava)
        save(out / name, **({"vision": VISION} | spec))
        goldens(name, kind, out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
