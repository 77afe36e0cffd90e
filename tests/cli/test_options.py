"""Options that override a config: what they change, and what is refused in which words."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mllm_align import BCO, Part, Sum
from mllm_align.cli import main
from mllm_align.config import (
    OBJECTIVES,
    BDHSConfig,
    Config,
    LoraConfig,
    from_json,
    load_config,
    to_json,
)

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, BDHS = str(CONFIGS / "dpo_tiny.py"), str(CONFIGS / "bdhs.py")


@pytest.fixture
def resolved(capsys):
    """The config that `train CONFIG options...` would run, from --print-config."""

    def resolve(*options: str, file: str = TINY) -> Config:
        main(["train", file, "--print-config", *options])
        return from_json(json.loads(capsys.readouterr().out))

    return resolve


@pytest.fixture
def refused(capsys):
    """The line that `train CONFIG options...` is refused with."""

    def refuse(*options: str, file: str = TINY, verb: str = "train") -> str:
        with pytest.raises(SystemExit) as stop:
            main([verb, file, "--model", "m", "--data", "d", "--out", "o", *options])
        said = capsys.readouterr()
        assert stop.value.code == 2 and not said.out
        assert said.err.startswith("mllm-align: error: ") and said.err.count("\n") == 1
        return said.err

    return refuse


def changed(config: Config, branch: str, **values) -> Config:
    return replace(config, **{branch: replace(getattr(config, branch), **values)})


def config_file(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(f"from mllm_align import *\n{body}\n")
    return str(folder / "mine.py")


def test_without_options_it_is_the_file(resolved):
    assert resolved() == load_config(TINY)


@pytest.mark.parametrize(
    "options, wanted",
    [
        (("--steps", "7", "--batch-size=16"), lambda c: replace(c, steps=7, batch_size=16)),
        (("--batch_size", "16"), lambda c: replace(c, batch_size=16)),
        (("--epochs", "0.5", "--dtype", "bfloat16"), lambda c: replace(c, epochs=0.5, dtype="bfloat16")),
        (("--objective.beta", "0.9"), lambda c: replace(c, objective=OBJECTIVES["dpo"](beta=0.9))),
        (
            ("--objective", "ipo", "--objective.beta", "0.9"),
            lambda c: replace(c, objective=OBJECTIVES["ipo"](beta=0.9)),
        ),
        (
            ("--objective=ipo", "--objective.no-length-normalised"),
            lambda c: replace(c, objective=OBJECTIVES["ipo"](length_normalised=False)),
        ),
        (("--objective", "sft"), lambda c: replace(c, objective=OBJECTIVES["sft"]())),
        (
            (
                "--objective",
                "dpo:0.8",
                "bco:2",
                "--objective.bco.beta=0.3",
                "--objective.dpo.weight",
                "0.5",
            ),
            lambda c: replace(c, objective=Sum((Part(c.objective, 0.5), Part(BCO(0.3), 2.0)))),
        ),
        (("--lora", "none"), lambda c: replace(c, lora=None)),
        (("--lora", "on"), lambda c: c),
        (("--lora.rank", "4"), lambda c: changed(c, "lora", rank=4)),
        (("--lora.targets", "q", "v"), lambda c: changed(c, "lora", targets=("q", "v"))),
        (("--freeze", "projector", "decoder"), lambda c: replace(c, freeze=("projector", "decoder"))),
        (("--lora", "none", "--freeze"), lambda c: replace(c, lora=None, freeze=())),
        (
            ("--optim.schedule", "linear", "--optim.projector-learning-rate", "0"),
            lambda c: changed(c, "optim", schedule="linear", projector_learning_rate=0.0),
        ),
        (
            ("--optim.projector-learning-rate", "None"),
            lambda c: changed(c, "optim", projector_learning_rate=None),
        ),
        (("--data.no-shuffle",), lambda c: changed(c, "data", shuffle=False)),
        (("--data.allow-outside",), lambda c: changed(c, "data", allow_outside=True)),
        (("--data.image-root", "/a b"), lambda c: changed(c, "data", image_root=Path("/a b"))),
        (("--mesh.data", "-1", "--mesh.fsdp", "2"), lambda c: changed(c, "mesh", fsdp=2)),
        (("--trackers", "wandb", "tensorboard"), lambda c: replace(c, trackers=("wandb", "tensorboard"))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_override_fields_of_every_branch(resolved, options, wanted):
    assert resolved(*options) == wanted(load_config(TINY))


def test_changing_the_kind_keeps_what_the_file_says_of_that_kind(tmp_path, resolved):
    file = config_file(tmp_path, "def get_config(): return Config(objective=IPO(beta=0.5), lora=None)")
    assert resolved("--objective", "ipo", file=file).objective == OBJECTIVES["ipo"](beta=0.5)
    assert resolved("--lora", "on", "--lora.rank", "3", file=file).lora == LoraConfig(rank=3)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ("--optim.learning-rat", "1"),
            "unknown option --optim.learning-rat; did you mean --optim.learning",
        ),
        (("--objective", "sft", "--objective.beta", "1"), "unknown option --objective.beta"),
        (("--lora", "none", "--lora.rank", "1"), "unknown option --lora.rank"),
        (
            ("--objective", "xpo"),
            "--objective is 'xpo'; it must be one of sft, dpo, robust, ipo, slic, averaged, ",
        ),
        (
            ("--objective", "rloo", "--objective.beta", "0.4"),
            "objective is 'RLOO'; it must be another, or --online rewards",
        ),
        (("--objective", "dpo:1", "ipo:0"), "the weight of ipo is '0.0'; it must be a number above 0"),
        (("--objective", "dpo", "nope:1"), "'nope' is no objective; give one of sft, dpo"),
        (
            ("--objective", "dpo", "sft", "--objective.beta", "1"),
            "unknown option --objective.beta (objective is sum); did you mean --objective.dpo.beta?",
        ),
        (("--lora", "maybe"), "--lora is 'maybe'; it must be one of none, on"),
        (("--objective",), "--objective is ''"),
        (("--objective", "nowhere.py:Mine"), "nowhere.py is not there"),
        (("--optim.lr", "1"), "unknown option --optim.lr; did you mean --optim.learning-rate?"),
        (("--rank", "1"), "unknown option --rank; did you mean --lora.rank?"),
        (("--steps", "many"), "--steps is 'many'; it must be a whole number or None"),
        (("--steps",), "--steps needs a value; it must be a whole number"),
        (("--steps", "--seed", "1"), "--steps needs a value"),
        (("--optim.warmup", "much"), "--optim.warmup is 'much'; it must be a number"),
        (("--data.shuffle=yes",), "--data.shuffle takes no value; leave out '=yes'"),
        (("--data.max-record", "3"), "unknown option --data.max-record; did you mean --data.max-records?"),
        (("--trackers", "comet"), "it must be some of tensorboard, wandb, mlflow"),
        (("--steps", "0"), "steps is 0; it must be 1 or more"),
        (("--optim.learning-rate", "-1"), "optim.learning_rate is -1.0; it must be 0 or more"),
        (
            ("--optim.schedule", "cosin"),
            "--optim.schedule is 'cosin'; it must be one of constant, linear, cosine",
        ),
        (("--objective.label-smoothing", "0.5"), "objective.label_smoothing is 0.5"),
        (("--freeze", "head"), "freeze is ('head',)"),
        (("--data.shuffle", "yes"), "can't place 'yes': no option before it takes it"),
        (("--no-data.shuffle",), "unknown option --no-data.shuffle; did you mean --data.shuffle?"),
        (("more.py",), "can't place 'more.py'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_are_refused(refused, options, said):
    line = refused(*options)
    assert said in line
    assert "---" not in line and "│" not in line, "no frame of a box is left"


def test_bdhs_starts_from_the_papers_settings(capsys):
    config = load_config(BDHS, BDHSConfig)
    found = (config.mask_rate, config.noise_steps, config.iterations, config.guided, config.threshold)
    assert found == (0.99, 500, 5, True, None)
    main(["bdhs", BDHS, "--print-config"])
    assert json.loads(capsys.readouterr().out) == to_json(config)


@pytest.mark.parametrize(
    "options, wanted",
    [
        (("--mask-rate", "0.5"), {"mask_rate": 0.5}),
        (("--mask_rate=0", "--no-guided"), {"mask_rate": 0.0, "guided": False}),
        (("--sampling.temperature", "0.7"), {"sampling": {"temperature": 0.7}}),
        (("--sampling.top-k", "50", "--sampling.top-p", "0.9"), {"sampling": {"top_k": 50, "top_p": 0.9}}),
        (("--distortion", "noise", "--noise-steps", "700"), {"distortion": "noise", "noise_steps": 700}),
        (("--similarity", "lexical", "--threshold", "0.9"), {"similarity": "lexical", "threshold": 0.9}),
        (
            ("--data.over-long", "skip", "--mesh.fsdp", "2"),
            {"data": {"over_long": "skip"}, "mesh": {"fsdp": 2}},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_of_bdhs(capsys, options, wanted):
    main(["bdhs", BDHS, "--print-config", *options])
    found, expected = json.loads(capsys.readouterr().out), to_json(BDHSConfig())
    for name, value in wanted.items():
        expected[name] = {**expected[name], **value} if isinstance(value, dict) else value
    assert found == expected


@pytest.mark.parametrize(
    "options, said",
    [
        (("--mask-rat", "1"), "unknown option --mask-rat; did you mean --mask-rate?"),
        (("--sampling.temprature", "1"), "did you mean --sampling.temperature?"),
        (("--optim.learning-rate", "1"), "unknown option --optim.learning-rate"),
        (("--lora", "none"), "unknown option --lora"),
        (("--mask-rate", "2"), "mask_rate is 2.0; it must be from 0 to 1"),
        (("--sampling.top-p", "0"), "sampling.top_p is 0.0; it must be above 0"),
        (("--distortion", "blur"), "--distortion"),
        (("--iterations", "many"), "--iterations"),
        (("--shard", "2/2"), "--shard is '2/2'; give part/parts, as 0/4 to 3/4 for four hosts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_of_bdhs_that_are_refused(refused, options, said):
    assert said in refused(*options, file=BDHS, verb="bdhs")


def test_options_that_replace_a_branch_reach_below_others(resolved):
    options = ["--online", "pairs", "--online.mesh", "on", "--online.mesh.tensor", "4"]
    options += ["--online.annotator", "judge", "--online.annotator.mesh", "on"]
    online = resolved(*options, "--online.annotator.mesh.fsdp", "2").online
    assert online.mesh.tensor == 4 and online.annotator.mesh.fsdp == 2
    assert resolved(*options, "--online.annotator.mesh=none").online.annotator.mesh is None


@pytest.mark.parametrize(
    "options, said",
    [
        (["--online.mesh", "on"], "unknown option --online.mesh (online is none)"),
        (
            ["--online", "distorted", "--online.annotator", "judge"],
            "unknown option --online.annotator (online is distorted)",
        ),
        (
            ["--online=pairs", "--online.annotator=oracle", "--online.annotator.mesh=on"],
            "unknown option --online.annotator.mesh (online.annotator is oracle)",
        ),
    ],
)
def test_branches_that_are_not_there_are_refused(capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        main(["train", TINY, *options, "--print-config"])
    assert stop.value.code == 2 and said in capsys.readouterr().err


# ---- a user's own kinds --------------------------------------------------------------------------------

MINE = """
from dataclasses import dataclass
from mllm_align import DPO

