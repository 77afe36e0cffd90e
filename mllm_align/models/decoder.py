"""A Llama-family decoder over prompt groups, and token by token on a cache of keys and values."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mllm_align.models.attention import fork_attention, prompt_group_attention
from mllm_align.models.cache import Cache
from mllm_align.models.config import DecoderConfig
from mllm_align.models.layers import ACTIVATIONS, Linear, RMSNorm, frequencies, parameter, rope, rotations
from mllm_align.models.remat import rematerialised, scanned
from mllm_align.sharding import constrain


class Block(nn.Module):
    """What a block computes around its attention; parameters have the same names in both kinds below."""

    config: DecoderConfig

    def heads(self, name: str, count: int, h: Float[Array, "B S D"]) -> Float[Array, "B S H E"]:
        c = self.config
        axis = "heads" if name == "q" else "kv_heads"
        linear = Linear(count * c.head_dim, ("embed", axis), bias=c.qkv_bias, name=name)
        out = linear(h).reshape(*h.shape[:2], count, c.head_dim)
        if c.qk_norm and name != "v":
            out = self.norm(f"norm_{name}", out)
        return out if name != "q" or c.query_scale == 1 else out * c.query_scale

    def norm(self, name: str, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)(x)

    def local(self, layer: Int[Array, ""] | None) -> Any:
        """Whether this layer sees a window; layer: its number, None for the last."""
        assert self.config.local is not None
        layers = self.config.local.layers
        return layers[-1] if layer is None else jnp.array(layers)[layer]

    def turned(self, layer: Int[Array, ""] | None, rotations: Any) -> Float[Array, "B S E"]:
        """This layer's rotations, of those of both kinds of layers."""
        if self.config.local is None:
            return rotations
        return jnp.where(self.local(layer), rotations[1], rotations[0])

    def finish(self, x: Float[Array, "B S D"], attended: Float[Array, "B S H E"]) -> Float[Array, "B S D"]:
        c = self.config
        h = attended.reshape(*attended.shape[:2], -1)
        h = Linear(c.hidden, ("heads", "embed"), bias=c.o_bias, name="o")(h)
        x = x + (self.norm("post_norm_1", h) if c.post_norms else h)
        h = self.norm("norm_2", x)
        gate = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="gate")(h)
        up = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="up")(h)
        h = ACTIVATIONS[c.activation](gate) * up
        h = Linear(c.hidden, ("mlp", "embed"), bias=c.mlp_bias, name="down")(h)
        x = x + (self.norm("post_norm_2", h) if c.post_norms else h)
        return constrain(x, "rows", None, None)


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
        rotations: Any,
        place: Int[Array, "B S"] | None,
        order: Int[Array, "B S"],
        visible: Bool[Array, "B S"],
        deep: Float[Array, "n B P D"] | None = None,
        read: Int[Array, " B"] | None = None,
    ):
        """layer: number of this block, None for the last. rotations, place: see `Decoder`. deep: added to
        the prefix after each of the first n. With `read`, only that row of each prefix and the responses'
        rows come out: what nobody reads after the last block is not computed there, but for its keys and
        values."""
        c = self.config
        h = self.norm("norm_1", x)
        rotations = self.turned(layer, rotations)
        k = rope(self.heads("k", c.kv_heads, h), rotations)
        v = self.heads("v", c.kv_heads, h)
        queries = x, h, rotations, order, place
        if read is not None:
            queries = jax.tree.map(lambda each: self._rows(each, read), queries)
        x, h, rotations, query_order, query_place = queries
        q = rope(self.heads("q", c.heads, h), rotations)
        arrays = q, k, v, query_order, order, visible
        x = self.finish(x, self._attended(layer, arrays, (query_place, place)))
        if deep is not None and layer is not None:
            x = self._deepened(x, layer, deep)
        return x, (k.swapaxes(1, 2), v.swapaxes(1, 2)) if self.keep else None

    def _attended(self, layer: Int[Array, ""] | None, arrays: tuple, places: tuple) -> Any:
        c, sizes = self.config, (self.prefix, self.responses)
        attend: Any = partial(prompt_group_attention, holes=self.holes, block=c.image_block)

        def everywhere(arrays, places):
            return attend(*arrays, *sizes)

        if c.local is None or self._within(arrays[1].shape[1], c.local.window):
            return everywhere(arrays, places)
        near: Any = partial(attend, window=c.local.window)

        def nearby(arrays, places):
            return near(*arrays, *sizes, places=places)

        which = self.local(layer)
        if isinstance(which, bool):
            return (nearby if which else everywhere)(arrays, places)
        return jax.lax.cond(which, nearby, everywhere, arrays, places)

    def _within(self, rows: int, window: int) -> bool:
        """Whether a window holds whole conversations; of a prefix alone, tokens may have been taken out, so
        that it is longer than its rows."""
        longest = self.prefix + (rows - self.prefix) // max(self.responses, 1)
        return not self.keep and longest <= window

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
        rotations: Any,
        seen: Any,
        step: Int[Array, " B"],
        column: Int[Array, ""],
    ):
        """carry: x, and the forks' keys and values in all layers (see `Cache.empty`): the new token's are
        written into them, in place. cache: number of this layer, and its keys and values of the prefix.
        rotations, seen: of both kinds of layers where there are local ones (see `Decoder`)."""
        c, reach = self.config, step
        (x, own), (layer, of_prefix) = carry, cache
        h = self.norm("norm_1", x)
        rotations = self.turned(layer, rotations)
        if c.local is not None:
            seen = jnp.where(self.local(layer), seen[1], seen[0])
            reach = jnp.where(self.local(layer), jnp.minimum(step, c.local.window - 1), step)
        k = rope(self.heads("k", c.kv_heads, h), rotations)
        v = self.heads("v", c.kv_heads, h)
        q = rope(self.heads("q", c.heads, h), rotations)

        def write(kept, token):
            where = (layer, 0, 0, 0, column, 0)
            return jax.lax.dynamic_update_slice(kept, token[None, :, :, :, None], where)

        # The barrier makes attention read what was written. Without it XLA also reads the keys before the
        # write, and on a GPU copied all of them twice a token, 15% of its time.
        own = jax.lax.optimization_barrier(jax.tree.map(write, own, (k, v)))
        of_forks = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), own)
        return (self.finish(x, fork_attention(q, of_prefix, of_forks, seen, reach, column)), own), None


