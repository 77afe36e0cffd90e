"""The policy as it samples: on the mesh of the run, or cut otherwise over the same devices.

Training wants parameters cut along fsdp; a decode step would then gather all of them for one token. Cut
along tensor they stay where they are. A second copy of the frozen base is kept for that; what is trained is
moved before each rollout.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax

from mllm_align.batch import PromptGroup
from mllm_align.config import Config, MeshConfig
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle, base_shardings, check_mesh
from mllm_align.models.policy import policy_alone
from mllm_align.sharding import batch_sharding, batch_shards, remade
from mllm_align.training.optim import abstract_trained


class Sampler:
    """mesh: of rollouts; None for that of the run. Raises InputError where it does not go with the model or
    the batch."""

    def __init__(self, config: Config, bundle: Bundle, mesh: MeshConfig | None):
        self.bundle = replace(bundle, lora=config.lora, trained={})
        self.moves = mesh is not None
        rows = config.rows_per_micro
        if mesh is not None:
            own = remade(bundle.mesh, mesh)
            check_mesh(bundle.config, own)
            if rows % batch_shards(own):
                raise InputError(
                    f"batch_size / micro_batches is {rows}; it must be a multiple of {batch_shards(own)}, "
                    "the devices that share a batch on online.mesh (slices x data x fsdp)"
                )
            params = _moved(bundle.params, base_shardings(bundle.config, own))
            self.bundle = replace(self.bundle, mesh=own, params=params)
            sampled = policy_alone(abstract_trained(config, bundle.config, own))
            self._where = jax.tree.map(lambda x: x.sharding, sampled)
        # parts of a batch are multiples of this: they are cut on either mesh
        self.step = math.lcm(batch_shards(bundle.mesh), batch_shards(self.bundle.mesh))

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the programs of generation are made from."""
        return self.bundle.config, self.bundle.mesh, self.bundle.lora_scale, self.bundle.dtype

    def trained(self, trained: Any) -> Any:
        alone = policy_alone(trained)
        return _moved(alone, self._where) if self.moves else alone

    def policy(self, trained: Any) -> Bundle:
        return replace(self.bundle, trained=self.trained(trained))

    def batch(self, group: PromptGroup) -> PromptGroup:
        return _moved(group, batch_sharding(self.bundle.mesh)) if self.moves else group


def _moved(tree: Any, where: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=where)(tree)
