"""Log-probabilities or rewards of given responses for the user, and references computed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import processes
from mllm_align.config import DataConfig
from mllm_align.config.checks import MANY, check_number
from mllm_align.data.encode import Encoded, Encoder, fingerprint
from mllm_align.errors import InputError, not_finite
from mllm_align.models.bundle import Bundle, opened
from mllm_align.models.policy import SCORE
from mllm_align.prepare import check_batch, name_weights, prepare
from mllm_align.scoring import not_finite_among, response_logps, response_rewards

SCORES = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
REWARDS = ("chosen_reward", "rejected_reward", "chosen_tokens", "rejected_tokens")


def score(
    model: str | Path | Bundle, data: Any, *, config: DataConfig | None = None, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Score preference records: one dict a record, in order.

    model: a Bundle, or what `load` takes: a model, or a run's folder. data: a data set in files or an
    iterable of rows. config: a DataConfig, how they are read. batch_size: records at once. Each result
    has `index` (place among the records that are read, over all files), `chosen_logp` and `rejected_logp`
    (nats, summed over response tokens, end of sequence included), `chosen_tokens` and `rejected_tokens`;
    of a reward model's run `chosen_reward` and `rejected_reward` in place of log-probs. A record left out
    (only with data.over_long or data.identical "skip") has its index, None for the rest, and `left_out`:
    why. Raises InputError for unusable data, NotFinite where log-probs or rewards are not finite.
    """
    config = config or DataConfig()
    check_number("batch_size", batch_size, 1, MANY)
    bundle = opened(model)
    encoder, records, left_out = prepare(bundle, data, config, responses=2)
    check_batch(batch_size, len(records))
    rewards = SCORE in bundle.trained
    names, forward = (REWARDS, response_rewards) if rewards else (SCORES, response_logps)
    values: Sequence[Any] = forward(bundle, encoder, records, config, batch_size)
    if broken := not_finite_among(records, values):
        raise not_finite("rewards are" if rewards else "log-probs are", broken, len(records))
    lines: list[dict[str, Any]] = [
        {"index": i, **dict.fromkeys(names)} for i in range(len(records) + len(left_out))
    ]
    for each in left_out:
        lines[each.index]["left_out"] = each.why
    for record, (chosen, rejected) in zip(records, values, strict=True):
        found = (float(chosen.sum()), float(rejected.sum()), *map(len, record.responses))
        lines[record.index].update(zip(names, found, strict=True))
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
        seed: int = 0,
    ) -> list[tuple[np.ndarray, ...]]:
        """Read them; compute and store them where there is no file yet. Those that are not finite are not
        stored: what is done about them is the caller's to say. seed: of crops and noise.

        Raises InputError if the file belongs to another model, data or dtype.
        """
        settings = bundle.processor.image_processor.to_json_string()
        settings += f" seed {seed}" * any(record.identity for record in records)
        name_weights(bundle.folder)
        stamp = (
            f"model {bundle.folder.fingerprint} data {fingerprint(records, settings)} dtype {bundle.kept}"
        )
        lengths = [[len(answer) for answer in record.responses] for record in records]
        if processes.on_first(self.path.exists):
            return self._load(stamp, lengths)
        logps = response_logps(
            bundle, encoder, records, config, batch_size, reference=True, what="reference", seed=seed
        )
        flat = np.concatenate([values for answers in logps for values in answers])
        if np.isfinite(flat).all():
            processes.on_first(lambda: self._write(stamp, flat))
        return logps

    def _write(self, stamp: str, flat: np.ndarray) -> None:
        part = self.path.with_name(f".{self.path.name}.partial")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
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
