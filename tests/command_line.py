"""The command line, run in this process."""

from __future__ import annotations

import pytest

from mllm_align import cli


@pytest.fixture
def run(capsys):
    """Import it into a test module: run(*argv) gives (status, stdout, stderr)."""

    def run(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            cli.main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run
