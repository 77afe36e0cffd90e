"""Which token comes next, and the random numbers that decide it."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mllm_align.config import SamplingConfig

DROPPED = -1e30


def random_key(seed: int, record: str, *sample: int) -> np.ndarray:
    """Key data [2] uint32 of one sample of one record: of nothing else, so that a batch's other rows,
    its shape and the number of hosts never change what is drawn. Positions are folded in later."""
    name = json.dumps([seed, record, *sample])
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32).copy()


def choose(
    logits: Float[Array, "N V"],
    keys: UInt32[Array, "N 2"],
    position: Int[Array, " N"],
    sampling: SamplingConfig,
) -> Int[Array, " N"]:
    """One token a row: the likeliest at temperature 0, else drawn from the filtered distribution.

    The draw adds Gumbel noise and takes the maximum, so rounding can change it only where two scores all
    but tie.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    scores = filtered(logits, sampling)

    def noise(key, at):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, at), scores.shape[-1:], scores.dtype)

    return (scores + jax.vmap(noise)(keys, position)).argmax(-1).astype(jnp.int32)


def filtered(logits: Float[Array, "N V"], sampling: SamplingConfig) -> Float[Array, "N V"]:
    """Logits after temperature, top-k and top-p; what may not be chosen is -1e30.

    top-p keeps the fewest likeliest tokens whose probabilities reach top_p, at least one (Holtzman et al.
    2020). Tokens that tie with the last one kept are kept too.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, DROPPED, logits)
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        mass = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass  # probability of all likelier tokens
        least = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, DROPPED, logits)
    return logits
