"""Rewards by transformers (and PEFT) of an exported reward model, and TRL's loss on given rewards.

    python check_reward.py --folder HF_FOLDER --data pairs.jsonl --ids ids.npz --out out.npz \
        [--adapter ADAPTER_FOLDER]
    python check_reward.py --rewards rewards.npz --out out.npz

ids.npz      input_ids, attention_mask [N, S]; row_index [N], each row's line in pairs.jsonl
rewards.npz  rewards [B, 2]; settings [n, 2], each a margin and a centring
out.npz      rewards [N]; or of each setting loss [n] and gradient [n, B, 2], float32
"""

import argparse
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from check_export import load_adapter, read_pictures, refuse
from transformers import AutoConfig, AutoImageProcessor, LlavaNextPreTrainedModel, LlavaPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class LlavaForSequenceClassification(GenericForSequenceClassification, LlavaPreTrainedModel):
    pass


class LlavaNextForSequenceClassification(GenericForSequenceClassification, LlavaNextPreTrainedModel):
    pass


CLASSES = {
    "llava": LlavaForSequenceClassification,
    "llava_next": LlavaNextForSequenceClassification,
}


@torch.no_grad()
def rewards(args: argparse.Namespace) -> dict[str, np.ndarray]:
    kind = AutoConfig.from_pretrained(args.folder).model_type
    model, info = CLASSES[kind].from_pretrained(
        args.folder, num_labels=1, dtype=torch.float32, output_loading_info=True
    )
    head = {"score.weight"} if args.adapter else set()  # a base has none
    refuse(args.folder, set(info["missing_keys"]) - head, info["mismatched_keys"])
    refuse(args.folder, [key for key in info["unexpected_keys"] if not key.endswith("lm_head.weight")])
    if args.adapter:
        model, _ = load_adapter(model, args.adapter)
    model.eval()
    with np.load(args.ids) as stored:
        ids = dict(stored)
    processor = AutoImageProcessor.from_pretrained(args.folder, backend="pil")
    out = []
    for row, mask, picture in zip(
        ids["input_ids"], ids["attention_mask"], read_pictures(args.data, ids["row_index"]), strict=True
    ):
        tokens = torch.from_numpy(row[mask == 1])[None]
        seen = dict(processor(images=[picture], return_tensors="pt"))
        out.append(model(input_ids=tokens, use_cache=False, **seen).logits.item())
    return {"rewards": np.array(out, np.float32)}


def losses(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as given:
        found = [loss(given["rewards"], *setting) for setting in given["settings"].tolist()]
    return dict(zip(("loss", "gradient"), map(np.stack, zip(*found, strict=True)), strict=True))


def loss(rewards: np.ndarray, margin: float, centring: float) -> tuple[np.ndarray, np.ndarray]:
    """TRL's own lines, on rewards in the order that its collator gives: all chosen, then all rejected."""
    from trl import RewardTrainer

    logits = torch.from_numpy(rewards.T.reshape(-1, 1).copy()).requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centring or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )
    inputs = {"margin": torch.full((len(rewards),), margin)} if margin else {}
    found = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    found.backward()
    return found.detach().numpy(), logits.grad.numpy().reshape(2, -1).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("folder", "adapter", "data", "ids", "rewards", "out"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    np.savez(args.out, **(losses(args.rewards) if args.rewards else rewards(args)))


if __name__ == "__main__":
    main()
