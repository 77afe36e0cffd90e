"""TRL's RLOO and GRPO on arrays: advantages from rewards, losses and gradients. Run with torch and TRL.

    python policy_gradients.py IN.npz OUT.npz

in: K, beta, clip, length; of N = B * K responses rewards [N], policy, old, reference [N, R] float64, mask.
out, of every NAME in LOSSES: NAME/loss [], NAME/gradient [N, R], NAME/advantages [N], NAME/clipped [].
"""

from __future__ import annotations

import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

# name -> the trainer, and what its config says
LOSSES = {
    "rloo": (RLOOTrainer, {}),
    "grpo": (GRPOTrainer, {"loss_type": "grpo", "scale_rewards": "group"}),
    "dapo": (GRPOTrainer, {"loss_type": "dapo", "scale_rewards": "group"}),
    "dr_grpo": (GRPOTrainer, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "corrected": (
        GRPOTrainer,
        {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": True},
    ),
}


def computed(kind, settings, given):
    """The loss, its gradient by the policy's log-probs, the advantages, and the share that is clipped."""
    policy = torch.tensor(given["policy"], requires_grad=True)
    old, reference = (torch.tensor(given[name]) for name in ("old", "reference"))
    mask, rewards = torch.tensor(given["mask"]), torch.tensor(given["rewards"])
    lengths, size = given["mask"].sum(-1), len(rewards)
    model, reference_model = SimpleNamespace(training=True, is_gradient_checkpointing=False), object()
    logps = {id(model): old, id(reference_model): reference}
    beta, clip = float(given["beta"]), float(given["clip"])
    accelerator = SimpleNamespace(
        device="cpu",
        process_index=0,
        num_processes=1,
        reduce=lambda x, reduction: x,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
    )
    args = SimpleNamespace(
        per_device_train_batch_size=size,
        gradient_checkpointing_kwargs=None,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
        delta=None,
    )
    trainer = SimpleNamespace(
        accelerator=accelerator,
        args=args,
        model=model,
        ref_model=reference_model,
        beta=beta,
        epsilon_low=clip,
        epsilon_high=clip,
        num_generations=int(given["K"]),
        num_iterations=2,  # so that log-probs of before are computed
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["reward"],
        reward_clip_range=None,
        normalize_advantages=False,
        scale_rewards=settings.get("scale_rewards"),
        multi_objective_aggregation="sum_then_normalize",
        loss_type=settings.get("loss_type"),
        max_completion_length=int(given["length"]),
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        environment_factories=None,
        environments=None,
        tools=None,
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer._calculate_rewards = lambda *_: rewards[:, None]
    answers = [[1] * n for n in lengths.tolist()]
    generated = [[1]] * size, answers, [""] * size
    if (
        kind is GRPOTrainer
    ):  # also tool masks, log-probs of a sampler, other fields, images, images of tools
        generated = [[1]] * size, answers, None, [""] * size, None, {}, None, None
    trainer._generate = lambda *_: generated
    trainer._get_per_token_logps_and_entropies = lambda which, *_, **__: (logps[id(which)], None, None)
    inputs = kind._generate_and_score_completions(trainer, [{"prompt": ""}] * size)
    assert torch.equal(inputs["completion_mask"].bool(), mask)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy, torch.zeros_like(policy), None)
    loss = kind._compute_loss(trainer, model, inputs)
    loss.backward()
    (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    return {
        "loss": loss.item(),
        "gradient": policy.grad.numpy(),
        "advantages": inputs["advantages"].numpy(),
        "clipped": clipped,
    }


def main(source: str, out: str) -> None:
    given = dict(np.load(source))
    found = {}
    for name, (kind, settings) in LOSSES.items():
        found |= {f"{name}/{part}": value for part, value in computed(kind, settings, given).items()}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
