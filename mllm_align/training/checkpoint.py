"""Checkpoints of a run, through orbax: `checkpoints/STEP/{trained,optimizer,run}`, `objective`
where the objective has a state, and `begun`, `begun_arrays` where a batch was begun ahead.

A save goes on in the background, under a name of its own, and appears when it is whole, digests of its
files with it. A checkpoint whose files have changed since is never restored: the one before it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import step as names

from mllm_align import processes
from mllm_align.errors import InputError, one_line
from mllm_align.files import parse_json
from mllm_align.training.online.maker import MakerState
from mllm_align.training.step import TrainState

Which = int | Literal["last", "best"]

DIGESTS, ABOUT, BEGUN = "digests.json", "run/metadata", "begun/metadata"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", DIGESTS)  # written after the digests
STEP = re.compile(r"[1-9][0-9]{0,9}")  # what else stands beside checkpoints is not ours


class Checkpoints:
    """The checkpoints of one run folder.

    keep: how many of the last ones stay; the one of the least rank stays besides: of held-out loss, or of
    another figure, its sign turned where higher is better. Only a run that trains may write: then what an
    interrupted save left is cleared away. newest: the step that the run goes on from, which `choose` found
    whole; no later one counts.
    """

    def __init__(self, folder: Any, keep: int = 2, write: bool = False, newest: int = 0):
        self.folder, self._saving = epath.Path(folder), 0
        self._ranks: dict[int, float] = {}
        self._arrays, self._manager = ocp.StandardCheckpointHandler(), None
        if not write:
            return
        with self._written():
            steps = processes.on_first(lambda: [step for step in kept(self.folder) if step <= newest][::-1])
            self._ranks.update(processes.on_first(lambda: list(_ranks(self.folder, steps)[0].items())))
            options = ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                step_name_format=_Known(steps),
                lightweight_initialize=True,
                preservation_policy=_LastAndBest(keep, self._ranks),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
            trees, texts = ("trained", "optimizer", "objective", "begun_arrays"), ("run", "begun")
            handlers: Any = {name: ocp.StandardCheckpointHandler() for name in trees}
            handlers |= {name: ocp.JsonCheckpointHandler() for name in texts}
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def best(self) -> tuple[int | None, float]:
        """Step and rank of the checkpoint of the least rank; None and infinity without one."""
        step = _best(self._ranks)
        return step, self._ranks.get(step, float("inf"))  # type: ignore[arg-type]

    def save(
        self,
        state: TrainState,
        step: int,
        about: dict[str, Any],
        rank: float | None = None,
        begun: MakerState | None = None,
    ) -> None:
        """Begin to save. Raises InputError where the one before was not written.

        about: JSON values that say what this is. rank: by which the best one is kept.
        begun: what the maker of responses needs to go on.
        """
        arrays = {} if begun is None else begun.arrays
        about = {**about, "rank": rank, "begun": begun is not None, "begun_arrays": bool(arrays)}
        items: dict[str, Any] = {
            "trained": ocp.args.StandardSave(state.trained),  # type: ignore[call-arg]
            "optimizer": ocp.args.StandardSave({"step": state.step, "state": state.optimizer}),  # type: ignore[call-arg]
            "run": ocp.args.JsonSave(about),  # type: ignore[call-arg]
        }
        if begun is not None:
            items["begun"] = ocp.args.JsonSave(begun.metadata)  # type: ignore[call-arg]
        if arrays:
            items["begun_arrays"] = ocp.args.StandardSave(arrays)  # type: ignore[call-arg]
        if jax.tree.leaves(state.objective):
            items["objective"] = ocp.args.StandardSave({"state": state.objective})  # type: ignore[call-arg]
        args = ocp.args.Composite(**items)
        assert self._manager is not None, "opened to read"
        with self._written():
            self._manager.wait_until_finished()
            self._saving = step
            if rank is not None:
                self._ranks[step] = rank
            self._manager.save(step, args=args)

    def about(self, step: int) -> dict[str, Any]:
        """What `save` was told of a step."""
        with self._explained(step):
            return _about(self.folder / str(step))

    def begun(self, step: int) -> MakerState | None:
        """What `save` kept of the maker of responses, if anything."""
        about = self.about(step)
        if not about.get("begun"):
            return None
        with self._explained(step):
            metadata = parse_json((self.folder / str(step) / BEGUN).read_bytes())
        return MakerState(
            metadata, self._on_host(step, "begun_arrays") if about.get("begun_arrays") else {}
        )

    def restore(self, state: TrainState, step: int) -> TrainState:
        """The state of a step, placed like `state`, whose leaves may be shapes with shardings."""
        optimizer = self._array(step, "optimizer", {"step": state.step, "state": state.optimizer})
        trained = self._array(step, "trained", state.trained)
        own = state.objective if not jax.tree.leaves(state.objective) else self._own(step, state.objective)
        return TrainState(optimizer["step"], trained, optimizer["state"], own)

    def _own(self, step: int, like: Any) -> Any:
        """The objective's state."""
        return self._array(step, "objective", {"state": like})["state"]

    def restore_trained(self, step: int, like: Any = None) -> Any:
        """What a step had trained, placed like `like`; without it, numpy arrays on the host."""
        return self._on_host(step, "trained") if like is None else self._array(step, "trained", like)

    def _on_host(self, step: int, name: str) -> Any:
        """The arrays of an item, as numpy."""
        with self._explained(step):
            place = self.folder / str(step) / name
            found: Any = self._arrays.metadata(place)
            like = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), found.tree)
            return self._arrays.restore(place, args=ocp.args.StandardRestore(like))  # type: ignore[call-arg]

    def _array(self, step: int, name: str, like: Any) -> Any:
        with self._explained(step):
            args: Any = ocp.args.StandardRestore(_shapes(like))  # type: ignore[call-arg]
            return self._arrays.restore(self.folder / str(step) / name, args=args)

    @property
    def saving(self) -> bool:
        """Whether a save is still being written."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Until what is being saved is there."""
        if self._manager is not None:
            with self._written():
                self._manager.wait_until_finished()

    def close(self) -> None:
        self._arrays.close()
        if self._manager is not None:
            with self._written():
                self._manager.close()

    def _seal(self) -> None:
        """Called when all files of a save are there, but it does not count yet: it has another name, or on
        gs:// no mark of success."""
        if processes.first():
            final = self.folder / str(self._saving)
            place = next(self.folder.glob(f"{self._saving}.*tmp*"), final)
            (place / DIGESTS).write_text(json.dumps(_digests(place)))

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds, some from threads
            raise InputError(
                f"can't write a checkpoint to {self.folder}: {one_line(error, 300)}; make room or mend the "
                "path, then run the same command: it goes on from the last whole one"
            ) from error

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise InputError(
                f"checkpoint {self.folder / str(step)} can't be read ({one_line(error, 300)}); "
                "remove it to go back to the one before"
            ) from error


