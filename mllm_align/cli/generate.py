"""`mllm-align generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mllm_align.cli import shared
from mllm_align.cli.shared import OptionalData, begin, note, result, tell
from mllm_align.config import DataConfig, Dtype, MeshConfig, SamplingConfig
from mllm_align.errors import InputError
from mllm_align.files import json_text


@dataclass(frozen=True)
class Generate:
    """A model's responses: to one prompt, printed, or to a file of prompts.

    Greedy, unless --sampling.temperature is given; stderr says what was used.
    With --data, OUT gets one JSON line per record, in order: index, responses (null for one left out as
    over-long).
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("sampling.temperature", "sampling.top-k", "sampling.top-p", "sampling.max-tokens"),
        *("data.split", "data.image-root", "data.max-length", "data.over-long", "mesh.fsdp", "mesh.tensor"),
    )

    model: Path
    """Hugging Face LLaVA folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    image: tuple[Path, ...] = ()
    """Image files, in the order in which the prompt speaks of them."""
    prompt: str | None = None
    """What to ask."""
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
        if self.data_file is None:
            if self.out is not None:
                raise InputError("generate --prompt prints its responses; --out goes with --data FILE")
            images = [str(image) for image in self.image]
            for text in self._responses([{"prompt": self.prompt, "images": images}], batch_size=1)[0]:
                tell(text)
            return
        if self.out is None or self.image:
            raise InputError("generate --data FILE needs --out FILE, and takes images from the file alone")
        with result(self.out, self.data_file) as file:
            texts = self._responses(self.data_file, self.batch_size)
            lines = [{"index": i, "responses": each or None} for i, each in enumerate(texts)]
            file.writelines(json_text(line) + "\n" for line in lines)
        tell(f"responses to {sum(bool(each) for each in texts)} records in {self.out}")

    def _responses(self, data: Any, batch_size: int) -> list[list[str]]:
        from mllm_align.generate.respond import generate
        from mllm_align.generate.sampling import described

        bundle = shared.open_model(self.model, self.dtype, self.mesh)
        settings = {"samples": self.samples, "seed": self.seed, "batch_size": batch_size}
        texts = generate(bundle, data, self.sampling, **settings, config=self.data)
        note(f"decoding: {described(self.sampling, self.seed)}")
        return texts
