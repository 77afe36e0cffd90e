"""The Hugging Face side of the generation benchmarks: `generate` on CPU; one JSON object on stdout.

Runs in a venv with the extra `oracle` and imports nothing of this project. It does the job that
`ours_generate.py --write` left: each row a continuation of its own, rows of a batch padded on the left,
batches sorted by length. Masked places are 0 in the 2-D attention mask; as transformers counts positions
from that mask, `position_ids` that count every token are given (`generate` goes on from the last of them).

What a row's image costs, by `--images`:
  - row:     every row brings its pixels, as the processor makes them;
  - record:  preprocessed and encoded once a record, all its rows get the features (`mm_encoder_outputs`);
  - dropped: that, and masked places are left out of the row: this project's shortcut, in transformers;
  - ready:   as row, but everything `generate` takes is made before the time is taken, and once.

With `--turns` it takes one pass for each line on stdin, at one batch size.

`--check` first decodes greedily and compares with the tokens of the job: rows that agree, and for each
other row by how much its first different token led in the logits here.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine, other_cpu_seconds, take_turns

logging.set_verbosity_error()
logging.disable_progress_bar()

PACKAGES = ("torch", "transformers", "numpy", "pillow")


class Peer:
    def __init__(
        self, folder: Path, model: Path, task: str, images: str, dtype: torch.dtype, attention: str
    ):
        self.job = json.loads((folder / f"{task}.json").read_text())
        self.images, self.dtype = images, dtype
        self.processor = AutoProcessor.from_pretrained(model).image_processor
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            model, dtype=dtype, attn_implementation=attention
        ).eval()
        self.model.generation_config.eos_token_id = self.job["stops"] or None
        self.model.generation_config.max_new_tokens = self.job["limit"]
        self.image_token = self.model.config.image_token_id
        self.rows = sorted(self.job["rows"], key=self.length)
        self.features: dict[int, torch.Tensor] = {}
        self.ready: dict[tuple[int, ...], dict] = {}
        self.pixels_s = 0.0

    def length(self, row: dict) -> int:
        return len(row["ids"]) - len(row["hidden"]) * (self.images == "dropped")

    def pixels(self, records: list[int]) -> dict:
        began = time.perf_counter()
        pictures = [Image.open(self.job["images"][i]).convert("RGB") for i in records]
        out = self.processor(pictures, return_tensors="pt")
        self.pixels_s += time.perf_counter() - began
        return {"pixel_values": out["pixel_values"].to(self.dtype), "image_sizes": out["image_sizes"]}

    def row_features(self, row: dict) -> torch.Tensor:
        """A row's image embeddings, one for each place that the row still has."""
        features = self.features[row["record"]]
        if self.images == "record":
            return features
        hidden, ids = set(row["hidden"]), row["ids"]
        places = [i for i, token in enumerate(ids) if token == self.image_token]
        return features[[n for n, i in enumerate(places) if i not in hidden]]

    def image_inputs(self, rows: list[dict]) -> dict:
        if self.images in ("row", "ready"):
            return self.pixels([row["record"] for row in rows])
        new = sorted({row["record"] for row in rows} - set(self.features))
        if new:
            seen = self.model.get_image_features(**self.pixels(new)).pooler_output
            self.features |= dict(zip(new, seen, strict=True))
        features = [self.row_features(row) for row in rows]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}

    def inputs(self, rows: list[dict]) -> dict:
        if self.images != "ready":
            return self.made(rows)
        which = tuple(id(row) for row in rows)
        if which not in self.ready:
            self.ready[which] = self.made(rows)
        return self.ready[which]

    def made(self, rows: list[dict]) -> dict:
        longest = max(map(self.length, rows))
        ids, mask, positions = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
        ids += self.model.config.text_config.pad_token_id
        for n, row in enumerate(rows):
            at = torch.arange(len(row["ids"]))
            real = torch.ones_like(at)
            real[row["hidden"]] = 0
            if self.images == "dropped":
                at, real = at[real == 1], real[real == 1]
            ids[n, -len(at) :] = torch.tensor(row["ids"])[at]
            mask[n, -len(at) :], positions[n, -len(at) :] = real, at
        text = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return text | self.image_inputs(rows)

    def generate(self, rows: list[dict], **options) -> tuple[list[list[int]], tuple | None]:
        """New tokens of each row, a stop the last; the logits of each step if `output_logits` is set."""
        inputs = self.inputs(rows)
        out = self.model.generate(
            **inputs,
            pad_token_id=self.model.config.text_config.pad_token_id,
            return_dict_in_generate=True,
            **options,
        )
        stops, tokens = set(self.job["stops"]), []
        for row in out.sequences[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            tokens.append(row[:end])
        return tokens, out.logits

    def work(self, size: int, **options) -> list[list[int]]:
        """One pass over the job, `size` rows at a time."""
        self.features = {}
        batches = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        return [tokens for rows in batches for tokens in self.generate(rows, **options)[0]]

    def check(self, size: int) -> dict:
        """Greedy decoding against the tokens of the job."""
        leads, count = [], 0
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            made, logits = self.generate(rows, do_sample=False, output_logits=True)
            count += sum(map(len, made))
            for n, (row, tokens) in enumerate(zip(rows, made, strict=True)):
                wanted = row["tokens"]
                if tokens != wanted:
                    at = next(i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b)
                    lead = logits[at][n, tokens[at]] - logits[at][n, wanted[at]]
                    leads.append(float(lead))
        agree = len(self.rows) - len(leads)
        return {"rows": len(self.rows), "agree": agree, "tokens": count, "leads": leads}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["bdhs", "sample", "rollout"])
    parser.add_argument("--folder", type=Path, required=True, help="where the job is")
    parser.add_argument("--model", type=Path, help="default: FOLDER/model")
    parser.add_argument("--images", choices=["row", "record", "dropped", "ready"], default="row")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--turns", action="store_true", help="passes when stdin asks")
    parser.add_argument("--samples", type=int, default=1, help="num_return_sequences")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="rows at once; the best counts")
    parser.add_argument("--passes", type=int, default=1, help="timed passes over the job")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--check", action="store_true", help="compare greedy tokens, too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype, model = getattr(torch, args.dtype), args.model or args.folder / "model"
    peer = Peer(args.folder, model, args.task, args.images, dtype, args.attention)
    greedy = peer.check(args.batch[0]) if args.check else None
    torch.manual_seed(0)
    # top_k=0: transformers would draw from the 50 likeliest
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": args.samples}
    if args.turns:
        peer.work(args.batch[0], **options)
        take_turns(lambda: peer.work(args.batch[0], **options))
        return
    timings = {}
    before = other_cpu_seconds()
    for size in sorted({min(size, len(peer.rows)) for size in args.batch}):
        peer.generate(peer.rows[-size:], **options)  # warm-up, at the longest rows
        peer.pixels_s, cpu, began = 0.0, time.process_time(), time.perf_counter()
        made = [tokens for _ in range(args.passes) for tokens in peer.work(size, **options)]
        seconds, tokens = time.perf_counter() - began, sum(map(len, made))
        timings[size] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "rows_per_s": round(len(made) / seconds, 2),
            "tokens": tokens,
            "rows": len(made),
            "total_s": round(seconds, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
            "pixels_s": round(peer.pixels_s, 3),
        }
    best = max(timings, key=lambda size: timings[size]["tokens_per_s"])
    result = {
        "side": "transformers",
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        **timings[best],
        "greedy": greedy,
        "best_batch": best,
        "by_batch": timings,
        "threads": torch.get_num_threads(),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "other_cpu_s": round(other_cpu_seconds() - before, 2),
        **machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