@dataclass
class _LastAndBest(policies.PreservationPolicy):
    """Keeps the last `keep` checkpoints, and the one of the least rank."""

    keep: int
    ranks: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [each.step for each in checkpoints]
        return [step in steps[-self.keep :] or step == _best(self.ranks) for step in steps]


def _best(ranks: Mapping[int, float]) -> int | None:
    return min(ranks, key=lambda step: (ranks[step], step)) if ranks else None


class _Known(names.NameFormat):
    """Shows the manager these steps and no others: a stray folder shall not count as one, or be read."""

    def __init__(self, steps: Iterable[int]):
        self.steps = tuple(steps)

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[names.Metadata]:
        return (self.find_step(base_path, step) for step in self.steps)

    def find_step(self, base_path: Any, step: int) -> names.Metadata:
        return names.Metadata(step=step, path=epath.Path(base_path) / str(step))


# ---- which one -----------------------------------------------------------------------------------------


def choose(folder: Any, wanted: Which = "last") -> tuple[int | None, list[tuple[int, str]]]:
    """The checkpoint that every verb takes, and (step, what is wrong) of damaged ones met on the way.

    "last": the newest whole one; "best": the whole one that evaluated best; or a step. Files are
    digested until a whole one is found: that one, as a rule. Call it on one process for all.
    """
    folder = epath.Path(folder)
    steps, damaged = kept(folder), []
    if wanted == "best":
        ranks, damaged = _ranks(folder, steps)
        steps = sorted(ranks, key=lambda step: (ranks[step], step))
    elif wanted != "last":
        steps = [step for step in steps if step == wanted]
    for step in steps:
        problem = _problem(folder / str(step))
        if problem is None:
            return step, damaged
        damaged.append((step, problem))
    return None, damaged


