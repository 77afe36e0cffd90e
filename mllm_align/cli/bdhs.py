"""`mllm-align bdhs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import Data, PrintConfig, begin, tell
from mllm_align.config import BDHSConfig


@dataclass(frozen=True)
class Bdhs:
    """Preference pairs from SFT records: the model itself makes the rejected responses (BDHS).

    Writes one JSON line per record, in order: index, id, images, prompt, chosen, rejected, bdhs (how it
    was made). Beside it, OUT.log.jsonl says what was run. The same command continues a job that was
    stopped. Image paths stay as they are in the data; where OUT lies elsewhere, train with
    --data.image-root.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("distortion", "mask-rate", "noise-steps", "guided", "iterations", "similarity", "threshold"),
        *("sentence-tokens", "sampling.temperature", "sampling.top-p", "sampling.max-tokens", "batch-size"),
        *("seed", "dtype", "mesh.fsdp", "mesh.tensor", "data.split", "data.max-records", "data.image-root"),
    )

    config_file: Positional[Path]
    """Name of a config (mllm-align configs), a Python file whose get_config() gives a BDHSConfig, or a YAML
    file."""
    model: Path
    """Hugging Face model folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    data_file: Data
    """SFT records, a prompt, images and one response each: a file, or as train takes them."""
    out: Path
    """File to write, JSONL."""
    shard: str = "0/1"
    """Part/parts of the records, one part for each host, written as OUT-00000-of-00004 and so on."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given; needs no other option."""
    config: Annotated[BDHSConfig, arg(name="")] = field(default_factory=BDHSConfig)

    def __call__(self) -> None:
        begin(self.config.distributed)
        from mllm_align.generation.bdhs_job import Shard, bdhs

        shard, config = Shard.parse(self.shard), self.config
        summary = bdhs(config, self.model, self.data_file, self.out, shard)
        left = f", {len(summary['left_out'])} left out (empty or equal)" if summary["left_out"] else ""
        tell(f"{summary['pairs']} pairs in {shard.name(self.out)}{left}; share that differs enough after")
        tell("  ".join(f"try {i + 1}: {share:.3f}" for i, share in enumerate(summary["differ_after"])))
