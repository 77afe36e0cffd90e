"""`mllm-align generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mllm_align.cli.shared import OptionalData, begin, note, tell
from mllm_align.config import DataConfig, Dtype, MeshConfig, SamplingConfig
from mllm_align.errors import InputError


@dataclass(frozen=True)
class Generate:
    """A model's responses: to one prompt, printed, or to a file of prompts.

    Greedy, unless --sampling.temperature is given; stderr says what was used.
    With --data, OUT gets one JSON line per record, in order: index, id, responses (null for one left out as
    over-long).
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("sampling.temperature", "sampling.top-k", "sampling.top-p", "sampling.max-tokens"),
        *("data.split", "data.max-records", "data.image-root", "data.max-length", "data.over-long"),
        *("mesh.fsdp", "mesh.tensor"),
    )

    model: Path
    """Hugging Face model folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    image: tuple[Path, ...] = ()
    """Image files, in the order in which the prompt speaks of them."""
    prompt: str | None = None
    """What to ask."""
    preference: str | None = None
    """What the user wants of every answer, as "Be brief."; stated before the prompt, as a record's
    preferences are (docs/data.md)."""
    data_file: OptionalData = None
    """In place of --image and --prompt: records with prompts and images, a file or as train takes them."""
    out: Path | None = None
    """File to write, JSONL; needed with --data."""
    samples: int = 1
    """Responses to each prompt."""
    seed: int = 0
    """Of the sampled tokens; the same seed gives a record the same responses in any batch, but for
    near-ties."""
    batch_size: int = 8
    """Prompts at once, over all devices."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __call__(self) -> None:
        begin()
        if (self.prompt is None) == (self.data_file is None):
            raise InputError("generate needs either --prompt (with --image) or --data FILE --out FILE")
        if self.data_file is None and self.out is not None:
            raise InputError("generate --prompt prints its responses; --out goes with --data FILE")
        if self.data_file is not None and self.preference is not None:
            raise InputError("generate --data FILE takes preferences from the file alone")
        if self.data_file is not None and (self.out is None or self.image):
            raise InputError("generate --data FILE needs --out FILE, and takes images from the file alone")
        from mllm_align.generation.respond import generate
        from mllm_align.generation.sampling import described
        from mllm_align.models.bundle import load

        data = self.data_file
        if data is None:
            row: dict[str, Any] = {"prompt": self.prompt, "images": [str(image) for image in self.image]}
            if self.preference is not None:
                row["preferences"] = {"user": self.preference}
            data = [row]
        texts = generate(
            load(self.model, self.dtype, self.mesh),
            data,
            self.sampling,
            out=self.out,
            samples=self.samples,
            seed=self.seed,
            batch_size=1 if self.data_file is None else self.batch_size,
            config=self.data,
        )
        note(f"decoding: {described(self.sampling, self.seed)}")
        if self.out is not None:
            tell(f"responses to {sum(bool(each) for each in texts)} records in {self.out}")
        else:
            tell("\n".join(texts[0]))
