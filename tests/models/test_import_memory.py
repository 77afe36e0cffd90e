"""Four processes import a model of a gigabyte: each holds its quarter, and one tensor while it reads."""

import json

import pytest
from jobs import Processes

from mllm_align.testbed.demo import make_model

pytestmark = pytest.mark.slow

WORKER = """
import json, sys
from pathlib import Path
from mllm_align import processes
processes.start(30, 60)
import jax
from mllm_align.config import MeshConfig
from mllm_align.models import bundle
from mllm_align.models.huggingface import open_folder
from mllm_align.models.processor import load_processor
from mllm_align.sharding import make_mesh

def memory(key):
    lines = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

mesh = make_mesh(MeshConfig(1, -1))
jax.jit(lambda: jax.numpy.zeros(4))().block_until_ready()
bundle.abstract_params(open_folder(sys.argv[1]).config)
load_processor(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = memory("VmRSS")
leaves = jax.tree.leaves(bundle.load(sys.argv[1], "float32", mesh).params)
said = {
    "peak": memory("VmHWM") - before,
    "part": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
    "whole": sum(leaf.nbytes for leaf in leaves),
}
Path(sys.argv[2] + f".{jax.process_index()}.json").write_text(json.dumps(said))
"""


def test_no_process_holds_more_than_its_part_and_one_tensor(tmp_path):
    heads = {"heads": 16, "kv_heads": 16, "head_dim": 64, "vision_heads": 8}
    sizes = {"hidden": 1024, "mlp": 4096, "layers": 15, "vocab": 4096, "vision_hidden": 256}
    make_model(tmp_path / "model", **heads, **sizes)
    (tmp_path / "worker.py").write_text(WORKER)
    place = tmp_path / "memory"
    Processes(place, 4, [tmp_path / "worker.py", tmp_path / "model", place]).done()
    tensor = 4096 * 1024 * 4
    for i in range(4):
        said = json.loads((tmp_path / f"memory.{i}.json").read_text())
        assert said["whole"] > 1e9 and said["part"] < 0.26 * said["whole"]
        # a tensor that is read is there twice, in the mapped file and as an array; the rest is small change
        assert said["peak"] < said["part"] + 2 * tensor + 8e6, said
