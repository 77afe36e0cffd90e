"""Several processes that run the same program, each with its own devices."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mllm_align.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(heartbeat_seconds: int, shutdown_seconds: int) -> None:
    """Join the other processes of this job, if there are any. Must be called before any other use of JAX.

    JAX detects Cloud TPU, GKE TPU, Slurm and Open MPI; elsewhere the VARIABLES identify this process. A
    process without a heartbeat for heartbeat_seconds counts as dead, and the others end with an error that
    names it. At the end, processes wait up to shutdown_seconds for each other.
    """
    if jax.distributed.is_initialized():
        return
    times: Any = {
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "shutdown_timeout_seconds": shutdown_seconds,
    }
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    # forwards a preemption notice from one process to all
    jax.config.update("jax_enable_preemption_service", True)
    if len(given) == len(VARIABLES):
        address, count, index = given.values()
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise InputError(
                f"JAX_PROCESS_ID is {index!r} and JAX_NUM_PROCESSES {count!r}; wanted 0 to N - 1, and N"
            )
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(index), **times)
    elif given:
        missing = [name for name in VARIABLES if name not in given]
        raise InputError(f"{', '.join(given)} set, but not {', '.join(missing)}; set all three or none")
    elif _found():
        jax.distributed.initialize(**times)


def _found() -> bool:
    """Whether a scheduler has started several processes that JAX detects by itself."""
    if "cpu" in (jax.config.values["jax_platforms"] or ""):
        return False
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or os.environ.get("TPU_PROCESS_ADDRESSES") or ""
    several = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(int(os.environ.get(name) or 1) > 1 for name in several)
        or "," in tpu_hosts
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or os.path.exists("/dev/accel0")  # a Cloud TPU VM asks its metadata server
        or os.path.exists("/dev/vfio/0")
    )


def keep_compiled() -> None:
    """Cache compiled programs across runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    On CPU only in the former: on Intel's, XLA rejects every program that it reads (jax#38445).
    """
    if jax.default_backend() != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = os.path.expanduser("~/.cache/mllm_align/compiled")
        jax.config.update("jax_compilation_cache_dir", folder)


def joined() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this is the first process, the only one that writes files and to the terminal."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if first():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a line on stderr, once for all processes."""
    if first():
        print(text, file=sys.stderr, flush=True)


def several() -> bool:
    return jax.process_count() > 1


def name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def on_first(f: Callable[[], Any]) -> Any:
    """Run f on the first process only, and return its result on all processes.

    The result is passed as JSON. An InputError of f is raised on every process.
    """
    if not several():
        return f()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    outcome: dict[str, Any] = {}
    if first():
        try:
            outcome = {"value": f()}
        except InputError as error:
            outcome = {"refused": str(error)}
    text = json.dumps(outcome).encode()
    size = int(broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(size)[:size], np.uint8)
    outcome = json.loads(bytes(np.asarray(broadcast_one_to_all(sent))))
    if "refused" in outcome:
        raise InputError(outcome["refused"])
    return outcome["value"]


def gathered(f: Callable[[], Any]) -> list[Any]:
    """Run f on every process, and return the list of all results, in process order, on all of them.

    Results are passed as JSON. An InputError of f on any process is raised on every one.
    """
    if not several():
        return [json.loads(json.dumps(f()))]
    from jax.experimental.multihost_utils import process_allgather

    try:
        outcome: dict[str, Any] = {"value": f()}
    except InputError as error:
        outcome = {"refused": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.int32(len(text)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    texts = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    each = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    refused = [one["refused"] for one in each if "refused" in one]
    if refused:
        raise InputError(refused[0])
    return [one["value"] for one in each]


def preempted(step: int) -> bool:
    """Whether some process has received a preemption notice; True at the same step on all processes."""
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return several() and reached_preemption_sync_point(step)
