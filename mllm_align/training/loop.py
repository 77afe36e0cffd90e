"""The training loop: the only place with side effects."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from mllm_align import locks, processes
from mllm_align.align.checks import check_terms
from mllm_align.batch import PromptGroup
from mllm_align.config import Config, to_json
from mllm_align.data.batches import Batches, HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.mixture import Mixture
from mllm_align.data.table import counted
from mllm_align.errors import (
    SHOWN,
    Diverged,
    InputError,
    Interrupted,
    NotFinite,
    Preempted,
    first_few,
)
from mllm_align.models.bundle import Bundle, kept_as, load
from mllm_align.models.huggingface import Folder
from mllm_align.models.policy import SCORE, policy_alone
from mllm_align.prepare import check_batch, prepare
from mllm_align.processes import say
from mllm_align.sharding import assemble, batch_sharding, local_rows, make_mesh
from mllm_align.training import run_facts, run_folder, run_model, terminal
from mllm_align.training.callbacks import Callback, check_callbacks, gives_figures
from mllm_align.training.checkpoint import Checkpoints, choose, kept, set_aside
from mllm_align.training.features import StoredFeatures
from mllm_align.training.fitting import fitting_remat
from mllm_align.training.flops import step_flops
from mllm_align.training.metrics import Log, add, divide, line
from mllm_align.training.online.feed import Feed, open_maker
from mllm_align.training.online.maker import Maker
from mllm_align.training.optim import init_trained, schedule, trained_parts
from mllm_align.training.preemption import notice_to_end
from mllm_align.training.profiler import Profile
from mllm_align.training.programs import check_fits, train_program
from mllm_align.training.references import SKIP, further_logps, stored_logps
from mllm_align.training.step import TrainState
from mllm_align.training.terminal import Clock, waiting
from mllm_align.training.trackers import Trackers, check_trackers
from mllm_align.training.window import Window, culprits


def train(
    config: Config,
    model: str | Path | Bundle,
    data: Any,
    out: str | Path,
    eval_data: Any = None,
    callbacks: Sequence[Callback] = (),
    profile: int = 0,
    allow_schedule_change: bool = False,
    init_from: str | Path | None = None,
) -> Bundle:
    """Align a model to preferences; continue by itself where `out` holds a checkpoint of the same run.

    config: a Config: the objective, what is trained, rates, batches, steps. model: a Bundle, or what to
    start from as a path or name: a Hugging Face folder, an adapter's, a run's, a name in the local Hub
    cache; also the reference. data, eval_data: a data set in files, or rows; data may be a `Mixture` of
    data sets in files. out: the run folder (see training/run_folder.py). callbacks: told of steps,
    evaluations and checkpoints. profile: so many steps, after the first of this process, are traced to
    `out`/profile. allow_schedule_change: continue for another number of steps though rates of the schedule
    depend on it. init_from: a run of the same base; what its newest checkpoint trained is where this one
    starts. The reference stays the base (to have that run's policy as the reference too, give it as the
    model).

    Returns the trained model. Nobody else can train into `out` meanwhile, and a start that fails before a
    step leaves nothing there. Raises InputError, before anything is written, for a config, model or data
    that can't be used; Preempted after SIGTERM and Interrupted (a KeyboardInterrupt) after Ctrl-C, with
    all saved; NotFinite where config.nonfinite says to stop, and where no held-out loss is finite.
    """
    out = Path(out)
    place = run_folder.checkpoints_folder(out, config)
    own = [] if "://" in str(place) or place.is_relative_to(out.resolve()) else [place]
    with locks.alone(out, *own):
        return _train(
            config, model, data, out, place, eval_data, callbacks, profile, allow_schedule_change, init_from
        )


def _train(
    config: Config,
    model: str | Path | Bundle,
    data: Any,
    out: Path,
    place: epath.Path,
    eval_data: Any,
    callbacks: Sequence[Callback],
    profile: int,
    allow_schedule_change: bool,
    init_from: str | Path | None,
) -> Bundle:
    check_callbacks(callbacks, config.best)
    processes.on_first(lambda: run_folder.check_folder(out, config))
    for objective in (config.objective, config.objective.held_out):
        check_terms(objective)
    if not isinstance(model, Bundle):
        with waiting(f"opening {model}"):
            folder = run_model.base_again(model, out).kept(config.int8)
            model = load(folder, config.dtype, make_mesh(config.mesh))
    bundle = kept_as(model, config.int8)
    if SCORE in bundle.trained:
        problem = "is a reward model; name a model that answers (or go on from its run with --init-from)"
        raise InputError(f"{bundle.folder.named or bundle.folder.path} {problem}")
    _check(config, bundle)
    processes.on_first(lambda: check_trackers(config.trackers))
    bundle = replace(bundle, lora=config.lora, trained={})
    online = config.online
    reserved = 0 if online is None else online.reserved_tokens
    # generated responses stand beside those of the data: both must continue one prompt
    opening = online is not None and online.generates
    dropped: Counter[str] = Counter()
    wanted, unpaired = config.data_responses, config.objective.unpaired
    with waiting(f"reading {data}" if isinstance(data, str | Path | Mixture) else "reading rows"):
        how = reserved, opening, dropped, unpaired, config.objective.rejected_image
        encoder, records, left_out = prepare(bundle, data, config.data, wanted, *how)
    check_batch(config.batch_size, len(records))
    if eval_data is not None and config.objective.fields:
        name = type(config.objective).__name__
        raise InputError(f"{name} has no loss on held-out data; leave out --eval-data, and see --evaluate")
    held_out, held_left_out = [], []
    if eval_data is not None:
        own = config.objective.held_out
        wanted, how = own.of_record, {"unpaired": unpaired, "rejected_image": own.rejected_image}
        eval_config = replace(config.data, split=config.data.eval_split)
        _, held_out, held_left_out = prepare(bundle, eval_data, eval_config, wanted, **how)
    for what, these in (("training", left_out), ("held-out", held_left_out)):
        if these:
            warn(f"{counted(these)} {what} records left out")
    weights = data.named if isinstance(data, Mixture) else None
    if weights is not None and not config.data.shuffle:
        raise InputError(
            "data.shuffle is False, and data sets are drawn by weight; leave out --data.no-shuffle"
        )
    references = run_model.open_references(config)
    described = run_facts.metadata(config, bundle, data, eval_data, records, references)
    if init_from is not None:
        described["init_from"] = str(Path(init_from).resolve())
    processes.on_first(lambda: run_folder.check(out, config, described))
    maker = open_maker(config, bundle, encoder, records, out)
    step = processes.on_first(lambda: _newest(place))
    before = now = run_folder.length(config, len(records))
    about: dict[str, Any] = {}
    if step:
        about = processes.on_first(lambda: Checkpoints(place).about(step))
        run_folder.check_checkpoint(place / str(step), about, config, described)
        length = partial(run_folder.goes_on, out, about, config, len(records), step, allow_schedule_change)
        before, now = (run_folder.Length(*each) for each in processes.on_first(length))
    described |= run_folder.lengths(now)
    initial = None if step else run_model.initial(config, bundle, init_from)
    for each in callbacks:
        each.on_start(bundle)

    with run_folder.undone_unless_begun(out, place), _kept_told(place, now.steps), ExitStack() as stack:
        processes.on_first(lambda: run_folder.start(out, config, described, step))
        places = (out, Trackers(config, out)) if processes.first() else (None, None)
        log = stack.enter_context(closing(Log(*places)))
        checkpoints = stack.enter_context(closing(Checkpoints(place, config.keep, True, step)))
        parts = config, bundle, encoder, records, held_out, maker, out, log, checkpoints, callbacks
        trainer = _Run(*parts, now, weights, references)
        if config.remat == "auto":
            described["remat"] = found = trainer.fit(about.get("remat"), initial)
            processes.on_first(lambda: run_folder.note(out, remat=found))
        state = trainer.begin(step, initial)
        if now != before:
            processes.on_first(lambda: run_folder.lengthen(out, config, now))
            log("continued", step=step, steps_before=before.steps, **run_folder.lengths(now))
        counts = {"records": len(records), "skipped": [each.id for each in left_out]}
        counts |= {"left_out": dict(+dropped)}
        counts |= {"eval_records": len(held_out), "eval_skipped": [each.id for each in held_left_out]}
        log("start", step=step, **described, **counts, **trainer.metadata(state))
        if step < trainer.steps:
            shown = len(records), len(left_out), len(held_out)
            ladder = trainer.batches.ladder
            say(terminal.start(config, bundle, out, step, trainer.steps, shown, ladder, state.trained))
        else:
            say(terminal.finished(out, step))
        state = trainer.loop(state, step, described, profile)
        log("done", step=trainer.steps)
    return replace(bundle, trained=policy_alone(state.trained))


def _newest(place: Any) -> int:
    """Step of the newest whole checkpoint, 0 if there is none. Newer ones that are damaged make way."""
    newest, damaged = choose(place)
    for step, problem in damaged:
        warn(
            f"checkpoint {place / str(step)} is damaged ({problem}); it is kept as {set_aside(place, step)}"
        )
    return newest or 0


@contextmanager
def _kept_told(place: epath.Path, steps: int) -> Iterator[None]:
    """A second Ctrl-C says what there is to go on from."""
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted):
            raise
        saved = kept(place)
        what = f"step {saved[0]} of {steps} is saved" if saved else "no step is saved"
        raise Interrupted(f"interrupted; {what}") from error


def _check(config: Config, bundle: Bundle) -> None:
    """What only config and model together can tell."""
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


class _Run:
    """Everything a run holds while it goes; made once, before the first step."""

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        encoder: Encoder,
        records: list[Encoded],
        held_out: list[Encoded],
        maker: Maker[Any],
        out: Path,
        log: Log,
        checkpoints: Checkpoints,
        callbacks: Sequence[Callback],
        length: run_folder.Length,
        weights: Mapping[str, float] | None = None,
        references: Sequence[Folder] = (),
    ):
        self.config, self.bundle, self.records, self.log = config, bundle, records, log
        self.maker, self.out, self.checkpoints, self.callbacks = maker, out, checkpoints, callbacks
        self.being_saved: list[int] = []  # steps
        reference = self._reference(encoder, held_out, out)
        sets = {"references": records} | ({"references_eval": held_out} if held_out else {})
        others = further_logps(references, bundle, encoder, sets, config, out)
        features = self._features(encoder, held_out, out)
        self.rows = config.rows_per_micro
        self.local_rows = local_rows(bundle.mesh, self.rows)
        shuffle = config.data.shuffle
        given = reference[0], others["references"], features[0]
        self.batches = self._batches(encoder, records, *given, shuffle, weights)
        self.sources = [each.record.source for each in records] if weights else None
        self.held_out = None
        if held_out:
            given = reference[1], others["references_eval"], features[1]
            self.held_out = self._batches(encoder, held_out, *given)
        self.held_records = held_out
        self.steps, warmup = length.steps, length.warmup
        mixed = tuple(weights or ())
        sizes = {"steps": self.steps, "warmup": warmup, "sources": mixed}
        self._program = partial(train_program, model=bundle.config, mesh=bundle.mesh, **sizes)
        self.program = self._program(config)
        self.base = {name: bundle.params[name] for name in self.program.base}
        self.rate = schedule(config.optim, config.optim.learning_rate, self.steps, warmup)
        self.trains_tower = "vision_tower" in trained_parts(config, bundle.config)

    def fit(self, saved: Any, initial: Any) -> dict[str, Any]:
        """Take the rematerialisation that fits; see `fitting_remat`. initial: as in `begin`."""
        c, shape = self.config, self.batches.ladder[-1]
        held = self.base, initial
        found = fitting_remat(c, self.bundle.config, self.bundle.mesh, shape, self._program, held, saved)
        self.program = self._program(replace(c, remat=found.policy))  # type: ignore[arg-type]
        say(str(found))
        return found.to_json()

    def begin(self, step: int, initial: Any = None) -> TrainState:
        """The state after `step` steps: of the checkpoint, or where the run starts. initial: what is
        trained there, if it is not as the base has it."""
        program = self.program
        if step:
            if self.checkpoints.about(step).get("records") != self._records(step):
                raise InputError(
                    f"{self.out}: the batches of the first {step} steps were of other records; continue it "
                    "with the versions that it was started with (see run.json), or give --out a new folder"
                )
            return self.checkpoints.restore(program.state, step)
        trained = init_trained(self.bundle, self.config) if initial is None else initial
        places = jax.tree.map(lambda x: x.sharding, program.state)
        moments = jax.jit(program.optimizer.init, out_shardings=places.optimizer)(trained)
        zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=places.step)()
        own = jax.jit(self.config.objective.init_state, out_shardings=places.objective)()
        return TrainState(zero, trained, moments, own)

    def _reference(self, encoder: Encoder, held_out: list[Encoded], out: Path):
        """Stored reference log-probs of the training and the held-out data, where the config wants them."""
        c = self.config
        if not c.stored_reference:
            return None, None

        def view(name: str, records: list[Encoded]):
            return stored_logps(out / name, self.bundle, encoder, records, c)

        def stored(name: str, records: list[Encoded]):
            """Of each view."""
            views = [view(f"{name}.npz", [each.alone for each in records])]
            second = [each.second for each in records if each.second is not None]
            return [*views, view(f"{name}_second.npz", second)] if second else views

        of_held_out = stored("reference_eval", held_out) if held_out else None
        return stored("reference", self.records), of_held_out

    def _features(self, encoder: Encoder, held_out: list[Encoded], out: Path):
        """Stored features of the training and the held-out data, where the config wants them."""
        c = self.config
        if c.features == "live":
            return None, None

        def stored(name: str, records: list[Encoded]) -> StoredFeatures:
            found = StoredFeatures(out / name, self.bundle, encoder, records, c.seed)
            return found.load_or_make(c.rows_per_micro, c.data.threads)

        of_held_out = stored("features_eval", held_out) if held_out else None
        return stored("features", self.records), of_held_out

    def _batches(
        self,
        encoder: Encoder,
        records,
        reference,
        references,
        features,
        shuffle: bool = False,
        weights: Any = None,
    ) -> Batches:
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
            references=references,
            local_rows=self.local_rows,
            weights=weights,
            features=features,
            borrowed=c.objective.borrowed,
            redraw=c.redraws_images,
            changed="changes" in c.objective.needs,
        )

    def put(self, batch: HostBatch) -> PromptGroup:
        return assemble(batch.group, batch_sharding(self.bundle.mesh), self.rows)

    def _batch(self, number: int) -> tuple[HostBatch, PromptGroup]:
        batch = self.batches(number)
        return batch, self.put(batch)

    def metadata(self, state: TrainState) -> dict[str, Any]:
        leaves = jax.tree.leaves(state.trained)
        return {
            "trained_parameters": sum(x.size for x in leaves),
            "shapes": [[s.prefix, s.response, s.tiles, *sum(s.others, ())] for s in self.batches.ladder],
        }

    def loop(self, state: TrainState, begun: int, about: dict[str, Any], profile: int = 0) -> TrainState:
        """Run the steps that are left; log, evaluate and save as the config says.

        about: what every checkpoint says of its run.
        """
        config, best = self.config, self.checkpoints.best()[1]
        rounds = config.rounds
        span = range(rounds.first(begun), rounds.begun(self.steps))
        ahead = self.batches.iterate(span, config.data.threads, config.data.prefetch)
        saved = self.checkpoints.begun(begun) if begun else None
        self.maker.start(state.trained, begun, self._batch)
        feed = Feed(ahead, self.put, self.maker, config, self.steps, begun, saved)
        clock, compiled = Clock(), set()
        # where it looks for NaN, JAX runs a step again, operation by operation, from the host
        guard = "allow" if jax.config.values["jax_debug_nans"] else "disallow"
        profiled = closing(Profile(self.out / "profile", profile))
        if not begun:
            with clock.spent("evaluating"):
                self._ask(state, 0, self._asked(0))
        window = self._window()
        with notice_to_end() as noticed, profiled as trace, closing(feed):
            for number in range(begun + 1, self.steps + 1):
                began = time.perf_counter()
                batch = feed(state.trained, number - 1)
                first = batch.shape not in compiled
                if first:
                    compiled.add(batch.shape)
                    say(f"compiling for {terminal.shape(batch.shape)}")
                made = time.perf_counter()
                with jax.transfer_guard(guard):
                    state, metrics, health = self.program.step(state, self.base, batch.group)
                if self.maker.on_policy or first:  # the next responses wait for it anyway
                    jax.block_until_ready(state)
                untimed = time.perf_counter() - began if first else None
                if untimed is not None:
                    clock.add("compiling", untimed)
                window.add(batch, metrics, health, feed.waited, untimed)
                if self.maker.on_policy:
                    window.updated(None if first else time.perf_counter() - made)
                trace.step(state)
                if not self.checkpoints.saving:
                    self._tell_saved()
                last, stop = number == self.steps, noticed(number)
                if stop:
                    locks.ending()  # of several processes it is known only now
                if number % config.log_every == 0 or last or stop or number == begun + 1:
                    rate = float(self.rate(number - 1))  # type: ignore[arg-type]
                    self._report(window.close(number, self.steps, rate))
                    if batch.example is not None:
                        self.log("example", step=number, **batch.example)
                    window = self._window()
                loss = rank = None
                asked = self._asked(number)
                with clock.spent("evaluating"):
                    if self.held_out is not None and (last or _due(config.eval_every, number)):
                        loss = self._evaluate(state, number)
                    if asked:
                        rank = self._ask(state, number, asked)
                if config.best == "loss":
                    rank = loss
                better = rank is not None and rank < best
                if number % config.save_every == 0 or last or stop or better:
                    window.check()  # no checkpoint goes past a step that stops the run
                    saving = time.perf_counter()
                    with clock.spent("saving"):
                        of_it = self._about(number, about)
                        self.checkpoints.save(state, number, of_it, rank, feed.saved())
                    window.leave_out(time.perf_counter() - saving)
                    self.log("save", step=number)
                    self._tell_saved()  # of the one before, which had to be whole first
                    self.being_saved.append(number)
                if loss is not None or asked:
                    window.check()
                    best, window = best if rank is None else min(rank, best), self._window()
                if stop and not last:
                    self.checkpoints.wait()
                    self._tell_saved()
                    how, kind = (
                        ("interrupted", Interrupted) if noticed.interrupted else ("preempted", Preempted)
                    )
                    self.log(how, step=number)
                    raise kind(f"{how}; step {number} of {self.steps} is saved")
        if begun < self.steps:
            with clock.spent("saving"):
                self.checkpoints.wait()
            self._tell_saved()
            found = self._best()
            say(terminal.done(self.out, clock, self.steps - begun, self.steps, found))
        return state

    def _tell_saved(self) -> None:
        """Tell the callbacks of checkpoints that are whole by now."""
        places = [(step, self.checkpoints.folder / str(step)) for step in self.being_saved]
        self.being_saved.clear()
        for step, place in places:
            if self.callbacks and place.exists():  # a save that failed is told by the next
                for each in self.callbacks:
                    each.on_save(step, place)

    def _window(self) -> Window:
        return Window(self.config, self._flops, self._step_nonfinite, self.sources)

    def _flops(self, records: Sequence[Encoded]) -> float:
        c = self.config
        return step_flops(
            self.bundle.config,
            records,
            lora=c.lora is not None,
            tower=self.trains_tower,
            reference=c.live_reference,
            values="values" in c.objective.needs,
            logits="score" not in c.objective.needs,
            features=c.features == "stored",
        )

    def _about(self, step: int, about: dict[str, Any]) -> dict[str, Any]:
        """The state of randomness is the config's seed and the step; so is the position in the data."""
        mesh = {name: int(size) for name, size in self.bundle.mesh.shape.items()}
        position = {"step": step, "records": self._records(step)}
        return {**position, "config": to_json(self.config), "mesh": mesh, **about}

    def _records(self, step: int) -> str:
        """Names the records that so many steps were taken on, with those of the round they end in."""
        return self.batches.digest(self.config.rounds.begun(step))

    def _report(self, values: dict[str, Any]) -> None:
        left = values.pop("seconds_left")
        self.log("train", **values)
        say(line(values["step"], self.steps, values, left))
        for each in self.callbacks:
            each.on_step(values)
        limits = {} if self.config.online is None else self.config.online.limits
        for name, (field, limit) in limits.items():
            if (value := values.get(name)) is not None and value > limit:
                problem = f"step {values['step']}: {name} is {value:.4g}, above online.{field} ({limit:g})"
                remedy = "see the examples in log.jsonl; with a higher limit it goes on from what is saved"
                raise Diverged(f"{problem}; {remedy}")

    def _evaluate(self, state: TrainState, number: int) -> float:
        """The held-out loss, without the batches that config.nonfinite lets go. Raises NotFinite where it
        lets none go, or none is left."""
        assert self.held_out is not None
        data, total, seen = self.config.data, None, []
        objective = self.config.objective
        own = state.objective if objective.held_out is objective else objective.held_out.init_state()
        for batch in self.held_out.iterate(range(self.held_out.per_epoch), data.threads, data.prefetch):
            more, health = self.program.evaluate(state.trained, self.base, self.put(batch), own)
            total = more if total is None else add(total, more)
            seen.append((batch.records, health))
        total, seen = jax.device_get((total, seen))
        broken = [found for batch, health in seen if not health.finite for found in culprits(batch, health)]
        values = divide(total)
        if broken:
            what = f"evaluation at step {number}: figures are"
            self.nonfinite(number, what, [self.held_records[i].record.id for i in broken], "evaluation")
        if values["loss"] is None:
            raise NotFinite(f"evaluation at step {number}: no held-out batch has finite figures")
        self.log("eval", step=number, **values)
        for each in self.callbacks:
            each.on_eval(number, values)
        shown = [f"loss {values['loss']:.4f}"]
        if values.get("rewards/accuracy") is not None:
            shown += [f"margin {values['rewards/margin']:.4f}", f"acc {values['rewards/accuracy']:.3f}"]
        say(f"eval {number}  {'  '.join(shown)}")
        return values["loss"]

    def _asked(self, number: int) -> list[Callback]:
        """The callbacks that are asked for figures after this step."""
        ends = number in (0, self.steps)
        asked = [each for each in self.callbacks if gives_figures(each)]
        return [each for each in asked if ends or _due(each.policy_every, number)]

    def _ask(self, state: TrainState, number: int, asked: Sequence[Callback]) -> float | None:
        """Log their figures of the policy. Returns config.best's of them, its sign turned where higher is
        better."""
        policy, best = replace(self.bundle, trained=policy_alone(state.trained)), self.config.best
        figures: dict[str, float] = {}
        rank = None
        for each in asked:
            try:
                own = {name: float(value) for name, value in each.on_policy(number, policy).items()}
            except NotFinite as error:
                if self.config.nonfinite == "stop":
                    raise
                warn(f"benchmarks at step {number}: {error}; they are left out")
                continue
            figures |= own
            if best in own:
                rank = -own[best] if each.higher_is_better(best) else own[best]
        if figures:
            self.log("benchmark", step=number, **figures)
            heads = [name for name in figures if name.count("/") < 2] or figures
            shown = (f"{name} {figures[name]:.4g}" for name in heads)
            say(f"benchmark {number}  {'  '.join(shown)}")
        if not number and best != "loss" and rank is None:
            raise InputError(f"best is {best}; it must be one of {', '.join(figures) or 'no figures'}")
        return rank

    def _best(self) -> tuple[int, str] | None:
        """Step of the best checkpoint, and what it is best by."""
        step, rank = self.checkpoints.best()
        if step is None:
            return None
        name = self.config.best
        if name == "loss":
            return step, f"the least held-out loss, {rank:.4f},"
        return step, f"the best {name}, {abs(rank):.4g},"

    def _step_nonfinite(self, step: int, indices: Sequence[int]) -> None:
        ids = [self.records[i].record.id for i in indices]
        self.nonfinite(step, f"step {step}: loss or gradient is", ids, "train")

    def nonfinite(self, step: int, what: str, ids: list[str], event: str) -> None:
        """Write down the records; stop if the config says so. event: of which kind, train or evaluation."""
        policy = self.config.nonfinite
        self.log("nonfinite", step=step, records=ids, policy=policy, during=event)
        count = f" ({len(ids)})" * (len(ids) > SHOWN)
        problem = f"{what} not finite, with records {first_few(ids)}{count}"
        if policy == "stop":
            raise NotFinite(f"{problem}; {SKIP}")
        warn(f"{problem}; the {'step' if event == 'train' else 'batch'} is left out")


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def warn(text: str) -> None:
    if processes.first():
        print(text, file=sys.stderr, flush=True)
