"""Phases of training: which parameters move, what is minimised, and which weights are validated and
kept.

A `Phase` is a small value; `methods.run` hands what the functions here make of it to
`training.fit`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ltsm_jax import trees
from ltsm_jax.methods.starts import Interpolated
from ltsm_jax.models import parts
from ltsm_jax.models.family import Batch, Lora, Model
from ltsm_jax.trees import Params

Loss = Callable[..., jax.Array]
Trainable = Literal["all", "head", "norms", "last", "scales", "recipe"]

OF_CONFIG = (
    "epochs",
    "lr",
    "schedule",
    "rho",
    "ema",
    "swa",
)  # fields of a phase that replace those of the config
MIXOUT = 0x6D69  # folded into the key of a step: Mixout must not draw the bits of dropout


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with a fresh optimiser and its own best-validation tracking.

    Attributes:
      trainable: "all"; "head", what the model family declares as its head; "norms", its biases and
        the scales of its norms (`Model.norms`); "last", the last `layers` layers of each stack and
        the head; "scales", what multi-scale fine-tuning trains (`Model.scalable`); or "recipe",
        what the family's fine-tuning recipe trains. The rest is frozen, dropout stays on.
      epochs, lr, schedule, rho, ema, swa: in place of the run's, see `training.TrainConfig`; None
        keeps the run's.
      l2_sp: weight w of the penalty w/2 * |params - start|^2 added to the loss; 0 for none.
      lora: train these adapters instead of weights, and add them in at the end of the phase.
      layers: how many, of "last".
      anchor: weight of the distance to the checkpoint's forecasts, see `anchor_distance`; 0 for
        none.
      mixout: probability that a weight is replaced by that of the start, see `mix_out`; 0 for none.
      mix: mix the weights that the phase begins with, as the start of a strategy mixes the
        checkpoint; None: as they are. The other side is that of the strategy's start at the same
        seed.
    Raises: ValueError for a value out of range, and for adapters together with what is about
    weights.
    """

    trainable: Trainable = "all"
    epochs: int | None = None
    lr: float | None = None
    l2_sp: float = 0.0
    lora: Lora | None = None
    schedule: str | None = None
    rho: float | None = None
    ema: float | None = None
    swa: float | None = None
    layers: int = 1
    anchor: float = 0.0
    mixout: float = 0.0
    mix: Interpolated | None = None

    def __post_init__(self):
        if self.trainable not in get_args(Trainable):
            raise ValueError(
                f"trainable must be one of {', '.join(get_args(Trainable))}; got {self.trainable!r}"
            )
        if self.layers < 1:
            raise ValueError(f"the last layers to train must be at least 1; got {self.layers}")
        if not self.anchor >= 0:
            raise ValueError(f"the weight of the anchor must not be negative; got {self.anchor}")
        if not 0 <= self.mixout < 1:
            raise ValueError(f"the probability of Mixout lies in [0, 1); got {self.mixout}")
        if self.lora is not None and (self.l2_sp or self.mixout or self.trainable != "all"):
            raise ValueError(
                "a phase that trains adapters trains no weights: leave trainable, l2_sp and mixout "
                "away"
            )

    def adapters(self, model: Any) -> Lora | None:
        """The adapters to train on this model; those of its recipe where that is what the phase
        trains.
        """
        return model.recipe().lora if self.trainable == "recipe" else self.lora

    def changes(self) -> dict[str, Any]:
        """Fields of the training config that this phase replaces."""
        return {name: value for name in OF_CONFIG if (value := getattr(self, name)) is not None}


def trainable_mask(phase: Phase, model: Model, params: Params) -> Params | None:
    """Tree of booleans: what `phase` trains; None where that is everything. Leaves the family fixes
    never train.
    """
    pattern: trees.Patterns = {
        "all": None,
        "head": model.head_leaves,
        "norms": model.norms,
        "last": _last_layers(phase.layers, model, params) if phase.trainable == "last" else None,
        "scales": model.scalable,
        "recipe": model.recipe().trainable,
    }[phase.trainable]
    if pattern is None and not model.fixed:
        return None
    chosen = trees.select(params, pattern)
    if not model.fixed:
        return chosen
    return jax.tree.map(
        lambda train, keep: train and not keep, chosen, trees.select(params, model.fixed)
    )


def _last_layers(count: int, model: Model, params: Params) -> Callable[[str], bool]:
    """Choose the paths of the head, and of the last `count` layers of each stack."""
    last: tuple[str, ...] = ()
    for stack in parts.stacks(model, trees.flatten(params)):
        last += tuple(f"{layer}/" for layer in stack[-count:])
    head = trees.flatten(trees.select(params, model.head_leaves))

    def chosen(path: str) -> bool:
        return head[path] or path.startswith(last)

    return chosen


