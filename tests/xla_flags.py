"""XLA's options in tests, to be read before JAX starts.

Compiling takes most of their time, so programs are optimized little: tests check numbers, not speed.
"""

from importlib.metadata import version

FAST = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones end at a flag they don't know
    FAST += " --xla_cpu_use_fusion_emitters=false"
