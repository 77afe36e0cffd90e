"""Benchmarks asked while training: figures are those of an evaluation of that checkpoint."""

from dataclasses import dataclass, replace

import pytest
from bench_folders import KITCHEN, pope
from command_line import run
from runs import MODEL, PAIRS, TINY, bundle, compiling, events

from mllm_align import Evaluator, SamplingConfig, Scored, evaluate, load_run, train
from mllm_align.config import save_json
from mllm_align.errors import InputError
from mllm_align.evaluation.benchmarks.pope import Pope
from mllm_align.evaluation.while_training import Benchmarks
from mllm_align.training.checkpoint import choose

assert compiling  # a fixture
assert run  # another
SHORT = Pope(sampling=SamplingConfig(temperature=0.0, max_tokens=4))


@dataclass(frozen=True)
class Letters(Evaluator):
    """The fewer the better."""

    ways = {"letters": -1}
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=4)

    def score(self, item, answer):
        return Scored({"letters": len(answer), "prompt/words": len(item.record.messages[-1].text.split())})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    pope(root / "pope")
    return root


@pytest.mark.slow
def test_figures_are_those_of_an_evaluation_of_the_checkpoint(folder, tmp_path):
    out = tmp_path / "run"
    train(
        replace(TINY, save_every=2, keep=9),
        bundle(),
        PAIRS,
        out,
        callbacks=[Benchmarks([SHORT], folder, 2)],
    )
    lines = {line["step"]: line for line in events(out, "benchmark")}
    assert list(lines) == [0, 2, 4]
    for step, line in lines.items():
        policy = load_run(out, "float32", bundle().mesh, step) if step else bundle()
        found = evaluate(policy, folder / "pope", SHORT).results["scores"]
        flat = {
            f"pope/{split}/{name}": value
            for split, own in found.items()
            if isinstance(own, dict)
            for name, value in own.items()
        }
        flat |= {f"pope/{name}": value for name, value in found.items() if not isinstance(value, dict)}
        told = {name: value for name, value in line.items() if name.startswith("pope/")}
        assert told == pytest.approx(flat) and "pope/mean_f1" in told


@pytest.mark.slow
def test_a_part_of_the_questions_the_same_every_time_and_a_figure_that_should_be_low(tmp_path):
    asked, out = Benchmarks([Letters()], str(PAIRS), questions=3), tmp_path / "run"
    train(replace(TINY, best="Letters/letters", keep=1), bundle(), PAIRS, out, callbacks=[asked])
    lines = events(out, "benchmark")
    assert [line["step"] for line in lines] == [0, 4]
    assert lines[0]["Letters/prompt/words"] == lines[1]["Letters/prompt/words"]
    assert not asked.higher_is_better("Letters/letters") and asked.higher_is_better("Letters/prompt/words")
    assert choose(out / "checkpoints", "best")[0] == 4


def test_what_is_refused_before_anything_is_written(folder, tmp_path):
    with pytest.raises(InputError, match=r"^llava-wild needs a judge, which is not asked while training"):
        Benchmarks(["llava-wild"], folder)
    with pytest.raises(InputError, match="'pop' is no evaluator"):
        Benchmarks(["pop"], folder)
    with pytest.raises(InputError, match="evaluate_every is 0"):
        Benchmarks(["pope"], folder, 0)
    with pytest.raises(InputError, match="gone: is not there; name the benchmarks' folder"):
        Benchmarks(["pope"], tmp_path / "gone")
    pope(tmp_path / "pope")
    (tmp_path / "pope/val2014" / KITCHEN).unlink()
    with pytest.raises(InputError, match="1 of 2 images are missing"):
        train(TINY, bundle(), PAIRS, tmp_path / "run", callbacks=[Benchmarks([SHORT], tmp_path)])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_from_the_command_line(run, folder, tmp_path):
    (tmp_path / "config.json").write_text(save_json(replace(TINY, steps=2, batch_size=8)))
    out = tmp_path / "run"
    words = ("train", tmp_path / "config.json", "--model", MODEL, "--data", PAIRS, "--out", out)
    status, _, said = run(*words, "--evaluate", "pope")
    assert status == 2 and "--evaluate needs data; name the benchmarks' folder with --evaluate-data" in said
    asked = ("--evaluate", "pope", "--evaluate-data", folder, "--evaluate-every", "1")
    asked += ("--evaluate-questions", "6", "--best", "pope/mean_f1")
    status, printed, _ = run(*words, *asked)
    assert status == 0 and "the best pope/mean_f1" in printed
    assert [line["step"] for line in events(out, "benchmark")] == [0, 1, 2]
    assert "benchmark 1  pope/mean_accuracy" in printed and "random" not in printed
