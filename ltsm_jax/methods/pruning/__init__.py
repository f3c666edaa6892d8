"""Structured pruning before fine-tuning: which channels of a model matter for a data set, and masks
for the others.

"Less is More" (NeurIPS 2025, arXiv 2505.23195), code SJTU-DMTai/Prune-then-Finetune (commit
e5b924c). Every linear in the blocks has a mask of 0 and 1 on its inputs and one on its outputs; an
entry of one is a channel. While the frozen model sees the training windows, each channel's
importance, the estimated change of the loss without it, is averaged, and after every group of
batches the least important ones are set to 0, for good. The epoch with the best validation gives
the masks. Fine-tuning (`methods.run.run(..., masks=...)`) starts from the pretrained weights times
the masks.

A masked model is the model with masked weights, exactly: see `apply_masks`. Dropout is off while
scoring.

Where the released code departs from its paper or from itself, what is right is the default:

| released behaviour | here |
| --- | --- |
| Q1 scores are of first order, whatever is asked for | score="taylor2"; as released: "taylor1" |
| Q1 second-order scores square the mean loss | "taylor2"; as released: "taylor2-mean-loss" |
| Q2 of TTM only the head's linear is pruned | its blocks; as released: quirk "head-only" |
| of Timer (timer_hf) every linear is pruned | its blocks; as released: quirk "every-linear" |
| Q5 the model before pruning is not looked at | it is validated as epoch 0, and is no candidate |
| Q6 a negative expert_threshold prunes all experts | layers keep top_k; as released: refused |
| Q8 each process counts its own tokens per expert | one count over all; as released: refused |
| Q14 Time-MoE is validated on all forecasts against one label | MSE; as released: refused |
| Q19 the last batch of an epoch counts as a full one | counts exactly; as released: refused |
| Q20 thresholds are the lowest of several devices' | one threshold; as released: refused |
| Q22 dropout is on again after a validation inside an epoch | always off; as released: refused |

Parameters may lie over a mesh of devices, of one host or of several: scoring and validation follow
them, and the masks are those of one device but for rounding. The masks of a result are whole on
every host; fine-tuning lays each as its weights lie.

Q4, dropout that is off when a pruned model is fine-tuned and on otherwise, is the quirk
"no-dropout" of `methods.run.run`.
Q3, training labels of Timer in another scale than its output, and Q7, pruned experts in the balance
loss, are of the models' own losses, where the right form is the only one.

Letters as in `models.family`.
"""

from ltsm_jax.layers.masks import apply_masks, masked
from ltsm_jax.layers.masks import masks_by_weight as weights_of
from ltsm_jax.methods.pruning.channels import (
    PRUNING_QUIRKS,
    REFUSED,
    Score,
    cut,
    full_masks,
    gradient_sums,
    importance_of,
    pruning_step,
    refuse_pruned,
    share_left,
)
from ltsm_jax.methods.pruning.config import PruneConfig
from ltsm_jax.methods.pruning.depth import block_influence, drop_layers, least_influential
from ltsm_jax.methods.pruning.experts import expert_usage, keep_experts, kept_experts
from ltsm_jax.methods.pruning.schedule import PruneResult, prune

__all__ = [
    "PRUNING_QUIRKS",
    "REFUSED",
    "PruneConfig",
    "PruneResult",
    "Score",
    "apply_masks",
    "block_influence",
    "cut",
    "drop_layers",
    "expert_usage",
    "full_masks",
    "gradient_sums",
    "importance_of",
    "keep_experts",
    "kept_experts",
    "least_influential",
    "masked",
    "prune",
    "pruning_step",
    "refuse_pruned",
    "share_left",
    "weights_of",
]