@dataclass(frozen=True)
class Mine(DPO):
    gamma: float = 2.0
    def __post_init__(self):
        super().__post_init__()
        if self.gamma > 9:
            raise ValueError("gamma is far too large")

def broken():
    raise RuntimeError("no")
"""


@pytest.fixture
def losses(tmp_path):
    (tmp_path / "losses.py").write_text(MINE)
    return tmp_path / "losses.py"


def test_a_users_kind_has_its_fields_as_options(resolved, losses):
    objective = resolved("--objective", f"{losses}:Mine", "--objective.gamma", "3").objective
    assert type(objective).__name__ == "Mine" and (objective.gamma, objective.beta) == (3.0, 0.1)


@pytest.mark.parametrize(
    "options, said",
    [
        (("Mine", "--objective.gama", "1"), "losses.py:Mine); did you mean --objective.gamma?"),
        (("Mine", "--objective.gamma", "10"), "gamma is far too large"),
        (("Mine", "--objective.gamma", "x"), "--objective.gamma is 'x'; it must be a number"),
        (("broken",), "broken can't be made without arguments (no)"),
        (("Nothing",), "has no attribute 'Nothing'"),
    ],
)
def test_a_users_kind_is_refused_like_ours(refused, losses, options, said):
    assert said in refused("--objective", f"{losses}:{options[0]}", *options[1:])


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ("--seed", str(2**70)),
            "seed is 1180591620717411303424; it must be from 0 to 9223372036854775807",
        ),
        (("--epochs", "1e18"), "epochs is 1e+18; it must be above 0, and at most 1000000000"),
        (("--epochs", "1e999"), "epochs is inf"),
        (("--steps", str(10**12)), "steps is 1000000000000; it must be from 1 to 1000000000"),
        (("--batch-size", str(10**9)), "batch_size is 1000000000; it must be from 1 to 65536"),
        (("--lora.rank", str(10**9)), "lora.rank is 1000000000; it must be from 1 to 65536"),
        (("--optim.learning-rate", "1e30"), "optim.learning_rate is 1e+30; it must be from 0 to 1000"),
        (("--data.multiple", "1000000"), "data.multiple is 1000000; it must be from 1 to 8192"),
        (("--data.prefetch", "1000000"), "data.prefetch"),
        (("--mesh.data", str(10**30)), "mesh"),
        (("--seed", "9" * 5000), "seed"),
    ],
)
def test_huge_options_are_refused(refused, options, said):
    assert said in refused(*options)
