"""Sampling of the next token, with random numbers that depend on seed, record and position only."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mllm_align.config import SamplingConfig

DROPPED = -1e30
BLOCK = 128  # tokens


def described(sampling: SamplingConfig, seed: int) -> str:
    """How tokens are chosen, as one line says it."""
    limit = f"at most {sampling.max_tokens} tokens"
    filters = [] if sampling.top_k is None else [f"top-k {sampling.top_k}"]
    filters += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    if sampling.temperature == 0:
        idle = f" ({' and '.join(filters)} only with a temperature above 0)" if filters else ""
        return f"greedy{idle}, {limit}"
    return ", ".join([f"temperature {sampling.temperature:g}", *filters, f"seed {seed}", limit])


def random_key(seed: int, record: str, *sample: int) -> np.ndarray:
    """Key data [2] uint32 of one sample of one record.

    It depends on nothing else, so the sampled tokens do not depend on the other rows of a batch, its shape
    or the number of hosts. Positions are folded in later.
    """
    name = json.dumps([seed, record, *sample])
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32).copy()


def choose(
    logits: Float[Array, "N V"], uniforms: Float[Array, "N 2"], sampling: SamplingConfig
) -> Int[Array, " N"]:
    """One token per row: the most likely at temperature 0, else sampled from the filtered distribution.

    Inverse-CDF sampling in two stages: the first of the `uniforms` selects a block of the vocabulary, the
    second a token of that block. The cumulative sums are short, and rounding changes a sample only if a
    uniform number almost equals one of them.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    scores = filtered(logits, sampling)
    mass = jnp.exp(scores - scores.max(-1, keepdims=True))
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % BLOCK))).reshape(len(mass), -1, BLOCK)
    block = _inverse_cdf(blocks.sum(-1), uniforms[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = block * BLOCK + _inverse_cdf(within, uniforms[:, 1])
    return jnp.minimum(token, logits.shape[1] - 1)  # NaN logits too


@partial(jnp.vectorize, signature="(k),()->(n)")
def uniform(key: UInt32[Array, "... 2"], position: Int[Array, ...]) -> Float[Array, "... 2"]:
    """The two uniform numbers in [0, 1) that determine the token at a position."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
    return jax.random.uniform(key, (2,))


def _inverse_cdf(mass: Float[Array, "N n"], uniform: Float[Array, " N"]) -> Int[Array, " N"]:
    """The first index whose cumulative mass exceeds `uniform` times the total; the last if none does."""
    cdf = jnp.where(mass > 0, mass.cumsum(-1), 0.0)  # rounding must not select an index without mass
    more = cdf > uniform[:, None] * cdf.max(-1, keepdims=True)
    indices = jnp.arange(mass.shape[-1], dtype=jnp.int32)
    return jnp.where(more, indices, indices[-1]).min(-1)


def filtered(logits: Float[Array, "N V"], sampling: SamplingConfig) -> Float[Array, "N V"]:
    """Logits after temperature, top-k and top-p; excluded tokens have -1e30.

    top-p keeps the smallest set of most likely tokens whose probabilities sum to top_p or more (Holtzman et
    al. 2020). Tokens with the same logit as the last one kept are kept too.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, DROPPED, logits)
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        mass = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass  # probability of all more likely tokens
        threshold = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < threshold, DROPPED, logits)
    return logits
