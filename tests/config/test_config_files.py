"""Config files: Python, YAML and JSON, by path and by name."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refusal

from mllm_align import DPO, SFT, Endpoint, Part, Sum
from mllm_align.config import (
    OBJECTIVES,
    BDHSConfig,
    Config,
    DataConfig,
    JudgeConfig,
    LoraConfig,
    MeshConfig,
    OnlineBDHS,
    from_json,
    load_config,
    named_configs,
    save_json,
    save_yaml,
    to_json,
)
from mllm_align.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = (Config, BDHSConfig, JudgeConfig)


def config_file(folder: Path, body: str, name: str = "mine.py") -> Path:
    text = f"from mllm_align import *\n{body}\n" if name.endswith(".py") else body
    (folder / name).write_text(text)
    return folder / name


# ---- by name, and Python -----------------------------------------------------------------------------


def test_named_configs_are_the_files_of_configs():
    assert named_configs() == {file.stem: file for file in CONFIGS.glob("*.py")}


@pytest.mark.parametrize("name", named_configs())
def test_a_named_config_goes_to_json_and_back(name):
    config = load_config(name, KINDS)
    assert config == load_config(CONFIGS / f"{name}.py", KINDS)
    assert from_json(json.loads(json.dumps(to_json(config))), type(config)) == config


def test_unknown_names_are_refused():
    line = refusal(load_config, "dpo_llava16_7")
    assert "no config is named 'dpo_llava16_7'; did you mean dpo_llava16_7b?; mllm-align configs" in line


@pytest.mark.parametrize(
    "body, said",
    [
        ("", "get_config"),
        ("def get_config(): return 3", "gives int, not a Config; train takes a Config, bdhs a BDHSConfig"),
        ("def get_config(): 1 / 0", "ZeroDivisionError"),
        ("def get_config(): raise SystemExit(0)", "SystemExit"),
        ("def get_config(: pass", "SyntaxError"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def get_config(): return Config(batchsize=3)", "unexpected keyword argument 'batchsize'"),
        ("def get_config(): return Config(batch_size='8')", "batch_size is '8'; it must be of type int"),
        ("def get_config(): return Config(batch_size=0)", "batch_size is 0; it must be 1 or more"),
    ],
)
def test_unusable_files_are_one_line(tmp_path, body, said):
    line = refusal(load_config, config_file(tmp_path, body))
    assert said in line and "mine.py" in line


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path):
    assert "absent.py is not there" in refusal(load_config, tmp_path / "absent.py")
    assert "absent.yaml is not there" in refusal(load_config, tmp_path / "absent.yaml")
    toml = config_file(tmp_path, "steps = 3", "config.toml")
    assert "it must end in .py, .yaml or .json" in refusal(load_config, toml)


@pytest.mark.parametrize("kind", [kind for kind, each in OBJECTIVES.items() if not each().fields])
def test_json_gives_the_config_back(kind):
    config = Config(
        objective=OBJECTIVES[kind](),
        online=OnlineBDHS() if kind == "averaged" else None,
        lora=None if kind == "sft" else LoraConfig(targets=("q", "down")),
        data=DataConfig(image_root=Path("a"), over_long="skip"),
        mesh=MeshConfig(data=2, tensor=4),
        freeze=(),
    )
    saved = json.loads(json.dumps(to_json(config)))
    assert from_json(saved) == config
    assert saved["objective"]["kind"] == kind
    assert set(saved) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    "broken",
    [[], {"objective": "dpo"}, {"unknown": 1}, {"online": {"kind": "oracle"}}, {"lora": {"kind": "x"}}],
)
def test_a_saved_config_of_another_version_is_refused(broken):
    saved = broken if isinstance(broken, list) else {**to_json(Config()), **broken}
    with pytest.raises(InputError, match="not of this version"):
        from_json(saved)


def test_configs_of_another_verb_are_refused():
    line = refusal(load_config, "dpo_tiny", BDHSConfig)
    assert "get_config() gives Config, not a BDHSConfig; train takes a Config" in line
    assert "get_config() gives BDHSConfig, not a Config;" in refusal(load_config, "bdhs")


def test_huge_numbers_of_a_file_are_refused(tmp_path):
    for field in ("seed", "steps", "epochs", "batch_size", "keep", "micro_batches"):
        file = config_file(tmp_path, f"def get_config(): return Config({field}=10**5000)", f"{field}.py")
        assert f"{field} is a number of thousands of digits; it must be" in refusal(load_config, file)


# ---- YAML --------------------------------------------------------------------------------------------

AVERAGED = Config(objective=OBJECTIVES["averaged"](), online=OnlineBDHS())
MINE = """
base: dpo_tiny
objective: ipo        # short for {kind: ipo}
optim: {learning_rate: 5e-7}
lora:
  targets: [q, v]
