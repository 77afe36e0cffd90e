"""A model's forward pass over given responses: log-probabilities, and the scores of a reward model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_align.batch import PromptGroup
from mllm_align.config import DataConfig
from mllm_align.data.batches import Batches
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle, base_shardings, make_model
from mllm_align.models.config import ModelConfig
from mllm_align.models.policy import SCORE, image_features, policy_variables
from mllm_align.progress import progress_bar
from mllm_align.sharding import assemble, batch_sharding, batch_shards, replicated, traced_within
from mllm_align.sizes import round_up


@lru_cache(maxsize=8)
def logps_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """logps(params, trained, group) -> [B, K, R] on every device, jitted."""
    return _forward(config, mesh, lora_scale, dtype, "response_logps")


@lru_cache(maxsize=8)
def rewards_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """rewards(params, trained, group) -> [B, K] on every device, jitted."""
    return _forward(config, mesh, lora_scale, dtype, "scores", lambda trained: (trained[SCORE]["kernel"],))


@lru_cache(maxsize=8)
def states_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """states(params, trained, group) -> [B, K, D] on every device, jitted."""
    return _forward(config, mesh, lora_scale, dtype, "states")


def _forward(
    config: ModelConfig,
    mesh: Mesh,
    lora_scale: float,
    dtype: Any,
    method: str,
    head: Callable[[Any], tuple] = lambda trained: (),
) -> Any:
    """Jitted forward(params, trained, group): a method of the model on a group's responses. head: what the
    method takes of what is trained."""
    model = make_model(config)

    def forward(params: Any, trained: Any, group: PromptGroup) -> Any:
        policy = policy_variables(params, trained, lora_scale, dtype)
        prefix = group.prefix
        features = image_features(model, policy, prefix, dtype)
        return model.apply(policy, features, prefix, group.responses, *head(trained), method=method)

    places = base_shardings(config, mesh), None, batch_sharding(mesh, micro=False)
    return jax.jit(traced_within(mesh, forward, dtype), in_shardings=places, out_shardings=replicated(mesh))


def response_logps(
    bundle: Bundle,
    encoder: Encoder,
    records: Sequence[Encoded],
    config: DataConfig,
    batch_size: int,
    *,
    reference: bool = False,
    what: str = "scoring",
    done: Callable[[int, tuple[np.ndarray, ...]], None] | None = None,
    wanted: Container[int] | None = None,
    seed: int = 0,
) -> list[tuple[np.ndarray, ...]]:
    """Per record its K responses' per-token log-probs, nats, float32.

    reference: of the checkpoint as it was loaded, without what a run has trained. done: called with the
    place and the log-probs of each record, as soon as they are there. wanted: places of the records to
    compute, default all; batches are those of all records, so that what goes on after a stop rounds as if
    it had not been stopped. seed: of crops and noise.
    """
    trained = {} if reference else bundle.trained
    program = logps_program(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype)
    values = partial(program, bundle.params, trained)
    out: list[tuple[np.ndarray, ...]] = [()] * len(records)
    asked = bundle, encoder, records, config, batch_size
    for index, row in _rows(values, *asked, what=what, wanted=wanted, seed=seed):
        answers = records[index].responses
        out[index] = tuple(row[k, : len(answer)].copy() for k, answer in enumerate(answers))
        if done is not None:
            done(index, out[index])
    return out


def response_states(
    bundle: Bundle,
    encoder: Encoder,
    records: Sequence[Encoded],
    config: DataConfig,
    batch_size: int,
    *,
    done: Callable[[int, np.ndarray], None],
    wanted: Container[int] | None = None,
) -> None:
    """The model's mean final hidden state of each of a record's K responses. done: called with the place
    and the states [K, D] float32 of each record, as soon as they are there. wanted: as of
    `response_logps`."""
    program = states_program(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype)
    values = partial(program, bundle.params, bundle.trained)
    asked = bundle, encoder, records, config, batch_size
    for index, row in _rows(values, *asked, what="states", wanted=wanted):
        done(index, row[: len(records[index].responses)].copy())


def response_rewards(
    bundle: Bundle,
    encoder: Encoder,
    records: Sequence[Encoded],
    config: DataConfig,
    batch_size: int,
    *,
    what: str | None = "scoring",
    done: Callable[[int, np.ndarray], None] | None = None,
    wanted: Container[int] | None = None,
) -> list[np.ndarray]:
    """Per record its K responses' rewards [K], float32. Raises InputError for a model that is no reward
    model. done, wanted: as of `response_logps`."""
    check_reward_model(bundle)
    program = rewards_program(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype)
    values = partial(program, bundle.params, bundle.trained)
    out = [np.zeros(0, np.float32)] * len(records)
    asked = bundle, encoder, records, config, batch_size
    for index, row in _rows(values, *asked, what=what, wanted=wanted):
        out[index] = row[: len(records[index].responses)].copy()
        if done is not None:
            done(index, out[index])
    return out


def check_reward_model(bundle: Bundle) -> None:
    """Raises InputError for a model that is no reward model."""
    if SCORE not in bundle.trained:
        raise InputError(
            f"{bundle.folder.named or bundle.folder.path} is no reward model; name a run of one"
        )


def _rows(
    values: Callable[[PromptGroup], Any],
    bundle: Bundle,
    encoder: Encoder,
    records: Sequence[Encoded],
    config: DataConfig,
    batch_size: int,
    *,
    what: str | None,
    wanted: Container[int] | None,
    seed: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:
    """(place of a wanted record, its row of `values` of a batch), in some order."""
    asked = {place for place in range(len(records)) if wanted is None or place in wanted}
    batches = Batches(
        records,
        encoder,
        size=round_up(batch_size, batch_shards(bundle.mesh)),
        seed=seed,
        shuffle=True,  # groups records of like length; results go back to their places
        shapes=config.shapes,
        multiple=config.multiple,
    )
    where = batch_sharding(bundle.mesh, micro=False)
    steps = [step for step in range(batches.per_epoch) if asked.intersection(batches.plan(step)[1])]
    with nullcontext() if what is None else progress_bar(len(asked), what) as bar:
        for batch in batches.iterate(steps, config.threads, config.prefetch):
            group = assemble(jax.tree.map(lambda x: x[0], batch.group), where)
            rows = np.asarray(values(group))
            here = [(index, rows[row]) for row, index in enumerate(batch.records) if index in asked]
            yield from here
            if bar is not None:
                bar.update(len(here))


def not_finite_among(records: Sequence[Encoded], values: Sequence[Any]) -> list[str]:
    """Ids of the records with a log-prob or reward that is not a finite number. values: of each record an
    array for each response, or one of all."""
    return [
        record.record.id
        for record, each in zip(records, values, strict=True)
        if not all(np.isfinite(row).all() for row in each)
    ]
