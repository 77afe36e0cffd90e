"""The TRL side of the DPO benchmark: pairs/s of TRL's DPOTrainer on CPU; one JSON object on stdout.

Runs in a venv with the extra `oracle` and imports nothing of this project. For a fair ratio:
  - rows in file order, no truncation (TRL's default max_length of 1024 cuts into image tokens),
    constant learning rate, AdamW;
  - wall time runs from the end of one step to the end of the next, so collation counts;
  - the reference of --mode full is the same folder, of --mode lora the adapter switched off;
  - TRL's defaults stay, where no option says otherwise: gradient checkpointing, all parameters
    trained (the vision tower too), pictures encoded once for chosen and once for rejected;
  - bf16 is TRL's own: autocast over float32 weights;
  - lengths differ between batches: compare totals, over the same steps;
  - `other_cpu_s` tells what else the machine did: distrust a window where it is not small.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracle"))

import torch
from datasets import Dataset, Features, Image, List, Value
from images_only import Images, Qwen3Images
from peft import LoraConfig
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    TrainerCallback,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

logging.set_verbosity_error()
logging.disable_progress_bar()

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
PROCESSORS = {"llava_onevision": Images, "qwen3_vl": Qwen3Images}  # without videos
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "pillow")


def load_pairs(path: Path) -> Dataset:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [row["images"] if "images" in row else [row["image"]] for row in rows]
    columns = {"images": [[str(path.parent / name) for name in group] for group in names]}
    for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        columns[key] = [[{"role": role, "content": row[key]}] for row in rows]
    message = List({"role": Value("string"), "content": Value("string")})
    features = {"images": List(Image()), "prompt": message, "chosen": message, "rejected": message}
    return Dataset.from_dict(columns, Features(features))


def load_model(folder: Path) -> torch.nn.Module:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return CLASSES[kind].from_pretrained(folder, dtype=torch.float32)


def cpu_seconds() -> tuple[float, float, float]:
    """CPU seconds so far: this process, the whole machine, stolen by the hypervisor."""
    own, hz = os.times(), os.sysconf("SC_CLK_TCK")
    with open("/proc/stat") as f:
        user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
    busy = user + nice + system + irq + softirq
    return own.user + own.system, busy / hz, steal / hz


def cpu_model() -> str:
    with open("/proc/cpuinfo") as f:
        names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Clock(TrainerCallback):
    """Begin and end of every step, and the CPU time of the timed window."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.begin, self.end, self.cpu = warmup, [], [], []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.begin.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs) -> None:
        self.end.append(time.perf_counter())
        if len(self.end) == self.warmup:
            self.cpu.append(cpu_seconds())

    def on_train_end(self, *args, **kwargs) -> None:
        self.cpu.append(cpu_seconds())


class TimedCollator:
    def __init__(self, collate) -> None:
        self.collate, self.seconds = collate, []

    def __call__(self, rows: list[dict]) -> dict:
        start = time.perf_counter()
        batch = self.collate(rows)
        self.seconds.append(time.perf_counter() - start)
        return batch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="HF folder")
    parser.add_argument("--data", type=Path, required=True, help="pairs.jsonl")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--gc", type=int, choices=[0, 1], default=1, help="checkpointing")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps, at least 1")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    load_before = os.getloadavg()
    model = load_model(args.model)
    processor = PROCESSORS.get(model.config.model_type, AutoProcessor).from_pretrained(args.model)
    lora = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules=LORA_TARGETS)
    clock = Clock(args.warmup)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=model,
            ref_model=load_model(args.model) if args.mode == "full" else None,
            args=DPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=args.dtype == "bf16",
                per_device_train_batch_size=args.batch,
                max_steps=args.warmup + args.steps,
                learning_rate=args.lr,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                beta=args.beta,
                max_length=None,
                gradient_checkpointing=bool(args.gc),
                train_sampling_strategy="sequential",
                seed=0,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=load_pairs(args.data),
            processing_class=processor,
            peft_config=lora if args.mode == "lora" else None,
            callbacks=[clock],
        )
        trainer.data_collator = TimedCollator(trainer.data_collator)
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its logs
            trainer.train()

    timed = slice(args.warmup, args.warmup + args.steps)
    steps = [b - a for a, b in zip(clock.end, clock.end[1:], strict=False)][args.warmup - 1 :]
    compute = [b - a for a, b in zip(clock.begin, clock.end, strict=True)][timed]
    own, busy, stolen = (b - a for a, b in zip(*clock.cpu, strict=True))
    parameters = list(trainer.model.parameters())
    report = {
        "side": "trl",
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "pairs_per_s": args.batch * args.steps / sum(steps),
        "pairs": args.batch * args.steps,
        "total_s": sum(steps),
        "step_s": steps,
        "compute_s": compute,
        "collate_s": trainer.data_collator.seconds[timed],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "margins": [e["rewards/margins"] for e in trainer.state.log_history if "loss" in e],
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "own_cpu_s": own,
        "other_cpu_s": max(busy - own, 0.0),
        "steal_s": stolen,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "loadavg_before": load_before,
        "loadavg_after": os.getloadavg(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
