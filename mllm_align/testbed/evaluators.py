"""Evaluators for Scenes: what captions say that is not there, and answers of yes or no."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.evaluation.base import EVALUATORS, Evaluator, Item, Scored
from mllm_align.testbed.annotators import Oracle
from mllm_align.testbed.hallucination import FIGURES, count, hallucinated_spans
from mllm_align.testbed.scenes.language import yes_or_no

LOWER = ("chair_i", "chair_s", "attribute_error", "place_error", "relation_error", "unparsed", "stutter")
WAYS: dict[str, int] = dict.fromkeys(LOWER, -1) | {"words": 0, "mentions": 0, "expected_share": 0}


@EVALUATORS.register("scenes")
@dataclass(frozen=True)
class Captions(Evaluator):
    """Scenes only: exact counts of hallucination in descriptions (CHAIR and the like), each figure of
    `testbed.hallucination.FIGURES`. Records are named after their scenes."""

    ways = WAYS
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=96)
    scenes: Path = Path("runs/quickstart/scenes")
    """Folder of the drawn pictures (quickstart OUT/scenes)."""

    @cached_property
    def _oracle(self) -> Oracle:
        return Oracle(self.scenes)

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        """Items that have their scene already keep it; those of records are looked for at once."""
        items = super().items(data, config)
        for item in items:
            if "scene" not in item.labels:
                self._oracle.scene(item.record)
        return items

    def score(self, item: Item, answer: str) -> Scored:
        scene = item.labels.get("scene") or self._oracle.scene(item.record)
        counts = asdict(count(scene, answer))
        words = sorted({answer[start:stop] for start, stop in hallucinated_spans(scene, answer)})
        return Scored(
            {name: (counts[a], counts[b]) for name, (a, b) in FIGURES.items()},
            {"counts": counts, "hallucinated_words": words},
        )


@EVALUATORS.register("scenes-pope")
@dataclass(frozen=True)
class Questions(Evaluator):
    """Yes-or-no questions, POPE's (Li et al. 2023): the share of right answers, over all and by mode. Each
    record's response is yes or no; its mode is a label."""

    references = 1
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=2)

    def score(self, item: Item, answer: str) -> Scored:
        right = yes_or_no(answer) is yes_or_no(item.record.responses[0])
        figures = {"pope_accuracy": float(right)}
        if "mode" in item.labels:
            figures[f"pope_{item.labels['mode']}"] = float(right)
        return Scored(figures, {"right": right})
