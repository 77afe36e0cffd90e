"""A Llama-family decoder over prompt groups, and token by token on a cache of keys and values."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mllm_align.models.attention import fork_attention, prompt_group_attention
from mllm_align.models.cache import Cache
from mllm_align.models.config import DecoderConfig
from mllm_align.models.layers import (
    Linear,
    RMSNorm,
    frequencies,
    parameter,
    rematerialised,
    rope,
    rotations,
    scanned,
)
from mllm_align.sharding import constrain


class Block(nn.Module):
    """What a block computes around its attention; parameters have the same names in both kinds below."""

    config: DecoderConfig

    def heads(self, name: str, count: int, h: Float[Array, "B S D"]) -> Float[Array, "B S H E"]:
        c = self.config
        axis = "heads" if name == "q" else "kv_heads"
        linear = Linear(count * c.head_dim, ("embed", axis), bias=c.qkv_bias, name=name)
        out = linear(h).reshape(*h.shape[:2], count, c.head_dim)
        return RMSNorm(c.norm_eps, name=f"norm_{name}")(out) if c.qk_norm and name != "v" else out

    def finish(self, x: Float[Array, "B S D"], attended: Float[Array, "B S H E"]) -> Float[Array, "B S D"]:
        c = self.config
        h = attended.reshape(*attended.shape[:2], -1)
        x = x + Linear(c.hidden, ("heads", "embed"), bias=c.o_bias, name="o")(h)
        h = RMSNorm(c.norm_eps, name="norm_2")(x)
        gate = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="gate")(h)
        up = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="up")(h)
        down = Linear(c.hidden, ("mlp", "embed"), bias=c.mlp_bias, name="down")
        return constrain(x + down(jax.nn.silu(gate) * up), "rows", None, None)


class DecoderBlock(Block):
    """A block over whole rows [prefix | response 1 | ... | response K]."""

    prefix: int
    responses: int
    keep: bool = False
    """Return keys and values too, [B, G, S, E] each."""
    holes: bool = False
    """Some prefix has masked keys between visible ones."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        layer: Int[Array, ""] | None,
        rotations: Float[Array, "B S E"],
        order: Int[Array, "B S"],
        visible: Bool[Array, "B S"],
        deep: Float[Array, "n B P D"] | None = None,
        read: Int[Array, " B"] | None = None,
    ):
        """layer: number of this block, None for the last. deep: added to the prefix after each of the first
        n. With `read`, only that row of each prefix and the responses' rows come out: what nobody reads
        after the last block is not computed there, but for its keys and values."""
        c = self.config
        h = RMSNorm(c.norm_eps, name="norm_1")(x)
        k = rope(self.heads("k", c.kv_heads, h), rotations)
        v = self.heads("v", c.kv_heads, h)
        queries = x, h, rotations, order
        if read is not None:
            queries = tuple(self._rows(each, read) for each in queries)
        x, h, rotations, query_order = queries
        q = rope(self.heads("q", c.heads, h), rotations)
        h = prompt_group_attention(
            q, k, v, query_order, order, visible, self.prefix, self.responses, self.holes
        )
        x = self.finish(x, h)
        if deep is not None and layer is not None:
            x = self._deepened(x, layer, deep)
        return x, (k.swapaxes(1, 2), v.swapaxes(1, 2)) if self.keep else None

    def _deepened(self, x, layer, deep):
        own = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(layer, len(deep) - 1), keepdims=False)
        own = jnp.where(layer < len(deep), own, 0)
        return jnp.concatenate([x[:, : self.prefix] + own, x[:, self.prefix :]], axis=1)

    def _rows(self, x, read):
        """Row `read` of the prefix, then the responses."""
        at = read.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.concatenate([jnp.take_along_axis(x, at, axis=1), x[:, self.prefix :]], axis=1)


class ForkBlock(Block):
    """A block for one more token of every fork."""

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B F D"], Any],
        cache: tuple[Int[Array, ""], Any],
        rotations: Float[Array, "B F E"],
        seen: Bool[Array, "B F P"],
        step: Int[Array, ""],
    ):
        """carry: x, and the forks' keys and values in all layers (see `Cache.empty`): the new token's are
        written into them, in place. cache: number of this layer, and its keys and values of the prefix."""
        c = self.config
        (x, own), (layer, of_prefix) = carry, cache
        h = RMSNorm(c.norm_eps, name="norm_1")(x)
        k = rope(self.heads("k", c.kv_heads, h), rotations)
        v = self.heads("v", c.kv_heads, h)
        q = rope(self.heads("q", c.heads, h), rotations)

        def write(kept, token):
            where = (layer, 0, 0, 0, step, 0)
            return jax.lax.dynamic_update_slice(kept, token[None, :, :, :, None], where)

        own = jax.tree.map(write, own, (k, v))
        of_forks = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), own)
        return (self.finish(x, fork_attention(q, of_prefix, of_forks, seen, step)), own), None


