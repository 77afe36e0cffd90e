"""A Llama-family decoder over prompt groups."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mllm_align.models.config import DecoderConfig
from mllm_align.models.layers import Linear, RMSNorm, parameter, rematerialised, rope, scanned
from mllm_align.ops.attention import prompt_group_attention


class DecoderBlock(nn.Module):
    config: DecoderConfig
    prefix: int
    responses: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        visible: Bool[Array, "B S"],
        read: Int[Array, " B"] | None = None,
    ):
        """With `read`, only that row of each prefix and the responses' rows come out: what nobody reads
        after the last block is not computed there, but for its keys and values."""
        c = self.config

        def heads(name: str, count: int, h):
            linear = Linear(count * c.head_dim, ("embed", "heads"), bias=c.attention_bias, name=name)
            return linear(h).reshape(*h.shape[:2], count, c.head_dim)

        h = RMSNorm(c.norm_eps, name="norm_1")(x)
        k = rope(heads("k", c.kv_heads, h), positions, c.rope_theta)
        v = heads("v", c.kv_heads, h)
        query_positions = positions
        if read is not None:
            x, h, query_positions = (self._rows(each, read) for each in (x, h, positions))
        q = rope(heads("q", c.heads, h), query_positions, c.rope_theta)
        h = prompt_group_attention(
            q, k, v, query_positions, positions, visible, self.prefix, self.responses
        )
        h = h.reshape(*h.shape[:2], -1)
        x = x + Linear(c.hidden, ("heads", "embed"), bias=c.attention_bias, name="o")(h)
        h = RMSNorm(c.norm_eps, name="norm_2")(x)
        gate = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="gate")(h)
        up = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="up")(h)
        down = Linear(c.hidden, ("mlp", "embed"), bias=c.mlp_bias, name="down")
        return x + down(jax.nn.silu(gate) * up), None

    def _rows(self, x, read):
        """Row `read` of the prefix, then the responses."""
        at = read.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.concatenate([jnp.take_along_axis(x, at, axis=1), x[:, self.prefix :]], axis=1)


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
        return self.embedding[tokens]

    def unembedding(self) -> Float[Array, "D V"]:
        return self.embedding.T if self.config.tied else self.head

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        visible: Bool[Array, "B S"],
        prefix: int,
        responses: int,
        read: Int[Array, " B"],
    ) -> Float[Array, "B 1+K*R D"]:
        """Final hidden states, after the last norm, of rows [prefix | response 1 | ... | response K]."""
        c = self.config
        if c.layers > 1:
            layers = scanned(DecoderBlock, c.layers - 1, self.remat, 2)
            x, _ = layers(c, prefix, responses, name="layers")(x, positions, visible)
        last = rematerialised(DecoderBlock, self.remat)(c, prefix, responses, name="last")
        x, _ = last(x, positions, visible, read)
        return self.norm(x)
