"""`mllm-align inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mllm_align.cli.shared import Data, open_encoder
from mllm_align.config import DataConfig
from mllm_align.config.checks import check_number
from mllm_align.errors import InputError
from mllm_align.files import json_text


@dataclass(frozen=True)
class Inspect:
    """One record as the model gets it: tokens, loss mask, positions, image tiles. Writes nothing."""

    COMMON: ClassVar[tuple[str, ...]] = (
        *("data.format", "data.split", "data.pairs", "data.image-root", "data.allow-outside"),
        *("data.chat-template", "data.max-length"),
    )

    model: Path
    """As `train` takes it; its tokenizer and image processor are read."""
    data_file: Data
    """Preference pairs (or, with --responses 1, SFT records)."""
    index: int = 0
    """Which record, from 0."""
    responses: int = 2
    """Responses a record must have, at least."""
    json: bool = False
    """Print JSON instead of a table."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from mllm_align.data import inspect as show
        from mllm_align.prepare import read_data

        check_number("--responses", self.responses, 1, 1024)
        _, encoder = open_encoder(self.model, self.data)
        records = read_data(self.data_file, self.data, self.responses)
        if not 0 <= self.index < len(records):
            there = f"{self.data_file} has records 0 to {len(records) - 1}"
            raise InputError(f"--index is {self.index}; {there}")
        encoded = encoder.encode(records[self.index], self.responses, self.index)
        described = show.describe(encoder, encoded)
        print(json_text(described) if self.json else show.text(described))
