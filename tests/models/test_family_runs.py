"""The whole way of families beside LLaVA, from a folder through training, generation and RL to an export.

That they compute what transformers does is in test_parity.py and oracle/test_families_live.py.
"""

import json
import math
from dataclasses import replace

import jax
import pytest
from goldens import FIXTURES
from runs import PAIRS, TINY, EachStep, compiling, events, one_device, same

import mllm_align
from mllm_align import RLOO, BDHSConfig, OnlineBDHS, OnlineRewards, SamplingConfig
from mllm_align.annotate.scorer import Scorer
from mllm_align.config import MeshConfig
from mllm_align.sharding import make_mesh

assert compiling  # a fixture
pytestmark = pytest.mark.slow
CONFIG = replace(TINY, steps=2, save_every=1)


def of(*names):
    """Families whose traits matter to a test: all of them train and export in test_train_export_live.py."""
    return pytest.mark.parametrize("bundle", names, indirect=True)


@pytest.fixture(scope="module")
def bundle(request, compiling):
    return mllm_align.load(FIXTURES / request.param, "float32", one_device())


@pytest.fixture(scope="module")
def run(bundle, tmp_path_factory):
    """(folder, what was trained) of two steps."""
    out = tmp_path_factory.mktemp("family") / "run"
    return out, mllm_align.train(CONFIG, bundle, PAIRS, out)


@of("qwen3_vl")
def test_a_stopped_lora_run_and_what_is_exported_of_it(bundle, run, tmp_path):
    def stop(values):
        if values["step"] == 1:
            raise RuntimeError

    out, whole = run
    with pytest.raises(RuntimeError):
        mllm_align.train(CONFIG, bundle, PAIRS, tmp_path / "again", callbacks=[EachStep(stop)])
    assert same(mllm_align.train(CONFIG, bundle, PAIRS, tmp_path / "again").trained, whole.trained)
    mllm_align.export(out, tmp_path / "merged")
    mllm_align.export(out, tmp_path / "adapter", adapter=True)
    before, after = mllm_align.score(bundle, PAIRS), mllm_align.score(whole, PAIRS)
    assert before != after
    for folder in (tmp_path / "merged", tmp_path / "adapter"):
        again = mllm_align.score(mllm_align.load(folder, "float32", bundle.mesh), PAIRS)
        for one, other in zip(after, again, strict=True):
            assert one["chosen_logp"] == pytest.approx(other["chosen_logp"], abs=1e-3)


@of("qwen2_5_vl", "gemma3")
def test_on_a_mesh_with_stored_features_as_on_one_device(bundle, run, tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    stored = replace(CONFIG, features="stored")
    mllm_align.train(stored, mllm_align.load(bundle.folder.path, "float32", mesh), PAIRS, tmp_path / "four")
    for one, four in zip(events(run[0], "train"), events(tmp_path / "four", "train"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@of("onevision", "idefics3", "qwen2_5_vl", "gemma3", "internvl")
def test_its_own_answers_are_rejected_ranked_and_rewarded(bundle, tmp_path):
    short = SamplingConfig(max_tokens=6)
    online = {
        "bdhs": (OnlineBDHS(similarity="lexical", sentence_tokens=6, sampling=short), TINY.objective),
        "rewards": (OnlineRewards(Scorer("votes:short"), sampling=short), RLOO(responses=2)),
    }
    for name, (maker, objective) in online.items():
        config = replace(TINY, online=maker, objective=objective, steps=1)
        policy = mllm_align.train(config, bundle, PAIRS, tmp_path / name)
        (line,) = events(tmp_path / name, "train")
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert line["rollout/logp_gap"] < 1e-4, "sampling and training see the same model"
    job = BDHSConfig(similarity="lexical", iterations=1, sentence_tokens=6, batch_size=4, sampling=short)
    mllm_align.bdhs(job, policy, PAIRS, tmp_path / "pairs.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 8 and all(row["rejected"] != row["chosen"] for row in pairs)
