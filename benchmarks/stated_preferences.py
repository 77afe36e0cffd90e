"""Preferences that are stated in the prompt, on Scenes: whether answers follow them, before and after DPO.

    python benchmarks/stated_preferences.py --work DIR > benchmarks/results/stated_preferences.json

DIR may be the folder of study.py: pictures and the seed's SFT model are shared. The model is trained by SFT
on answers in the form that is asked for (brief, everything, colours, places; in one of three tiers; a tenth
of the records with the system against the user), then by DPO on pairs whose preference flips, and asked
about other pictures: in wordings that it was trained on, in others, and with the system against the user.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from scenes_study.forms import FORMS, UNSEEN, WORDINGS, answer, form_of
from scenes_study.variants import Study

from mllm_align import DPO, DataConfig, SamplingConfig, generate
from mllm_align.config import Config
from mllm_align.curation.flip import flip
from mllm_align.data.preferences import TIERS
from mllm_align.files import new_file
from mllm_align.models.bundle import Bundle
from mllm_align.testbed.quickstart.experiment import take
from mllm_align.testbed.quickstart.phases import PROMPT, Base, Clock, Pictures, Recipe
from mllm_align.testbed.scenes.builder import Example
from mllm_align.training.loop import train

PICTURES = 1000  # to train on
ASKED = 150
SFT_STEPS, SFT_RATE = 600, 1e-3
DPO_STEPS, DPO_RATE = 120, 3e-4
CONFLICTS = 0.1

Row = dict[str, Any]
Rng = np.random.Generator


class Preferences(Study):
    """One seed: data, both trainings, and what the models answer."""

    def settings(self, steps: int, rate: float, **fields: Any) -> Config:
        by_length = DataConfig(shapes=3, multiple=8, threads=2)
        return self._config(steps, rate, freeze=("vision_tower",), data=by_length, **fields)

    def records(self) -> Path:
        """Every picture in every form."""
        path = self.data / "preferences.jsonl"
        if not path.exists():
            (self.data / "images").mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                for number, example in enumerate(self.read("train")[:PICTURES]):
                    (self.data / "images" / f"{example.id}.png").write_bytes(example.png)
                    for row in rows(example, np.random.default_rng((self.seed, number))):
                        file.write(json.dumps(row | {"image": f"images/{example.id}.png"}) + "\n")
        return path

    def models(self) -> Iterator[tuple[str, Bundle]]:
        """The models of each stage, by name."""
        yield "start", self.sft
        runs, records = self.out / "runs", self.records()
        taught = train(self.settings(SFT_STEPS, SFT_RATE), self.sft, records, runs / "preferences_sft")
        yield "SFT", taught
        pairs = self.data / "preference_pairs.jsonl"
        if not pairs.exists():
            flip([records], pairs, seed=self.seed)
        objective = DPO(beta=self.recipe.beta, sft_weight=self.recipe.sft_weight)
        config = self.settings(DPO_STEPS, DPO_RATE, objective=objective)
        yield "DPO", train(config, runs / "preferences_sft", pairs, runs / "preferences_dpo")


def rows(example: Example, rng: Rng) -> Iterator[Row]:
    """A record for each form, its preference in a tier drawn at random."""
    for form in FORMS:
        words = _pick(WORDINGS[form], rng)
        preferences = {TIERS[int(rng.integers(len(TIERS)))]: words}
        if rng.random() < CONFLICTS:
            other = _another(form, rng)
            preferences = {
                "system": words,
                "user": WORDINGS[other][int(rng.integers(len(WORDINGS[other])))],
            }
        row = {"id": f"{example.id}-{form}", "prompt": PROMPT, "preferences": preferences}
        yield row | {"completion": answer(example.scene, form, rng)}


def _another(form: str, rng: Rng) -> str:
    others = [each for each in FORMS if each != form]
    return others[int(rng.integers(len(others)))]


def measure(model: Bundle, examples: list[Example], seed: int) -> Row:
    """Share of answers in the form that is asked for, by form; flips; lengths; conflicts."""
    found: Row = {}
    for name, wordings in (("trained wordings", WORDINGS), ("other wordings", UNSEEN)):
        answers = {form: _answers(model, examples, seed, _of_user(wordings[form])) for form in FORMS}
        followed = {form: [form_of(text) == form for text in answers[form]] for form in FORMS}
        words = {form: float(np.mean([len(text.split()) for text in answers[form]])) for form in FORMS}
        both = np.array(followed["brief"]) & np.array(followed["everything"])
        found[name] = {
            "followed": {form: round(float(np.mean(each)), 3) for form, each in followed.items()},
            "brief_flips_to_everything": round(float(both.mean()), 3),
            "words": {form: round(value, 1) for form, value in words.items()},
            "length_ratio": round(words["everything"] / max(words["brief"], 1e-9), 2),
        }
    wanted = [FORMS[i % len(FORMS)] for i in range(len(examples))]
    forms = iter(wanted)

    def against(rng: Rng) -> Row:
        form = next(forms)
        user = _pick(WORDINGS[_another(form, rng)], rng)
        return {"system": _pick(WORDINGS[form], rng), "user": user}

    texts = _answers(model, examples, seed, against)
    wins = [form_of(text) == form for text, form in zip(texts, wanted, strict=True)]
    return found | {"system_wins": round(float(np.mean(wins)), 3)}


def _of_user(wordings: tuple[str, ...]) -> Callable[[Rng], Row]:
    return lambda rng: {"user": _pick(wordings, rng)}


def _answers(model: Bundle, examples: list[Example], seed: int, state: Callable[[Rng], Row]) -> list[str]:
    rng = np.random.default_rng(seed)
    asked = [
        {"images": [{"bytes": each.png}], "prompt": PROMPT, "preferences": state(rng)} for each in examples
    ]
    greedy = SamplingConfig(temperature=0.0, max_tokens=96)
    return [texts[0] for texts in generate(model, asked, greedy, batch_size=50)]


def _pick(options: tuple[str, ...], rng: Rng) -> str:
    return options[int(rng.integers(len(options)))]


def main(argv: list[str] | None = None, recipe: Recipe | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures and models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, recipe = parser.parse_args(argv), recipe or Recipe()
    take(options.work, len(options.seeds), recipe)
    clock, pictures = Clock(options.work / "seconds.json"), Pictures(options.work / "scenes", recipe.scenes)
    base = Base(options.work / "base", 0, recipe, pictures, clock)
    results: dict[int, Row] = {}
    for seed in options.seeds:
        study = Preferences(options.work / f"seed-{seed}", seed, recipe, pictures, clock)
        with redirect_stdout(sys.stderr):  # what trainings say is no result
            study.begin(base)
            examples = [e for e in pictures("unbiased") if not e.scene.repeats][:ASKED]
            results[seed] = {name: measure(model, examples, seed) for name, model in study.models()}
        print(f"seed {seed}: {json.dumps(results[seed]['DPO'])}", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
