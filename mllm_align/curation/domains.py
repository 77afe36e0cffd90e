"""Diversity as a reward: how hard it is to tell which kind of record a record is.

DaaR (arXiv 2502.04380): records are put into pseudo-domains by a model's own states, a probe learns to tell
these, and records of which the probe is unsure, those between the domains, are kept. There, another head
learns to predict the entropy; here it is computed for every record, by a probe that has not seen it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize
from scipy.special import log_softmax

from mllm_align.config import DataConfig
from mllm_align.curation.vectors import Vectors
from mllm_align.data.encode import Encoded, image_digest
from mllm_align.data.records import Record
from mllm_align.errors import InputError, not_finite
from mllm_align.generation.bdhs_job import trained_digest
from mllm_align.models.bundle import load
from mllm_align.prepare import make_encoder, name_weights
from mllm_align.scoring import response_states

COMPONENTS = 64  # of the states, that clusters and probe look at
FOLDS = 5
STARTS = 8  # of k-means; the best is taken


class Domains(NamedTuple):
    """labels [n]: the domain of each record. entropy [n]: of the probe's probabilities, nats. accuracy: the
    share of the records whose domain a probe tells that has not seen them. sizes: records of each
    domain."""

    labels: np.ndarray
    entropy: np.ndarray
    accuracy: float
    sizes: list[int]


def domains(states: np.ndarray, count: int, seed: int) -> Domains:
    """Of states [n, D]. count: pseudo-domains, by k-means; seed: of its starts and of the folds.

    The probe is a multinomial logistic regression with weight decay 1. Raises InputError where fewer than
    two domains are found, or there are fewer than FOLDS records.
    """
    if len(states) < max(FOLDS, count):
        raise InputError(f"--domains is {count}, and {len(states)} records have states; ask for fewer")
    reduced = components(states)
    labels = clusters(reduced, count, seed)
    found = len(np.unique(labels))
    if found < 2:
        raise InputError("the records' states are all the same: there are no domains; take another --by")
    fold = np.random.default_rng(seed).permutation(len(states)) % FOLDS
    logps = np.zeros((len(states), found))
    for number in range(FOLDS):
        held = fold == number
        weights = probe(reduced[~held], labels[~held], found)
        logps[held] = log_softmax(_biased(reduced[held]) @ weights, axis=1)
    entropy = -(np.exp(logps) * logps).sum(1)
    accuracy = float((logps.argmax(1) == labels).mean())
    return Domains(labels, entropy, accuracy, np.bincount(labels).tolist())


def components(states: np.ndarray) -> np.ndarray:
    """[n, d] float64: the centred states along their principal axes, at most COMPONENTS, scaled by one
    number so that the first has variance 1."""
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred / len(states))
    keep = np.argsort(-values)[:COMPONENTS]
    keep = keep[values[keep] > 1e-12 * max(values[keep[0]], 1e-300)]
    if not len(keep):
        return np.zeros((len(states), 1))
    return centred @ axes[:, keep] / np.sqrt(values[keep[0]])


def clusters(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Labels [n] from 0 on, by the best of several k-means: that with the least sum of squares. Domains
    without a record are left out."""
    best, labels = np.inf, np.zeros(len(points), int)
    count = min(count, len(np.unique(points, axis=0)))
    for start in range(STARTS):
        rng = np.random.default_rng((seed, start))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a cluster without points
            centres, found = kmeans2(points, count, minit="++", rng=rng)
        squares = float(((points - centres[found]) ** 2).sum())
        if squares < best:
            best, labels = squares, found
    return np.unique(labels, return_inverse=True)[1]


def probe(points: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Weights [d + 1, count] of a logistic regression: the least sum of -log p plus half of the squared
    weights; the last row, the biases, is free."""
    inputs, wanted = _biased(points), np.eye(count)[labels]
    shape, decay = (inputs.shape[1], count), np.r_[np.ones(points.shape[1]), 0.0][:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logps = log_softmax(inputs @ weights, axis=1)
        gradient = inputs.T @ (np.exp(logps) - wanted) + decay * weights
        return -(wanted * logps).sum() + 0.5 * (decay * weights**2).sum(), gradient.ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return found.x.reshape(shape)


def _biased(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)


# ---- states ------------------------------------------------------------------------------------------


def model_states(
    model: str, records: Sequence[Record], folder: Path, config: DataConfig, batch_size: int
) -> list[np.ndarray | None]:
    """Of each record the mean of the model's last hidden states over its chosen response, [D]; None where
    it is longer than the model's limit. They are kept in `folder` as they come.

    Raises InputError for a model, data or a folder that can't be used, NotFinite for states that are not
    finite.
    """
    bundle = load(model)
    encoder = make_encoder(bundle, config)
    name_weights(bundle.folder)
    limit = config.max_length or bundle.config.decoder.max_length
    encoded = [encoder.encode(record, 1, index) for index, record in enumerate(records)]
    names = {each.index: _digest(each, encoder.fingerprint) for each in encoded if each.length <= limit}
    stamp = {"model": bundle.folder.fingerprint, "trained": trained_digest(bundle.trained)}
    kept = Vectors(folder, stamp | {"dtype": str(bundle.dtype)}, bundle.config.decoder.hidden, "--out")
    known = kept.open()
    fitting = [each for each in encoded if each.index in names]
    left = {place for place, each in enumerate(fitting) if names[each.index] not in known}
    broken = []

    def done(place: int, states: np.ndarray) -> None:
        name = names[fitting[place].index]
        if not np.isfinite(states).all():
            broken.append(fitting[place].record.id)
        elif name not in known:
            known[name] = states[0]
            kept.add({name: states[0]})

    if left:
        response_states(bundle, encoder, fitting, config, batch_size, done=done, wanted=left)
    if broken:
        raise not_finite("states are", broken, len(records))
    return [known[names[i]] if i in names else None for i in range(len(records))]


def _digest(encoded: Encoded, encoder: str) -> bytes:
    digest = hashlib.sha256(encoder.encode())
    for ids in (encoded.prefix, *encoded.responses):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    for source in encoded.record.images:
        digest.update(image_digest(source))
    return digest.digest()
