"""The loop over the tokens of forks: continuations of prefixes whose keys and values are at hand.

A fork continues a prefix from one of its tokens on: it attends to the prefix before that token, then to its
own tokens. Its first tokens are given (`forced`), at least one: the last token before the fork, which is
run again because the cache stores keys and values but no predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mllm_align.config import SamplingConfig
from mllm_align.generation.sampling import choose, uniform
from mllm_align.models.cache import Cache
from mllm_align.models.vlm import VisionLanguageModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forks:
    """F continuations of each of B prefixes.

    order, rope: of a fork's first own token, as in `batch.Prefix`; it attends to prefix tokens before it.
    tokens, forced: R positions for its own tokens; the first `forced`, at least 1, are given.
    limit: maximum number of tokens to generate after those; 0 for a fork that only pads the batch.
    keys: key data of its random numbers (see `sampling.random_key`).
    """

    order: Int[Array, "B F"]
    rope: Int[Array, "B F"]
    tokens: Int[Array, "B F R"]
    forced: Int[Array, "B F"]
    limit: Int[Array, "B F"]
    keys: UInt32[Array, "B F 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """How far the forks of B rows are; those of a row are all at the same token.

    tokens: the forced ones, then those generated so far, `lengths` in all. finite: whether all logits from
    which they were sampled are finite. logps: of the generated ones, 0 elsewhere, in nats per token, of the
    model, before temperature and filters; None where nobody asks. uniforms: the random numbers of the n-th
    generated token. step: number of the token that the model takes next. own, column: keys and values of
    the tokens before, and where those of the next are written (see `Cache.empty`).
    """

    order: Int[Array, "B F"]
    rope: Int[Array, "B F"]
    tokens: Int[Array, "B F R"]
    forced: Int[Array, "B F"]
    limit: Int[Array, "B F"]
    uniforms: Float[Array, "B F R 2"]
    step: Int[Array, " B"]
    lengths: Int[Array, "B F"]
    unfinished: Bool[Array, "B F"]
    finite: Bool[Array, "B F"]
    logps: Float[Array, "B F R"] | None
    own: Any
    column: Int[Array, ""]


def begin(prefix: Cache, forks: Forks, logps: bool = False) -> State:
    """Forks before their first token."""
    size, count, length = forks.tokens.shape
    numbers = uniform(forks.keys[:, :, None], jnp.arange(length)[None, None])  # cheaper all at once
    return State(
        forks.order,
        forks.rope,
        forks.tokens,
        forks.forced,
        forks.limit,
        numbers,
        step=jnp.zeros(size, jnp.int32),
        lengths=forks.forced,
        unfinished=forks.limit > 0,
        finite=jnp.ones((size, count), bool),
        logps=jnp.zeros((size, count, length), jnp.float32) if logps else None,
        own=prefix.empty(count, length - 1),  # the last token is never fed to the model
        column=jnp.zeros((), jnp.int32),
    )


def run(
    model: VisionLanguageModel,
    variables: Any,
    prefix: Cache,
    state: State,
    stop_mask: Bool[Array, " V"],
    sampling: SamplingConfig,
    enough: Any = 0,
) -> State:
    """Run the forks until at most `enough` rows are unfinished.

    A fork ends after a generated token in `stop_mask`, at its limit, or at logits that are not finite; a
    row when all its forks have.
    """
    columns = state.tokens.shape[2] - 1
    places = jnp.arange(columns + 1)[None, None]

    def unfinished_rows(taken: tuple[Array, State]) -> Array:  # `plan` reads the bound
        steps, state = taken
        return (state.unfinished.any(-1).sum() > enough) & (steps < columns)

    def advance(state: State) -> State:
        step = state.step[:, None, None]
        now = jnp.take_along_axis(state.tokens, step, axis=2)[:, :, 0]
        given = jnp.take_along_axis(state.tokens, jnp.minimum(step + 1, columns), axis=2)[:, :, 0]
        at = state.order, state.rope, state.step, state.column
        logits, own = model.apply(variables, now, prefix, state.own, *at, method="decode")
        number = step[:, :, 0] + 1 - state.forced  # index of the next token among the generated ones
        draws = jnp.take_along_axis(state.uniforms, jnp.maximum(number, 0)[:, :, None, None], axis=2)
        sampled = choose(logits.reshape(number.size, -1), draws.reshape(-1, 2), sampling)
        sampled = sampled.reshape(number.shape)
        new = state.unfinished & (number >= 0)
        token = jnp.where(new, sampled, given)
        written = places == step + 1
        logps = state.logps
        if logps is not None:
            chosen = jnp.take_along_axis(logits, sampled[:, :, None], axis=-1)[:, :, 0]
            logp = jnp.where(new, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
            logps = jnp.where(written, logp[:, :, None], logps)
        finite = state.finite & (~new | jnp.isfinite(logits).all(-1))
        ended = new & (stop_mask[sampled] | (number + 1 >= state.limit))
        return replace(
            state,
            tokens=jnp.where(written, token[:, :, None], state.tokens),
            step=state.step + state.unfinished.any(-1).astype(jnp.int32),
            lengths=state.lengths + new.astype(state.lengths.dtype),
            unfinished=state.unfinished & finite & ~ended,
            finite=finite,
            logps=logps,
            own=own,
            column=(state.column + 1) % columns,
        )

    start = jnp.zeros((), jnp.int32), state
    return jax.lax.while_loop(unfinished_rows, lambda taken: (taken[0] + 1, advance(taken[1])), start)[1]
