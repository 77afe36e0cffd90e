"""Log-probabilities of given responses: for the user, and for references computed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_align import processes
from mllm_align.batch import PromptGroup
from mllm_align.config import DataConfig
from mllm_align.config.checks import MANY, check_number
from mllm_align.data.batches import Batches
from mllm_align.data.encode import Encoded, Encoder, fingerprint
from mllm_align.errors import InputError, not_finite
from mllm_align.models.bundle import Bundle, base_shardings, make_model, opened
from mllm_align.models.config import ModelConfig
from mllm_align.models.policy import policy_variables
from mllm_align.prepare import check_batch, name_weights, prepare
from mllm_align.progress import progress_bar
from mllm_align.sharding import assemble, batch_sharding, batch_shards, replicated, traced_within
from mllm_align.sizes import round_up


def logps_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """logps(params, trained, group) -> [B, K, R] on every device, jitted."""
    model = make_model(config)

    def logps(params: Any, trained: Any, group: PromptGroup) -> Any:
        policy = policy_variables(params, trained, lora_scale, dtype)
        prefix = group.prefix
        features = model.apply(policy, prefix.pixels.astype(dtype), method="features")
        return model.apply(policy, features, prefix, group.responses, method="response_logps")

    places = base_shardings(config, mesh), None, batch_sharding(mesh, micro=False)
    return jax.jit(traced_within(mesh, logps, dtype), in_shardings=places, out_shardings=replicated(mesh))


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
) -> list[tuple[np.ndarray, ...]]:
    """Per record its K responses' per-token log-probs, nats, float32.

    reference: of the checkpoint as it was loaded, without what a run has trained. done: called with the
    place and the log-probs of each record, as soon as they are there.
    """
    shards = batch_shards(bundle.mesh)
    batches = Batches(
        records,
        encoder,
        size=round_up(batch_size, shards),
        shuffle=True,  # groups records of like length; results go back to their places
        shapes=config.shapes,
        multiple=config.multiple,
    )
    trained = {} if reference else bundle.trained
    rows = batch_sharding(bundle.mesh, micro=False)
    logps = logps_program(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype)
    out: list[tuple[np.ndarray, ...]] = [()] * len(records)
    ahead = batches.iterate(0, batches.per_epoch, config.threads, config.prefetch)
    with progress_bar(len(records), what) as bar:
        for batch in ahead:
            group = assemble(jax.tree.map(lambda x: x[0], batch.group), rows)
            values = np.asarray(logps(bundle.params, trained, group))
            for row, index in enumerate(batch.records):
                answers = records[index].responses
                out[index] = tuple(values[row, k, : len(a)].copy() for k, a in enumerate(answers))
                if done is not None:
                    done(index, out[index])
            bar.update(len(batch.records))
    return out


def not_finite_among(records: Sequence[Encoded], logps: Sequence[tuple[np.ndarray, ...]]) -> list[str]:
    """Ids of the records with a log-prob that is not a finite number."""
    return [
        record.record.id
        for record, answers in zip(records, logps, strict=True)
        if not all(np.isfinite(values).all() for values in answers)
    ]


SCORES = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")


def score(
    model: str | Path | Bundle, data: Any, *, config: DataConfig | None = None, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Score preference records: one dict a record, in order.

    model: a Bundle, or what `load` takes: a model, or a run's folder. data: a data set in files or an
    iterable of rows. config: a DataConfig, how they are read. batch_size: records at once. Each result
    has `index` (place among the records that are read, over all files), `chosen_logp` and `rejected_logp`
    (nats, summed over response tokens, end of sequence included), `chosen_tokens` and `rejected_tokens`.
    A record left out (only with data.over_long or data.identical "skip") has its index, None for the
    rest, and `left_out`: why. Raises InputError for unusable data, NotFinite where log-probs are not
    finite.
    """
    config = config or DataConfig()
    check_number("batch_size", batch_size, 1, MANY)
    bundle = opened(model)
    encoder, records, left_out = prepare(bundle, data, config, responses=2)
    check_batch(batch_size, len(records))
    logps = response_logps(bundle, encoder, records, config, batch_size)
    if broken := not_finite_among(records, logps):
        raise not_finite("log-probs are", broken, len(records))
    lines: list[dict[str, Any]] = [
        {"index": i, **dict.fromkeys(SCORES)} for i in range(len(records) + len(left_out))
    ]
    for each in left_out:
        lines[each.index]["left_out"] = each.why
    for record, (chosen, rejected) in zip(records, logps, strict=True):
        values = (float(chosen.sum()), float(rejected.sum()), len(chosen), len(rejected))
        lines[record.index].update(zip(SCORES, values, strict=True))
    return lines


class StoredReference:
    """Reference log-probs on disk, per token, under the fingerprints of model and data."""

    def __init__(self, path: Path):
        self.path = path

    def load_or_make(
        self,
        bundle: Bundle,
        encoder: Encoder,
        records: Sequence[Encoded],
        config: DataConfig,
        batch_size: int,
    ) -> list[tuple[np.ndarray, ...]]:
        """Read them; compute and store them where there is no file yet. Those that are not finite are not
        stored: what is done about them is the caller's to say.

        Raises InputError if the file belongs to another model, data or dtype.
        """
        settings = bundle.processor.image_processor.to_json_string()
        name_weights(bundle.folder)
        stamp = (
            f"model {bundle.folder.fingerprint} data {fingerprint(records, settings)} dtype {bundle.dtype}"
        )
        lengths = [[len(answer) for answer in record.responses] for record in records]
        if processes.on_first(self.path.exists):
            return self._load(stamp, lengths)
        logps = response_logps(
            bundle, encoder, records, config, batch_size, reference=True, what="reference"
        )
        flat = np.concatenate([values for answers in logps for values in answers])
        if np.isfinite(flat).all():
            processes.on_first(lambda: self._write(stamp, flat))
        return logps

    def _write(self, stamp: str, flat: np.ndarray) -> None:
        part = self.path.with_name(f".{self.path.name}.partial")
        try:
            with open(part, "wb") as file:
                np.savez(file, stamp=np.array(stamp), logps=flat)
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"can't write reference log-probs to {self.path}: {error}") from error

    def _load(self, stamp: str, lengths: list[list[int]]) -> list[tuple[np.ndarray, ...]]:
        try:
            with np.load(self.path) as file:
                found, flat = str(file["stamp"]), file["logps"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.path} holds no reference log-probs; delete it to compute them"
            ) from error
        if found != stamp or len(flat) != sum(map(sum, lengths)):
            raise InputError(
                f"{self.path} belongs to {found}, this run is {stamp}; delete it to compute them anew"
            )
        cuts = np.cumsum([n for answers in lengths for n in answers])[:-1]
        pieces = iter(np.split(flat, cuts))
        return [tuple(next(pieces) for _ in answers) for answers in lengths]
