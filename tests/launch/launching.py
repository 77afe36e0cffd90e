"""Runs the launchers as a user does; no cluster, no network."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(folder: Path | None = None, **variables: str) -> dict[str, str]:
    """This process's environment without what JAX reads; programs in `folder` come before the system's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "MLLM_ALIGN"))}
    if folder is not None:
        kept["PATH"] = f"{folder}:{kept['PATH']}"
    return kept | variables


def launch(script: str, *words: object, folder: Path | None = None, **variables: str):
    """The finished launcher: returncode, stdout, stderr."""
    return subprocess.run(
        [ROOT / "launch" / script, *map(str, words)],
        env=environment(folder, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(text: str) -> list[list[str]]:
    """The words of each printed command; lines that start with # are for the reader."""
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def program(folder: Path, name: str, text: str) -> Path:
    """An executable bash script."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path
