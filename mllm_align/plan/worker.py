"""Compilation of one program in a separate process: python -m mllm_align.plan.worker JOB.pickle.

The process is separate because the TPU compiler needs environment variables before JAX starts, may abort
the process on an internal error, and can't be stopped in any other way.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
TEXT, METADATA, RESULT = "module.txt", "metadata.pickle", "result.pickle"


@dataclass(frozen=True)
class Job:
    program: str
    config: Any
    model: Any
    planned: Any
    topology: Any
    """None: the devices of this machine."""
    folder: Path

    def __reduce__(self) -> Any:
        """The config travels as JSON: a class in a user's file is known to this process alone."""
        from mllm_align.config import to_json

        return _job, ({**vars(self), "config": to_json(self.config)}, type(self.config))


def _job(values: dict[str, Any], kind: type) -> Job:
    from mllm_align.config import from_json

    return Job(**{**values, "config": from_json(values["config"], kind)})


def work(job: Job) -> dict[str, Any]:
    import jax

    from mllm_align.plan.chips import describe
    from mllm_align.plan.targets import cache_bytes, check, lower, resident_bytes, rows, under_way_bytes
    from mllm_align.sharding import make_mesh
    from mllm_align.training.fitting import free, memory

    mesh = make_mesh(job.config.mesh, describe(job.topology) if job.topology else None)
    metadata: dict[str, Any] = {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "rows": rows(job.config, mesh, job.program),
        "mesh": dict(mesh.shape),
        "kept_whole": check(job.config, job.model, mesh),
        "resident": resident_bytes(job.program, job.config, job.model, mesh),
        "usable": None if job.topology else free(mesh.local_devices, 0),
    }
    if job.program == "prefill":
        metadata["resident"] += under_way_bytes(job.config, job.model, mesh, job.planned)
    if job.program == "decode":
        metadata["cache"] = cache_bytes(job.config, job.model, mesh, job.planned)
    _write(job.folder / METADATA, metadata)
    lowered = lower(job.program, job.config, job.model, mesh, job.planned)
    options = {"xla_dump_to": str(job.folder), "xla_dump_hlo_as_text": True} if job.topology else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)}
    if not job.topology:
        (job.folder / TEXT).write_text(compiled.as_text() or "", encoding="utf-8")
    return {"memory": memory(compiled)}


def _write(file: Path, what: Any) -> None:
    part = file.with_suffix(".partial")
    part.write_bytes(pickle.dumps(what))
    part.rename(file)


def _end_with_parent() -> None:
    """End this process when its parent ends: the compiler would run on for long."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    _end_with_parent()
    path = Path(sys.argv[1])
    try:
        result = work(pickle.loads(path.read_bytes()))
    except Exception as error:  # it comes out in the process that waits
        result = {"raised": error}
    _write(path.parent / RESULT, result)
    os._exit(0)


if __name__ == "__main__":
    main()
