"""A run's context on the stored LLaVA 1.5, and batches of its records: what the tests of makers share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from runs import PAIRS, TINY, bundle

from mllm_align.batch import Group
from mllm_align.config import Config, Distorted, Online
from mllm_align.data.batches import Batches, HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.prepare import prepare
from mllm_align.sharding import assemble, batch_sharding
from mllm_align.training.online.context import RunContext


@cache
def prepared() -> tuple[Encoder, list[Encoded]]:
    """The stored pairs."""
    encoder, records, _ = prepare(bundle(), PAIRS, TINY.data, 2)
    return encoder, records


def context(
    online: Online | None = None, records: list[Encoded] | None = None, **fields: Any
) -> RunContext:
    """Of TINY with these fields: batches of four."""
    online = online or Distorted()
    config = replace(TINY, online=online, **fields)
    encoder, everything = prepared()
    return RunContext(config, online, bundle(), encoder, records or everything, Path())


class NoImages:
    """An encoder that reads no pixels: batches are small and quick."""

    def group(self, record: Encoded, features: Any = None, draw: Any = (0, 0)) -> Group:
        group = prepared()[0].group(record)
        (prefix,) = group.prefixes
        return replace(
            group,
            prefixes=(
                replace(
                    prefix, patches=np.zeros((1, 1, 3), np.float32), place=np.zeros((1, 1, 2), np.int16)
                ),
            ),
        )


def batch_of(context: RunContext, step: int = 0) -> tuple[HostBatch, Any]:
    """(a batch of the data in file order, the same on the devices)."""
    config: Config = context.config
    size = {"size": config.batch_size, "micro": config.micro_batches, "shapes": 1}
    batch = Batches(context.records, NoImages(), **size)(step)  # type: ignore[arg-type]
    group = assemble(batch.group, batch_sharding(context.bundle.mesh), context.rows)
    return batch, group
