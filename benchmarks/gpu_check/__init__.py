"""The parts of `benchmarks/gpu.py`: a GPU's results compared with the CPU's, and its speed."""