class Decoder(nn.Module):
    config: DecoderConfig
    remat: str = "none"

    def setup(self):
        c = self.config
        normal, lecun = nn.initializers.normal(0.02), nn.initializers.lecun_normal()
        shape = (c.vocab, c.hidden)
        self.embedding = parameter(self, "embedding", normal, ("vocab", "embed"), shape)
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            self.head = parameter(self, "head", lecun, ("embed", "vocab"), shape[::-1])

    def embed(self, tokens: Int[Array, ...]) -> Float[Array, "... D"]:
        table = constrain(self.embedding, "vocab", None)  # whole rows
        out = table[tokens]
        return constrain(out, "rows", *(None,) * (out.ndim - 1))

    def unembedding(self) -> Float[Array, "D V"]:
        return self.embedding.T if self.config.tied else self.head

    def rotations(self, positions: Int[Array, "B A S"]) -> Float[Array, "B S E"]:
        c = self.config
        frequency = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        return rotations(positions, frequency, c.rope_axes)

    @nn.compact
    def _blocks(self, block: Any, settings: dict, x, cache: tuple, shared: tuple, read: tuple = ()):
        """All blocks in turn: the stacked ones under a scan, the last one apart.

        x: what each block takes from the one before. cache: what a block takes of its own (of the stack, of
        the last). Returns x and the blocks' second results, likewise in two.
        """
        c, out = self.config, None
        if c.layers > 1:
            stack = scanned(block, c.layers - 1, self.remat, over=1, shared=len(shared))
            x, out = stack(c, **settings, name="layers")(x, cache[0], *shared)
        last = rematerialised(block, self.remat)(c, **settings, name="last")
        x, last_out = last(x, cache[1], *shared, *read)
        return x, (out, last_out)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        order: Int[Array, "B S"],
        rope: Int[Array, "B A S"],
        visible: Bool[Array, "B S"],
        prefix: int,
        responses: int,
        read: Int[Array, " B"],
        deep: Float[Array, "n B P D"] | None = None,
    ) -> Float[Array, "B 1+K*R D"]:
        """Final hidden states, after the last norm, of rows [prefix | response 1 | ... | response K].

        Of the prefix only row `read` comes out. order, rope, visible: as in `batch.Prefix`. deep: what is
        added to the prefix after each of the first n layers, fewer than all ("deepstack",
        arXiv 2406.04334).
        """
        rows = {"prefix": prefix, "responses": responses}
        shared = self.rotations(rope), order, visible, deep
        x, _ = self._blocks(DecoderBlock, rows, x, self._numbers(), shared, (read,))
        return self.norm(x)

    def prefill(
        self,
        x: Float[Array, "B P D"],
        order: Int[Array, "B P"],
        rope: Int[Array, "B A P"],
        visible: Bool[Array, "B P"],
        holes: bool = False,
        deep: Float[Array, "n B P D"] | None = None,
    ) -> Cache:
        """Keys and values of a prefix. holes: some key between visible ones is not visible. deep: as in
        `__call__`."""
        rows = {"prefix": x.shape[1], "responses": 0, "keep": True, "holes": holes}
        shared = self.rotations(rope), order, visible, deep
        _, kept = self._blocks(DecoderBlock, rows, x, self._numbers(), shared)
        return Cache(*kept, order, visible)

    def _numbers(self) -> tuple[Int[Array, " L-1"], None]:
        return jnp.arange(self.config.layers - 1), None

    def decode(
        self,
        x: Float[Array, "B F D"],
        prefix: Cache,
        own: Any,
        order: Int[Array, "B F"],
        rope: Int[Array, "B F"],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "B F D"], Any]:
        """Hidden states of token number `step` of every fork, and `own` with its keys and values.

        own: keys and values of the forks' tokens, see `Cache.empty`. order, rope: of each fork's first
        token; the fork sees earlier tokens of the prefix, and itself.
        """
        last, axes = self.config.layers - 1, self.config.num_rope_axes
        cache = (jnp.arange(last), prefix.layers), (last, prefix.last)
        seen = prefix.visible[:, None] & (prefix.order[:, None] < order[:, :, None])
        text = jnp.broadcast_to((rope + step)[:, None], (len(rope), axes, rope.shape[1]))  # axes agree
        shared = self.rotations(text), seen, step
        (x, own), _ = self._blocks(ForkBlock, {}, (x, own), cache, shared)
        return self.norm(x), own
