"""A model as it travels: where it came from, its parameters on a mesh, its processor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_align.batch import Shape, blank
from mllm_align.config import Dtype, LoraConfig, MeshConfig, Remat
from mllm_align.errors import InputError
from mllm_align.models.config import ModelConfig
from mllm_align.models.huggingface import Folder, load_params
from mllm_align.models.policy import SCORE
from mllm_align.models.processor import Processor, end_tokens, load_processor
from mllm_align.models.quantised import count, with_int8
from mllm_align.models.sources import open_model
from mllm_align.models.vlm import VisionLanguageModel
from mllm_align.registry import Registry
from mllm_align.sharding import make_mesh, parameter_shardings, replicated, tensor_shards, tree_lookup

# What `load` opens beside models, for the packages above: (whether a path is of the kind, what loads it).
OTHERS = Registry("source of a model", "mllm_align.training.run_model")


@dataclass(frozen=True, repr=False)
class Bundle:
    """params: the checkpoint's, in `dtype` (matrices of blocks in int8, if config.int8), sharded over
    `mesh`. trained: what a run has put over them (see models/policy.py), float32; of a checkpoint as it is
    empty, but for the head of a reward model.
    """

    folder: Folder
    processor: Processor
    mesh: Mesh
    dtype: Any
    params: dict[str, Any]
    trained: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None

    @property
    def config(self) -> ModelConfig:
        return self.folder.config

    @property
    def lora_scale(self) -> float:
        return 1.0 if self.lora is None else self.lora.scale

    @property
    def kept(self) -> str:
        """What the parameters are kept in."""
        return f"{self.dtype}, blocks in int8" if self.config.int8 else str(self.dtype)

    def __repr__(self) -> str:
        mesh = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        lines = [
            f"Bundle of {self.folder.named or self.folder.path} ({self.config.family})",
            f"  parameters  {count(self.params):,} in {self.kept}",
            f"  mesh        {mesh} ({self.mesh.devices.flat[0].device_kind})",
            f"  trained     {self._trained()}",
        ]
        return "\n".join(lines)

    def _trained(self) -> str:
        numbers = count(self.trained)
        if not numbers:
            return "nothing"
        parts = sorted(self.trained.get("params", {}))
        if self.trained.get("lora") and self.lora is not None:
            parts = [f"LoRA of rank {self.lora.rank}", *parts]
        return f"{numbers:,} in float32: {', '.join(parts)}"


def compute_dtype(name: Dtype, mesh: Mesh) -> Any:
    """auto is float32 on CPU and bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


@cache  # tracing takes a second
def abstract_params(config: ModelConfig) -> Any:
    """The parameter tree as shapes boxed with their logical axes; allocates nothing."""
    if config.int8:
        return with_int8(abstract_params(replace(config, int8=False)))
    v = config.vision

    def init() -> Any:
        def make(dims: tuple[int, ...], dtype: Any) -> jax.Array:
            return jnp.ones((1, *dims), dtype)

        axes = config.decoder.num_rope_axes
        tile, shape = (v.patches, v.patch_width), Shape(prefix=1, response=2, tiles=1)
        tiny = blank(make, shape, tile, ((0,),), axes, config.taps)
        return VisionLanguageModel(config).init(jax.random.key(0), tiny)

    return jax.eval_shape(init)["params"]


