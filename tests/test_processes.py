"""What one process knows of the others; several real ones are in tests/training/test_jobs.py."""

import pytest

from mllm_align import processes
from mllm_align.errors import InputError


def test_one_process_does_all_by_itself():
    assert processes.first() and not processes.several() and not processes.joined()
    assert processes.on_first(lambda: {"a": 1}) == {"a": 1}
    assert not processes.preempted(1)

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        processes.on_first(refuse)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one"}, False),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host"}, True),
    ],
)
def test_schedulers_that_start_several_processes(monkeypatch, variables, expected):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.os.path, "exists", lambda path: False)
    assert not processes._found(), "on CPU nothing is looked for"
    before = processes.jax.config.values["jax_platforms"]
    processes.jax.config.update("jax_platforms", None)
    try:
        assert processes._found() == expected
    finally:
        processes.jax.config.update("jax_platforms", before)


def test_compiled_programs_are_kept_on_accelerators_alone(monkeypatch):
    config, name = processes.jax.config, "jax_compilation_cache_dir"
    before = config.values[name]
    processes.keep_compiled()
    assert config.values[name] == before
    try:
        monkeypatch.setattr(processes.jax, "default_backend", lambda: "tpu")
        config.update(name, None)
        processes.keep_compiled()
        assert config.values[name].endswith(".cache/mllm_align/compiled")
        config.update(name, "/elsewhere")
        processes.keep_compiled()
        assert config.values[name] == "/elsewhere"
    finally:
        config.update(name, before)
