"""The quickstart's metrics, computed from the counts of each seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_align.evaluation.intervals import bootstrap, over_seeds
from mllm_align.testbed.hallucination import Counts, intervals
from mllm_align.testbed.quickstart.phases import MODELS, OTHERS


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
    """The outcome in plain sentences."""
    sentences = []
    after = results["aligned"]["chair_i"]
    for name, words in (("sft", "the SFT model"), ("sft_control", "as many further steps of SFT")):
        before = results[name]["chair_i"]
        change = f"from {before['mean']:.1%} to {after['mean']:.1%}"
        if after["high"] < before["low"]:
            sentences.append(
                f"Fewer hallucinated things than {words}: CHAIR_i {change}; intervals do not overlap."
            )
        elif after["low"] > before["high"]:
            sentences.append(
                f"More hallucinated things than {words}: CHAIR_i {change}; intervals do not overlap."
            )
        else:
            sentences.append(
                f"No clear effect against {words}: CHAIR_i {change}, and the intervals overlap."
            )
    gained = round(100 * (results["aligned"]["recall"]["mean"] - results["sft"]["recall"]["mean"]), 1)
    if gained:
        sentences.append(f"Recall is {'higher' if gained > 0 else 'lower'} by {abs(gained):.1f} points.")
    else:
        sentences.append("Recall is the same.")
    return sentences
