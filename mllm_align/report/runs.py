"""Training runs drawn from their folders, one or several side by side, while they go on, too.

Only config.json and log.jsonl are read, without a lock. A last line that is being written is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import names_apart, parse_json, read_json
from mllm_align.report import page
from mllm_align.report.page import NOTHING, Cell, Curve, Row, Table, flat, groups, number, plain

POINTS = 400  # of a curve; of a longer one, neighbours are drawn as their mean
EXAMPLES = 6  # of each run, the last ones
KNOWN = {  # name of a figure -> title and unit
    "loss": ("Loss", "a pair, or nats a token"),
    "rewards/margin": ("Reward margin", "chosen less rejected"),
    "rewards/accuracy": ("Reward accuracy", "share of pairs with a margin above 0"),
    "rewards/chosen": ("Reward of chosen", "reward"),
    "rewards/rejected": ("Reward of rejected", "reward"),
    "reward": ("Reward", "as the annotator gave it"),
    "reward/within_prompt": ("Rewards of a prompt", "their deviation"),
    "reward/length_correlation": ("Reward and length", "correlation"),
    "kl/sequence": ("KL from the reference", "nats a response"),
    "policy/nll": ("Entropy, estimated", "nats a token"),
    "policy/ratio": ("Ratio", "of the policy to the one that responded"),
    "policy/clipped": ("Clipped", "share without a gradient"),
    "value/explained": ("Explained variance", "of the returns, by the values"),
    "rollout/tokens": ("Length of responses", "tokens"),
    "rollout/unfinished": ("Unfinished responses", "share at the limit"),
    "logps/chosen": ("Log-probs of chosen", "nats"),
    "logps/rejected": ("Log-probs of rejected", "nats"),
    "learning_rate": ("Learning rate", "of the decoder’s parameters"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "pairs_per_second": ("Throughput", "pairs a second"),
    "tokens_per_second": ("Tokens", "tokens a second"),
    "mfu": ("Model FLOP utilization", "share of the peak"),
    "seconds_per_step": ("Step time", "seconds"),
    "data_wait": ("Waiting for data", "share of the time"),
    "padding": ("Padding", "share of the tokens"),
}
SPEED = ("pairs_per_second", "tokens_per_second", "mfu", "seconds_per_step", "data_wait", "padding")
TOLD = {  # in a sentence on the run
    "loss": "loss",
    "rewards/margin": "margin",
    "rewards/accuracy": "accuracy",
    "reward": "reward",
    "kl/sequence": "KL",
}
UNDRAWN = {"flops_per_second"}  # mfu says the same
ENDS = {"done": "done", "interrupted": "interrupted", "preempted": "preempted"}
ABOUT = {"model": "model", "trained on": "data", "held out": "eval_data", "devices": "devices"}
Points = list[tuple[int, float]]


@dataclass
class Run:
    """What a run's folder says. figures: event -> name -> points by step; a step that was taken again after
    a restart counts as it went last. last: the last event, and when. damaged: lines that can't be read."""

    name: str
    config: dict[str, Any]
    start: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    last: tuple[str, float] = ("", math.nan)
    damaged: int = 0

    def points(self, event: str, name: str) -> Points:
        """Finite points in the order of the steps."""
        found = self.figures.get(event, {}).get(name, {})
        return sorted((step, value) for step, value in found.items() if math.isfinite(value))

    @property
    def step(self) -> int:
        """How far it has come."""
        return max((step for step in self.figures.get("train", {}).get("loss", {})), default=0)

    @property
    def state(self) -> str:
        return ENDS.get(self.last[0], "no end yet")


class Fact(NamedTuple):
    name: str
    meaning: str = ""
    way: int = 0


class Column(NamedTuple):
    key: str
    name: str
    detail: str


