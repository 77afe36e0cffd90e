"""Trackers: what reaches them, what a run does when one is absent or fails, how a run is continued."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from runs import PAIRS, TINY, bundle, compiling, events

from mllm_align import Config, InputError, load_config, train
from mllm_align.config import from_json, to_json
from mllm_align.training.trackers import OPENED, Trackers, check_trackers

assert compiling  # a fixture


class Board:
    """Stands for tensorboardX."""

    def __init__(self, folder):
        self.folder, self.scalars, self.flushed, self.closed = folder, [], 0, False
        sys.modules["tensorboardX"].made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.closed = True


class Weights:
    """Stands for wandb: a run by its id."""

    def __init__(self):
        self.began, self.logged, self.finished = [], [], 0

    def init(self, **given):
        self.began.append(given)
        return SimpleNamespace(id=given["id"] or "w1", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


class Flow:
    """Stands for mlflow and its client."""

    entities = SimpleNamespace(Param=lambda *each: each, Metric=lambda *each: each)

    def __init__(self):
        self.experiments, self.runs, self.params, self.metrics, self.states = {}, [], [], [], []

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return None if known is None else SimpleNamespace(experiment_id=known)

    def create_experiment(self, name):
        return self.experiments.setdefault(name, f"e{len(self.experiments)}")

    def create_run(self, experiment, run_name):
        self.runs.append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"m{len(self.runs)}"))

    def log_batch(self, run, metrics=(), params=()):
        assert len(params) <= 100
        self.params += params
        self.metrics += [(run, name, value, step) for name, value, _, step in metrics]

    def update_run(self, run, status):
        self.states.append((run, status))

    def set_terminated(self, run):
        self.states.append((run, "ended"))


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for all three packages."""
    board = ModuleType("tensorboardX")
    board.SummaryWriter, board.made = Board, []
    found = SimpleNamespace(tensorboard=board, wandb=Weights(), mlflow=Flow())
    for name, module in (("tensorboardX", board), ("wandb", found.wandb), ("mlflow", found.mlflow)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return found


ALL = Config(trackers=("tensorboard", "wandb", "mlflow"))
VALUES = {"train/loss": 0.5, "train/rewards/margin": -1.0}


def test_each_gets_the_figures(packages, tmp_path):
    assert ALL.trackers == tuple(OPENED)
    check_trackers(ALL.trackers)
    trackers = Trackers(ALL, tmp_path)
    trackers.log(3, VALUES)
    trackers.close()
    (board,) = packages.tensorboard.made
    assert board.folder == str(tmp_path / "tensorboard") and board.flushed == 1 and board.closed
    assert board.scalars == [(name, value, 3) for name, value in VALUES.items()]
    (began,) = packages.wandb.began
    assert (began["project"], began["name"], began["dir"]) == ("mllm_align", tmp_path.name, str(tmp_path))
    assert (began["id"], began["config"]["optim"]["learning_rate"]) == (None, 1e-6)
    assert packages.wandb.logged == [(3, VALUES)] and packages.wandb.finished == 1
    assert packages.mlflow.runs == [("e0", tmp_path.name)] and packages.mlflow.experiments == {
        "mllm_align": "e0"
    }
    assert ("optim.learning_rate", "1e-06") in packages.mlflow.params
    assert packages.mlflow.metrics == [("m1", name, value, 3) for name, value in VALUES.items()]
    assert packages.mlflow.states == [("m1", "RUNNING"), ("m1", "ended")]


def test_a_run_that_goes_on_is_the_same_to_them(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    for step in (1, 2):
        trackers = Trackers(ALL, tmp_path)
        trackers.log(step, VALUES)
        trackers.close()
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "w1", "mlflow": "m1"}
    assert [each["id"] for each in packages.wandb.began] == [None, "w1"]
    assert {each["project"] for each in packages.wandb.began} == {"mine"}
    assert len(packages.mlflow.runs) == 1 and {run for run, *_ in packages.mlflow.metrics} == {"m1"}
    assert packages.mlflow.experiments == {"ours": "e0"}


def test_none_writes_nothing(tmp_path):
    trackers = Trackers(Config(), tmp_path)
    trackers.log(1, VALUES)
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_one_that_fails_is_told_of_once_and_left_out(packages, tmp_path, capsys):
    def lost(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    packages.wandb.log = lost
    packages.mlflow.get_experiment_by_name = lost
    trackers = Trackers(ALL, tmp_path)
    for step in (1, 2, 3):
        trackers.log(step, VALUES)
    packages.tensorboard.made[0].close = lost
    trackers.close()
    lines = capsys.readouterr().err.splitlines()
    said = "fails (ConnectionError: no route to host); the run goes on without it"
    assert lines == [f"tracker {name} {said}" for name in ("mlflow", "wandb", "tensorboard")]
    assert len(packages.tensorboard.made[0].scalars) == 6
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "w1"}


@pytest.mark.slow
def test_a_run_ends_well_whose_tracker_fails(packages, tmp_path, capsys):
    packages.wandb.init = None
    config = replace(TINY, steps=2, trackers=("wandb", "tensorboard"))
    train(config, bundle(), PAIRS, tmp_path / "run", PAIRS)
    assert capsys.readouterr().err.count("tracker wandb fails (TypeError") == 1
    (board,) = packages.tensorboard.made
    losses = [(each["loss"], each["step"]) for each in events(tmp_path / "run", "train")]
    assert [(value, step) for name, value, step in board.scalars if name == "train/loss"] == losses
    assert [step for name, _, step in board.scalars if name == "eval/loss"] == [2] and board.closed


@pytest.mark.parametrize(
    "name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_one_that_is_absent_is_told_before_anything_is_made(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as refused:
        train(replace(TINY, trackers=(name,)), bundle(), PAIRS, tmp_path / "run")
    said = f"tracker {name} needs the package {package}: pip install 'mllm-align[{name}]'"
    assert str(refused.value) == said and not (tmp_path / "run").exists()


def test_one_that_is_unknown_is_refused():
    with pytest.raises(
        InputError, match=r"trackers is .*'comet'.*; it must be some of tensorboard, wandb, mlflow"
    ):
        Config(trackers=("comet",))


def test_the_one_that_is_installed_writes_events(tmp_path):
    pytest.importorskip("tensorboardX")
    trackers = Trackers(Config(trackers=("tensorboard",)), tmp_path)
    trackers.log(1, VALUES)
    trackers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


# ---- configs of earlier versions -----------------------------------------------------------------------


@pytest.mark.parametrize("written, wanted", [(False, ()), (True, ("tensorboard",))])
def test_the_field_of_earlier_versions_is_read(tmp_path, written, wanted):
    saved = to_json(Config()) | {"tensorboard": written}
    del saved["trackers"]
    assert from_json(saved) == Config(trackers=wanted)
    (tmp_path / "mine.yaml").write_text(f"tensorboard: {str(written).lower()}\nsteps: 3\n")
    assert load_config(tmp_path / "mine.yaml") == Config(trackers=wanted, steps=3)
    (tmp_path / "bad.yaml").write_text("tensorboard: 3\n")
    with pytest.raises(InputError, match=r"bad\.yaml line 1: tensorboard: no such field"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its folder and its checkpoints hold the field."""
    out = tmp_path / "run"
    train(replace(TINY, steps=1, save_every=1), bundle(), PAIRS, out)
    saved = json.loads((out / "config.json").read_text())
    del saved["trackers"]
    (out / "config.json").write_text(json.dumps(saved | {"tensorboard": False}))
    train(replace(TINY, steps=2), bundle(), PAIRS, out)
    assert [each["step"] for each in events(out, "train")] == [1, 2]
