"""Checkpoints in a bucket (gs://), against a server on this machine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from jobs import CONFIG, Job, final, free_port, log, reach

from mllm_align import export
from mllm_align.testbed.demo import make_model, make_pairs
from mllm_align.training.checkpoint import _digests

pytestmark = pytest.mark.slow
PLACE = "gs://bucket/run"


@pytest.fixture
def bucket(monkeypatch):
    port = free_port()
    program = Path(__file__).parents[1] / "bucket_server.py"
    server = subprocess.Popen([sys.executable, program, str(port)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline().strip()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    yield
    server.kill()


def test_a_run_goes_on_from_a_bucket(bucket, tmp_path):
    """Killed, its newest checkpoint damaged, then continued from a machine that has nothing of it."""
    make_model(tmp_path / "model")
    make_pairs(tmp_path / "data", 20, held_out=1)
    (tmp_path / "config.py").write_text(CONFIG.replace("steps=24", "steps=8"))
    Job(tmp_path, tmp_path / "whole", 1).done()
    expected = final(tmp_path / "whole")

    job = Job(tmp_path, tmp_path / "first", 1, "--checkpoints", PLACE)
    reach(tmp_path / "first", 6, "save", job=job)
    job.kill(0)
    job.wait()
    step = final(PLACE)[0]
    assert step in (4, 6), "the save of step 6 may not have been whole yet"
    newest = epath.Path(PLACE) / str(step)
    data = newest / next(name for name in _digests(newest) if name.startswith("trained") and "/d/" in name)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    job = Job(tmp_path, tmp_path / "second", 1, "--checkpoints", PLACE)
    job.done()
    assert f"run/{step} is damaged" in job.said()
    assert (epath.Path(PLACE) / f"damaged-{step}").exists()
    assert log(tmp_path / "second")[0]["step"] == step - 2
    found = final(PLACE)
    assert found[:2] == expected[:2]
    assert all(np.array_equal(found[2][name], leaf) for name, leaf in expected[2].items())
    assert export(tmp_path / "second", tmp_path / "exported")["step"] == 8
