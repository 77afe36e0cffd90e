"""Training runs drawn from logs: whole ones, ones that go on, damaged ones, several side by side."""

import json
import math
import re

import pytest
from refusals import refusal

from mllm_align.report.runs import POINTS, read_run, thinned, write_page

CONFIG = {"objective": {"kind": "dpo", "beta": 0.1}, "online": None, "lora": {"rank": 8}, "steps": 40}


def train(step, **more):
    """A line as a run of DPO logs it."""
    values = {
        "loss": 0.7 * math.exp(-step / 30),
        "rewards/margin": step / 20,
        "rewards/accuracy": min(1.0, 0.5 + step / 50),
        "rewards/chosen": 0.01 * step,
        "rewards/rejected": -0.04 * step,
        "logps/chosen": -80.0 + step / 9,
        "logps/rejected": -82.0 - step / 7,
        "learning_rate": 1e-6 * min(step, 10),
        "grad_norm": 1.0 + math.sin(step),
        "pairs_per_second": None if step == 1 else 10.0 + step % 3,
        "skipped": 0.0,
    }
    return {"event": "train", "time": 1.8e9 + step, "step": step, **values, **more}


def folder(place, lines, config=CONFIG, end="\n"):
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    start = {"event": "start", "time": 1.8e9, "step": 0, "steps": 40, "records": 320, "data": "pairs.jsonl"}
    text = "\n".join(json.dumps(line) if isinstance(line, dict) else line for line in (start, *lines))
    (place / "log.jsonl").write_text(text + end)
    return place


def whole(place, config=CONFIG, **more):
    held_out = [
        {"event": "eval", "time": 1.8e9, "step": step, "loss": loss, "rewards/margin": 0.1}
        for step, loss in ((20, 0.5), (30, 0.375), (40, 0.4))
    ]
    lines = [train(step, **more) for step in (1, *range(2, 41, 2))]
    return folder(place, [*lines, *held_out, {"event": "done", "time": 1.8e9 + 60, "step": 40}], config)


def online(place):
    """With what the policy wrote, and figures of an annotator."""
    lines = []
    for step in range(1, 12):
        lines.append(train(step, **{"annotate/tie": 0.25, "annotate/failed": 0.0}))
        example = {"id": f"r{step}", "responses": [f"<b>one {step}</b>", "two"], "outcome": "ranked"}
        example |= {"scores": [1.0, 2.5], "reason": "Shorter."}
        lines.append({"event": "example", "time": 1.8e9, "step": step, **example})
    config = CONFIG | {"online": {"kind": "pairs", "samples": 2}, "objective": {"kind": "dpo", "beta": 0.5}}
    return folder(place, lines, config)


