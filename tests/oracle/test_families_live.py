"""transformers on folders of families beside LLaVA, of other settings than the goldens', run now."""

import json

import numpy as np
import pytest
from conversations import ANSWERS, CHATS, picture
from interpreter import run
from runs import compiling, one_device
from test_export_live import oracle

from mllm_align import DataConfig, load
from mllm_align.prepare import prepare
from mllm_align.scoring import response_logps

assert compiling and oracle  # fixtures
pytestmark = pytest.mark.oracle
VARIANTS = ["smolvlm", "text", "whole", "onevision", "onevision scaled", "qwen2.5"]
VARIANTS += ["qwen2.5 cells of nine", "qwen3", "qwen3 cells of nine", "gemma3", "gemma3 windows everywhere"]
VARIANTS += ["internvl", "internvl qwen3"]
TIED = ("smolvlm", "onevision", "qwen2.5", "qwen3", "gemma3", "internvl")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """(folder of folders, the conversations)."""
    out, rows = tmp_path_factory.mktemp("families"), []
    for name, (messages, sizes) in CHATS.items():
        files = [str(out / f"{name}-{i}.png") for i in range(len(sizes))]
        for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
            picture(i, *size).save(file)
        rows += [{"messages": messages, "images": files, "answer": answer} for answer in ANSWERS]
    (out / "rows.json").write_text(json.dumps(rows))
    run("check_families.py", "--rows", out / "rows.json", "--out", out)
    return out, rows


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_and_log_probs_of_conversations(live, name):
    out, rows = live
    bundle = load(out / name, "float32", one_device())
    assert bundle.config.decoder.tied == (name in TIED)
    pairs = [
        {"prompt": row["messages"], "images": row["images"], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
        for row in rows[::2]
    ]
    shape = DataConfig(shapes=1)
    encoder, records, _ = prepare(bundle, pairs, shape, 2)
    found = response_logps(bundle, encoder, records, shape, batch_size=8)
    furthest = 0.0
    with np.load(out / f"{name}.npz") as theirs:
        for record, ours in zip(records, found, strict=True):
            prefix = encoder.prefix(record).tokens
            for k, (answer, logps) in enumerate(zip(record.responses, ours, strict=True)):
                ids, wanted = (theirs[f"{what}_{2 * record.index + k}"] for what in ("ids", "logps"))
                end = len(prefix) + len(answer)
                assert ids[:end].tolist() == [*prefix, *answer]
                furthest = max(furthest, np.abs(wanted[len(prefix) - 1 : end - 1] - logps).max())
    print(name, furthest)
    assert furthest < 1e-4
