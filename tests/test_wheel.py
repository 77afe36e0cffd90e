"""The wheel holds all that a run needs, and works where nothing else of the project is."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from xla_flags import FAST

import mllm_align
from mllm_align.testbed.demo import make_model, make_pairs

ROOT = Path(mllm_align.__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_it_holds_every_file_of_the_package_and_the_configs(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {f"mllm_align/{name}" for name in files(ROOT / "mllm_align")}
    assert held == wanted | {f"mllm_align/configs/{name}" for name in files(ROOT / "configs")}
    templates = {"report/base.html.jinja", "report/parts.html.jinja", "testbed/report/page.html.jinja"}
    templates |= {"report/runs.html.jinja", "evaluation/page.html.jinja", "curation/page.html.jinja"}
    templates |= {"curation/page.js"}
    assert {f"mllm_align/{name}" for name in templates} <= held


@pytest.mark.slow
def test_it_trains_by_a_configs_name_from_another_folder(wheel, tmp_path):
    place = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", place]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    model, pairs = make_model(tmp_path / "model"), make_pairs(tmp_path / "data", 8, held_out=1)

    def program(*argv) -> str:
        check = f"import mllm_align.cli; assert mllm_align.__file__.startswith({str(place)!r})"
        words = [sys.executable, "-c", f"{check}; mllm_align.cli.main()", *map(str, argv)]
        environment = os.environ | {"PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(place / "mllm_align" / "configs") in program("configs")
    program(
        "train",
        "dpo_tiny",
        "--model",
        model,
        "--data",
        pairs,
        "--out",
        "run",
        "--steps",
        1,
        "--data.shapes",
        1,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "save"] == [1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 1