def l2_sp_penalty(reference: Params, weight: float, params: Params) -> jax.Array:
    """weight/2 * sum of squared differences to `reference`, over every tensor."""
    gaps = jax.tree.map(lambda p, p0: jnp.sum(jnp.square(p - p0)), params, reference)
    return 0.5 * weight * jax.tree.reduce(jnp.add, gaps)


# --------------------------------------------------------------------------------------------------
# losses around a loss: arrays they carry reach the compiled step as arguments, not as constants


def with_anchor(loss: Loss, model: Model, checkpoint: Params, weight: float) -> Loss:
    """Make `loss + weight * anchor_distance(...)`, with `checkpoint` frozen."""
    return jax.tree_util.Partial(
        _anchored_loss(model), jax.tree_util.Partial(loss), checkpoint, weight
    )


@functools.cache
def _anchored_loss(model: Model) -> Loss:
    # The model is no tree: it is in the function, and equal models must give one and the same
    # function.
    def anchored_loss(loss, checkpoint, weight, params, batch, key, train):
        return loss(params, batch, key, train) + weight * anchor_distance(
            model, params, checkpoint, batch=batch
        )

    return anchored_loss


def anchor_distance(model: Model, params: Params, checkpoint: Params, batch: Batch) -> jax.Array:
    """Mean squared distance between the forecasts of `params` and those of `checkpoint` on the
    contexts of a batch.

    It is the model's `point_loss` with the point forecast of the checkpoint, as `Model.predict`
    makes it, in the place of the target, without dropout: 0 at the checkpoint, but for families
    whose `point_loss` compares something else than `predict` forecasts (of Chronos-T5 the mean
    along a taught path, of Moirai the mean of the distribution and not the median). In the
    (squared) units of the batch. It costs a forecast of the checkpoint, where a family samples as
    many paths as it always does, and one more forward and backward pass.

    Raises: ValueError for a batch without a context and targets to forecast.
    """
    context, target = batch.get("context"), batch.get("target")
    if context is None or target is None or target.ndim != 3:
        raise ValueError(
            "an anchor is a distance between forecasts: it is for training on a context and its "
            "future"
        )
    point = jax.lax.stop_gradient(model.predict(checkpoint, context, target.shape[-1]).point)
    if point.shape != target.shape:
        raise ValueError(
            f"an anchor needs forecasts of every target: {point.shape} for targets {target.shape}"
        )
    return model.point_loss(
        params, {**batch, "target": point.astype(jnp.float32)}, None, train=False
    )


def mixed_out(loss: Loss, reference: Params, probability: float) -> Loss:
    """Make `loss` at `mix_out(params, reference, probability)` in training, each step with a draw
    of its own.
    """
    return jax.tree_util.Partial(
        _mixed_out_loss, jax.tree_util.Partial(loss), reference, probability
    )


def _mixed_out_loss(loss, reference, probability, params, batch, key, train):
    if train:
        params = mix_out(params, reference, probability, key=jax.random.fold_in(key, MIXOUT))
    return loss(params, batch, key, train)


def mix_out(params: Params, reference: Params, probability: Any, key: jax.Array) -> Params:
    """Replace each weight w by u, that of `reference`, with probability p, and rescale so that the
    mean stays w.

    With m ~ Bernoulli(p) for each entry: `(m * u + (1 - m) * w - p * u) / (1 - p)`, which is u
    where m is 1 and u + (w - u) / (1 - p) where it is 0. Where w is u, as frozen weights are, it is
    u bit for bit. With u = 0 it is DropConnect.

    Args:
      params, reference: trees of the same shapes.
      probability: p, in [0, 1).
      key: of the draws; each leaf has bits of its own.
    Source: Lee et al., "Mixout: Effective Regularization to Finetune Large-scale Pretrained
      Language Models" (ICLR 2020, arXiv 1909.11299), equation 4.
    """
    leaves, structure = jax.tree.flatten(params)
    mixed = []
    for i, (w, u) in enumerate(zip(leaves, structure.flatten_up_to(reference), strict=True)):
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            mixed.append(w)
            continue
        replaced = jax.random.bernoulli(jax.random.fold_in(key, i), probability, w.shape)
        far = u + (w - u) / (1 - probability)
        mixed.append(jnp.where(replaced, u, far).astype(w.dtype))
    return structure.unflatten(mixed)
