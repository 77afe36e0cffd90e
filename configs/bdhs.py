"""BDHS with the settings of the paper: masks at rho_th 0.99, up to five tries, mpnet similarity 0.97."""

from mllm_align.config import BDHSConfig


def get_config() -> BDHSConfig:
    return BDHSConfig()
