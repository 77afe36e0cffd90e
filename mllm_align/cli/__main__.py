"""`python -m mllm_align.cli`, the same as `mllm-align`."""

from mllm_align.cli import main

main()