data:
  image_root: pictures
steps: 3
"""


def test_yaml_lies_over_its_base(tmp_path):
    tiny = load_config("dpo_tiny")
    wanted = replace(
        tiny,
        objective=OBJECTIVES["ipo"](),
        optim=replace(tiny.optim, learning_rate=5e-7),
        lora=replace(tiny.lora, targets=("q", "v")),
        data=replace(tiny.data, image_root=Path("pictures")),
        steps=3,
    )
    assert load_config(config_file(tmp_path, MINE, "mine.yaml")) == wanted
    config_file(tmp_path, "base: mine.yaml\nobjective: {beta: 0.4}\nlora: null", "next.yml")
    assert load_config(tmp_path / "next.yml") == replace(
        wanted, objective=OBJECTIVES["ipo"](beta=0.4), lora=None
    )


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("", Config()),
        ("seed: 3", Config(seed=3)),
        ("objective: dpo:0.5 sft", Config(objective=Sum((Part(DPO(), 0.5), Part(SFT()))))),
        ("objective: {kind: sum, parts: [{objective: sft}]}", Config(objective=Sum((Part(SFT()),)))),
        ("mask_rate: 0.5", BDHSConfig(mask_rate=0.5)),
        ("annotator: {kind: endpoint, retries: 1}", JudgeConfig(Endpoint(retries=1))),
        (
            "objective: averaged\nonline: bdhs",
            Config(objective=OBJECTIVES["averaged"](), online=OnlineBDHS()),
        ),
        ("online: none", Config()),
    ],
)
def test_yaml_without_a_base_lies_over_the_defaults_of_its_kind(tmp_path, body, wanted):
    assert load_config(config_file(tmp_path, body, "mine.yaml"), KINDS) == wanted


@pytest.mark.parametrize("save, name", [(save_yaml, "saved.yaml"), (save_json, "saved.json")])
@pytest.mark.parametrize("config", named_configs())
def test_a_saved_config_can_be_fed_back(tmp_path, config, save, name):
    config = load_config(config, KINDS)
    text = save(config)
    assert load_config(config_file(tmp_path, text, name), type(config)) == config
    assert save(load_config(tmp_path / name, type(config))) == text


@pytest.mark.parametrize(
    "body, said",
    [
        (
            "steps: 1\n\nbatchsize: 3",
            "line 3: batchsize: no such field; did you mean batch_size?",
        ),
        ("optim:\n  lr: 1", "mine.yaml line 2: optim.lr: no such field; did you mean learning_rate?"),
        ("objective: {kind: dpo, gamma: 1}", "line 1: objective.gamma: no such field"),
        ("objective: xpo", "objective.kind is 'xpo'"),
        ("objective: {kind: oracle}", "objective.kind is 'oracle', which has no place there"),
        ("objective: nowhere.py:Mine", "nowhere.py is not there"),
        ("optim: 3", "mine.yaml line 1: optim is '3'; it must have the fields of OptimConfig"),
        ("steps: 0", "mine.yaml line 1: steps is 0; it must be 1 or more"),
        ("seed: 1\nsteps: many", "mine.yaml line 2: steps is 'many'; it must be of type int"),
        ("steps: {a: 1}", "steps is {'a': 1}"),
        ("lora: {rank: 1.5}", "lora.rank is 1.5; it must be of type int"),
        ("lora: {targets: [[q]]}", "lora.targets"),
        ("base: nothing", "no config is named 'nothing'"),
        ("base: 3", "base is the name of a config"),
        ("base: mine.yaml", "base leads back to"),
    ],
)
def test_yaml_that_is_refused(tmp_path, body, said):
    line = refusal(load_config, config_file(tmp_path, body, "mine.yaml"))
    assert said in line and "mine.yaml" in line


def test_a_users_part_goes_to_yaml_and_back(tmp_path):
    loss = "@dataclasses.dataclass(frozen=True)\nclass Mine(DPO):\n    gamma: float = 2.0\n"
    part = config_file(tmp_path, f"import dataclasses\n{loss}")
    file = config_file(tmp_path, f"objective: {{kind: '{part}:Mine', gamma: 3}}", "mine.yaml")
    config = load_config(file)
    assert type(config.objective).__name__ == "Mine" and config.objective.gamma == 3
    assert load_config(config_file(tmp_path, save_yaml(config), "again.yaml")) == config
