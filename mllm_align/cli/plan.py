"""`mllm-align plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import PrintConfig
from mllm_align.config import BDHSConfig, Config
from mllm_align.config.checks import check_number
from mllm_align.errors import InputError


@dataclass(frozen=True)
class Plan:
    """Whether a config fits on a TPU slice that need not be there: memory, FLOPs, a bound on time.

    Prints the verdict, then what it follows from. Compiles the run's real programs (of a BDHS config:
    those of generation) with the TPU compiler, which the extra `plan` brings, and allocates nothing.
    Times are bounds from published figures, not measurements. Without --topology, for the devices of this
    machine. With --remat auto, of every rematerialisation, and which of them a run takes.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("mesh.data", "mesh.fsdp", "mesh.tensor", "batch-size", "micro-batches", "remat", "dtype", "lora"),
        *("lora.rank", "objective", "online", "reference"),
    )

    config_file: Positional[Path]
    """Name of a config (mllm-align configs), a Python file with get_config(), of `train` or of `bdhs`, or a
    YAML file."""
    topology: str | None = None
    """v5e:4x4, v5p:2x2x4, v6e:16x16, ...; 2xv5e:16x16 for two slices; vendors' names too (v5p-32)."""
    model: str = "llava-1.6-7b"
    """llava-1.5-7b, -13b, llava-1.6-7b, -mistral-7b, -13b, -34b, smolvlm-256m, -500m, -2.2b, idefics3-8b,
    or as for train (config.json is read)."""
    prefix: int | None = None
    """Padded tokens of a prompt; default: the model's longest, with 128 of text."""
    response: int | None = None
    """Padded tokens of a response; default: 256."""
    what: tuple[str, ...] = ()
    """Some of train, reference, features, prefill, decode, score, reward; default: what the config runs."""
    sweep: bool = False
    """Rank the meshes that the topology allows, in place of the config's own."""
    json: Path | None = None
    """File to write the plan to."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given."""
    config: Annotated[Config | BDHSConfig, arg(name="")] = field(default_factory=Config)

    def __call__(self) -> None:
        from mllm_align.plan import planner

        def say(text: str) -> None:
            print(text, flush=True)

        for name in ("prefix", "response"):
            check_number(f"--{name}", getattr(self, name), 1, 2**20)
        sizes: dict[str, Any] = {"prefix": self.prefix, "response": self.response}
        if self.what:
            sizes["programs"] = self.what
        if self.sweep:
            if self.topology is None:
                raise InputError("plan --sweep needs --topology")
            plans: Any = planner.sweep(self.config, self.model, self.topology, say, **sizes)
        else:
            plans = planner.plan(self.config, self.model, self.topology, say=say, **sizes)
        if self.json is not None:
            planner.save(plans, self.json)
