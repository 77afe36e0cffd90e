"""The device that the parts run on."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import jax.extend

from gpu_check.lines import Figures, Lines
from gpu_check.parts import DEVICES

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def run(lines: Lines, work: Path, tiny: bool) -> None:
    lines(DEVICES, lambda: devices(tiny))
    lines("peak", peak)


def devices(tiny: bool) -> Figures:
    found = jax.devices()
    if found[0].platform != "gpu" and not tiny:
        raise RuntimeError(f"JAX sees no GPU, only {found[0].device_kind}; --tiny runs on a CPU")
    stats = found[0].memory_stats() or {}
    return {
        "platform": found[0].platform,
        "kind": found[0].device_kind,
        "count": len(found),
        "used": 1,
        "memory_bytes": stats.get("bytes_limit"),
        "platform_version": jax.extend.backend.get_backend().platform_version.replace("\n", " "),
        "driver": driver(),
        "jax": jax.__version__,
        "packages": {name: found for name in PLUGINS if (found := _version(name))},
    }


def driver() -> str | None:
    """As NVIDIA's own tool tells it, where it is."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def peak() -> Figures:
    """MFU needs the published figure of this very device."""
    from mllm_align.training.flops import PEAK

    device = jax.devices()[0]
    if device.platform == "gpu" and device.device_kind not in PEAK:
        raise RuntimeError(f"training/flops.py has no figure for {device.device_kind!r}")
    return {"kind": device.device_kind, "bf16_flops_per_s": PEAK.get(device.device_kind)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
