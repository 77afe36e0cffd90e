"""The interpreter with torch, transformers, TRL and PEFT, named in MLLM_ALIGN_ORACLE_PYTHON (default: this
one). One process answers all tests: the imports take longer than what most tests ask for."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PYTHON = os.environ.get("MLLM_ALIGN_ORACLE_PYTHON", sys.executable)
PROBE = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"


@cache
def has(*modules: str) -> bool:
    return not subprocess.run([PYTHON, "-c", PROBE, *modules]).returncode


def needs(*modules: str) -> None:
    """Skip where the interpreter lacks one of them."""
    if not has(*modules):
        pytest.skip(f"{PYTHON} lacks one of {', '.join(modules)}")


@cache
def process() -> subprocess.Popen:
    """It ends with this process, whose end closes its standard input."""
    command = [PYTHON, str(Path(__file__).with_name("serve.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(script: str, *arguments: object) -> None:
    """Run a script of this folder; an error in it fails the test."""
    peer = process()
    print(json.dumps([script, *map(str, arguments)]), file=peer.stdin, flush=True)
    answer = peer.stdout.readline()
    assert answer, f"{PYTHON} ended in {script}"
    error = json.loads(answer)
    assert not error, error[-2000:]
