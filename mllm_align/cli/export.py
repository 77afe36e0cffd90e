"""`mllm-align export`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mllm_align.files import json_text


@dataclass(frozen=True)
class Export:
    """A run's checkpoint as a Hugging Face folder that transformers loads, or as a PEFT adapter.

    Merging into 16-bit weights rounds; what that costs is printed and logged in the run's log.jsonl.
    """

    run: Path
    """Run folder."""
    out: Path
    """Folder to make."""
    adapter: bool = False
    """Write a PEFT adapter (LoRA and projector) instead of merged weights."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; default: as the base folder has them (adapter: float32)."""
    step: Literal["last", "best"] | int = "last"
    """Which checkpoint: the newest, the one with the least held-out loss, or a step."""

    push: str | None = None
    """Upload the folder to this repository of the Hugging Face Hub, owner/name. A new one is private."""

    def __call__(self) -> None:
        from mllm_align.models import hub
        from mllm_align.training.run_model import export_run

        if self.push is not None:
            hub.check_name(self.push)
        report = export_run(self.run, self.out, adapter=self.adapter, dtype=self.dtype, step=self.step)
        with open(self.run / "log.jsonl", "a", encoding="utf-8") as file:
            event = {"event": "export", "time": round(time.time(), 3), "out": str(self.out), **report}
            file.write(json_text(event) + "\n")
        print(json_text({"out": str(self.out), **report}), flush=True)
        if self.push is not None:
            print(json_text({"pushed": hub.push(self.out, self.push)}))
