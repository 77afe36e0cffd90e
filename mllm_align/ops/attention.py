"""Attention, written once in plain XLA: the definition that every faster backend is checked against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with no visible key gives no NaN


def full_attention(
    q: Float[Array, "N S H E"], k: Float[Array, "N S H E"], v: Float[Array, "N S H E"]
) -> Float[Array, "N S H E"]:
    """Every token sees every token (vision tower). Softmax in float32."""
    scores = jnp.einsum("nqhe,nkhe->nhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(q.dtype)
    return jnp.einsum("nhqk,nkhe->nqhe", weights, v)


def prompt_group_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    positions: Int[Array, "B S"],
    visible: Bool[Array, "B S"],
    prefix: int,
    responses: int,
    block: int = 256,
) -> Float[Array, "B S H E"]:
    """Causal attention over rows laid out as [prefix | response 1 | ... | response K].

    The prefix attends to itself; each response to the prefix and to itself, never to a sibling. This is
    what K separate rows compute, with the prefix computed once. Causality comes from `positions`, which
    rise along the prefix and along each response; `visible` is False for keys that nobody may see.
    The prefix runs in query blocks that skip the keys after them, so no [S, S] score array exists.
    """
    heads, groups, dim = q.shape[2], k.shape[2], q.shape[3]
    batch, total = q.shape[:2]
    length = (total - prefix) // responses if responses else 0
    shared = heads // groups  # query heads that share one key-value head
    q = (q * dim**-0.5).reshape(batch, total, groups, shared, dim)

    def allowed(query: Int[Array, "... q"], key: Int[Array, "... k"], seen: Bool[Array, "... k"]):
        return (key[..., None, :] <= query[..., :, None]) & seen[..., None, :]

    pieces = []
    for start in range(0, prefix, block):
        stop = min(start + block, prefix)
        mask = allowed(positions[:, start:stop], positions[:, :stop], visible[:, :stop])
        scores = jnp.einsum(
            "bqgme,bkge->bgmqk",
            q[:, start:stop],
            k[:, :stop],
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(mask[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        pieces.append(jnp.einsum("bgmqk,bkge->bqgme", weights, v[:, :stop]))
    if responses:

        def split(x):
            return x[:, prefix:].reshape(batch, responses, length, *x.shape[2:])

        own_q, own_k, own_v = split(q), split(k), split(v)
        own_positions, own_visible = split(positions), split(visible)
        for start in range(0, length, block):
            stop = min(start + block, length)
            queries, query_positions = own_q[:, :, start:stop], own_positions[:, :, start:stop]
            to_prefix = jnp.einsum(
                "bcqgme,bkge->bgmcqk", queries, k[:, :prefix], preferred_element_type=jnp.float32
            )
            to_own = jnp.einsum(
                "bcqgme,bckge->bgmcqk",
                queries,
                own_k[:, :, :stop],
                preferred_element_type=jnp.float32,
            )
            prefix_mask = allowed(
                query_positions, positions[:, None, :prefix], visible[:, None, :prefix]
            )
            own_mask = allowed(
                query_positions, own_positions[:, :, :stop], own_visible[:, :, :stop]
            )
            to_prefix = jnp.where(prefix_mask[:, None, None], to_prefix, MASKED)
            to_own = jnp.where(own_mask[:, None, None], to_own, MASKED)
            # One softmax over both key sets, without copying them together.
            top = jnp.maximum(to_prefix.max(-1, keepdims=True), to_own.max(-1, keepdims=True))
            top = jax.lax.stop_gradient(top)
            to_prefix, to_own = jnp.exp(to_prefix - top), jnp.exp(to_own - top)
            mass = to_prefix.sum(-1, keepdims=True) + to_own.sum(-1, keepdims=True)
            part = jnp.einsum("bgmcqk,bkge->bcqgme", (to_prefix / mass).astype(v.dtype), v[:, :prefix])
            part += jnp.einsum(
                "bgmcqk,bckge->bcqgme", (to_own / mass).astype(v.dtype), own_v[:, :, :stop]
            )
            pieces.append(part)
        # pieces of the responses are [B, K, block, ...]; bring them back to row order
        count = -(-length // block)
        own = jnp.concatenate(pieces[-count:], axis=2).reshape(batch, -1, groups, shared, dim)
        pieces = [*pieces[:-count], own]
    return jnp.concatenate(pieces, axis=1).reshape(batch, total, heads, dim)
