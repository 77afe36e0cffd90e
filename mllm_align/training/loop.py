"""The training loop: the only place with side effects."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from mllm_align.data.encode import Encoded
from mllm_align.errors import InputError, Interrupted, NotFinite, Preempted
from mllm_align.models.bundle import Bundle
from mllm_align.models.policy import policy_alone
from mllm_align.processes import say, warn
from mllm_align.sharding import assemble, batch_sharding
from mllm_align.training import run_facts, run_folder, run_model, terminal
from mllm_align.training.callbacks import Callback, check_callbacks
from mllm_align.training.checkpoint import Checkpoints, choose, kept, set_aside
from mllm_align.training.fitting import fitting_remat
from mllm_align.training.flops import step_flops
from mllm_align.training.inputs import Inputs, open_batches, open_bundle, open_data
from mllm_align.training.metrics import Log, add, divide
from mllm_align.training.online.feed import Feed, open_maker
from mllm_align.training.online.maker import Maker, TrainBatch
from mllm_align.training.optim import init_trained, schedule, trained_parts
from mllm_align.training.preemption import Notice, notice_to_end
from mllm_align.training.profiler import Profile
from mllm_align.training.programs import train_program
from mllm_align.training.reporter import Reporter, due
from mllm_align.training.step import TrainState
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
    bundle = open_bundle(config, model, out)
    processes.on_first(lambda: check_trackers(config.trackers))
    inputs = open_data(config, bundle, data, eval_data)
    records = inputs.records
    references = run_model.open_references(config)
    described = run_facts.metadata(config, bundle, data, eval_data, records, references)
    if init_from is not None:
        described["init_from"] = str(Path(init_from).resolve())
    processes.on_first(lambda: run_folder.check(out, config, described))
    maker = open_maker(config, bundle, inputs.encoder, records, out)
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
        reporter = Reporter(config, log, checkpoints, callbacks, now.steps)
        batches = open_batches(config, bundle, inputs, references, out)
        run = _Run(config, bundle, inputs, batches, maker, out, checkpoints, reporter, now)
        if config.remat == "auto":
            described["remat"] = found = run.fit(about.get("remat"), initial)
            processes.on_first(lambda: run_folder.note(out, remat=found))
        state = run.begin(step, initial)
        if now != before:
            processes.on_first(lambda: run_folder.lengthen(out, config, now))
            log("continued", step=step, steps_before=before.steps, **run_folder.lengths(now))
        log("start", step=step, **described, **inputs.counts(), **run.metadata(state))
        if step < now.steps:
            shown = len(records), len(inputs.left_out), len(inputs.held_out)
            ladder = run.batches.ladder
            say(terminal.start(config, bundle, out, step, now.steps, shown, ladder, state.trained))
        else:
            say(terminal.finished(out, step))
        state = run.loop(state, step, described, profile)
        log("done", step=now.steps)
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


class _Run:
    """Everything a run holds while it goes; made once, before the first step."""

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        inputs: Inputs,
        batches: tuple[Batches, Batches | None],
        maker: Maker[Any],
        out: Path,
        checkpoints: Checkpoints,
        reporter: Reporter,
        length: run_folder.Length,
    ):
        self.config, self.bundle, self.maker, self.out = config, bundle, maker, out
        self.checkpoints, self.tell = checkpoints, reporter
        self.records, self.held_records = inputs.records, inputs.held_out
        self.batches, self.held_out = batches
        self.sources = [each.record.source for each in self.records] if inputs.weights else None
        self.steps, warmup = length.steps, length.warmup
        sizes = {"steps": self.steps, "warmup": warmup, "sources": tuple(inputs.weights or ())}
        self._program = partial(train_program, model=bundle.config, mesh=bundle.mesh, **sizes)
        self.program = self._program(config)
        self.base = {name: bundle.params[name] for name in self.program.base}
        self.rate = schedule(config.optim, config.optim.learning_rate, self.steps, warmup)
        self.trains_tower = "vision_tower" in trained_parts(config, bundle.config)
        self.clock = terminal.Clock()
        self._compiled: set[Any] = set()  # shapes

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

    def put(self, batch: HostBatch) -> PromptGroup:
        return assemble(batch.group, batch_sharding(self.bundle.mesh), self.config.rows_per_micro)

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
        config, tell, clock, best = self.config, self.tell, self.clock, self.checkpoints.best()[1]
        feed = self._feed(state, begun)
        if not begun:
            with clock.spent("evaluating"):
                tell.ask(0, self._policy(state))
        window = self._window()
        profiled = closing(Profile(self.out / "profile", profile))
        with notice_to_end() as noticed, profiled as trace, closing(feed):
            for number in range(begun + 1, self.steps + 1):
                state, batch = self._take(state, number, feed, window)
                trace.step(state)
                if not self.checkpoints.saving:
                    tell.saved()
                last, stop = number == self.steps, noticed(number)
                if stop:
                    locks.ending()  # of several processes it is known only now
                if number % config.log_every == 0 or last or stop or number == begun + 1:
                    rate = float(self.rate(number - 1))  # type: ignore[arg-type]
                    tell.step(window.close(number, self.steps, rate))
                    if batch.example is not None:
                        tell.log("example", step=number, **batch.example)
                    window = self._window()
                with clock.spent("evaluating"):
                    judged, rank = self._judge(state, number)
                better = rank is not None and rank < best
                if number % config.save_every == 0 or last or stop or better:
                    window.check()  # no checkpoint goes past a step that stops the run
                    saving = time.perf_counter()
                    with clock.spent("saving"):
                        of_it = self._about(number, about)
                        self.checkpoints.save(state, number, of_it, rank, feed.saved())
                    window.leave_out(time.perf_counter() - saving)
                    tell.saving(number)
                if judged:
                    window.check()
                    best, window = best if rank is None else min(rank, best), self._window()
                if stop and not last:
                    self._end(noticed, number)
        if begun < self.steps:
            with clock.spent("saving"):
                self.checkpoints.wait()
            tell.saved()
            say(terminal.done(self.out, clock, self.steps - begun, self.steps, tell.best()))
        return state

    def _feed(self, state: TrainState, begun: int) -> Feed[Any]:
        """The batches of the steps that are left."""
        data, rounds = self.config.data, self.config.rounds
        span = range(rounds.first(begun), rounds.begun(self.steps))
        ahead = self.batches.iterate(span, data.threads, data.prefetch)
        saved = self.checkpoints.begun(begun) if begun else None
        self.maker.start(state.trained, begun, self._batch)
        return Feed(ahead, self.put, self.maker, self.config, self.steps, begun, saved)

    def _take(
        self, state: TrainState, number: int, feed: Feed[Any], window: Window
    ) -> tuple[TrainState, TrainBatch]:
        """Take a step; the window adds up its figures."""
        began = time.perf_counter()
        batch = feed(state.trained, number - 1)
        first = batch.shape not in self._compiled
        if first:
            self._compiled.add(batch.shape)
            say(f"compiling for {terminal.shape(batch.shape)}")
        made = time.perf_counter()
        # where it looks for NaN, JAX runs a step again, operation by operation, from the host
        guard = "allow" if jax.config.values["jax_debug_nans"] else "disallow"
        with jax.transfer_guard(guard):
            state, metrics, health = self.program.step(state, self.base, batch.group)
        if self.maker.on_policy or first:  # the next responses wait for it anyway
            jax.block_until_ready(state)
        untimed = time.perf_counter() - began if first else None
        if untimed is not None:
            self.clock.add("compiling", untimed)
        window.add(batch, metrics, health, feed.waited, untimed)
        if self.maker.on_policy:
            window.updated(None if first else time.perf_counter() - made)
        return state, batch

    def _judge(self, state: TrainState, number: int) -> tuple[bool, float | None]:
        """Evaluate what is due after a step: whether anything was, and the rank among checkpoints."""
        loss = rank = None
        asked = bool(self.tell.asked(number))
        if self.held_out is not None and (number == self.steps or due(self.config.eval_every, number)):
            loss = self._evaluate(state, number)
        if asked:
            rank = self.tell.ask(number, self._policy(state))
        return loss is not None or asked, loss if self.config.best == "loss" else rank

    def _end(self, noticed: Notice, number: int) -> None:
        """End before the last step; raises Interrupted or Preempted."""
        self.checkpoints.wait()
        self.tell.saved()
        how, kind = ("interrupted", Interrupted) if noticed.interrupted else ("preempted", Preempted)
        self.tell.log(how, step=number)
        raise kind(f"{how}; step {number} of {self.steps} is saved")

    def _policy(self, state: TrainState) -> Bundle:
        return replace(self.bundle, trained=policy_alone(state.trained))

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
            ids = [self.held_records[i].record.id for i in broken]
            self.tell.nonfinite(number, f"evaluation at step {number}: figures are", ids, "evaluation")
        if values["loss"] is None:
            raise NotFinite(f"evaluation at step {number}: no held-out batch has finite figures")
        self.tell.evaluated(number, values)
        return values["loss"]

    def _step_nonfinite(self, step: int, indices: Sequence[int]) -> None:
        ids = [self.records[i].record.id for i in indices]
        self.tell.nonfinite(step, f"step {step}: loss or gradient is", ids, "train")
