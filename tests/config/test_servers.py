"""Settings of a chat endpoint, and of a judge of benchmarks."""

import pytest
from refusals import refusal

from mllm_align import Endpoint
from mllm_align.config.servers import BenchmarkJudge

URL = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"name": "x"}, "judge.name is given, but no judge; name it with judge.url or judge.model"),
        ({"runs": 2}, "judge.runs is given, but no judge"),
        ({"url": URL, "model": "m"}, "judge.url and judge.model name two judges; leave one out"),
        (
            {"model": "m", "runs": 2},
            "judge.runs asks an endpoint: greedy verdicts of a model are all the same",
        ),
        ({"url": "localhost"}, "judge.url is 'localhost'; it must be an http(s) address"),
        ({"url": "http://key@host"}, "judge.url is 'http://key@host'; it must be an http(s) address"),
        ({"url": URL, "name": ""}, "judge.name is ''; it must be a name"),
        ({"url": URL, "runs": 0}, "judge.runs is 0; it must be 1 or more"),
        ({"url": URL, "max_tokens": 0}, "judge.max_tokens is 0"),
        ({"url": URL, "timeout": 0.0}, "judge.timeout is 0.0; it must be above 0"),
        ({"url": URL, "temperature": 3.0}, "judge.temperature is 3.0; it must be from 0 to 2, or none"),
        ({"url": URL, "budget": 0}, "judge.budget is 0"),
        ({"model": "m", "batch_size": 0}, "judge.batch_size is 0"),
    ],
)
def test_a_judge_that_can_not_be(settings, problem):
    assert problem in refusal(BenchmarkJudge, **settings)


def test_who_is_asked():
    assert not BenchmarkJudge().given
    assert BenchmarkJudge(model="m").given and BenchmarkJudge(model="m").shown == "judge.model m"
    there = BenchmarkJudge(url=URL, name="x", runs=3)
    assert there.given and there.shown == "judge.name x" and there.served == ("judge.name", "x")


def test_an_endpoint_that_annotates_names_its_own_options():
    assert Endpoint(model="x").served == ("annotator.model", "x")
    assert "annotator.retries is -1" in refusal(Endpoint, retries=-1)
    assert "annotator.model is ''" in refusal(Endpoint, model="")