def write_page(runs: Sequence[str | Path], out: str | Path) -> list[str]:
    """Draw the runs of these folders as one HTML file; a sentence on each run. Raises InputError for a
    folder that is no run, or has no log yet, and where the page can't be written."""
    if not runs:
        raise InputError("there are no runs; give at least one run folder")
    read = [read_run(Path(run), name) for run, name in zip(runs, names_apart(runs), strict=True)]
    sentences = [_sentence(run) for run in read]
    same, differ = _settings(read)
    text = page.render(
        "mllm_align.report",
        "runs.html.jinja",
        report={"title": ", ".join(run.name for run in read), "verdict": sentences},
        facts=_facts(read),
        sections_of_charts=[
            (id, title, drawn) for id, title, curves in _charts(read) if (drawn := page.drawn(curves))
        ],
        examples=[(run.name, _examples(run)) for run in read if run.examples],
        differ=differ,
        settings=same,
        damaged=[
            f"{run.name}: {run.damaged} lines of the log can’t be read." for run in read if run.damaged
        ],
    )
    page.write(text, Path(out))
    return sentences


def read_run(folder: Path, name: str) -> Run:
    """Raises InputError for a folder that is no run, or has no log yet."""
    run = Run(name, read_json(folder / "config.json", "give the folder of a training run"))
    try:
        text = (folder / "log.jsonl").read_bytes()
    except OSError as error:
        problem = f"can't be read ({one_line(error.strerror)})"
        raise refusal(str(folder / "log.jsonl"), problem, "give a run that has begun") from error
    whole, _, _ = text.rpartition(b"\n")
    for line in whole.splitlines():
        try:
            value = parse_json(line)
            _take(run, value["event"], value)
        except (ValueError, KeyError, TypeError):
            run.damaged += 1
    if not run.start:
        raise refusal(str(folder / "log.jsonl"), "has no start of a run", "give a run that has begun")
    return run


def _take(run: Run, event: str, line: Mapping[str, Any]) -> None:
    step = line.get("step")
    run.last = event, float(line.get("time", math.nan))
    if event == "start":
        run.start = dict(line)
    elif event == "example" and isinstance(step, int):
        run.examples[step] = dict(line)
    elif isinstance(step, int):
        for name, value in line.items():
            if isinstance(value, float) and name != "time":
                run.figures.setdefault(event, {}).setdefault(name, {})[step] = value


# ---- charts ------------------------------------------------------------------------------------------


def _charts(runs: Sequence[Run]) -> list[tuple[str, str, list[Curve]]]:
    """(id, title, curves) of each section."""
    trained = _names(runs, "train")
    method = [name for name in trained if name in KNOWN and name not in SPEED]
    rest = [name for name in trained if name not in KNOWN and name not in UNDRAWN]
    events = dict.fromkeys(event for run in runs for event in run.figures if event not in ("train", "eval"))
    return [
        ("training", "Training", [_curve(runs, "train", name) for name in method]),
        ("held-out", "Held-out data", [_curve(runs, "eval", name) for name in _names(runs, "eval")]),
        *((event, event.capitalize(), _told(runs, event, _names(runs, event))) for event in events),
        ("speed", "Speed", [_curve(runs, "train", name) for name in trained if name in SPEED]),
        ("others", "Other figures", _told(runs, "train", rest)),
    ]


def _names(runs: Iterable[Run], event: str) -> list[str]:
    """The figures of an event, the known ones first."""
    found = dict.fromkeys(name for run in runs for name in run.figures.get(event, {}))
    return [name for name in KNOWN if name in found] + [name for name in found if name not in KNOWN]


def _told(runs: Sequence[Run], event: str, names: Sequence[str]) -> list[Curve]:
    """Without the figures that are 0 all along."""
    return [
        _curve(runs, event, name)
        for name in names
        if any(value for run in runs for _, value in run.points(event, name))
    ]


def _curve(runs: Sequence[Run], event: str, name: str) -> Curve:
    title, unit = KNOWN.get(name, (name.replace("_", " "), ""))
    return Curve(title, "step", unit, {run.name: thinned(run.points(event, name)) for run in runs})


