"""What run.json says."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
from etils import epath

from mllm_align.config import Config
from mllm_align.training import run_facts


def test_a_checkout_that_is_not_installed_can_train(monkeypatch):
    def version(name):
        if name == "mllm-align":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(run_facts, "version", version)
    assert run_facts._version("mllm-align") == "not installed"
    assert run_facts._version("jax") == "1.2"


def test_data_are_known_by_their_tokens(monkeypatch):
    """And by where one text ends and the next begins."""
    monkeypatch.setattr(run_facts, "name_weights", lambda folder: None)
    folder = SimpleNamespace(
        named=None, path=epath.Path("/m"), step=None, fingerprint="f", projector_fingerprint="p"
    )
    bundle = SimpleNamespace(folder=folder, dtype="float32", kept="float32")

    def fingerprint(*records):
        made = [
            SimpleNamespace(prefix=np.array(p, np.int32), responses=[np.array(r, np.int32) for r in rest])
            for p, *rest in records
        ]
        for each in made:
            each.parts = (each,)
        return run_facts.metadata(Config(), bundle, "d.jsonl", None, made)["data_fingerprint"]

    base = fingerprint(([1, 2], [3], [4]))
    assert base == fingerprint(([1, 2], [3], [4]))
    others = {
        fingerprint(([1, 2, 3], [], [4])),
        fingerprint(([1, 2], [4], [3])),
        fingerprint(([1, 2], [3], [5])),
        fingerprint(([1, 2], [3], [4]), ([1, 2], [3], [4])),
    }
    assert len(others) == 4 and base not in others
