"""Log-probabilities of a run's data under references, computed before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mllm_align import processes
from mllm_align.config import Config
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.table import encode_all
from mllm_align.errors import not_finite, refusal
from mllm_align.models.bundle import Bundle, load
from mllm_align.models.huggingface import Folder
from mllm_align.models.processor import load_processor
from mllm_align.prepare import make_encoder
from mllm_align.scoring import not_finite_among
from mllm_align.training.score import StoredReference

SKIP = "see what they hold, or leave such steps out: --nonfinite skip"
Logps = list[tuple[np.ndarray, ...]]
"""Of each record its responses' log-probs, nats per token."""


def stored_logps(
    file: Path, bundle: Bundle, encoder: Encoder, records: Sequence[Encoded], config: Config
) -> Logps:
    """Those of `file`, or computed and kept there. Raises NotFinite where the run is to stop at those that
    are not finite."""
    found = StoredReference(file).load_or_make(
        bundle, encoder, records, config.data, config.rows_per_micro, config.seed
    )
    broken = not_finite_among(records, found) if config.nonfinite == "stop" else []
    if broken:
        raise not_finite("reference log-probs are", broken, len(records), SKIP)
    return found


def further_logps(
    folders: Sequence[Folder],
    bundle: Bundle,
    encoder: Encoder,
    sets: Mapping[str, Sequence[Encoded]],
    config: Config,
    out: Path,
) -> dict[str, list[Logps]]:
    """Of each data set, by name, those under the model of each folder, kept in `out`/NAME/NUMBER.npz.

    bundle, encoder: the run's. One model after the other is loaded beside the run's base, with images and
    prompt as it takes them itself, and only where a file is not there yet. Raises InputError for a model
    whose tokenizer makes other tokens of a response.
    """
    found: dict[str, list[Logps]] = {name: [] for name in sets}
    for number, folder in enumerate(folders, 1):
        model = Bundle(folder, load_processor(folder.path), bundle.mesh, bundle.dtype, {})
        own = make_encoder(model, config.data)
        for name, records in sets.items():
            file = out / name / f"{number}.npz"
            alike = own.fingerprint == encoder.fingerprint
            given = records if alike else _again(records, own, model, config)
            if not processes.on_first(file.exists):
                model = model if model.params else load(folder, config.dtype, bundle.mesh)
            found[name].append(stored_logps(file, model, own, given, config))
    return found


def _again(
    records: Sequence[Encoded], encoder: Encoder, model: Bundle, config: Config
) -> Sequence[Encoded]:
    """The records for another model."""
    most = config.data.max_length or model.config.decoder.max_length
    named = model.folder.named or model.folder.path
    given = [each.record for each in records]
    made, _ = encode_all(given, encoder, responses=len(records[0].responses), max_length=most)
    for before, now in zip(records, made, strict=True):
        if not all(map(np.array_equal, before.responses, now.responses)):
            problem = f"the tokenizer of the reference {named} makes other tokens of a response"
            raise refusal(before.record.where, problem, "give references with the model's own tokenizer")
    return made