def drawn(runs, tmp_path):
    sentences = write_page(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    return sentences, text, re.findall(r'aria-label="([^"]*) over step"', text)


def test_a_run_has_its_figures(tmp_path):
    sentences, text, charts = drawn([whole(tmp_path / "dpo")], tmp_path)
    assert sentences == [
        "dpo: step 40 of 40, done; loss 0.677 to 0.185; margin 0.050 to 2.000; "
        "accuracy 0.520 to 1.000; least held-out loss 0.3750 at step 30."
    ]
    assert [chart.partition(":")[0] for chart in charts] == [
        "Loss",
        "Reward margin",
        "Reward accuracy",
        "Reward of chosen",
        "Reward of rejected",
        "Log-probs of chosen",
        "Log-probs of rejected",
        "Learning rate",
        "Gradient norm",
        "Loss",
        "Reward margin",
        "Throughput",
    ]
    assert "0.3750 at 30" in text and "2027-01-15 08:01" in text and "What the policy wrote" not in text
    assert "<td>pairs.jsonl</td>" in text and "In these the runs differ" not in text


def test_several_runs_share_charts_and_name_what_differs(tmp_path):
    runs = [whole(tmp_path / "a"), online(tmp_path / "b")]
    _, text, charts = drawn(runs, tmp_path)
    assert charts[0] == "Loss: a pair, or nats a token" and charts[-1].startswith("annotate/tie: ")
    first = text[text.index("<h3>Loss</h3>") : text.index("<h3>Reward margin</h3>")]
    assert re.findall(r"</svg>(\w)</li>", first) == ["a", "b"]
    assert re.findall(r'class="curve (c\d)"', first) == ["c0", "c1"]
    ties = text[text.index("<h3>annotate/tie</h3>") :]
    assert re.findall(r"</svg>(\w)</li>", ties) == ["b"]  # the other has none, and b keeps its colour
    assert re.findall(r'class="curve (c\d)"', ties)[0] == "c1"
    differ = text[text.index("In these the runs differ") : text.index("The others are the same")]
    rows = re.findall(r'<th scope="row">(\S+)', differ)
    values = re.findall(r"<b>(.*?)</b>", differ)
    assert rows == ["objective.beta", "online"] and values == ["0.1", "0.5", "–", "pairs"]


def test_what_the_policy_wrote(tmp_path):
    _, text, _ = drawn([online(tmp_path / "b")], tmp_path)
    said = text[text.index('<section id="examples"') : text.index('<section id="settings"')]
    assert re.findall(r"step (\d+)<br>(\w+)", said) == [(f"{n}", f"r{n}") for n in range(11, 5, -1)]
    assert (
        "&lt;b&gt;one 11&lt;/b&gt;" in said and "ranked: Shorter." in said and "<small>2.5</small>" in said
    )


def test_a_run_that_goes_on(tmp_path):
    half = json.dumps(train(4))[:50]
    run = folder(tmp_path / "run", [train(1), train(2), half], end="")
    sentences, text, _ = drawn([run], tmp_path)
    assert sentences[0].startswith("run: step 2 of 40, no end yet; loss") and "can’t be read" not in text


def test_steps_that_were_taken_again_count_as_they_went_last(tmp_path):
    lines = [train(1), train(2, loss=9.0), train(3, loss=9.0), "{broken", {"event": "preempted", "step": 3}]
    run = read_run(folder(tmp_path / "run", [*lines, train(2), train(3)]), "run")
    assert run.points("train", "loss")[1:] == [(n, pytest.approx(0.7 * math.exp(-n / 30))) for n in (2, 3)]
    assert run.damaged == 1 and run.state == "no end yet"
    _, text, _ = drawn([tmp_path / "run"], tmp_path)
    assert "run: 1 lines of the log can’t be read." in text


def test_a_run_without_a_step_yet(tmp_path):
    sentences, text, charts = drawn([folder(tmp_path / "run", [])], tmp_path)
    assert sentences == ["run: step 0 of 40, no end yet."] and charts == [] and "At a glance" in text


def test_figures_of_other_events_are_drawn_too(tmp_path):
    lines = [{"event": "benchmark", "time": 1.8e9, "step": n, "pope/mean_f1": 0.8} for n in (10, 20)]
    _, text, charts = drawn([folder(tmp_path / "run", [train(1), *lines])], tmp_path)
    assert any(chart.startswith("pope/mean f1") for chart in charts) and ">Benchmark</h2>" in text


def test_long_curves_are_thinned():
    points = [(step, float(step % 2)) for step in range(1, 10 * POINTS)]
    found = thinned(points)
    assert len(found) <= POINTS and all(abs(y - 0.5) < 0.06 for _, y in found)
    assert found[0] == (5.5, 0.5) and thinned(points[:POINTS]) == points[:POINTS]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_text("{}")
    out = tmp_path / "page.html"
    assert "config.json: can't be read" in refusal(write_page, [tmp_path / "gone"], out)
    assert "log.jsonl: can't be read" in refusal(write_page, [tmp_path / "begun"], out)
    (tmp_path / "begun/log.jsonl").write_text('{"event": "done"}\n')
    assert "has no start of a run" in refusal(write_page, [tmp_path / "begun"], out)
    assert "is given twice" in refusal(write_page, [tmp_path / "begun", tmp_path / "begun"], out)
    assert "there are no runs" in refusal(write_page, [], out) and not out.exists()
