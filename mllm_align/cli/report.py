"""`mllm-align report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mllm_align.errors import InputError


@dataclass(frozen=True)
class Report:
    """A page that shows training runs, or evaluations, side by side: mllm-align report RUN ... --out PAGE.

    Of runs: loss, margins, rewards, log-probs, rates, speed, held-out figures, what the policy wrote,
    settings, from the logs as they are, also while the runs go on. Of folders that `evaluate` wrote: what
    its own page has, with every model compared with the first. The page is one HTML file that asks for
    nothing.
    """

    runs: tuple[Path, ...]
    """Run folders, or folders of evaluations; the word --runs may be left out."""
    out: Path
    """Page to write, such as page.html."""

    @staticmethod
    def place(argv: list[str]) -> list[str]:
        """`--runs` before the folders, where they stand first."""
        return argv if not argv or argv[0].startswith("-") else ["--runs", *argv]

    def __call__(self) -> None:
        evaluations = [folder for folder in self.runs if (folder / "results.json").is_file()]
        if 0 < len(evaluations) < len(self.runs):
            other = next(folder for folder in self.runs if folder not in evaluations)
            raise InputError(
                f"{evaluations[0]} is an evaluation and {other} is not; give folders of one kind"
            )
        if evaluations:
            from mllm_align.evaluation.page import page_of_folders as write
        else:
            from mllm_align.report.runs import write_page as write
        print("\n".join([*write(self.runs, self.out), str(self.out)]))
