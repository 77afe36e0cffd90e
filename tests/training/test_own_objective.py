"""A user's objective in a file of hers: several terms with weights of their own, and a state."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens, union
from runs import MODEL, PAIRS, TINY, bundle, compiling, one_device
from signals import signals

from mllm_align import InputError, load_run, train
from mllm_align.batch import pad, stack
from mllm_align.cli import main
from mllm_align.config import from_json, save_json, to_json
from mllm_align.registry import load_part
from mllm_align.training.step import TrainState, make_evaluation, make_step

assert compiling  # a fixture
SOURCE = '''
from dataclasses import dataclass

import jax.numpy as jnp

from mllm_align import Objective, Terms


@dataclass(frozen=True)
class Mixed(Objective):
    """softplus(center - beta h) of each pair, plus the chosen response's loss of each token; center is the
    mean of beta h so far."""

    responses = 2
    needs = frozenset({"reference"})
    beta: float = 0.1
    share: float = 0.5

    def weights(self, responses):
        tokens = responses.mask[:, 0].sum(-1) * responses.weight
        return {"pairs": responses.weight.sum(), "tokens": tokens.sum()}

    def init_state(self):
        return {"sum": jnp.zeros(()), "count": jnp.zeros(())}

    def __call__(self, signals, state):
        ratios = signals.policy[0].sum(-1) - signals.reference[0].sum(-1)
        reward = self.beta * (ratios[:, 0] - ratios[:, 1])
        center = state["sum"] / jnp.maximum(state["count"], 1)
        pairs = jnp.logaddexp(0.0, center - reward) * signals.weight
        chosen = -signals.policy[0][:, 0].sum(-1) * signals.weight
        sums = {"pairs": pairs.sum(), "tokens": self.share * chosen.sum()}
        stats = {"sum": (reward * signals.weight).sum(), "count": signals.weight.sum()}
        return Terms(sums, {"rewards/center": (center, jnp.ones(()))}, stats)

    def update(self, state, stats):
        return {name: state[name] + stats[name] for name in state}
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("mine") / "my_losses.py"
    place.write_text(SOURCE)
    return place


@pytest.fixture(scope="module")
def mixed(file):
    return load_part(f"{file}:Mixed", "objective")()


# ---- exact over micro-batches ------------------------------------------------------------------------

DESCENT = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, _, params=None: (jax.tree.map(lambda g: -0.1 * g, grads), grads),
)
STATE = {"sum": jnp.float32(0.6), "count": jnp.float32(2.0)}


@pytest.fixture(scope="module")
def stepped(mixed):
    """stepped(batch) -> (state, metrics) after one step of gradient descent that keeps its gradient."""
    golden = goldens("llavanext")
    step = jax.jit(make_step(golden.model, mixed, DESCENT, 1.0, jnp.float32))
    trained = {"params": {"projector": golden.policy["projector"]}}

    def run(batch):
        state = TrainState(jnp.zeros((), jnp.int32), trained, DESCENT.init(trained), STATE)
        state, metrics, health = step(state, golden.base, batch)
        assert health.finite
        return state, {name: float(s) / float(w) for name, (s, w) in metrics.items() if float(w)}

    groups = golden.groups()
    shape = union(groups)
    whole, uneven = stack([pad(groups, shape, 4)]), [groups[:1], groups[1:3], groups[3:]]
    parts = stack([pad(part, shape, 2) for part in uneven])
    return SimpleNamespace(golden=golden, run=run, whole=whole, parts=parts, trained=trained)


def test_terms_with_weights_of_their_own_are_exact(stepped, mixed):
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
    terms = mixed(signals(np.zeros(mask.shape), np.zeros(mask.shape), mask, np.ones(len(mask))), STATE)
    assert float(terms.stats["sum"]) == 0 and float(terms.metrics["rewards/center"][0]) == pytest.approx(
        0.3
    )


def test_evaluation_sees_the_state_and_keeps_it(stepped, mixed):
    golden = stepped.golden
    evaluate = jax.jit(make_evaluation(golden.model, mixed, 1.0, jnp.float32))
    metrics, _ = evaluate(stepped.trained, golden.base, stepped.parts, STATE)
    _, expected = stepped.run(stepped.whole)
    total = sum(float(s) / float(w) for name, (s, w) in metrics.items() if name.startswith("loss/"))
    assert total == pytest.approx(expected["loss"], rel=1e-5)


# ---- a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(mixed):
    return replace(TINY, objective=replace(mixed, beta=0.2), save_every=2)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(config, bundle(), PAIRS, out), out


def equal(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_with_its_state(config, whole, tmp_path):
    def stop(values):
        if values["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, bundle(), PAIRS, tmp_path / "run", on_step=stop)
    again = train(config, bundle(), PAIRS, tmp_path / "run")
    model, out = whole
    assert equal(again.trained, model.trained)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    centers = [line["rewards/center"] for line in lines if line["event"] == "train"]
    assert centers[0] == 0 and len(set(centers)) == 4, "the state moves in every step"
    assert (out / "checkpoints" / "4" / "objective").is_dir()


def test_the_saved_config_finds_the_class_again(config, whole, file):
    saved = to_json(config)["objective"]
    assert saved == {"kind": f"{file}:Mixed", "beta": 0.2, "share": 0.5}
    assert from_json(json.loads(save_json(config))) == config
    model, out = whole
    assert equal(load_run(out).trained, model.trained)


def test_a_run_is_not_continued_with_another_version_of_the_file(
    config, whole, file, tmp_path, monkeypatch
):
    _, out = whole
    facts = json.loads((out / "run.json").read_text())
    assert list(facts["part_files"]) == [str(file)]
    monkeypatch.setattr("mllm_align.training.run_folder.part_files", lambda config: {str(file): "other"})
    with pytest.raises(InputError, match=r"my_losses.py has changed since .* was started") as caught:
        train(replace(config, steps=6), bundle(), PAIRS, out)
    assert "\n" not in str(caught.value)


def test_named_on_the_command_line(file, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    monkeypatch.setattr("mllm_align.training.loop.make_mesh", one_device)
    (tmp_path / "tiny.py").write_text(
        f"import json\nfrom mllm_align.config import from_json\n"
        f"def get_config():\n    return from_json(json.loads('''{save_json(replace(TINY, steps=1))}'''))\n"
    )
    out = tmp_path / "run"
    command = ["train", tmp_path / "tiny.py", "--model", MODEL, "--data", PAIRS, "--out", out]
    main([str(x) for x in (*command, "--objective", f"{file}:Mixed", "--objective.share", "0.25")])
    saved = json.loads((out / "config.json").read_text())["objective"]
    assert saved == {"kind": f"{file}:Mixed", "beta": 0.1, "share": 0.25}


@pytest.mark.parametrize(
    "name, said",
    [
        ("none_there.py:Mixed", "none_there.py is not there"),
        ("my_losses.py:Mixd", "AttributeError"),
        ("my_losses.py:jnp", "can't be made without arguments"),
        ("broken.py:Mixed", "SyntaxError"),
        ("leaves.py:Mixed", "SystemExit"),
        ("os:getcwd", "it must be of type Objective"),
        ("nothing", "it must be one of dpo"),
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
