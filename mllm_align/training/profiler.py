"""A trace of some steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profile:
    """A trace of some steps for XProf, TensorBoard and Perfetto, without the first, which compiles."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.left, self.on = folder, steps, False

    def step(self, result: Any) -> None:
        """Called after every step."""
        if self.on:
            self.left -= 1
        if self.left and not self.on:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self.on = True
        elif not self.left and self.on:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self.on:
            jax.profiler.stop_trace()
            self.on, self.left = False, 0
