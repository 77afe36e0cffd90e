"""What a run starts from: its model, its data, and the batches that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm_align.config import Config
from mllm_align.data.batches import Batches
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.mixture import Mixture
from mllm_align.data.table import LeftOut, counted
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle, kept_as, load
from mllm_align.models.huggingface import Folder
from mllm_align.models.policy import SCORE
from mllm_align.prepare import check_batch, prepare
from mllm_align.processes import warn
from mllm_align.sharding import local_rows, make_mesh
from mllm_align.training import run_model
from mllm_align.training.features import StoredFeatures
from mllm_align.training.optim import trained_parts
from mllm_align.training.programs import check_fits
from mllm_align.training.references import Logps, further_logps, stored_logps
from mllm_align.training.terminal import waiting


@dataclass(frozen=True)
class Inputs:
    """Encoded data of a run. held_out: to evaluate on; may be empty. dropped: how many records the rules of
    published sets left out. weights: of the sets of a mixture, by name."""

    encoder: Encoder
    records: list[Encoded]
    left_out: list[LeftOut]
    held_out: list[Encoded] = field(default_factory=list)
    held_left_out: list[LeftOut] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    weights: Mapping[str, float] | None = None

    def counts(self) -> dict[str, Any]:
        """What the log says of them."""
        return {
            "records": len(self.records),
            "skipped": [each.id for each in self.left_out],
            "left_out": dict(+self.dropped),
            "eval_records": len(self.held_out),
            "eval_skipped": [each.id for each in self.held_left_out],
        }


def open_bundle(config: Config, model: str | Path | Bundle, out: Path) -> Bundle:
    """What training into `out` starts from, with nothing trained yet. Raises InputError for a model that
    the config can't train."""
    if not isinstance(model, Bundle):
        with waiting(f"opening {model}"):
            folder = run_model.base_again(model, out).kept(config.int8)
            model = load(folder, config.dtype, make_mesh(config.mesh))
    bundle = kept_as(model, config.int8)
    if SCORE in bundle.trained:
        problem = "is a reward model; name a model that answers (or go on from its run with --init-from)"
        raise InputError(f"{bundle.folder.named or bundle.folder.path} {problem}")
    if config.lora is None and not trained_parts(config, bundle.config):
        rate = config.optim.projector_learning_rate
        raise InputError(
            f"nothing is left to train: freeze is {', '.join(config.freeze)} and "
            f"optim.projector_learning_rate {rate}; freeze less"
        )
    width = bundle.config.decoder.hidden
    if config.lora is not None and config.lora.rank > width:
        raise InputError(
            f"lora.rank is {config.lora.rank}, and the model's decoder {width} wide; give at most {width}"
        )
    for what in check_fits(config, bundle.config, bundle.mesh):
        warn(f"{what} do not divide by mesh.tensor: every device of that axis keeps all of them")
    return replace(bundle, lora=config.lora, trained={})


def open_data(config: Config, bundle: Bundle, data: Any, eval_data: Any = None) -> Inputs:
    """Read and encode the data. Raises InputError for data that can't be used."""
    objective, online = config.objective, config.online
    reserved = 0 if online is None else online.reserved_tokens
    # generated responses stand beside those of the data: both must continue one prompt
    opening = online is not None and online.generates
    dropped: Counter[str] = Counter()
    with waiting(f"reading {data}" if isinstance(data, str | Path | Mixture) else "reading rows"):
        how = reserved, opening, dropped, objective.unpaired, objective.rejected_image
        encoder, records, left_out = prepare(bundle, data, config.data, config.data_responses, *how)
    check_batch(config.batch_size, len(records))
    held_out, held_left_out = [], []
    if eval_data is not None:
        held_out, held_left_out = _open_held_out(config, bundle, eval_data)
    for what, these in (("training", left_out), ("held-out", held_left_out)):
        if these:
            warn(f"{counted(these)} {what} records left out")
    weights = data.named if isinstance(data, Mixture) else None
    if weights is not None and not config.data.shuffle:
        raise InputError(
            "data.shuffle is False, and data sets are drawn by weight; leave out --data.no-shuffle"
        )
    return Inputs(encoder, records, left_out, held_out, held_left_out, dropped, weights)


def _open_held_out(config: Config, bundle: Bundle, data: Any) -> tuple[list[Encoded], list[LeftOut]]:
    objective, own = config.objective, config.objective.held_out
    if objective.fields:
        name = type(objective).__name__
        raise InputError(f"{name} has no loss on held-out data; leave out --eval-data, and see --evaluate")
    how: Any = {"unpaired": objective.unpaired, "rejected_image": own.rejected_image}
    settings = replace(config.data, split=config.data.eval_split)
    _, records, left_out = prepare(bundle, data, settings, own.of_record, **how)
    return records, left_out


def open_batches(
    config: Config, bundle: Bundle, inputs: Inputs, references: Sequence[Folder], out: Path
) -> tuple[Batches, Batches | None]:
    """Batches to train on and to evaluate on, with what the config wants stored of them in `out`: log-probs
    of the reference and of further `references`, and features."""
    sets = {"": inputs.records} | ({"_eval": inputs.held_out} if inputs.held_out else {})
    reference = {end: _reference(config, bundle, inputs.encoder, sets[end], out, end) for end in sets}
    named = {f"references{end}": records for end, records in sets.items()}
    further = further_logps(references, bundle, inputs.encoder, named, config, out)
    rows = local_rows(bundle.mesh, config.rows_per_micro)

    def batches(end: str, **order: Any) -> Batches:
        return Batches(
            sets[end],
            inputs.encoder,
            size=config.batch_size,
            micro=config.micro_batches,
            seed=config.seed,
            shapes=config.data.shapes,
            multiple=config.data.multiple,
            reference=reference[end],
            references=further[f"references{end}"],
            local_rows=rows,
            features=_features(config, bundle, inputs.encoder, sets[end], out / f"features{end}"),
            borrowed=config.objective.borrowed,
            redraw=config.redraws_images,
            changed="changes" in config.objective.needs,
            **order,
        )

    training = batches("", shuffle=config.data.shuffle, weights=inputs.weights)
    return training, batches("_eval") if inputs.held_out else None


def _reference(
    config: Config, bundle: Bundle, encoder: Encoder, records: Sequence[Encoded], out: Path, end: str
) -> list[Logps] | None:
    """The reference's log-probs of each view, where they are stored."""
    if not config.stored_reference:
        return None
    views = {f"reference{end}.npz": [each.alone for each in records]}
    if second := [each.second for each in records if each.second is not None]:
        views[f"reference{end}_second.npz"] = second
    return [stored_logps(out / name, bundle, encoder, view, config) for name, view in views.items()]


def _features(
    config: Config, bundle: Bundle, encoder: Encoder, records: Sequence[Encoded], folder: Path
) -> StoredFeatures | None:
    """The tower's features of each record, where they are stored."""
    if config.features == "live":
        return None
    found = StoredFeatures(folder, bundle, encoder, records, config.seed)
    return found.load_or_make(config.rows_per_micro, config.data.threads)
