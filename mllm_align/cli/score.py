"""`mllm-align score`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mllm_align.cli.shared import Data, begin, log_beside, tell
from mllm_align.config import DataConfig, Dtype, MeshConfig
from mllm_align.files import json_text


@dataclass(frozen=True)
class Score:
    """Log-probabilities of chosen and rejected responses.

    Writes one JSON line per record, in order: index, chosen_logp, rejected_logp (nats, summed over
    response tokens, end of sequence included), chosen_tokens, rejected_tokens. Beside it, OUT.log.jsonl
    says what was run.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("data.format", "data.split", "data.max-records", "data.image-root", "data.max-length"),
        *("data.over-long", "data.identical", "mesh.fsdp", "mesh.tensor"),
    )

    model: Path
    """Hugging Face model folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    data_file: Data
    """Preference pairs: a file, a folder or quoted pattern of shards, or the name of a cached data set."""
    out: Path
    """File to write, JSONL."""
    batch_size: int = 8
    """Records at once, over all devices."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __call__(self) -> None:
        begin()
        from mllm_align.models.bundle import load
        from mllm_align.prepare import name_weights
        from mllm_align.result_file import result
        from mllm_align.training.score import score

        began = time.time()
        with result(self.out, self.data_file) as file:  # refused before the work, not after
            bundle = load(self.model, self.dtype, self.mesh)
            lines = score(bundle, self.data_file, config=self.data, batch_size=self.batch_size)
            name_weights(bundle.folder)
            file.writelines(json_text(line) + "\n" for line in lines)
        skipped = [line for line in lines if "left_out" in line]
        log_beside(
            self.out,
            event="score",
            model=self.model,
            model_fingerprint=bundle.folder.fingerprint,
            data=self.data_file,
            dtype=str(bundle.dtype),
            records=len(lines),
            skipped=[line["index"] for line in skipped],
            seconds=round(time.time() - began, 3),
        )
        reasons = Counter(each["left_out"] for each in skipped)
        counts = " and ".join(f"{n} {reason}" for reason, n in reasons.items())
        note = f", {counts} records left out" if skipped else ""
        tell(f"{len(lines) - len(skipped)} records scored to {self.out}{note}")
