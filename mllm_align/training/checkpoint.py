"""Checkpoints of a run: what is trained, apart from the optimizer's state, through orbax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mllm_align.errors import InputError, one_line
from mllm_align.training.step import TrainState


class Checkpoints:
    """`folder/STEP/{trained,optimizer}`; a step counts once it is whole. Saves in the background."""

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("trained", "optimizer")}
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        args = ocp.args.Composite(
            trained=ocp.args.StandardSave(state.trained),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.optimizer}),
        )
        self._manager.save(step, args=args)

    def restore(self, state: TrainState, step: int) -> TrainState:
        """The state of a step, placed like `state`."""

        def shapes(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

        args = ocp.args.Composite(
            trained=ocp.args.StandardRestore(shapes(state.trained)),
            optimizer=ocp.args.StandardRestore(shapes({"step": state.step, "state": state.optimizer})),
        )
        with self._explained(step):
            saved = self._manager.restore(step, args=args)
        optimizer = saved["optimizer"]
        return TrainState(optimizer["step"], saved["trained"], optimizer["state"])

    def restore_trained(self, step: int) -> Any:
        """What a step had trained, as numpy arrays on the host; needs no optimizer and no mesh."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with self._explained(step):
            metadata = self._manager.item_metadata(step)["trained"]
            shapes = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata.tree
            )
            args = ocp.args.Composite(trained=ocp.args.StandardRestore(shapes))
            return jax.device_get(self._manager.restore(step, args=args)["trained"])

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"checkpoint {self._manager.directory / str(step)} can't be read ({one_line(error)}); "
                "remove it to go back to the one before"
            ) from error

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being saved."""
        self._manager.close()
