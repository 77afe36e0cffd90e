"""The parts of `benchmarks/gpu.py`: what a GPU computes against the CPU, and how fast."""
