"""`mllm-align inspect`."""

import json

import pytest
from runs import MODEL, PAIRS, rows, write_pairs


def test_inspect_shows_a_record(run):
    status, table, _ = run("inspect", "--model", MODEL, "--data", PAIRS, "--index", 3)
    assert status == 0 and "pairs.jsonl record 3" in table and "3_RGB.png" in table
    status, text, _ = run("inspect", "--model", MODEL, "--data", PAIRS, "--index", 3, "--json")
    told = json.loads(text)
    assert status == 0 and told["where"] == "pairs.jsonl record 3"
    assert told["images"][0]["embeddings"] == 16 and told["pixels"]["shape"] == [1, 16, 588]
    assert [len(r) for r in told["responses"]] == told["response_tokens"]
    assert all(token["loss"] == 1 for r in told["responses"] for token in r)
    assert all(entry["loss"] == 0 for entry in told["prefix"])
    assert f"prefix {told['prefix_tokens']}" in table


def test_inspect_of_single_responses(run, tmp_path):
    data = write_pairs(tmp_path, [{k: v for k, v in rows()[0].items() if k != "rejected"}])
    status, text, _ = run("inspect", "--model", MODEL, "--data", data, "--responses", 1, "--json")
    assert status == 0 and len(json.loads(text)["responses"]) == 1


@pytest.mark.parametrize("index", [-1, 8])
def test_inspect_of_a_record_that_is_not_there(refused, index):
    line = refused("inspect", "--model", MODEL, "--data", PAIRS, "--index", index)
    assert f"--index is {index}; {PAIRS} has records 0 to 7" in line


def test_inspect_of_no_response(refused):
    argv = ("inspect", "--model", MODEL, "--data", PAIRS, "--responses", 0)
    assert "--responses is 0; it must be 1 or more" in refused(*argv)
