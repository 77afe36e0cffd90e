"""The quickstart's metrics, computed from the counts of each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mllm_align.evaluation.intervals import Interval, bootstrap, over_seeds
from mllm_align.testbed.hallucination import Counts, intervals
from mllm_align.testbed.quickstart.phases import MODELS, OTHERS
from mllm_align.testbed.report.page import METRICS


def figures(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every metric of one model on one split, with its interval over images (POPE: over questions)."""
    out = {name: i.to_json() for name, i in intervals([Counts(**c) for c in measured["counts"]]).items()}
    if "pope" not in measured:
        return out
    modes = [mode for mode, _ in measured["pope"]]
    right = np.array([good for _, good in measured["pope"]], float)
    out["pope_accuracy"] = bootstrap(right).to_json()
    for mode in sorted(set(modes)):
        chosen = right[[m == mode for m in modes]]
        out[f"pope_{mode}"] = bootstrap(chosen).to_json()
    return out


def summary(measured: Sequence[dict[str, Any]], mask_rate: float) -> dict[str, Any]:
    """The contents of results.json: intervals over images or, with several seeds, over seeds."""
    seeds = len(measured)
    each = [
        {name: {split: figures(m) for split, m in splits.items()} for name, splits in one["models"].items()}
        for one in measured
    ]

    def joined(name: str, split: str) -> dict[str, Any]:
        if seeds == 1:
            return each[0][name][split]
        names = each[0][name][split]
        return {key: over_seeds([one[name][split][key]["mean"] for one in each]).to_json() for key in names}

    others = {split: {name: joined(name, split) for name in MODELS} for split in OTHERS}
    pairs = [one["pairs"] for one in measured]
    differ = np.mean([p["differ_after"] for p in pairs], axis=0).tolist()
    return {
        "interval": "95% bootstrap over images" if seeds == 1 else f"95% Student t over {seeds} seeds",
        "seeds": list(range(seeds)),
        "split": "broken",
        **{name: joined(name, "broken") for name in MODELS},
        "other_splits": others,
        "pairs": {
            "count": sum(p["pairs"] for p in pairs),
            "differ_after_iteration": {f"{mask_rate:g}": differ},
        },
    }


def verdict(results: dict[str, Any]) -> list[str]:
    """The outcome in plain sentences: what got better, what got worse, what is at chance."""
    return [
        _effect(results, "sft", "the SFT model"),
        _harm(results),
        _effect(results, "sft_control", "as many further steps of SFT"),
        *_recall(results),
        *_answers(results),
        *_chance(results),
    ]


def _effect(results: dict[str, Any], name: str, words: str) -> str:
    before, after = (Interval.from_json(results[model]["chair_i"]) for model in (name, "aligned"))
    change = f"CHAIR_i from {before.mean:.1%} to {after.mean:.1%}"
    side = after.side(before)
    if not side:
        return f"No clear effect against {words}: {change}, and the intervals overlap."
    more = "Fewer" if side < 0 else "More"
    return f"{more} hallucinated things than {words}: {change}; intervals do not overlap."


def _worse(results: dict[str, Any]) -> dict[str, bool]:
    """Figures whose mean is on the worse side of the earlier interval; True where the intervals do not
    overlap either. CHAIR_i has a sentence of its own, and so has what is at chance."""
    found = {}
    for key, metric in METRICS.items():
        before, after = (Interval.from_json(results[model].get(key)) for model in ("sft", "aligned"))
        if key == "chair_i" or (metric.at_chance(before) and metric.at_chance(after)):
            continue
        if metric.worse(replace(after, low=after.mean, high=after.mean), before):
            found[key] = metric.worse(after, before)
    return found


def _harm(results: dict[str, Any]) -> str:
    before, after = results["sft"], results["aligned"]
    worse = _worse(results)

    def told(clear: bool) -> str:
        return "; ".join(
            f"{METRICS[key].spoken} from {before[key]['mean']:.1%} to {after[key]['mean']:.1%}"
            for key, each in worse.items()
            if each == clear
        )

    said = f"Worse than the SFT model: {told(True)}." if told(True) else ""
    perhaps = f"Perhaps worse (intervals overlap): {told(False)}." if told(False) else ""
    return " ".join(filter(None, (said, perhaps))) or "Nothing else that was measured got clearly worse."


def _recall(results: dict[str, Any]) -> list[str]:
    if "recall" in _worse(results):
        return []  # told as harm
    gained = round(100 * (results["aligned"]["recall"]["mean"] - results["sft"]["recall"]["mean"]), 1)
    if not gained:
        return ["Recall is the same."]
    return [f"Recall is {'higher' if gained > 0 else 'lower'} by {abs(gained):.1f} points."]


def _answers(results: dict[str, Any]) -> list[str]:
    """What POPE tells of the model's sight, of the bias in it, and of what alignment does to it."""
    unbiased = (results.get("other_splits") or {}).get("unbiased", {}).get("sft", {})
    before, after, fair = (
        Interval.from_json(each.get("pope_accuracy"))
        for each in (results["sft"], results["aligned"], unbiased)
    )
    pope = METRICS["pope_accuracy"]
    if not all(each.low > pope.chance for each in (before, after, fair)):
        return []  # answers of a guess, or none
    bias = "lowers" if before.side(fair) < 0 else "does not clearly lower"
    change = {-1: "worse", 0: "no clear change", 1: "better"}[after.side(before)]
    return [
        f"Asked whether a thing is there (POPE), the SFT model is right in {_spread(fair)} on unbiased "
        f"pictures and {_spread(before)} on bias-breaking ones: it looks at the picture, and the bias "
        f"{bias} its answers.",
        f"After alignment it is right in {_spread(after)} on bias-breaking ones: {change}.",
    ]


def _spread(value: Interval) -> str:
    return f"{value.mean:.1%} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _chance(results: dict[str, Any]) -> list[str]:
    """Figures that tell nothing of the method, because no model does better than a guess."""
    told = []
    for key in ("pope_accuracy", "relation_error"):
        values = [Interval.from_json(results[name].get(key)) for name in MODELS]
        if all(map(METRICS[key].at_chance, values)):
            told.append(f"{METRICS[key].spoken} ({values[-1].mean:.1%})")
    return [f"At chance before and after: {' and '.join(told)}."] if told else []
