"""A reward model as the annotator: what it gives, whose base it shares, what a run keeps of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from runs import MODEL, PAIRS, TINY, bundle, compiling, events, reward_run

from mllm_align import (
    DataConfig,
    MeshConfig,
    OnlinePairs,
    RewardModel,
    SamplingConfig,
    cli,
    export,
    load,
    score,
    train,
)
from mllm_align.annotate.factory import Context, open_annotator
from mllm_align.annotate.reward import Rewards
from mllm_align.annotate.verdict import Question, rank
from mllm_align.errors import InputError, NotFinite
from mllm_align.prepare import read_data
from mllm_align.scoring import rewards_program
from mllm_align.training import run_facts, run_folder

assert compiling and reward_run  # fixtures


def questions(*responses):
    records = read_data(PAIRS, DataConfig(), responses=2)
    return [Question(record, responses or record.responses[:2]) for record in records]


def opened(run, base=None, **settings):
    return open_annotator(RewardModel(str(run), **settings), Context(base))


def test_verdicts_are_the_scores_of_the_run(reward_run):
    asks = opened(reward_run, bundle(), batch_size=3)
    lines = score(reward_run, PAIRS)
    verdicts = rank(asks, questions())
    wanted = [(line["chosen_reward"], line["rejected_reward"]) for line in lines]
    np.testing.assert_allclose([verdict.scores for verdict in verdicts], wanted, atol=1e-5)
    assert verdicts[0].pair == ((0, 1) if wanted[0][0] > wanted[0][1] else (1, 0))
    program = rewards_program(*(getattr(asks.bundle, n) for n in ("config", "mesh", "lora_scale", "dtype")))
    compiled = program._cache_size()
    rank(asks, questions()[::-1])
    assert program._cache_size() == compiled, "another step compiles nothing"
    assert verdicts[0].reason == ", ".join(f"{value:g}" for value in verdicts[0].scores)


def test_any_number_of_responses_and_those_that_cannot_be_scored(reward_run):
    asks = opened(reward_run, bundle())
    record = questions()[0].record
    few, many = ("tuku.", "gi dan."), ("gi dan.", "tuku.", " tuku. ", "dan.")
    first, second, long = asks([Question(record, each) for each in (few, many, ("tuku. " * 5000, "gi."))])
    np.testing.assert_allclose(second.scores[:2], first.scores[::-1], atol=1e-5)
    assert second.scores[1] == second.scores[2] and len(second.scores) == 4
    assert long.outcome == "failed" and "longer than" in long.reason
    assert asks([]) == []


def test_the_base_is_shared_with_a_policy_of_the_same(reward_run, tmp_path):
    base = bundle()
    policy = replace(base, trained={"lora": {}}, lora=None)
    shared = opened(reward_run, policy)
    assert isinstance(shared, Rewards) and shared.bundle.params is base.params
    assert shared.bundle.lora == TINY.lora and "score" in shared.bundle.trained
    others = [
        opened(reward_run, base, mesh=MeshConfig(fsdp=2)),
        opened(reward_run, base, dtype="bfloat16"),
        opened(reward_run),
    ]
    assert all(each.bundle.params is not base.params for each in others)
    assert others[0].bundle.mesh.shape["fsdp"] == 2 and others[1].bundle.dtype == "bfloat16"
    wanted = [each.scores for each in shared(questions())]
    export(reward_run, tmp_path / "merged")
    merged = opened(tmp_path / "merged", base)
    assert merged.bundle.params is not base.params and merged.bundle.mesh == base.mesh
    np.testing.assert_allclose([each.scores for each in merged(questions())], wanted, atol=1e-4)


def test_what_is_no_reward_model_is_refused_at_once(reward_run):
    with pytest.raises(InputError, match="is no reward model; name a run of one"):
        opened(MODEL, bundle())
    with pytest.raises(InputError, match=r"needs annotator\.model"):
        open_annotator(RewardModel(), Context(bundle()))
    broken = load(reward_run, mesh=bundle().mesh)
    head = {"kernel": broken.trained["score"]["kernel"] * np.float32("nan")}
    broken = replace(broken, trained=broken.trained | {"score": head})
    with pytest.raises(NotFinite, match="rewards are not finite for 8 of 8 records"):
        Rewards(broken, 3, DataConfig())(questions())


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_online_run_learns_from_it(reward_run, tmp_path, share):
    """Online-DPO and mixed-DPO; the reward model is that of the start, whatever the policy becomes."""
    annotator = RewardModel(str(reward_run))
    online = OnlinePairs(annotator=annotator, sampling=SamplingConfig(max_tokens=8), offline_share=share)
    config, out = replace(TINY, online=online, steps=2), tmp_path / "run"
    train(config, bundle(), PAIRS, out)
    lines = events(out, "train")
    assert all(np.isfinite(line["loss"]) and line["annotate/ranked"] > 0 for line in lines)
    shown = next(each for each in events(out, "example") if each["outcome"] == "ranked")
    record = next(each.record for each in questions() if each.record.id == shown["id"])
    (again,) = opened(reward_run, bundle())([Question(record, tuple(shown["responses"]))])
    np.testing.assert_allclose(again.scores, shown["scores"], atol=1e-5)


def test_a_run_keeps_one_reward_model(reward_run, tmp_path):
    """Of a run as of an exported folder: the checkpoint is part of what a run stands on."""
    shutil.copytree(reward_run, tmp_path / "reward")
    online = OnlinePairs(annotator=RewardModel(str(tmp_path / "reward")))
    config, out = replace(TINY, online=online), tmp_path / "run"

    def described():
        return run_facts.metadata(config, bundle(), PAIRS, None, [])

    before = described()
    assert before["judge_fingerprint"] not in (None, before["model_fingerprint"])
    assert before["judge"] == str(tmp_path / "reward")
    run_folder.start(out, config, before, 0)
    (out / "log.jsonl").write_text('{"event": "train", "step": 1}\n')
    run_folder.check(out, config, described())
    checkpoints = sorted((tmp_path / "reward/checkpoints").iterdir(), key=lambda x: x.name)
    assert len(checkpoints) > 1
    shutil.rmtree(checkpoints[-1])
    with pytest.raises(InputError, match=r"was started with another judge .*; give its judge, or --out"):
        run_folder.check(out, config, described())


@pytest.mark.slow
def test_judge_measures_it(reward_run, tmp_path, capsys):
    out = tmp_path / "result.json"
    asked = ["--annotator", "reward", "--annotator.model", str(reward_run)]
    code = cli.main(["judge", "judge", *asked, "--data", str(PAIRS), "--out", str(out)])
    assert not code and "accuracy of decided" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    for line, found in zip(lines, score(reward_run, PAIRS), strict=True):
        assert line["scores"] == pytest.approx([found["chosen_reward"], found["rejected_reward"]], abs=1e-5)
