"""Vision tower, projector, decoder, and the forward pass over prompt groups: what all families share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_align.batch import Pixels, Prefix, PromptGroup, Responses
from mllm_align.models.cache import Cache
from mllm_align.models.config import ModelConfig
from mllm_align.models.decoder import Decoder
from mllm_align.models.families.registry import family_of
from mllm_align.models.layers import parameter
from mllm_align.ops.logprobs import token_kl, token_logps
from mllm_align.sharding import batch_shards, constrain, current

CHUNK = 1024  # hidden states that meet the vocabulary at once, on each device

Params = dict[str, Any]
Hidden = tuple[Float[Array, "B D"], Float[Array, "B K R D"]]
"""Final hidden states of each prompt's last token, and of its responses' tokens."""


class VisionLanguageModel(nn.Module):
    """Parameters: `vision_tower`, `projector`, `decoder`, and `image_newline` where the config has one.

    The first two are modules of the config's family.
    """

    config: ModelConfig
    remat: str = "none"

    def setup(self):
        c = self.config
        family = family_of(c)
        self.vision_tower: Any = family.tower(c, self.remat)
        self.projector: Any = family.projector(c)
        self.decoder = Decoder(c.decoder, self.remat)
        if c.newline:
            normal, shape = nn.initializers.normal(0.02), (c.decoder.hidden,)
            self.image_newline = parameter(self, "image_newline", normal, ("norm",), shape)

    def features(self, pixels: Pixels) -> Float[Array, "B T*I F"]:
        """The vision tower's output for each tile; the same for policy and reference while it is frozen."""
        size, tiles, patches = pixels.patches.shape[:3]
        if not tiles:  # text alone; there is no attention over nothing
            return jnp.zeros((size, 0, self.config.vision.features), pixels.patches.dtype)
        lead = (size, tiles * patches) if self.config.joined else (size * tiles, patches)
        out = self.vision_tower(*(x.reshape(*lead, x.shape[-1]) for x in pixels))
        return out.reshape(size, -1, out.shape[-1])

    def embed(
        self, features: Float[Array, "B n F"], prefix: Prefix
    ) -> tuple[Float[Array, "B P D"], Float[Array, "n B P D"] | None]:
        """Embeddings of the prefix: text, and the rows of the image table that `prefix.image` names, mixed
        with others where there are `prefix.taps`.

        Where the projector gives rows of (1 + n) D, the rest of them is what the first n layers add (see
        `Decoder`), 0 at text; else None.
        """
        image, width = self.projector(features), self.config.decoder.hidden
        newline = jnp.zeros((image.shape[-1],), image.dtype)
        if self.config.newline:
            newline = self.image_newline
        row = jnp.broadcast_to(newline[None, None], (image.shape[0], 1, image.shape[-1]))
        table = jnp.concatenate([row, image], axis=1)

        text = self.decoder.embed(prefix.tokens)
        place = prefix.image[:, :, None]
        seen = jnp.take_along_axis(table, jnp.maximum(place, 0), axis=1)
        if prefix.taps is not None and prefix.mix is not None:
            seen = _mixed(table, seen, prefix.taps, prefix.mix)
        states = constrain(jnp.where(place >= 0, seen[..., :width], text), "rows", None, None)
        if seen.shape[-1] == width:
            return states, None
        deep = jnp.where(place >= 0, seen[..., width:], 0).reshape(*text.shape[:2], -1, width)
        return states, constrain(deep.transpose(2, 0, 1, 3), None, "rows", None, None)

    def prefill(self, features: Float[Array, "B n F"], prefix: Prefix, holes: bool = False) -> Cache:
        """Keys and values of each prefix; `features` may hold just those rows that the prefix names.

        holes: some prefix has a masked key between visible ones.
        """
        states, deep = self.embed(features, prefix)
        return self.decoder.prefill(states, prefix.order, prefix.rope, prefix.visible, holes, deep)

    def decode(
        self,
        tokens: Int[Array, "B F"],
        prefix: Cache,
        own: Any,
        order: Int[Array, "B F"],
        rope: Int[Array, "B F"],
        step: Int[Array, " B"],
        column: Int[Array, ""],
    ) -> tuple[Float[Array, "B F V"], Any]:
        """float32 logits after token number `step` of every fork (see `Decoder.decode`)."""
        states = self.decoder.embed(tokens)
        states, own = self.decoder.decode(states, prefix, own, order, rope, step, column)
        kernel = self.decoder.unembedding()
        return jnp.matmul(states, kernel, preferred_element_type=jnp.float32), own

    def hidden(
        self, features: Float[Array, "B T*I F"], prefix: Prefix, responses: Responses
    ) -> tuple[Float[Array, "B D"], Float[Array, "B K R D"]]:
        """Final hidden states of each prompt's last token and of the tokens of the responses that continue
        it."""
        size, count, length = responses.tokens.shape
        states, deep = self.embed(features, prefix)
        own = self.decoder.embed(responses.tokens.reshape(size, -1))
        order, rope = prefix.after(length)
        states = self.decoder(
            jnp.concatenate([states, own], axis=1),
            jnp.concatenate([prefix.order, *[order] * count], axis=1),
            jnp.concatenate([prefix.rope, *[rope] * count], axis=2),
            jnp.concatenate([prefix.visible, responses.mask.reshape(size, -1)], axis=1),
            states.shape[1],
            count,
            prefix.length - 1,
            deep,
        )
        return states[:, 0], states[:, 1:].reshape(size, count, length, -1)

    def __call__(self, group: PromptGroup) -> tuple[Float[Array, "B k R"], ...]:
        """Log-probability, in nats, of every response token, for each view; 0 at padding."""
        return self.logps(tuple(self.features(prefix.pixels) for prefix in group.prefixes), group)

    def logps(
        self, features: tuple[Float[Array, "B T*I F"], ...], group: PromptGroup
    ) -> tuple[Float[Array, "B k R"], ...]:
        """As `__call__`, on features of the vision tower computed before, one array for each prefix."""
        return self.logps_and_hidden(features, group)[0]

    def logps_and_hidden(
        self, features: tuple[Float[Array, "B T*I F"], ...], group: PromptGroup
    ) -> tuple[tuple[Float[Array, "B k R"], ...], Hidden]:
        """`logps`, and the states of `hidden` of the first view."""
        views = [group.responses.take(view) for view in group.views]
        hidden = [self.hidden(*each) for each in zip(features, group.prefixes, views, strict=True)]
        return tuple(map(self.predicted, hidden, views)), hidden[0]

    def response_logps(self, features, prefix: Prefix, responses: Responses) -> Float[Array, "B K R"]:
        """Log-probabilities, in nats, of responses that continue one prefix; 0 at padding.

        Only positions that predict a response token reach the vocabulary projection: the last prefix
        position, once for all K responses, and each response's tokens but its last.
        """
        return self.predicted(self.hidden(features, prefix, responses), responses)

    def predicted(self, hidden: Hidden, responses: Responses) -> Float[Array, "B K R"]:
        """The log-probabilities by states of `hidden`."""
        kernel, tokens = self.decoder.unembedding(), responses.tokens
        size, count, _ = tokens.shape
        first = token_logps(hidden[0][:, None], tokens[:, None, :, 0], kernel)
        later = tokens[:, :, 1:].reshape(size, -1, 1)
        later = token_logps(_before(hidden), later, kernel, _chunk())
        first, later = first.reshape(size, count, 1), later.reshape(size, count, -1)
        logps = jnp.concatenate([first, later], axis=-1)
        return jnp.where(responses.mask, logps, 0.0)

    def divergence(
        self, hidden: Hidden, responses: Responses, reference: Hidden, kernel: Float[Array, "D V"]
    ) -> Float[Array, "B K R"]:
        """KL(reference || policy) of the distribution that predicts each response token, in nats; 0 at
        padding. reference, kernel: the other model's states of `hidden`, and its unembedding."""
        own, (size, count, _) = self.decoder.unembedding(), responses.tokens.shape
        first = token_kl(hidden[0][:, None], own, reference[0][:, None], kernel)
        later = token_kl(_before(hidden), own, _before(reference), kernel, _chunk())
        first = jnp.broadcast_to(first[:, None], (size, count, 1))
        values = jnp.concatenate([first, later.reshape(size, count, -1)], axis=-1)
        return jnp.where(responses.mask, values, 0.0)

    def unembedding(self) -> Float[Array, "D V"]:
        """What turns hidden states into logits."""
        return self.decoder.unembedding()

    def scores(
        self, features, prefix: Prefix, responses: Responses, kernel: Float[Array, " D"]
    ) -> Float[Array, "B K"]:
        """A linear head on the final hidden state of each response's last token, in float32."""
        _, states = self.hidden(features, prefix, responses)
        last = jnp.maximum(responses.mask.sum(-1) - 1, 0)[:, :, None, None]
        ends = jnp.take_along_axis(states, last, axis=2)[:, :, 0]
        return ends.astype(jnp.float32) @ kernel.astype(jnp.float32)

    def states(self, features, prefix: Prefix, responses: Responses) -> Float[Array, "B K D"]:
        """The mean of the final hidden states over each response's tokens, in float32."""
        _, states = self.hidden(features, prefix, responses)
        mask = responses.mask[..., None].astype(jnp.float32)
        return (states.astype(jnp.float32) * mask).sum(2) / jnp.maximum(mask.sum(2), 1.0)

    def values(
        self, features, prefix: Prefix, responses: Responses, kernel: Float[Array, " D"]
    ) -> Float[Array, "B K R"]:
        """A linear head on the final hidden state that predicts each response token, in float32; 0 at
        padding."""
        last, states = self.hidden(features, prefix, responses)
        last = jnp.broadcast_to(last[:, None, None], states[:, :, :1].shape)
        before = jnp.concatenate([last, states[:, :, :-1]], axis=2)
        values = before.astype(jnp.float32) @ kernel.astype(jnp.float32)
        return jnp.where(responses.mask, values, 0.0)


