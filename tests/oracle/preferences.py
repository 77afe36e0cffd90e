"""TRL's preference losses on arrays, by its own trainers. Run with torch and TRL.

    python preferences.py IN.npz OUT.npz

in: policy, reference [B, 4, R] float64 and mask; of each group the chosen and the rejected response, and
those of another record. out: of every NAME in LOSSES: NAME/loss [] and NAME/gradient [B, 2, R].
"""

from __future__ import annotations

import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

MPO = ["sigmoid", "bco_pair", "sft"]
# name -> the trainer, and what its config says
LOSSES = {
    "dpo": (DPOTrainer, {"loss_types": ["sigmoid"], "beta": 0.3}),
    "dpo_length": (DPOTrainer, {"loss_types": ["sigmoid_norm"], "beta": 5.0}),
    "exo": (DPOTrainer, {"loss_types": ["exo_pair"], "beta": 0.3, "label_smoothing": 1e-3}),
    "bco": (DPOTrainer, {"loss_types": ["bco_pair"], "beta": 0.3}),
    "mpo": (DPOTrainer, {"loss_types": MPO, "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1}),
    "apo_zero": (DPOTrainer, {"loss_types": ["apo_zero"], "beta": 0.3}),
    "apo_down": (DPOTrainer, {"loss_types": ["apo_down"], "beta": 0.3}),
    "simpo": (CPOTrainer, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    "cpo": (CPOTrainer, {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7}),
    "orpo": (ORPOTrainer, {"beta": 0.3}),
    "kto": (KTOTrainer, {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
}


def by_response(values):
    """[B, K, R] -> rows as TRL has them: of all groups the first response, then the second."""
    return values.transpose(0, 1).reshape(-1, values.shape[-1])


def with_prompt(rows, fill):
    """Rows after a prompt of one token."""
    return torch.nn.functional.pad(rows, (1, 0), value=fill)


def computed(kind, settings, given):
    """The loss and its gradient by the policy's log-probs of the first two responses."""
    policy = given["policy"][:, :2].clone().requires_grad_()
    rows, mask = by_response(policy), by_response(given["mask"][:, :2])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        **{"label_smoothing": 0.0, "loss_weights": [1.0], "alpha": 0.0, "loss_type": "kto"} | settings,
    )
    loss = (by_logits if kind in (CPOTrainer, ORPOTrainer) else by_logps)(kind, trainer, rows, mask, given)
    loss.backward()
    return {"loss": loss.item(), "gradient": policy.grad.numpy()}


def by_logits(kind, trainer, rows, mask, given):
    """Of a trainer that takes logits: over two tokens, of which the second is the label."""
    ids, real = with_prompt(mask.long(), 1), with_prompt(mask, True)
    inputs = {
        "concatenated_input_ids": ids,
        "concatenated_attention_mask": real.long(),
        "concatenated_labels": torch.where(with_prompt(mask, False), ids, -100),
    }
    trainer.concatenated_inputs = lambda *_, **__: inputs
    for name in ("concatenated_forward", "get_batch_logps", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(trainer, name, bound(kind, name, trainer))
    certain = torch.where(mask, rows, -1.0)  # logits of padding are masked, and must be finite
    logits = torch.stack([torch.log(-torch.expm1(certain)), certain], -1)
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # the last token predicts nothing
    model = SimpleNamespace(logits=logits)
    batch = {"chosen_labels": torch.zeros(len(rows) // 2)}
    return kind.get_batch_loss_metrics(trainer, lambda *_, **__: model, batch)[0]


def by_logps(kind, trainer, rows, mask, given):
    """Of a trainer that takes log-probs."""
    trainer.ld_alpha, trainer.f_divergence_type, trainer.use_weighting = None, "reverse_kl", False
    trainer.precompute_ref_logps = trainer.calculate_KL = True
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    own, others = (by_response(given["reference"][:, part]).sum(-1) for part in (slice(2), slice(2, 4)))
    inputs = {
        "input_ids": with_prompt(mask.long(), 1),
        "attention_mask": with_prompt(mask, True).long(),
        "completion_mask": with_prompt(mask.long(), 0),
    }
    if kind is KTOTrainer:
        trainer._compute_kl_logps = bound(kind, "_compute_kl_logps", trainer)
        inputs |= {f"KL_{name}": value for name, value in inputs.items()}
        inputs["KL_input_ids"] = torch.full_like(inputs["input_ids"], 2)
        label = torch.arange(len(rows)) < len(rows) // 2
        inputs |= {"label": label, "ref_logps": own, "ref_KL_logps": others}
    else:
        chosen, rejected = own.chunk(2)
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def model(input_ids, **_):
        seen = by_response(given["policy"][:, 2:]) if (input_ids == 2).all() else rows
        return SimpleNamespace(log_probs=seen, entropy=seen, mean_logits=seen, is_top1=mask)

    return kind._compute_loss(trainer, model, inputs, False)


def bound(kind, name, trainer):
    """A trainer's method on our stand-in; static ones as they are."""
    found = kind.__dict__[name]
    return found.__func__ if isinstance(found, staticmethod) else found.__get__(trainer)


def main(source: str, out: str) -> None:
    given = {name: torch.tensor(values) for name, values in np.load(source).items()}
    found = {}
    for name, (kind, settings) in LOSSES.items():
        found |= {f"{name}/{part}": value for part, value in computed(kind, settings, given).items()}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