class Decoder(nn.Module):
    """Where some layers are local, rotations and what a fork sees come in pairs, of global and local ones,
    and `place` is the rotary position of each token; else it is None."""

    config: DecoderConfig
    remat: str = "none"

    def setup(self):
        c = self.config
        normal, lecun = nn.initializers.normal(0.02), nn.initializers.lecun_normal()
        shape = (c.vocab, c.hidden)
        self.embedding = parameter(self, "embedding", normal, ("vocab", "embed"), shape)
        self.norm = RMSNorm(c.norm_eps, c.norm_offset)
        if not c.tied:
            self.head = parameter(self, "head", lecun, ("embed", "vocab"), shape[::-1])

    def embed(self, tokens: Int[Array, ...]) -> Float[Array, "... D"]:
        table = constrain(self.embedding, "vocab", None)  # whole rows
        out = table[tokens]
        if self.config.scaled_embedding:
            out = out * jnp.asarray(self.config.hidden**0.5, out.dtype)
        return constrain(out, "rows", *(None,) * (out.ndim - 1))

    def unembedding(self) -> Float[Array, "D V"]:
        return self.embedding.T if self.config.tied else self.head

    def rotations(self, positions: Int[Array, "B A S"]) -> Any:
        c = self.config
        far = rotations(positions, frequencies(c.head_dim, c.rope_theta, c.rope_scaling), c.rope_axes)
        if c.local is None:
            return far
        return far, rotations(positions, frequencies(c.head_dim, c.local.rope_theta), c.rope_axes)

    def places(self, positions: Int[Array, "B A S"]) -> Int[Array, "B S"] | None:
        return None if self.config.local is None else positions[:, 0]

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
        shared = self.rotations(rope), self.places(rope), order, visible, deep
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
        shared = self.rotations(rope), self.places(rope), order, visible, deep
        _, kept = self._blocks(DecoderBlock, rows, x, self._numbers(), shared)
        return Cache(*kept, order, visible, self.places(rope))

    def _numbers(self) -> tuple[Int[Array, " L-1"], None]:
        return jnp.arange(self.config.layers - 1), None

    def decode(
        self,
        x: Float[Array, "B F D"],
        prefix: Cache,
        own: Any,
        order: Int[Array, "B F"],
        rope: Int[Array, "B F"],
        step: Int[Array, " B"],
        column: Int[Array, ""],
    ) -> tuple[Float[Array, "B F D"], Any]:
        """Hidden states of token number `step` of every fork, and `own` with its keys and values.

        own, column: those of the forks' tokens, and where this one's go, see `Cache.empty`. order, rope: of
        each fork's first token; the fork sees earlier tokens of the prefix, and its own `step` tokens
        before this one.
        """
        step, axes = step[:, None], self.config.num_rope_axes
        last = self.config.layers - 1
        cache = (jnp.arange(last), prefix.layers), (last, prefix.last)
        seen: Any = prefix.visible[:, None] & (prefix.order[:, None] < order[:, :, None])
        if self.config.local is not None and prefix.place is not None:
            far = prefix.place[:, None] + self.config.local.window
            seen = seen, seen & ((rope + step)[:, :, None] < far)
        text = jnp.broadcast_to((rope + step)[:, None], (len(rope), axes, rope.shape[1]))  # axes agree
        shared = self.rotations(text), seen, step[:, 0], column
        (x, own), _ = self._blocks(ForkBlock, {}, (x, own), cache, shared)
        return self.norm(x), own