def thinned(points: Points) -> Sequence[tuple[float, float]]:
    """At most POINTS points: the means of as many neighbours as it takes."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return points
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [tuple(statistics.fmean(each) for each in zip(*part, strict=True)) for part in parts]  # type: ignore[misc]


# ---- texts -------------------------------------------------------------------------------------------


def _first_and_last(points: Points, form: str) -> str:
    return f"{points[0][1]:{form}} to {points[-1][1]:{form}}" if points else ""


def _least(run: Run) -> tuple[int, float] | None:
    return min(run.points("eval", "loss"), key=lambda point: point[1], default=None)


def _sentence(run: Run) -> str:
    """How far a run has come, and what its main figures did."""
    parts = [f"step {run.step:,} of {run.start.get('steps', 0):,}, {run.state}"]
    for name, words in TOLD.items():
        if told := _first_and_last(run.points("train", name), ".3f"):
            parts.append(f"{words} {told}")
    if least := _least(run):
        parts.append(f"least held-out loss {least[1]:.4f} at step {least[0]:,}")
    return f"{run.name}: {'; '.join(parts)}."


def _facts(runs: Sequence[Run]) -> Table:
    def last(name: str, form: str, event: str = "train") -> Callable[[Run], str]:
        return lambda run: number(next(iter(run.points(event, name)[::-1]), (0, None))[1], form)

    def least(run: Run) -> str:
        found = _least(run)
        return f"{found[1]:.4f} at {found[0]:,}" if found else NOTHING

    def speed(run: Run) -> str:
        values = [value for _, value in run.points("train", "pairs_per_second")]
        return number(statistics.median(values) if values else None, ".3g")

    def when(run: Run) -> str:
        time = run.last[1]
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M}" if math.isfinite(time) else NOTHING

    rows: dict[Fact, Callable[[Run], str]] = {
        Fact("State"): lambda run: run.state,
        Fact("Steps"): lambda run: f"{run.step:,} of {run.start.get('steps', 0):,}",
        Fact("Records"): lambda run: plain(run.start.get("records")),
        Fact("Last loss"): last("loss", ".4f"),
        Fact("Last reward margin"): last("rewards/margin", ".4f"),
        Fact("Last reward accuracy"): last("rewards/accuracy", ".3f"),
        Fact("Least held-out loss"): least,
        Fact("Pairs a second, median"): speed,
        Fact("Last line (UTC)"): when,
    }
    cells = {fact: [Cell(value(run), "", []) for run in runs] for fact, value in rows.items()}
    told = [(fact, own) for fact, own in cells.items() if any(cell.mean != NOTHING for cell in own)]
    return Table([Column("", run.name, "") for run in runs], [Row(fact, own, "") for fact, own in told])


def _settings(runs: Sequence[Run]) -> tuple[list[tuple[str, list[tuple[str, str]]]], Table | None]:
    """Settings that all runs have alike, in groups; and those in which they differ."""
    about = [{words: run.start.get(name) for words, name in ABOUT.items()} for run in runs]
    settings = [dict(flat(more | run.config)) for run, more in zip(runs, about, strict=True)]
    for run, own in zip(runs, settings, strict=True):  # what only some runs have is told by its group
        for name in {name for each in settings for name in each} - own.keys():
            group = name.partition(".")[0]
            own[group] = _kind(run.config.get(group))
    names = [name for name in settings[0] if all(name in each for each in settings)]
    differ = [name for name in names if any(each[name] != settings[0][name] for each in settings)]
    same: dict[str, Any] = {}
    for name in names:
        if name not in differ:
            group, _, last = name.partition(".")
            inside = same.setdefault(group, {}) if last else same
            inside[last or group] = settings[0][name]
    rows = [Row(Fact(name), [Cell(_short(each[name]), "", []) for each in settings], "") for name in differ]
    columns = [Column("", run.name, "") for run in runs]
    return groups(same), Table(columns, rows) if rows else None


def _kind(value: Any) -> Any:
    return value.get("kind", "on") if isinstance(value, dict) else value


def _short(value: Any) -> str:
    """A setting in a narrow column: of a path, the end."""
    text = plain(value)
    return text if len(text) <= 24 else f"…{text[-23:]}"


class Example(NamedTuple):
    """note: the annotator's. responses: (text, score or nothing)."""

    step: int
    id: str
    note: str
    responses: list[tuple[str, str]]


def _examples(run: Run) -> list[Example]:
    found = []
    for step in sorted(run.examples, reverse=True)[:EXAMPLES]:
        line = run.examples[step]
        responses = line.get("responses") or []
        scores = line.get("scores") or [None] * len(responses)
        note = ": ".join(str(line[name]) for name in ("outcome", "reason") if line.get(name))
        told = [(str(text), number(score, ".4g")) for text, score in zip(responses, scores, strict=False)]
        found.append(Example(step, str(line.get("id", "")), note, told))
    return found
