"""Scenes as a benchmark: the same figures as the testbed's own counts."""

import numpy as np
import pytest
from judges import record
from refusals import refusal

pytest.importorskip("tensorflow_datasets")

from mllm_align.config import DataConfig
from mllm_align.evaluation.base import Item, figures
from mllm_align.testbed.evaluators import Captions, Questions
from mllm_align.testbed.hallucination import FIGURES, count, intervals
from mllm_align.testbed.scenes import builder
from mllm_align.testbed.scenes.language import caption
from mllm_align.testbed.scenes.world import Settings

SETTINGS = Settings(train=6, held_out=1, unbiased=0, broken=0, lessons=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    builder.prepare(folder, SETTINGS)
    return folder


def test_captions_have_the_testbeds_figures(folder):
    examples = list(builder.read(folder, "train"))
    rng = np.random.default_rng(0)
    said = [caption(e.scene, rng) for e in examples]
    said = [said[0], said[2], said[1], f"{said[3]} We see a hat.", "Lorem ipsum.", ""]
    wanted = intervals([count(e.scene, text) for e, text in zip(examples, said, strict=True)])
    evaluator = Captions(scenes=folder)
    items = evaluator.items([record(f"{e.id}-0", images=0) for e in examples], DataConfig())
    scored = evaluator.score_all(items, said, None)
    assert figures(evaluator, items, scored) == wanted
    assert wanted["chair_i"].mean > 0 and scored[4].details["counts"]["unparsed"] == 1
    given = [Item(record(f"{e.id}-0", images=0), {"scene": e.scene}) for e in examples]
    assert Captions().score_all(given, said, None) == scored


def test_every_figure_has_a_better_way_or_none():
    assert set(FIGURES) - Captions.ways.keys() == {"recall"}, "higher is better, where nothing else is said"


def test_a_record_without_a_scene_is_named_before_anything_is_asked(folder):
    assert "is not named after a scene" in refusal(
        Captions(scenes=folder).items, [record("mine", images=0)], DataConfig()
    )


@pytest.mark.parametrize(
    "answer, right", [("Yes.", 1.0), ("yes, it is", 1.0), ("No", 0.0), ("Perhaps", 0.0)]
)
def test_questions_are_right_or_wrong(answer, right):
    item = Item(record("q", images=0, chosen="yes", rejected="no"), {"mode": "random"})
    scored = Questions().score(item, answer)
    assert scored.figures == {"pope_accuracy": right, "pope_random": right}
    assert scored.details == {"right": bool(right)}
    plain = Questions().score(Item(item.record), answer)
    assert plain.figures == {"pope_accuracy": right}
