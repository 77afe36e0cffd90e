"""Checkpoints of a run, through orbax: `checkpoints/STEP/{trained,optimizer,run}`, and `begun` where a
batch was made ahead.

A save goes on in the background, under a name of its own, and appears when it is whole, digests of its
files with it. A checkpoint whose files have changed since is never restored: the one before it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mllm_align import processes
from mllm_align.errors import InputError, one_line
from mllm_align.training.step import TrainState

DIGESTS = "digests.json"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", DIGESTS)  # written after the digests


class Checkpoints:
    """The checkpoints of one run folder.

    keep: how many of the last ones stay; the one with the least held-out loss stays besides. Only a
    run that trains may write: then what an interrupted save left is cleared away.
    """

    def __init__(self, folder: Any, keep: int = 2, write: bool = False):
        self.folder, self._write, self._saving = epath.Path(folder), write, 0
        self._losses: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            create=write,
            read_only=not write,
            cleanup_tmp_directories=write,
            preservation_policy=_LastAndBest(keep, self._losses),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        arrays: Any = {name: ocp.StandardCheckpointHandler() for name in ("trained", "optimizer")}
        handlers = {**arrays, "run": ocp.JsonCheckpointHandler(), "begun": ocp.JsonCheckpointHandler()}
        with self._written():
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        for step in self._manager.all_steps():
            if (loss := self.about(step).get("held_out_loss")) is not None:
                self._losses[step] = loss

    def best(self) -> int | None:
        """The step with the least held-out loss, of those that were evaluated."""
        return _best(self._losses)

    def best_loss(self) -> float:
        return min(self._losses.values(), default=float("inf"))

    def save(
        self,
        state: TrainState,
        step: int,
        about: dict[str, Any],
        loss: float | None = None,
        begun: Any = None,
    ) -> None:
        """Begin to save. Raises InputError where the one before was not written.

        about: JSON values that say what this is; begun: those of a batch that was made ahead, if any.
        """
        items: dict[str, Any] = {
            "trained": ocp.args.StandardSave(state.trained),  # type: ignore[call-arg]
            "optimizer": ocp.args.StandardSave({"step": state.step, "state": state.optimizer}),  # type: ignore[call-arg]
            "run": ocp.args.JsonSave({**about, "held_out_loss": loss, "begun": begun is not None}),  # type: ignore[call-arg]
        }
        if begun is not None:
            items["begun"] = ocp.args.JsonSave(begun)  # type: ignore[call-arg]
        args = ocp.args.Composite(**items)
        with self._written():
            self._manager.wait_until_finished()
            self._saving = step
            if loss is not None:
                self._losses[step] = loss
            self._manager.save(step, args=args)

    def about(self, step: int) -> dict[str, Any]:
        """What `save` was told of a step."""
        with self._explained(step):
            return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]  # type: ignore[call-arg]

    def begun(self, step: int) -> Any:
        """The batch that was made ahead when a step was saved, or None."""
        if not self.about(step)["begun"]:
            return None
        with self._explained(step):
            args = ocp.args.Composite(begun=ocp.args.JsonRestore())  # type: ignore[call-arg]
            return self._manager.restore(step, args=args)["begun"]

    def restore(self, state: TrainState, step: int) -> TrainState:
        """The state of a step, placed like `state`, whose leaves may be shapes with shardings."""
        args = ocp.args.Composite(
            trained=ocp.args.StandardRestore(_shapes(state.trained)),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardRestore(_shapes({"step": state.step, "state": state.optimizer})),  # type: ignore[call-arg]
        )
        with self._explained(step):
            saved = self._manager.restore(step, args=args)
        optimizer = saved["optimizer"]
        return TrainState(optimizer["step"], saved["trained"], optimizer["state"])

    def restore_trained(self, step: int, like: Any = None) -> Any:
        """What a step had trained, placed like `like`; without it, numpy arrays on the host."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with self._explained(step):
            tree = like
            if like is None:
                metadata = self._manager.item_metadata(step)["trained"]
                tree = jax.tree.map(
                    lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata.tree
                )
            args = ocp.args.Composite(trained=ocp.args.StandardRestore(_shapes(tree)))  # type: ignore[call-arg]
            out = self._manager.restore(step, args=args)["trained"]
            return out if like is not None else jax.device_get(out)

    def wait(self) -> None:
        """Until what is being saved is there."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
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
            if not self._write:
                raise
            raise InputError(
                f"can't write a checkpoint to {self.folder}: {one_line(error, 300)}; make room or mend the "
                "path, then run the same command: it goes on from the last whole one"
            ) from error

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"checkpoint {self.folder / str(step)} can't be read ({one_line(error, 300)}); "
                "remove it to go back to the one before"
            ) from error


@dataclass
class _LastAndBest(policies.PreservationPolicy):
    """Keeps the last `keep` checkpoints, and the one with the least held-out loss."""

    keep: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [each.step for each in checkpoints]
        return [step in steps[-self.keep :] or step == _best(self.losses) for step in steps]


def _best(losses: dict[int, float]) -> int | None:
    return min(losses, key=lambda step: losses[step]) if losses else None


def whole_steps(folder: Any) -> tuple[list[int], list[tuple[int, str]]]:
    """Steps whose files are as they were written, and (step, what is wrong) of the others; newest first."""
    folder = epath.Path(folder)
    steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
    wrong = [(step, problem) for step in steps if (problem := _problem(folder / str(step)))]
    return [step for step in steps if step not in dict(wrong)], wrong


def set_aside(folder: Any, step: int) -> str:
    """Give a damaged checkpoint a name under which no run goes on from it; returns that name."""
    folder = epath.Path(folder)
    names = (f"damaged-{step}", *(f"damaged-{step}-{n}" for n in range(2, 1000)))
    place = next(folder / name for name in names if not (folder / name).exists())
    (folder / str(step)).rename(place)
    return str(place)


def _problem(place: epath.Path) -> str | None:
    try:
        wanted = json.loads((place / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        return f"{DIGESTS} can't be read ({one_line(error)})"
    try:
        found = _digests(place)
    except OSError as error:
        return one_line(error)
    bad = [name for name, digest in wanted.items() if found.get(name) != digest]
    return f"{bad[0]} is {'missing' if bad[0] not in found else 'altered'}" if bad else None


def _digests(place: epath.Path) -> dict[str, str]:
    """Path under `place` -> SHA-256 of the file."""
    out, folders = {}, [place]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            elif path.name not in LATER:
                with path.open("rb") as file:
                    out[str(path.relative_to(place))] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return out


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
