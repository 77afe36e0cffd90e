"""`mllm-align quickstart`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mllm_align.config.checks import check_number
from mllm_align.errors import InputError


@dataclass(frozen=True)
class Quickstart:
    """The method on pictures that the program draws itself: SFT, BDHS, DPO, and a report to look at.

    Makes OUT/report.html and OUT/results.json; no downloads, about eight minutes on two fast cores and four
    more for each further seed. The same command continues a run that was stopped.
    """

    out: Path = Path("runs/quickstart")
    """Folder to make."""
    seeds: int = 1
    """Runs of SFT, BDHS and DPO from one pretrained model; with several, intervals are over them."""
    mask_rate: float = 0.99
    """Share of the image that BDHS hides."""

    def __call__(self) -> None:
        from mllm_align.testbed.quickstart.experiment import run
        from mllm_align.testbed.quickstart.phases import Recipe

        check_number("--seeds", self.seeds, 1, 1000)
        if not 0 <= self.mask_rate <= 1:
            raise InputError(f"--mask-rate is {self.mask_rate}; it must be from 0 to 1")
        run(self.out, self.seeds, Recipe(mask_rate=self.mask_rate))
