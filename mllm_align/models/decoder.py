"""A Llama-family decoder over prompt groups."""

from __future__ import annotations

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from mllm_align.models.config import DecoderConfig
from mllm_align.models.layers import Linear, RMSNorm, rope, scanned
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
    ):
        c, rows = self.config, x.shape[:2]

        def heads(name: str, count: int, h):
            linear = Linear(count * c.head_dim, ("embed", "heads"), bias=c.attention_bias, name=name)
            return linear(h).reshape(*rows, count, c.head_dim)

        h = RMSNorm(c.norm_eps, name="norm_1")(x)
        q = rope(heads("q", c.heads, h), positions, c.rope_theta)
        k = rope(heads("k", c.kv_heads, h), positions, c.rope_theta)
        v = heads("v", c.kv_heads, h)
        h = prompt_group_attention(q, k, v, positions, visible, self.prefix, self.responses)
        h = h.reshape(*rows, -1)
        x = x + Linear(c.hidden, ("heads", "embed"), bias=c.attention_bias, name="o")(h)
        h = RMSNorm(c.norm_eps, name="norm_2")(x)
        gate = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="gate")(h)
        up = Linear(c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name="up")(h)
        down = Linear(c.hidden, ("mlp", "embed"), bias=c.mlp_bias, name="down")
        return x + down(jax.nn.silu(gate) * up), None


class Decoder(nn.Module):
    config: DecoderConfig
    remat: str = "none"

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab, c.hidden))
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
            self.head = self.param("head", init, (c.hidden, c.vocab))

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
    ) -> Float[Array, "B S D"]:
        """Final hidden states, after the last norm, of rows [prefix | response 1 | ... | response K]."""
        c = self.config
        layers = scanned(DecoderBlock, c.layers, self.remat, 2)
        x, _ = layers(c, prefix, responses, name="layers")(x, positions, visible)
        return self.norm(x)
