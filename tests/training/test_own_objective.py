"""The objectives of docs/objectives.md, in a user's file: several terms, and a state."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens, union
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from refusals import refusal
from runs import MODEL, PAIRS, TINY, EachStep, bundle, compiling, one_device
from signals import signals

from mllm_align import BCO, KTO, Part, SimPO, Sum, load_run, train
from mllm_align.batch import pad, stack
from mllm_align.cli import main
from mllm_align.config import Config, MeshConfig, from_json, load_config, part_files, save_json, to_json
from mllm_align.models.bundle import load
from mllm_align.registry import load_part, run_file
from mllm_align.sharding import make_mesh
from mllm_align.training.step import TrainState, make_evaluation, make_step

assert compiling  # a fixture
PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
SOURCE = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("mine") / "my_losses.py"
    place.write_text(SOURCE)
    return place


@pytest.fixture(scope="module")
def centered(file):
    return load_part(f"{file}:Centered", "objective")()


# ---- exact over micro-batches ------------------------------------------------------------------------

DESCENT = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, _, params=None: (jax.tree.map(lambda g: -0.1 * g, grads), grads),
)
STATE = {"sum": jnp.float32(0.6), "count": jnp.float32(2.0)}


def equal(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def stepped(centered):
    """stepped(batch) -> (state, metrics) after one step of gradient descent that keeps its gradient."""
    golden = goldens("llavanext")
    step = jax.jit(make_step(golden.model, centered, DESCENT, 1.0, jnp.float32))
    trained = {"params": {"projector": golden.policy["projector"]}}

    def run(batch, own=STATE, place=lambda tree: tree, finite=True):
        state = place(TrainState(jnp.zeros((), jnp.int32), trained, DESCENT.init(trained), own))
        state, metrics, health = step(state, place(golden.base), batch)
        assert bool(health.finite) == finite
        return state, {name: float(s) / float(w) for name, (s, w) in metrics.items() if float(w)}

    groups = golden.groups()
    shape = union(groups)
    whole, uneven = stack([pad(groups, shape, 4)]), [groups[:1], groups[1:3], groups[3:]]
    parts = stack([pad(part, shape, 2) for part in uneven])
    twice = stack([pad(groups * 2, shape, 8)])
    return SimpleNamespace(golden=golden, run=run, whole=whole, parts=parts, twice=twice, trained=trained)


@pytest.mark.slow
def test_terms_with_weights_of_their_own_are_exact(stepped, centered):
    """The gradient is that of the two means, taken on the whole batch at once."""
    golden, batch = stepped.golden, jax.tree.map(lambda x: x[0], stepped.whole)
    mask = np.asarray(batch.responses.mask)

    @jax.jit
    @jax.value_and_grad
    def loss(projector):
        both = [{**golden.base, "projector": projector}, golden.base]
        policy, reference = (golden.model.apply({"params": p}, batch)[0] for p in both)
        ratios = policy.sum(-1) - reference.sum(-1)
        reward = 0.1 * (ratios[:, 0] - ratios[:, 1])
        pairs, tokens = jnp.logaddexp(0.0, 0.3 - reward).mean(), policy[:, 0].sum() / mask[:, 0].sum()
        return pairs - 0.5 * tokens

    value, gradient = loss(stepped.trained["params"]["projector"])
    for each in (stepped.whole, stepped.parts):
        state, metrics = stepped.run(each)
        assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
        assert metrics["loss/pairs"] + metrics["loss/tokens"] == pytest.approx(float(value), rel=1e-5)
        found = state.optimizer["params"]["projector"]
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert float(state.objective["count"]) == 6, "two before, four now"
    terms = centered(signals(np.zeros(mask.shape), np.zeros(mask.shape), mask, np.ones(len(mask))), STATE)
    assert float(terms.stats["sum"]) == 0 and float(terms.metrics["rewards/center"][0]) == pytest.approx(
        0.3
    )


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes(stepped):
    """One group a device; every group twice has the means of every group once."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "data"), ()))
    spread = jax.device_put(stepped.twice, rows)
    found, metrics = stepped.run(spread, place=lambda tree: jax.device_put(tree, everywhere))
    expected, expected_metrics = stepped.run(stepped.whole)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)
    pairs = (jax.tree.leaves(x.optimizer) for x in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    gained = ({name: x.objective[name] - STATE[name] for name in STATE} for x in (found, expected))
    ours, theirs = ({name: float(value) for name, value in each.items()} for each in gained)
    assert ours == pytest.approx({name: 2 * value for name, value in theirs.items()}, rel=1e-4, abs=1e-5)


def test_a_step_that_is_not_finite_leaves_the_state(stepped):
    broken = {"sum": jnp.float32(jnp.nan), "count": jnp.float32(2.0)}
    state, metrics = stepped.run(stepped.whole, broken, finite=False)
    assert float(state.objective["count"]) == 2 and metrics == {"skipped": 1}
    assert equal(state.trained, stepped.trained)


def test_evaluation_sees_the_state_and_keeps_it(stepped, centered):
    golden = stepped.golden
    evaluate = jax.jit(make_evaluation(golden.model, centered, 1.0, jnp.float32))
    metrics, _ = evaluate(stepped.trained, golden.base, stepped.parts, STATE)
    _, expected = stepped.run(stepped.whole)
    total = sum(float(s) / float(w) for name, (s, w) in metrics.items() if name.startswith("loss/"))
    assert total == pytest.approx(expected["loss"], rel=1e-5)


# ---- a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(centered):
    """Its objective stands in a sum with those of the package that have a state."""
    parts = Part(replace(centered, beta=0.2)), Part(BCO(0.3), 0.5), Part(KTO(0.3), 0.5)
    return replace(TINY, objective=Sum(parts), save_every=2)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(config, bundle(), PAIRS, out), out


@pytest.fixture
def begun(config, tmp_path):
    """The same, ended in its third step; the second is saved."""

    def stop(values):
        if values["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, bundle(), PAIRS, tmp_path / "run", callbacks=[EachStep(stop)])
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_its_state(config, whole, begun):
    again = train(config, bundle(), PAIRS, begun)
    model, out = whole
    assert equal(again.trained, model.trained)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    centers = [line["rewards/center"] for line in lines if line["event"] == "train"]
    assert centers[0] == 0 and len(set(centers)) == 4, "the state moves in every step"
    deltas = [line["bco/rewards/delta"] for line in lines if line["event"] == "train"]
    assert deltas[0] == 0 and len(set(deltas)) == 4
    assert all(line["kto/kl/mismatched"] != 0 for line in lines[-2:] if line["event"] == "train")
    assert (out / "checkpoints" / "4" / "objective").is_dir()


@pytest.mark.slow
def test_other_devices_and_micro_batches_go_on_with_its_state(config, whole, begun):
    config = replace(config, micro_batches=2, mesh=MeshConfig(data=2))
    spread = load(MODEL, "float32", make_mesh(config.mesh, jax.devices()[:2]))
    again = train(config, spread, PAIRS, begun)
    model, out = whole
    for ours, theirs in zip(*map(jax.tree.leaves, (again.trained, model.trained)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    ours, theirs = (
        [x["rewards/center"] for x in map(json.loads, (run / "log.jsonl").open()) if x["event"] == "train"]
        for run in (begun, out)
    )
    assert ours[-2:] == pytest.approx(theirs[-2:], rel=1e-3)


def test_the_saved_config_finds_the_class_again(config, whole, file):
    saved = to_json(config)["objective"]["parts"][0]["objective"]
    assert saved == {"kind": f"{file}:Centered", "beta": 0.2, "share": 0.5}
    assert from_json(json.loads(save_json(config))) == config
    model, out = whole
    assert equal(load_run(out).trained, model.trained)


def test_a_run_is_not_continued_with_another_version_of_the_file(config, whole, file):
    _, out = whole
    facts = json.loads((out / "run.json").read_text())
    assert list(facts["part_files"]) == [str(file)]
    text, about = file.read_text(), file.stat()
    file.write_text(text + "\nEPSILON = 1e-6\n")
    said = refusal(train, replace(config, steps=6), bundle(), PAIRS, out)
    file.write_text(text)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # it is loaded once as long as it is the same
    assert said.startswith(f"{file} has changed since {out} was started; take its earlier version")


def test_named_on_the_command_line(file, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    monkeypatch.setattr("mllm_align.training.inputs.make_mesh", one_device)
    (tmp_path / "tiny.py").write_text(
        f"import json\nfrom mllm_align.config import from_json\n"
        f"def get_config():\n    return from_json(json.loads('''{save_json(replace(TINY, steps=1))}'''))\n"
    )
    command = ["train", str(tmp_path / "tiny.py"), "--objective"]
    main([*command, f"{file}:SimPO", "--objective.beta", "2.5", "--print-config"])
    saved = json.loads(capsys.readouterr().out)["objective"]
    assert saved == {"kind": f"{file}:SimPO", "beta": 2.5, "gamma": 1.0}
    out = tmp_path / "run"
    parts = [f"{file}:Centered", "bco:0.5", "kto:0.5", "--objective.Centered.beta", "0.2"]
    settings = ["--objective.bco.beta=0.3", "--objective.kto.beta=0.3", "--model", MODEL, "--data", PAIRS]
    main([str(x) for x in (*command, *parts, *settings, "--out", out)])
    ours, theirs = (json.loads((run / "config.json").read_text()) for run in (out, whole[1]))
    assert ours == theirs | {"steps": 1, "save_every": TINY.save_every}
    first, expected = (
        next(x for x in map(json.loads, (run / "log.jsonl").open()) if x["event"] == "train")
        for run in (out, whole[1])
    )
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-6) and "rewards/center" in first


def test_the_example_of_the_page_is_the_objective_of_its_name(file):
    rng = np.random.default_rng(2)
    mask = np.arange(5) < rng.integers(1, 6, (3, 2))[:, :, None]
    given = signals(-rng.random(mask.shape) * mask, None, mask, np.array([1.0, 0.0, 1.0]))
    found, expected = load_part(f"{file}:SimPO", "objective")()(given, ()), SimPO()(given)
    assert float(found.sums["pairs"]) == pytest.approx(float(expected.sums["pairs"]), rel=1e-6)
    ours, theirs = (each.metrics["rewards/margin"] for each in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.fixture
def own(tmp_path):
    """A config file that defines objectives, as a module."""
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom mllm_align import DPO, Config\n"
        "@dataclass(frozen=True)\nclass Top(DPO):\n"
        "    @dataclass(frozen=True)\n    class Inner(DPO):\n        pass\n"
        "def within():\n    @dataclass(frozen=True)\n    class Local(DPO):\n        pass\n"
        "    return Local\n"
        "def get_config():\n    return Config(objective=Top(beta=0.3))\n"
    )
    return run_file(tmp_path / "own.py")


def test_a_class_of_a_config_file_is_found_again(own, tmp_path):
    path = tmp_path / "own.py"
    saved = to_json(load_config(path))
    assert saved["objective"] == {
        "kind": f"{path}:Top",
        "beta": 0.3,
        "label_smoothing": 0.0,
        "sft_weight": 0.0,
        "length_normalised": False,
    }
    assert to_json(from_json(saved)) == saved
    assert list(part_files(from_json(saved))) == [str(path)]


def test_a_class_that_a_saved_run_would_not_find_is_refused(own):
    for kind in (own.Top.Inner, own.within()):
        said = refusal(to_json, Config(objective=kind()))
        assert said.startswith(f"{kind.__qualname__} is not defined at the top of a Python file; put it")


@pytest.mark.parametrize(
    "name, said",
    [
        ("none_there.py:Centered", "none_there.py is not there"),
        ("my_losses.py:Centred", "AttributeError"),
        ("my_losses.py:jnp", "can't be made without arguments"),
        ("broken.py:Centered", "SyntaxError"),
        ("leaves.py:Centered", "SystemExit"),
        ("os:getcwd", "it must be of type Objective"),
        ("nothing", "it must be one of sft, dpo"),
    ],
)
def test_a_name_that_leads_to_no_objective_is_refused(name, said, file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "broken.py").write_text("def f(:\n")
    (file.parent / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "plain.py").write_text(
        "from mllm_align import Config\ndef get_config():\n    return Config()\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "plain.py"), "--objective", name, "--print-config"])
    told = capsys.readouterr()
    assert stopped.value.code == 2 and not told.out
    assert told.err.count("\n") == 1 and said in told.err