def kept(folder: Any) -> list[int]:
    """Steps by whose names something stands there, whole or not; newest first. Raises InputError for a
    folder that can't be read."""
    folder = epath.Path(folder)
    try:
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder} can't be read ({one_line(error)}); check its permissions") from error
    return sorted((int(name) for name in found if STEP.fullmatch(name)), reverse=True)


def _ranks(folder: epath.Path, steps: Sequence[int]) -> tuple[dict[int, float], list[tuple[int, str]]]:
    """Rank of each step that was evaluated, and (step, what is wrong) of those that can't tell."""
    ranks, damaged = {}, []
    for step in steps:
        try:
            about = _about(folder / str(step))
            rank = about.get("rank", about.get("held_out_loss"))  # the latter: of earlier versions
        except (OSError, ValueError) as error:
            damaged.append((step, one_line(error)))
            continue
        if isinstance(rank, float) and math.isfinite(rank):
            ranks[step] = rank
    return ranks, damaged


def set_aside(folder: Any, step: int) -> str:
    """Give a damaged checkpoint a name under which no run goes on from it; returns that name."""
    folder = epath.Path(folder)
    names = (f"damaged-{step}", *(f"damaged-{step}-{n}" for n in range(2, 1000)))
    place = next(folder / name for name in names if not (folder / name).exists())
    try:
        (folder / str(step)).rename(place)
    except OSError as error:
        raise InputError(
            f"can't rename the damaged checkpoint {folder / str(step)} ({one_line(error)}); remove it"
        ) from error
    return str(place)


def _problem(place: epath.Path) -> str | None:
    """What is wrong with a checkpoint, if its files are not as they were written."""
    name = DIGESTS
    try:
        for name, digest in _sealed(place).items():
            if _digest(place / name) != digest:
                return f"{one_line(name)} is altered"
        step = _about(place).get("step")
        return None if str(step) == place.name else f"it is that of step {one_line(step)}"
    except FileNotFoundError:
        return f"{one_line(name)} is missing"
    except (OSError, ValueError) as error:
        return one_line(error, 200)


def _sealed(place: epath.Path) -> dict[str, str]:
    """Path under `place` -> digest, as they were when all was written. Raises ValueError for a checkpoint
    that can't tell."""
    if not place.is_dir():
        raise ValueError("it is no folder")
    try:
        digests = parse_json((place / DIGESTS).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{DIGESTS} can't be read ({one_line(error)})") from error
    good = isinstance(digests, dict) and all(isinstance(digest, str) for digest in digests.values())
    if not good or not all(any(name.startswith(part) for name in digests) for part in ("trained/", ABOUT)):
        raise ValueError(f"{DIGESTS} holds no digests of a checkpoint")
    return digests


def _about(place: epath.Path) -> dict[str, Any]:
    """What `save` was told. Raises OSError and ValueError where that can't be read, or is altered."""
    data = (place / ABOUT).read_bytes()
    if hashlib.sha256(data).hexdigest() != _sealed(place).get(ABOUT):
        raise ValueError(f"{ABOUT} is altered")
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"{ABOUT} holds {type(value).__name__} where an object belongs")
    return value


def _digests(place: epath.Path) -> dict[str, str]:
    """Path under `place` -> SHA-256 of the file."""
    out, folders = {}, [place]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            elif path.name not in LATER:
                out[str(path.relative_to(place))] = _digest(path)
    return out


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
