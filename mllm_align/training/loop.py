"""The training loop: the only place with side effects."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mllm_align.batch import tokens_of
from mllm_align.config import Config
from mllm_align.data.batches import Batches, HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle, load, make_model
from mllm_align.prepare import prepare
from mllm_align.sharding import batch_sharding, batch_shards, make_mesh, replicated
from mllm_align.training import run
from mllm_align.training.checkpoint import Checkpoints
from mllm_align.training.flops import peak_flops, step_flops
from mllm_align.training.metrics import Log, add, divide, event_writer, line
from mllm_align.training.optim import init_trained, make_optimizer, schedule, trained_parts
from mllm_align.training.score import StoredReference
from mllm_align.training.step import TrainState, make_evaluation, make_step

Tree = dict[str, Any]


def train(
    config: Config,
    model: str | Path | Bundle,
    data: Any,
    out: str | Path,
    eval_data: Any = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Bundle:
    """Train and return the model; continue by itself where `out` holds a checkpoint of the same run.

    model: a Hugging Face LLaVA folder, or one loaded before. data, eval_data: a file or rows.
    out: the run folder (see training/run.py). on_step: called with the figures of every logged step.
    Raises InputError, before anything is written, for a config, model or data that can't be used.
    """
    out = Path(out)
    run.check_folder(out, config)
    bundle = model if isinstance(model, Bundle) else load(model, config.dtype, make_mesh(config.mesh))
    _check(config, bundle)
    writer = event_writer() if config.tensorboard else None
    bundle = replace(bundle, lora=config.lora, trained={})
    responses = config.objective.responses
    encoder, records, skipped = prepare(bundle, data, config.data, responses)
    held_out, held_skipped = [], []
    if eval_data is not None:
        _, held_out, held_skipped = prepare(bundle, eval_data, config.data, responses)
    for what, ids in (("training", skipped), ("held-out", held_skipped)):
        if ids:
            warn(f"{len(ids)} over-long {what} records left out")
    described = run.facts(bundle, data, eval_data, records)
    run.start(out, config, described)

    log = Log(out, writer)
    checkpoints = Checkpoints(out / "checkpoints", config.keep)
    try:
        trainer = _Run(config, bundle, encoder, records, held_out, out, log, checkpoints, on_step)
        counts = {"records": len(records), "skipped": skipped}
        counts |= {"eval_records": len(held_out), "eval_skipped": held_skipped}
        log("start", step=trainer.first, steps=trainer.steps, **described, **counts, **trainer.facts())
        state = trainer.loop()
        log("done", step=trainer.steps)
    finally:
        checkpoints.close()
        log.close()
    return replace(bundle, trained=state.trained)


def _check(config: Config, bundle: Bundle) -> None:
    """What only config and model together can tell."""
    if config.lora is None and not trained_parts(config, bundle.config.anyres):
        rate = config.optim.projector_learning_rate
        raise InputError(
            f"nothing is left to train: freeze is {', '.join(config.freeze)} and "
            f"optim.projector_learning_rate {rate}; freeze less"
        )
    rows, shards = config.batch_size // config.micro_batches, batch_shards(bundle.mesh)
    if rows % shards:
        raise InputError(
            f"batch_size / micro_batches is {rows}; it must be a multiple of {shards}, the devices that "
            "share a batch (mesh.data x mesh.fsdp)"
        )


class _Run:
    """Everything a run holds while it goes; made once, before the first step."""

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        encoder: Encoder,
        records: list[Encoded],
        held_out: list[Encoded],
        out: Path,
        log: Log,
        checkpoints: Checkpoints,
        on_step: Callable[[dict[str, Any]], None] | None,
    ):
        self.config, self.bundle, self.records, self.log = config, bundle, records, log
        self.checkpoints, self.on_step = checkpoints, on_step
        references = self._references(encoder, held_out, out)
        self.batches = self._batches(encoder, records, references[0], shuffle=config.data.shuffle)
        self.held_out = self._batches(encoder, held_out, references[1]) if held_out else None
        self.steps = config.steps or math.ceil(config.epochs * self.batches.per_epoch)

        model, mesh = make_model(bundle.config, config.remat), bundle.mesh
        optimizer = make_optimizer(config.optim, self.steps)
        trained = init_trained(bundle, config)
        self.state = _init_state(trained, optimizer, replicated(mesh))
        self.first = self.checkpoints.latest() or 0
        if self.first:
            self.state = checkpoints.restore(self.state, self.first)
        self.base = bundle.params
        if references[0] is not None:
            # no reference is run: what is trained needs no frozen copy
            parts = trained_parts(config, bundle.config.anyres)
            self.base = {name: part for name, part in self.base.items() if name not in parts}

        rows, whole = batch_sharding(mesh), replicated(mesh)
        places, base_places = (jax.tree.map(lambda x: x.sharding, t) for t in (self.state, self.base))
        common = (bundle.lora_scale, bundle.dtype)
        self.put = lambda batch: jax.device_put(batch.group, rows)
        self.step = jax.jit(
            make_step(model, config.objective, optimizer, *common),
            in_shardings=(places, base_places, rows),
            out_shardings=(places, whole),
            donate_argnums=0,
        )
        self.evaluate_batch = jax.jit(
            make_evaluation(model, config.objective, *common),
            in_shardings=(places.trained, base_places, rows),
            out_shardings=whole,
        )
        self.rate = schedule(config.optim, config.optim.learning_rate, self.steps)

    def _references(self, encoder: Encoder, held_out: list[Encoded], out: Path):
        """Stored reference log-probs of the training and the held-out data, where the config wants them."""
        c = self.config
        if c.reference != "stored" or not c.objective.needs_reference:
            return None, None

        def stored(name: str, records: list[Encoded]):
            return StoredReference(out / name).load_or_make(
                self.bundle, encoder, records, c.data, c.batch_size // c.micro_batches
            )

        held = stored("reference_eval.npz", held_out) if held_out else None
        return stored("reference.npz", self.records), held

    def _batches(self, encoder: Encoder, records, reference, shuffle: bool = False) -> Batches:
        c = self.config
        return Batches(
            records,
            encoder,
            size=c.batch_size,
            micro=c.micro_batches,
            seed=c.seed,
            shuffle=shuffle,
            shapes=c.data.shapes,
            multiple=c.data.multiple,
            reference=reference,
        )

    def facts(self) -> dict[str, Any]:
        leaves = jax.tree.leaves(self.state.trained)
        return {
            "trained_parameters": sum(x.size for x in leaves),
            "shapes": [[s.prefix, s.response, s.tiles] for s in self.batches.ladder],
        }

    def loop(self) -> TrainState:
        """Run the steps that are left; log, evaluate and save as the config says."""
        config, state = self.config, self.state
        ahead = self.batches.iterate(self.first, self.steps, config.data.threads, config.data.prefetch)
        window = _Window(self)
        for number in range(self.first + 1, self.steps + 1):
            waiting = time.perf_counter()
            batch = next(ahead)
            group = self.put(batch)
            waited = time.perf_counter() - waiting
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, self.base, group)
                window.add(batch, metrics, waited)
            last = number == self.steps
            if number % config.log_every == 0 or last or number == self.first + 1:
                self._report(window.close(number))
                window = _Window(self)
            due = config.eval_every is not None and number % config.eval_every == 0
            if self.held_out is not None and (due or last):
                self._evaluate(state, number)
                window = _Window(self)
            if number % config.save_every == 0 or last:
                self.checkpoints.save(state, number)
                self.log("save", step=number)
        if self.first < self.steps:
            self.checkpoints.wait()
        return state

    def _report(self, values: dict[str, Any]) -> None:
        left = values.pop("seconds_left")
        self.log("train", **values)
        print(line(values["step"], self.steps, values, left), flush=True)
        if self.on_step is not None:
            self.on_step(values)

    def _evaluate(self, state: TrainState, number: int) -> None:
        assert self.held_out is not None
        data, total = self.config.data, None
        for batch in self.held_out.iterate(0, self.held_out.per_epoch, data.threads, data.prefetch):
            more = self.evaluate_batch(state.trained, self.base, self.put(batch))
            total = more if total is None else add(total, more)
        values = divide(total)
        self.log("eval", step=number, **values)
        shown = [f"loss {values['loss']:.4f}"]
        if "rewards/accuracy" in values:
            shown += [f"margin {values['rewards/margin']:.4f}", f"acc {values['rewards/accuracy']:.3f}"]
        print(f"eval {number}  {'  '.join(shown)}", flush=True)


def _init_state(trained: Tree, optimizer: optax.GradientTransformation, whole: Any) -> TrainState:
    """Optimizer moments are placed like the parameters they belong to."""
    shapes = jax.eval_shape(optimizer.init, trained)
    where = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        shapes,
        trained,
        transform_non_params=lambda _: whole,
    )
    moments = jax.jit(optimizer.init, out_shardings=where)(trained)
    step = jax.device_put(jnp.zeros((), jnp.int32), whole)
    return TrainState(step, trained, moments)


class _Window:
    """Figures between two log lines. Device values are fetched once, when it is closed."""

    def __init__(self, owner: _Run):
        self.owner, self.total, self.start = owner, None, time.perf_counter()
        self.count = self.pairs = self.real = self.padded = 0
        self.waited = self.flops = 0.0

    def add(self, batch: HostBatch, metrics: Any, waited: float) -> None:
        self.total = metrics if self.total is None else add(self.total, metrics)
        real, padded = tokens_of(batch.group)
        config, bundle = self.owner.config, self.owner.bundle
        parts = trained_parts(config, bundle.config.anyres)
        self.flops += step_flops(
            bundle.config,
            [self.owner.records[i] for i in batch.records],
            lora=config.lora is not None,
            tower="vision_tower" in parts,
            reference=config.objective.needs_reference and config.reference == "live",
        )
        self.count += 1
        self.pairs += len(batch.records)
        self.real += real
        self.padded += padded
        self.waited += waited

    def close(self, step: int) -> dict[str, Any]:
        values = divide(self.total)
        seconds = time.perf_counter() - self.start
        peak = peak_flops()
        return {
            "step": step,
            **values,
            "learning_rate": float(self.owner.rate(step - 1)),  # type: ignore[arg-type]
            "pairs_per_second": self.pairs / seconds,
            "tokens_per_second": self.real / seconds,
            "padding": 1 - self.real / self.padded,
            "flops_per_second": self.flops / seconds,
            "mfu": None if peak is None else self.flops / seconds / peak,
            "data_wait": self.waited / seconds,
            "seconds_per_step": seconds / self.count,
            "seconds_left": (self.owner.steps - step) * seconds / self.count,
        }


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