def _before(hidden: Hidden) -> Float[Array, "B n D"]:
    """States before each response token but the first."""
    states = hidden[1][:, :, :-1]
    return states.reshape(states.shape[0], -1, states.shape[-1])


def _chunk() -> int:
    """Hidden states that meet the vocabulary at once, over all devices."""
    mesh = current()
    return CHUNK * (1 if mesh is None else batch_shards(mesh))


def _mixed(
    table: Float[Array, "B n D"],
    first: Float[Array, "B P D"],
    taps: Int[Array, "B W P"],
    mix: Float[Array, "B W P"],
) -> Float[Array, "B P D"]:
    """Sums over rows by their shares, in float32; `first` has what is left of 1."""
    share = mix[..., None]
    out = (1 - share.sum(1)) * first.astype(jnp.float32)
    for each in range(taps.shape[1]):
        row = jnp.take_along_axis(table, taps[:, each, :, None], axis=1)
        out = out + share[:, each] * row.astype(jnp.float32)
    return out.astype(first.dtype)


def variables(params: Params, lora: Params | None = None) -> dict[str, Params]:
    """What `VisionLanguageModel.apply` takes: parameters, and scaled low-rank terms where there are any."""
    return {"params": params} if lora is None else {"params": params, "lora": lora}


def cast(tree: Any, dtype: Any) -> Any:
    """Every array in the dtype of the computation, but for matrices in int8."""
    return jax.tree.map(lambda x: x if x.dtype == jnp.int8 else x.astype(dtype), tree)
