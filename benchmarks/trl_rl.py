"""The TRL side of the RLOO benchmark: updates/s and rollout tokens/s of TRL's RLOOTrainer on CPU; one JSON
object on stdout.

Runs in a venv with the extra `oracle` and imports nothing of this project. As in trl_dpo.py: rows in file
order, LoRA, TRL's defaults but for gradient checkpointing, which is off (faster). Each prompt gets
`--samples` responses at temperature 1 of `--tokens` tokens (the random model rarely ends one before); the
reward is minus the length of the text. One update is taken on each rollout.
"""

import argparse
import contextlib
import json
import resource
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from trl_dpo import LORA_TARGETS, PACKAGES, Clock, load_model, load_pairs  # isort: skip - sets variables

import torch
from peft import LoraConfig
from transformers import AutoProcessor
from trl import RLOOConfig, RLOOTrainer


def shorter(completions: list, **_: object) -> list[float]:
    return [-len(each[0]["content"]) / 20 for each in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="HF folder")
    parser.add_argument("--data", type=Path, required=True, help="pairs.jsonl")
    parser.add_argument("--prompts", type=int, default=4, help="of an update")
    parser.add_argument("--samples", type=int, default=4, help="K")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="timed")
    parser.add_argument("--lora-r", type=int, default=16)
    args = parser.parse_args()
    clock = Clock(args.warmup)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RLOOTrainer(
            model=load_model(args.model),
            reward_funcs=shorter,
            args=RLOOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=args.prompts * args.samples,
                num_generations=args.samples,
                max_completion_length=args.tokens,
                temperature=1.0,
                beta=0.05,
                max_steps=args.warmup + args.steps,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                shuffle_dataset=False,
                seed=0,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=load_pairs(args.data).remove_columns(["chosen", "rejected"]),
            processing_class=AutoProcessor.from_pretrained(args.model),
            peft_config=LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules=LORA_TARGETS),
            callbacks=[clock],
        )
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its logs
            trainer.train()
    steps = [b - a for a, b in zip(clock.end, clock.end[1:], strict=False)][args.warmup - 1 :]
    logged = [e for e in trainer.state.log_history if "completions/mean_length" in e][args.warmup :]
    lengths = [e["completions/mean_length"] for e in logged]
    tokens = args.prompts * args.samples * sum(lengths)
    own, busy, _ = (b - a for a, b in zip(*clock.cpu, strict=True))
    report = {
        "side": "trl",
        "updates_per_s": len(steps) / sum(steps),
        "tokens_per_s": tokens / sum(steps),
        "step_s": steps,
        "mean_length": sum(lengths) / len(lengths),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "other_cpu_s": max(busy - own, 0.0),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
