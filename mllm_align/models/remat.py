"""Rematerialisation: what a block keeps of its forward pass for the backward one, and what it recomputes.

A policy goes by names. `Linear` names its result like itself (with the low-rank term added, before rotary
embedding and norms of heads) and its low-rank product "low_rank"; attention names its output and
log-sum-exp "attention". In 16 bits, a product [.., i] x [i, o] costs i FLOPs for each byte of its result,
and attention about as many as a query sees keys, at a lower rate: nothing is worth much more than the rest
but attention, which is given up last.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from mllm_align.ops import cudnn

_cp = jax.checkpoint_policies


def _names(names: Any) -> Any:
    """Keeps these names, and, as one of them, the attention that can't be named: cuDNN's."""
    return _cp.save_from_both_policies(names, cudnn.is_forward_kernel)


ATTENTION = ("attention",)
QKV = ("q", "k", "v", *ATTENTION)
POLICIES: dict[str, Any] = {
    "none": None,
    "dots": _names(_cp.save_any_names_but_these()),
    "gate": _names(_cp.save_any_names_but_these("up", "low_rank")),
    "qkv": _names(_cp.save_only_these_names(*QKV)),
    "attention": _names(_cp.save_only_these_names(*ATTENTION)),
    "full": _cp.nothing_saveable,
}
"""Each keeps what those after it keep, and more.

none       everything that the backward pass reads
dots       the results of all matrix products, and attention's output
gate       those, but for the feed-forward's `up` and low-rank products
qkv        queries, keys, values and attention's output
attention  attention's output
full       the block's input alone
"""


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """The block, keeping for its backward pass what `remat`, one of POLICIES, says."""
    if POLICIES[remat] is None:
        return block
    return nn.remat(block, policy=POLICIES[remat], prevent_cse=False)


def scanned(block: type[nn.Module], layers: int, remat: str, *, over: int = 0, shared: int = 0) -> type:
    """A stack of equal blocks as one scan: parameters get a leading `layers` axis, traced once.

    After x, a block takes `over` arguments of which every layer gets its own (layers leading, or None)
    and `shared` ones that all get as they are. remat: one of POLICIES.
    """
    return nn.scan(
        rematerialised(block, remat),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(0,) * over + (nn.broadcast,) * shared,  # type: ignore[arg-type]
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
        check_constancy_invariants=False,  # of what is broadcast out, which is nothing: a second trace
    )
