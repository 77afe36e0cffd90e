"""The folder of results: groups of figures, what is ours and what is another's."""

from judges import record
from refusals import refusal

from mllm_align import Evaluator, Item, Scored
from mllm_align.evaluation.results import check_folder, read_finished, results_of, table, write

ITEMS = [Item(record(name, images=0)) for name in "abc"]
STAMP = {"benchmark": "mine", "config": {"seed": 0}}


def made(*figures):
    return results_of(
        Evaluator(), ITEMS[: len(figures)], [Scored(each) for each in figures], STAMP, model="m"
    )


def test_groups_of_figures_and_their_table():
    found = made({"all": 1, "a/right": 1, "a/deep/x": (1, 4)}, {"all": 0, "a/right": 0})
    assert found["scores"] == {"all": 0.5, "a": {"right": 0.5, "deep": {"x": 0.25}}}
    assert found["intervals"]["a"]["right"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    assert (found["benchmark"], found["model"], found["n"], found["prompt"]) == ("mine", "m", 2, None)
    assert table(found["intervals"]) == [
        "all                     0.5000 (0.0000 to 1.0000) of 2",
        "a right                 0.5000 (0.0000 to 1.0000) of 2",
        "a deep x                0.2500 of 1",
    ]


def test_figures_with_the_names_of_an_interval():
    assert table(made({"mean": 1, "low/mean": 0})["intervals"])[0].startswith("mean    ")


def test_what_was_written_is_read(tmp_path):
    check_folder(tmp_path / "out")
    assert read_finished(tmp_path / "out", STAMP) is None
    results = made({"x": 1})
    write(tmp_path / "out", results, [{"id": "a"}])
    check_folder(tmp_path / "out")
    assert read_finished(tmp_path / "out", STAMP) == (results, [{"id": "a"}])
    other = STAMP | {"config": {"seed": 1}}
    assert "is of another evaluation" in refusal(read_finished, tmp_path / "out", other)
    (tmp_path / "out/answers.jsonl").write_text("{")
    assert "answers.jsonl: can't be read" in refusal(read_finished, tmp_path / "out", STAMP)


def test_what_is_not_ours(tmp_path):
    (tmp_path / "answers.jsonl").write_text("")
    said = refusal(check_folder, tmp_path)
    assert "answers.jsonl: is there without results.json, so it is not ours; give another --out" in said
    (tmp_path / "answers.jsonl.part").write_text("")
    check_folder(tmp_path)
    assert "this is a file; name a folder" in refusal(check_folder, tmp_path / "answers.jsonl")
