"""Fixtures of the command line: one device, a small model, refusals."""

from pathlib import Path

import pytest
from command_line import run
from decoding import Scripted
from runs import TINY, bundle, compiling, one_device

from mllm_align.config import save_json

assert compiling and run  # fixtures


@pytest.fixture
def refused(run):
    """The one line that a command is refused with; around --out, nothing came or went."""

    def around(out: Path | None) -> list[Path]:
        return [] if out is None else sorted(out.parent.rglob("*"))

    def refuse(*argv) -> str:
        out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else None
        before = around(out)
        status, told, line = run(*argv)
        assert status == 2, (told, line)
        assert line.startswith("mllm-align: error: ") and line.count("\n") == 1, line
        assert not told
        assert around(out) == before
        return line

    return refuse


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """TINY as a config file."""
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    text = "import json\nfrom mllm_align.config import from_json\n"
    file.write_text(f"{text}def get_config():\n    return from_json(json.loads('''{save_json(TINY)}'''))\n")
    return file


@pytest.fixture
def scripted(monkeypatch):
    """Decoders that take tokens by the keys of the forks: nothing is loaded or compiled."""

    def decoder(bundle, sampling, size):
        return Scripted(bundle.config.decoder.vocab, size)

    monkeypatch.setattr("mllm_align.models.bundle.load", lambda *_: bundle())
    monkeypatch.setattr("mllm_align.generation.respond.Generator", decoder)
    monkeypatch.setattr("mllm_align.generation.bdhs_job.Generator", decoder)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    """The programs of the other tests are there then, compiled."""
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    monkeypatch.setattr("mllm_align.training.inputs.make_mesh", one_device)
