"""Opening annotators: those of the package by name, a user's in a file of hers."""

from dataclasses import replace

import pytest
from judges import question, record
from refusals import refusal

from mllm_align import JudgeModel, OnlinePairs, scored
from mllm_align.annotate.factory import Context, open_annotator
from mllm_align.annotate.verdict import Question, rank
from mllm_align.config import ANNOTATORS, Config, DataConfig, from_json, part_files, to_json
from mllm_align.config.annotators import AnnotatorConfig

MINE = """
from dataclasses import dataclass
from pathlib import Path

from mllm_align import AnnotatorConfig, Verdict, scored

@dataclass(frozen=True)
class Length(AnnotatorConfig):
    may_change = frozenset({"note"})
    longer: bool = True
    note: Path = Path("notes")

    def __call__(self, questions):
        sign = 1 if self.longer else -1
        return [scored([sign * len(r) for r in q.responses]) for q in questions]

@dataclass(frozen=True)
class Opened(AnnotatorConfig):
    on_devices = True

    def open(self, context):
        seen = [context.data.max_length, len(context.records)]
        return lambda questions: [Verdict("tie", reason=str(seen)) for _ in questions]

@dataclass(frozen=True)
class Bad(AnnotatorConfig):
    what: str = ""

    def open(self, context):
        if self.what == "open":
            raise RuntimeError("no\\nroom")
        def ask(questions):
            if self.what == "raise":
                return 1 / 0
            if self.what == "few":
                return []
            if self.what == "kind":
                return [1.0 for _ in questions]
            return [undefined for _ in questions]
        return ask

class Loose(AnnotatorConfig):
    def __call__(self, questions):
        return []

@dataclass(frozen=True)
class Nothing(AnnotatorConfig):
    words: int = 3

@dataclass(frozen=True)
class Unknown(Length):
    may_change = frozenset({"tone"})

def function(questions):
    return []
"""


@pytest.fixture
def mine(tmp_path):
    """mine(name) is the class of the file."""
    (tmp_path / "my_annotator.py").write_text(MINE)
    return lambda name: ANNOTATORS.find(f"{tmp_path}/my_annotator.py:{name}")


def test_all_register_themselves_where_they_stand():
    assert set(ANNOTATORS) == {"judge", "endpoint", "reward", "scorer", "oracle", "questions"}
    homes = {kind.__module__ for kind in ANNOTATORS.values()}
    assert len(homes) == 5 and all(issubclass(kind, AnnotatorConfig) for kind in ANNOTATORS.values())
    assert OnlinePairs().annotator == JudgeModel()


def test_one_that_answers_itself(mine):
    (verdict,) = rank(open_annotator(mine("Length")(longer=False)), [question("A large cat.", "A cat.")])
    assert verdict.pair == (1, 0)


def test_one_that_is_opened_gets_its_context(mine):
    config = mine("Opened")()
    context = Context(data=DataConfig(max_length=77), records=[record()])
    (verdict,) = open_annotator(config, context)([question()])
    assert verdict.reason == "[77, 1]" and config.on_devices and not config.asks_base


def test_it_is_saved_with_its_file_and_found_again(mine, tmp_path, monkeypatch):
    config = Config(online=OnlinePairs(mine("Length")(longer=False)))
    saved = to_json(config)
    file = tmp_path / "my_annotator.py"
    kind = {"kind": f"{file}:Length", "longer": False, "note": "notes"}
    assert saved["online"]["annotator"] == kind and list(part_files(config)) == [str(file)]
    monkeypatch.chdir("/")
    assert from_json(saved) == config
    before = part_files(config)
    file.write_text(MINE + "# another\n")
    assert part_files(config).keys() == before.keys() and part_files(config) != before


@pytest.mark.parametrize(
    "name, words",
    [
        ("Loose", ("annotator Loose is no frozen dataclass", "@dataclass(frozen=True)")),
        ("Nothing", ("annotator Nothing has neither open(context) nor __call__(questions)",)),
        ("Unknown", ("annotator Unknown has may_change ['tone']",)),
    ],
)
def test_one_that_breaks_the_contract(mine, name, words):
    line = refusal(OnlinePairs, mine(name)())
    assert all(each in line for each in words)


def test_what_is_no_annotator(mine):
    assert "online.annotator is <function" in refusal(OnlinePairs, mine("function"))
    wrong = mine("Length")(longer="yes")
    assert "annotator.longer is 'yes'; it must be of type bool" in refusal(OnlinePairs, wrong)


@pytest.mark.parametrize(
    "what, words",
    [
        ("open", "Bad raises RuntimeError: no room; mend it"),
        ("raise", "Bad raises ZeroDivisionError: division by zero"),
        ("few", "Bad gives 0 items (nothing) for 2 questions; return one Verdict for each"),
        ("kind", "Bad gives 2 items (float) for 2 questions"),
        ("", "Bad raises NameError"),
    ],
)
def test_what_goes_wrong_in_one(mine, what, words):
    config = replace(mine("Bad")(), what=what)
    line = refusal(lambda: open_annotator(config)([question(), question(name="r1")]))
    assert f"my_annotator.py:{words}" in line


def test_a_score_for_each_response(mine, monkeypatch):
    config = mine("Length")()
    three = Question(record(), ("a", "bb", "ccc"))
    kind = type(config)
    monkeypatch.setattr(kind, "__call__", lambda self, qs: [scored([1.0, 2.0]) for _ in qs])
    line = refusal(lambda: open_annotator(config)([three]))
    assert "gives 2 scores for 3 responses; give one score for each" in line