def load(
    model: str | Path | Folder,
    dtype: Dtype = "auto",
    mesh: Mesh | MeshConfig | None = None,
    base: Bundle | None = None,
) -> Bundle:
    """Read a model: weights sharded over the mesh, processor, configuration.

    model: a Hugging Face folder of a known family, a PEFT adapter folder, the name of either in the local
    Hub cache, a run folder (its newest whole checkpoint; `load_run` takes another), or a folder that was
    opened before. dtype: of the computation; auto is float32 on a CPU and bfloat16 elsewhere. mesh: a
    mesh or its MeshConfig; default, all devices on one data axis. base: a bundle whose parameters, dtype
    and mesh are taken where `model` is a run that began from the same checkpoint. Returns a Bundle, which
    all other calls take. Raises InputError for a model that can't be used.
    """
    # only a run's folder needs the modules that open it, which take long to import
    if not isinstance(model, Folder) and (Path(model) / "run.json").exists():
        for fits, load_other in OTHERS.values():
            if fits(Path(model)):
                return load_other(model, dtype, mesh, base=base)
    folder = model if isinstance(model, Folder) else open_model(model)
    processor = load_processor(folder.path)
    end_tokens(folder.path, folder.config.decoder.vocab)  # refused now, and not after the weights
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh or MeshConfig())
    check_mesh(folder.config, mesh)
    compute = compute_dtype(dtype, mesh)
    params = load_params(folder, compute, tree_lookup(base_shardings(folder.config, mesh)))
    trained = {}
    if folder.score is not None:
        trained = {SCORE: {"kernel": jax.device_put(folder.score, replicated(mesh))}}
    return Bundle(folder, processor, mesh, compute, params, trained)


def opened(
    model: str | Path | Bundle, dtype: Dtype = "auto", mesh: Mesh | MeshConfig | None = None
) -> Bundle:
    """A bundle as it is; else what `load` makes of a path or name."""
    return model if isinstance(model, Bundle) else load(model, dtype, mesh)


def kept_as(bundle: Bundle, int8: bool) -> Bundle:
    """The bundle with the matrices of its blocks in int8, or not: read from its folder again where they are
    kept otherwise, so that no number depends on what they were kept in before."""
    if bundle.config.int8 == int8:
        return bundle
    folder = bundle.folder.kept(int8)
    places = tree_lookup(base_shardings(folder.config, bundle.mesh))
    return replace(bundle, folder=folder, params=load_params(folder, bundle.dtype, places))


def _units(config: ModelConfig) -> dict[str, int]:
    """What the axes of heads are cut between."""
    d = config.decoder
    return {"heads": d.heads, "kv_heads": d.kv_heads, "vision_heads": config.vision.heads}


def check_mesh(config: ModelConfig, mesh: Mesh) -> list[str]:
    """Names what is kept whole on every device of the tensor axis because it does not divide.

    Raises InputError where the decoder's heads or feed-forward do not: that axis would then do nothing.
    """
    d, v, shards = config.decoder, config.vision, tensor_shards(mesh)
    for what, size in (("attention heads", d.heads), ("feed-forward columns", d.mlp)):
        if size % shards:
            good = [n for n in range(1, shards) if d.heads % n == 0 and d.mlp % n == 0]
            raise InputError(
                f"mesh.tensor is {shards}, which does not divide the decoder's {size} {what}; "
                f"take one of {', '.join(map(str, good))}, and more of mesh.fsdp"
            )
    parts = {
        f"{d.kv_heads} key-value heads": d.kv_heads,
        f"a vocabulary of {d.vocab}": d.vocab,
        f"the vision tower's {v.heads} heads": v.heads,
    }
    return [what for what, size in parts.items() if size % shards]


def base_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """Where each parameter of the checkpoint lives."""
    return parameter_shardings(abstract_params(config), mesh, _units(config))


def lora_shardings(config: ModelConfig, lora: Any, mesh: Mesh) -> Any:
    """`a` is cut like the input axis of its kernel, `b` like the output axis; that of the two which the
    embedding's axis does not cut has its rank cut instead. lora: shapes are enough."""
    decoder = abstract_params(replace(config, int8=False))["decoder"]

    def boxed(path: Any, leaf: Any) -> nn.LogicallyPartitioned:
        _, stack, name, side = (key.key for key in path)
        *lead, inner, outer = decoder[stack][name]["kernel"].names
        own = inner if side == "a" else outer
        rank = None if own == "embed" else "embed"
        return nn.LogicallyPartitioned(
            leaf, names=(*lead, own, rank) if side == "a" else (*lead, rank, own)
        )

    return parameter_shardings(jax.tree_util.tree_map_with_path(boxed, lora), mesh, _units(config))


def make_model(config: ModelConfig, remat: Remat = "none") -> VisionLanguageModel:
    return VisionLanguageModel(config, remat)
