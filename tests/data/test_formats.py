"""The published sets: how each is told from the others, what its rows become, what is left out."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import (
    ROWS,
    assert_refused,
    completion,
    gpt,
    human,
    in_columns,
    llavarlhf,
    nlf,
    png,
    povid,
    rlaifv,
    rlhfv,
    sharegpt,
    sharegpt_pairs,
    trl,
    turns,
    vlfeedback,
)

from mllm_align.config import Config, DataConfig, from_json, part_files, to_json
from mllm_align.config.parts import READERS
from mllm_align.data.formats.base import format_of
from mllm_align.data.readers import read_each, records_from, told


def read(*rows, **options):
    dropped = Counter()
    return records_from(rows, dropped=dropped, **options), +dropped


def refused(row, *words, **options):
    assert_refused([row], *words, **options)


def test_formats_are_those_of_the_config():
    assert set(ROWS) == set(READERS) and all(DataConfig(format=name) for name in READERS)


# --- detection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_each_is_told_by_its_fields(name):
    row = ROWS[name]()
    assert format_of(row) == name
    ((record,), dropped) = read(row)
    assert read(row, format=name)[0] == [record] and not dropped
    assert record.responses == ("A cat.", "A dog.") and len(record.images) == 1
    assert record.messages[-1].text in ("What?", "What?") and sum(m.places for m in record.messages) == 1


@pytest.mark.parametrize("name", ROWS)
def test_each_from_parquet(name, tmp_path):
    rows = [ROWS[name](), ROWS[name]()]
    if name == "trl":
        rows[1]["id"] = "x"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    records = records_from(tmp_path / "pairs.parquet")
    assert [record.responses for record in records] == [("A cat.", "A dog.")] * 2
    assert len({record.id for record in records}) == 2


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (trl(question="Why?", ds_name="x", idx="3", image_path="b.png"), "trl"),
        (trl(text="a caption", ds_name="x"), "trl"),
        (trl(completions=["A cat.", "A dog."], img_path="b.png"), "trl"),
        (trl(conversations=None), "trl"),
        ({"question": "Why?", "chosen": [human("x")], "rejected": [human("x")]}, "trl"),
        ({"question": "Why?", "chosen": "x", "rejected": "y"}, "rlaifv"),
        (rlaifv(text=None, prompt=None), "rlaifv"),
        (rlaifv(text="a caption"), "rlaifv"),
        (rlhfv(question=None, chosen=None, rejected=None), "rlhfv"),
        (vlfeedback(completions=None), "vlfeedback"),
        (povid(chosen=None, output_1=None), "povid"),
        (llavarlhf(completions=None), "llavarlhf"),
        (sharegpt(), "sharegpt"),
        ({"messages": [], "conversations": [human("x")]}, "trl"),
    ],
)
def test_rows_that_fit_two(row, name):
    assert format_of(row) == name


# --- RLAIF-V --------------------------------------------------------------------------------------


def test_rlaifv():
    rows = rlaifv(), rlaifv(image=None), rlaifv(idx="9", chosen=" A dog.\n")
    records, dropped = read(*rows)
    assert [record.id for record in records] == ["4", "4-1"] and dropped == {"identical pair": 1}
    assert records[0].images[0].data == png() and records[1].images[0].path.name == "a.png"
    refused(rlaifv(question=7), "record 0, question", "found int", format="rlaifv")
    refused(rlaifv(chosen=None), "record 0, chosen", "found null", format="rlaifv")
    refused(rlaifv(idx=1.5), "record 0, idx", "found float")


# --- VLFeedback -----------------------------------------------------------------------------------


def responses(records):
    return [record.responses for record in records]


FOUR = (
    completion("good", "4", "5", "4"),
    completion("best", "5", "5", "4"),
    completion("worst", "1", "5", "2"),
    completion("bad", "3", "2", "3"),
)


def test_vlfeedback_best_against_worst():
    records, dropped = read(vlfeedback(*FOUR))
    assert responses(records) == [("best", "worst")] and not dropped  # means 14/3, 8/3 and 8/3: the first
    assert records[0].id == "v1" and turns(records[0]) == [("user", "What?", 1)]
    assert records[0].images[0].path.name == "a.png"


def test_vlfeedback_all_pairs():
    records, dropped = read(vlfeedback(*FOUR), pairs="all")
    wanted = [("best", "good"), ("good", "worst"), ("good", "bad"), ("best", "worst"), ("best", "bad")]
    assert responses(records) == wanted and dropped == {"tie": 1}
    assert [record.id for record in records] == [f"v1-{i}" for i in range(5)]


def test_vlfeedback_leaves_out_and_counts():
    rows = [
        vlfeedback(completion("a", "N/A"), completion("b", "4"), completion("c", 2)),
        vlfeedback(completion("a", "nan"), completion("b", "4")),
        vlfeedback(
            completion("a", None), completion("b", True), completion("c", "1/2"), completion("d", "1e9")
        ),
        vlfeedback(completion("a", "4"), completion("b", 4.0)),
        vlfeedback(completion("a", "4.1", "4.2", "4.3"), completion("b", "4.2")),  # not in floats
        vlfeedback(completion("same", "4"), completion(" same ", "3")),
        vlfeedback(completion("a", "4"), completion(" ", "3"), completion(None, "1")),
        vlfeedback(completions=None),
    ]
    records, dropped = read(*rows)
    assert responses(records) == [("b", "c")]
    assert dropped == {
        "response without a number for each rating": 6,
        "prompt with fewer than two rated responses": 4,
        "tie": 2,
        "identical pair": 1,
        "empty response": 2,
    }
    assert told(dropped) == (
        "6 responses without a number for each rating, 4 prompts with fewer than two rated responses, "
        "2 ties, 2 empty responses, 1 identical pair"
    )


def test_vlfeedback_in_columns(tmp_path):
    row = vlfeedback(*FOUR)
    row["completions"] = in_columns(FOUR[0], list(FOUR))
    assert set(row["completions"]) == {"annotations", "model", "response"}
    assert read(row, pairs="all") == read(vlfeedback(*FOUR), pairs="all")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert responses(records_from(tmp_path / "a.parquet")) == [("best", "worst")]
    lists = {**row["completions"], "annotations": [each["annotations"] for each in FOUR]}
    assert read({**row, "completions": lists}) == read(row)


def test_faulty_vlfeedback():
    at = "record 0, completions"
    refused(vlfeedback(completions="x"), at, "found str")
    refused(vlfeedback(completions=[7]), f"{at}[0]", "found int")
    refused(vlfeedback(completions={"model": ["x"], "response": []}), at, "lists of one length")
    refused(vlfeedback(completion(7, "1")), f"{at}[0].response", "found int")
    refused(vlfeedback(prompt=None), "record 0, prompt", "found null")
    tie = vlfeedback(completion("a", "1"), completion("b", "1"))
    refused(tie, "holds no records", "1 tie")


# --- LLaVA-RLHF -----------------------------------------------------------------------------------


def test_llavarlhf():
    records, dropped = read(llavarlhf(1), llavarlhf("2"), llavarlhf(0), llavarlhf(None))
    assert responses(records) == [("A cat.", "A dog."), ("A dog.", "A cat.")] and dropped == {"tie": 2}
    assert turns(records[0]) == [("user", "Hello.", 1), ("assistant", "Hello.", 0), ("user", "What?", 0)]
    assert [record.id for record in records] == ["l1", "l1-1"]
    same = llavarlhf(1, output_2={"from": "llava", "value": "A cat. "})
    assert read(llavarlhf(), same)[1] == {"identical pair": 1}


def test_faulty_llavarlhf():
    for preference in (3, True, "x", 1.5, [1]):
        refused(llavarlhf(preference), "record 0, preference", "give 1 or 2")
    refused(llavarlhf(output_1=None), "record 0, output_1", "found null")
    refused(llavarlhf(output_2={"value": 7}), "record 0, output_2.value", "found int")
    refused(llavarlhf(conversations=[]), "record 0, conversations", "empty list")
    refused(llavarlhf(conversations=[human("x"), gpt("y")]), "does not end with a user turn")


# --- ShareGPT and LLaVA ---------------------------------------------------------------------------


def test_nlf_takes_the_first_answer_against_the_last():
    turns_ = [{"user": f"Q{i}?", "model": f"Answer {i}.", "rating": str(i)} for i in range(3)]
    ((record,), dropped) = read(nlf(*turns_), nlf(*turns_[:1]), format="nlf")
    assert record.responses == ("Answer 2.", "Answer 0.") and turns(record) == [("user", "Q0?", 1)]
    assert (
        dropped == {"answer without a refined one": 1} and told(dropped) == "1 answer without a refined one"
    )
    (item,) = read_each([nlf()])
    assert item.fields == {
        "caption": "A pet.",
        "chosen_rating": "4",
        "rejected_rating": "1",
        "rejected_reason": "No dog.",
    }


def test_faulty_nlf():
    refused(nlf(interaction="x"), "interaction", "found str")
    refused(nlf(interaction=[nlf(), 3]), "interaction[1]", "found int")
    refused(
        nlf({"user": "What?", "model": None}, {"model": "A cat."}), "interaction[0].model", "found null"
    )


def test_conversations_are_sft_on_the_last_answer():
    asked = [("user", "What?", 1), ("assistant", "A pet.", 0), ("user", "Which?", 0)]
    more = sharegpt(conversations=[*sharegpt()["conversations"], human("And?")])
    (records, _) = read(sharegpt(), more, responses=1)
    assert responses(records) == [("A cat.",)] * 2 and [turns(record) for record in records] == [asked] * 2
    (record,), _ = read(sharegpt(image=None, conversations=[human("What?"), gpt("A cat.")]), responses=1)
    assert record.images == () and record.responses == ("A cat.",)
    (prompt,), _ = read(sharegpt(conversations=[human("What?")]), responses=0)
    assert turns(prompt) == [("user", "What?", 1)] and prompt.responses == ()
    refused(sharegpt(), "record 0, rejected", "is missing")
    refused(sharegpt(conversations=[human("What?")]), "record 0, chosen", "is missing", responses=1)


def test_conversations_with_chosen_and_rejected():
    (record,), _ = read(sharegpt_pairs())
    assert turns(record) == [("system", "Be brief.", 0), ("user", "What?", 1)]
    assert responses([record]) == [("A cat.", "A dog.")] and record.id == "0"
    (texts,), _ = read(sharegpt_pairs(chosen="A cat.", rejected="A dog."))
    assert texts == record
    row = sharegpt_pairs(conversations=[human("<image>What?")], system="Be brief.")
    assert read(row)[0] == [record]
    roles = [
        {"from": "user", "value": "<image>Hi"},
        {"from": "assistant", "value": "Hello"},
        human("What?"),
    ]
    (record,), _ = read(sharegpt_pairs(conversations=roles, chosen={"from": "assistant", "value": "x"}))
    assert turns(record)[:2] == [("user", "Hi", 1), ("assistant", "Hello", 0)]
    assert read(sharegpt_pairs(), sharegpt_pairs(rejected=gpt("A cat.")))[1] == {"identical pair": 1}


def test_faulty_conversations():
    refused(sharegpt_pairs(chosen=human("x")), "record 0, chosen.from", "'human'")
    refused(sharegpt_pairs(rejected={}), "record 0, rejected.value", "found null")
    refused(sharegpt_pairs(conversations=[{"from": "bot", "value": "x"}]), "conversations[0].from", "'bot'")
    refused(sharegpt_pairs(conversations=[human("What?"), gpt("x")]), "does not end with a user turn")
    refused(sharegpt_pairs(system=7), "record 0, system", "found int")


# --- the older ones -------------------------------------------------------------------------------


def test_identical_pairs_of_povid_and_rlhfv_are_counted():
    talk = [human("What?"), gpt("A cat.")]
    assert read(povid(), povid(talk, [human("What?"), gpt(" A cat.\n")]))[1] == {"identical pair": 1}
    same = {"question": "What?", "chosen": "x", "rejected": "x"}
    assert read(rlhfv(), rlhfv(text=same))[1] == {"identical pair": 1}


def test_a_file_of_left_out_rows_is_refused(tmp_path: Path):
    refused(povid(rejected=povid()["conversations"]), "holds no records but 1 identical pair")


# --- a user's own -------------------------------------------------------------------------------------

OWN = """
def read(row):
    if row["kind"] == "several":
        return [{"prompt": row["q"], "chosen": a, "rejected": "C."} for a in ("A.", "B.")]
    if row["kind"] == "named":
        return {"id": row["key"], "prompt": row["q"], "chosen": "A.", "rejected": "C."}
    if row["kind"] == "none":
        return None
    if row["kind"] == "number":
        return 3
    if row["kind"] == "texts":
        return ["A.", "B."]
    if row["kind"] == "poor":
        return {"prompt": row["q"], "chosen": "A."}
    if row["kind"] == "same":
        return {"prompt": row["q"], "chosen": "A.", "rejected": "A."}
    return row["absent"]

three = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "my_reader.py").write_text(OWN)
    return f"{tmp_path}/my_reader.py:read"


def test_a_function_in_a_file(own):
    rows = [
        {"kind": "several", "q": "What?"},
        {"kind": "none"},
        {"kind": "none"},
        {"kind": "named", "key": "k", "q": "Who?"},
    ]
    records, dropped = read(*rows, format=own)
    assert [(record.id, record.responses) for record in records] == [
        ("0-0", ("A.", "C.")),
        ("0-1", ("B.", "C.")),
        ("k", ("A.", "C.")),
    ]
    assert told(dropped) == "2 rows without a record"
    ((record,), _) = read(
        {"kind": "same", "q": "What?"}, format=own
    )  # tokens decide later, as for any own file
    assert record.responses == ("A.", "A.")


def test_its_images_start_from_the_datas_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "r.py").write_text("def read(row): return {**row, 'image': row['picture']}")
    (tmp_path / "rows.jsonl").write_text(
        '{"picture": "a.png", "prompt": "?", "chosen": "A", "rejected": "B"}\n'
    )
    (record,) = records_from(tmp_path / "rows.jsonl", format=f"{tmp_path}/r.py:read")
    assert record.images[0].path == tmp_path / "a.png"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("number", ("record 0", "my_reader.py:read raises TypeError", "mend the reader")),
        ("texts", ("record 0", "my_reader.py:read gives str", "return a dict, or a list of dicts")),
        ("poor", ("record 0, rejected", "is missing")),
        ("else", ("record 0", "my_reader.py:read raises KeyError: 'absent'")),
    ],
)
def test_what_goes_wrong_in_it(own, kind, words):
    refused({"kind": kind, "q": "What?"}, *words, format=own)


def test_a_reader_that_is_not_there(own):
    refused({}, "my_reader.py:three can't be called", format=own.replace(":read", ":three"))
    refused({}, "can't be loaded (AttributeError", format=own.replace(":read", ":write"))
    refused({}, "give the path of a Python file", format="gone.py:read")


def test_a_config_names_it_by_its_absolute_path(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(format="my_reader.py:read")
    assert config.format == own and part_files(Config(data=config)).keys() == {
        str(tmp_path / "my_reader.py")
    }
    monkeypatch.chdir("/")
    assert from_json(to_json(Config(data=config))).data == config
