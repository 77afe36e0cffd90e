"""Eight fake CPU devices and strict numerics, set once and before JAX starts."""

import gc
import os
import signal
from pathlib import Path

import pytest
from kept_programs import keep
from xla_flags import FAST

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", FAST]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax

from mllm_align import progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
progress.EVERY = 1e9  # what a command says hangs on no machine's speed

MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="session", autouse=True)
def programs_are_kept(tmp_path_factory):
    keep(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """A compiled program takes some forty memory maps, of which Linux gives a process 65,530: with none
    left, every test after that fails."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
