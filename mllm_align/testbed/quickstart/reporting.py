"""The contents of the quickstart's report: steps, curves, example pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_align.config import to_json as config_json
from mllm_align.files import parse_json
from mllm_align.report.page import Curve, Marked
from mllm_align.testbed.hallucination import hallucinated_spans
from mllm_align.testbed.quickstart.phases import MODELS, PROMPT, Seed
from mllm_align.testbed.quickstart.results import verdict
from mllm_align.testbed.report.page import Example, Report


def report(one: Seed, measured: Sequence[dict[str, Any]], results: dict[str, Any]) -> Report:
    """The report: metrics of all seeds, curves and pictures of the first seed."""
    recipe, scenes, count = one.recipe, one.recipe.scenes, results["pairs"]["count"]

    def took(phase: str) -> str:
        seeds = f" over {len(measured)} seeds" if len(measured) > 1 and phase != "pretraining" else ""
        return f"{results['seconds'][phase]:.0f} s{seeds}"

    steps = [
        (
            "Pictures",
            f"{scenes.train} training pictures were drawn. In {scenes.bias:.0%} of their pairs the second "
            "thing is the usual partner of the first; the bias-breaking split has no partners at all.",
        ),
        (
            "Supervised fine-tuning",
            f"A small LLaVA 1.6 learned from scratch: {sum(recipe.seeing)} steps on clear pictures, at "
            f"first of repeated things ({took('pretraining')}), then {recipe.sft} on captions, questions "
            f"and answers ({took('SFT')}).",
        ),
        (
            "Rejected responses",
            f"The model rewrote {count} training captions with {recipe.mask_rate:.0%} of the image hidden "
            f"(BDHS, {took('BDHS')}). No annotator, no other model.",
        ),
        (
            "Alignment",
            f"{recipe.dpo} steps of DPO on those pairs ({took('DPO')}). The control is the same "
            f"SFT model after {recipe.dpo} further steps of SFT.",
        ),
    ]
    return Report(
        title="mllm-align quickstart",
        verdict=verdict(results),
        steps=steps,
        results=results,
        curves=_curves(one.out / "runs"),
        pairs=_pair_examples(one),
        examples=_caption_examples(one, measured[0]),
        settings={"recipe": config_json(recipe)},
    )


def _curves(runs: Path) -> list[Curve]:
    def series(name: str, value: str) -> list[tuple[float, float]]:
        lines = map(parse_json, (runs / name / "log.jsonl").read_bytes().splitlines())
        # A resumed run may have logged some steps twice.
        points = {line["step"]: line[value] for line in lines if line["event"] == "train"}
        return sorted(points.items())

    return [
        Curve("SFT loss", "step", "nats per token", {"SFT": series("sft", "loss")}),
        Curve("DPO loss", "step", "loss per pair", {"DPO": series("aligned", "loss")}),
        Curve(
            "DPO margin",
            "step",
            "reward, chosen less rejected",
            {"DPO": series("aligned", "rewards/margin")},
        ),
    ]


def _pair_examples(one: Seed, max_count: int = 6) -> list[Example]:
    scenes = {f"{e.id}-0": e for e in one.read("train")[:200]}
    lines = (one.out / "data" / "pairs.jsonl").read_text().splitlines()
    examples = []
    for row in map(parse_json, lines):
        example = scenes.get(row["id"])
        if example is not None and row["bdhs"]["guided"] and len(examples) < max_count:
            text = row["rejected"]
            spans = written_spans(row)
            rejected = Marked(text, tuple(hallucinated_spans(example.scene, text)), tuple(spans))
            examples.append(Example(example.id, example.png, PROMPT, row["chosen"], rejected))
    return examples


def written_spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Character spans of an output record's rejected response that the model generated."""
    spans, moved = [], 0
    for each in row["bdhs"]["sentences"]:
        _, stop = each["sentence"]
        old, new = each["swapped"] or ("", "")
        moved += len(new) - len(old)
        start = each["cut"] + moved
        spans.append((start, start + len(each["written"])))
        moved += len(each["written"]) - (stop - each["cut"])
    return spans


def _caption_examples(one: Seed, measured: dict[str, Any], max_count: int = 12) -> list[Example]:
    models = measured["models"]
    examples = []
    for i, e in enumerate(one.read("broken")[:max_count]):
        before, control, after = (
            Marked(text, tuple(hallucinated_spans(e.scene, text)))
            for text in (models[name]["broken"]["captions"][i] for name in MODELS)
        )
        truth = e.qas[0].answer
        examples.append(Example(e.id, e.png, PROMPT, truth, None, before, control, after))
    return examples
