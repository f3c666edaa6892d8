"""Fine-tuning strategies as data: where a run starts and what it trains, nothing else.

All of them go through the same code with the same data order, so that a difference between two rows of a table is a
difference between two of these small values.

| name      | start                                      | trains           | source |
|-----------|--------------------------------------------|------------------|--------|
| zero_shot | pretrained                                 | nothing          |        |
| ff        | pretrained                                 | all              | full fine-tuning |
| tfs       | random                                     | all              | training from scratch |
| sff       | alpha * pretrained + (1 - alpha) * random  | all              | arXiv 2606.08578, Meteor-Stars/SFF |
| lp        | pretrained, head re-initialised            | head             | linear probing |
| lpff      | the same                                   | head, then all   | LP-FT, arXiv 2202.10054 |
| l2sp      | pretrained                                 | all, pulled back | L2-SP, arXiv 1802.01483 |
| noise     | alpha * pretrained + (1 - alpha) * noise   | all              | control for sff |
| shrink    | alpha * pretrained                         | all              | control for sff |
| perturb   | pretrained + (1 - alpha) * random          | all              | control for sff |
| sff_norm, sff_channel | as sff, each tensor or output channel of its pretrained norm | all | |
| sff_sphere | as sff, but on the sphere of the pretrained norm | all       |        |
| sff_keep  | as sff, head and embedding pretrained      | all              |        |
| sff_warm  | as sff                                     | head for an epoch, then all | |
| lora      | pretrained                                 | adapters of low rank | LoRA, arXiv 2106.09685 |
| recipe    | pretrained                                 | as the recipe of the model says | `Model.recipe` |
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ltsm_jax import trees
from ltsm_jax.methods.starts import Interpolated, Pretrained, Random, Start
from ltsm_jax.models.family import Lora

Params = Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with a fresh optimiser and its own best-validation tracking.

    Attributes:
      trainable: "all", "head" (what the model family declares as its head; the rest is frozen, dropout stays on) or
        "recipe" (what the family's fine-tuning recipe trains).
      lora: train these adapters instead of weights, and add them in at the end of the phase.
    Raises: ValueError for adapters together with what is about weights.
      epochs, lr: in place of the run's; None keeps the run's.
      l2_sp: weight w of the penalty w/2 * |params - start|^2 added to the loss; 0 for none.
    """

    trainable: Literal["all", "head", "recipe"] = "all"
    epochs: int | None = None
    lr: float | None = None
    l2_sp: float = 0.0
    lora: Lora | None = None

    def __post_init__(self):
        if self.lora is not None and (self.l2_sp or self.trainable != "all"):
            raise ValueError("a phase that trains adapters trains no weights: leave trainable and l2_sp away")

    def adapters(self, model: Any) -> Lora | None:
        """The adapters to train on this model; those of its recipe where that is what the phase trains."""
        return model.recipe().lora if self.trainable == "recipe" else self.lora


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A start point and the phases of training that follow, each from the best weights of the one before."""

    name: str
    start: Start = dataclasses.field(default_factory=Pretrained)
    phases: tuple[Phase, ...] = (Phase(),)
    reinit_head: bool = False

    @property
    def alpha(self) -> float | None:
        """Weight of the pretrained side where the start is a mixture, else None."""
        return getattr(self.start, "alpha", None)


def zero_shot() -> Strategy:
    """The checkpoint, evaluated only."""
    return Strategy("zero_shot", phases=())


def ff() -> Strategy:
    """Full fine-tuning: every parameter, from the checkpoint."""
    return Strategy("ff")


def tfs() -> Strategy:
    """Training from scratch: every parameter, from the model's own random initialisation."""
    return Strategy("tfs", Random())


def sff(
    alpha: float = 0.7,
    *,
    norm: trees.Norm = "none",
    keep: Sequence[str] = (),
    alphas: Mapping[str, float] | None = None,
) -> Strategy:
    """Smoothed Full Fine-tuning: mix the checkpoint with a random model, once, then full fine-tuning.

    Args:
      alpha: weight of the PRETRAINED side; 1 is `ff`, 0 is `tfs`, bit for bit at the same seed. The released script
        uses 0.7.
      norm, keep, alphas: how to mix otherwise than the release: what becomes of the norms of tensors, groups that stay
        pretrained, groups or layers with an alpha of their own. See `starts.Interpolated`.
    Source: arXiv 2606.08578, Meteor-Stars/SFF.
    Example: `fit(model, params, data, method=sff(0.7, norm="tensor", keep=("head",), alphas={"layer_0": 0.9}))`
    """
    return Strategy("sff", Interpolated(alpha, norm, tuple(keep), tuple((alphas or {}).items())))


def sff_norm(alpha: float = 0.7) -> Strategy:
    """`sff` that shrinks no tensor: m * |p| / |m|, with p a pretrained tensor and m = alpha * p + (1 - alpha) * r.

    Mixing with an independent draw r makes tensors smaller, by about alpha, and that alone costs accuracy.
    """
    return Strategy("sff_norm", Interpolated(alpha, norm="tensor"))


def sff_channel(alpha: float = 0.7) -> Strategy:
    """`sff` that shrinks no output channel: as `sff_norm`, each column of a kernel (each filter) for itself."""
    return Strategy("sff_channel", Interpolated(alpha, norm="channel"))


def sff_sphere(alpha: float = 0.7) -> Strategy:
    """`sff` on a sphere: each tensor turns, at its own norm, from p towards r, a share 1 - alpha of the angle w.

    |p| * (sin(alpha w) p / |p| + sin((1 - alpha) w) r / |r|) / sin(w).
    """
    return Strategy("sff_sphere", Interpolated(alpha, norm="sphere"))


def sff_keep(alpha: float = 0.7) -> Strategy:
    """`sff` without the maps between data and width D: head and embedding stay pretrained (see `starts.groups_of`)."""
    return Strategy("sff_keep", Interpolated(alpha, keep=("head", "embedding")))


def sff_warm(alpha: float = 0.7) -> Strategy:
    """`sff` with a warm-up: an epoch of the head alone on the mixed body, then full fine-tuning from its best."""
    return Strategy("sff_warm", Interpolated(alpha), (Phase("head", epochs=1), Phase()))


def lp() -> Strategy:
    """Linear probing: a new head on the frozen pretrained body."""
    return Strategy("lp", phases=(Phase("head"),), reinit_head=True)


def lpff() -> Strategy:
    """Linear probing, then full fine-tuning from its best weights with a fresh optimiser and the same learning rate.

    Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022,
    arXiv 2202.10054.
    """
    return Strategy("lpff", phases=(Phase("head"), Phase("all")), reinit_head=True)


def l2sp(weight: float = 0.1) -> Strategy:
    """Full fine-tuning with the penalty weight/2 * |params - pretrained|^2.

    Every parameter here is pretrained, so the second term of the paper (plain decay of new layers) is empty.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning", ICML 2018, arXiv 1802.01483.
    """
    return Strategy("l2sp", phases=(Phase(l2_sp=weight),))


def noise(alpha: float = 0.7) -> Strategy:
    """Control for `sff`: Gaussian noise, tensor by tensor as large as the random model, in the random model's place.

    Where it does as well as `sff`, what helps is shrinking and shaking the checkpoint, not the initialisation scheme.
    """
    return Strategy("noise", Interpolated(alpha, other="noise"))


def shrink(alpha: float = 0.7) -> Strategy:
    """Control for `sff`: the pretrained part of its mix without the random one, alpha * pretrained."""
    return Strategy("shrink", Interpolated(alpha, other="zeros"))


def perturb(alpha: float = 0.7) -> Strategy:
    """Control for `sff`: the random part of its mix on the whole checkpoint, pretrained + (1 - alpha) * random."""
    return Strategy("perturb", Interpolated(alpha, other="sum"))


def lora(rank: int = 4) -> Strategy:
    """LoRA: adapters of this rank beside every linear layer are trained, times 2; the weights stay.

    It wants a larger learning rate than full fine-tuning: that of Chronos-2 is advised to be ten times as large.

    Source: see `methods.lora`.
    """
    return Strategy("lora", phases=(Phase(lora=Lora(rank, 2.0 * rank)),))


def recipe() -> Strategy:
    """The family's own recipe: from the checkpoint, only the leaves that `Model.recipe().trainable` names, or adapters
    where `Model.recipe().lora` says so."""
    return Strategy("recipe", phases=(Phase("recipe"),))


_MIXING = (sff, noise, shrink, perturb, sff_norm, sff_channel, sff_sphere, sff_keep, sff_warm)
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    f.__name__: f for f in (zero_shot, ff, tfs, sff, lp, lpff, l2sp, *_MIXING[1:], lora, recipe)
}
MIXED = tuple(f.__name__ for f in _MIXING)  # those that take an alpha
VARIANTS = tuple(name for name in MIXED if name not in ("sff", "noise"))  # as sff, but for how the start is mixed


def strategy(name: str, *, alpha: float = 0.7, l2_sp: float = 0.1, lora_rank: int = 4) -> Strategy:
    """The strategy called `name`; `alpha` reaches those that mix (`MIXED`), `l2_sp` only l2sp, `lora_rank` only lora.

    Raises: ValueError for an unknown name (with the known ones), an alpha outside [0, 1] or a rank below 1.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown method {name!r}{hint}; known: {', '.join(STRATEGIES)}")
    if name in MIXED:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the weight of the pretrained side, between 0 and 1; got {alpha}")
        return STRATEGIES[name](float(alpha))
    if name == "l2sp":
        if not l2_sp > 0:
            raise ValueError(f"the l2sp weight must be positive; got {l2_sp}")
        return l2sp(float(l2_sp))
    if name == "lora":
        if lora_rank < 1:
            raise ValueError(f"the rank of LoRA must be at least 1; got {lora_rank}")
        return lora(lora_rank)
    return STRATEGIES[name]()


def trainable_mask(phase: Phase, model: Any, params: Params) -> Params | None:
    """Tree of booleans: what `phase` trains; None where that is everything. Leaves the family fixes never train."""
    pattern = {"all": None, "head": model.head, "recipe": model.recipe().trainable}[phase.trainable]
    if pattern is None and not model.fixed:
        return None
    chosen = trees.select(params, pattern)
    if not model.fixed:
        return chosen
    return jax.tree.map(lambda train, keep: train and not keep, chosen, trees.select(params, model.fixed))


def l2_sp_penalty(reference: Params, weight: float, params: Params) -> jax.Array:
    """weight/2 * sum of squared differences to `reference`, over every tensor."""
    gaps = jax.tree.map(lambda p, p0: jnp.sum(jnp.square(p - p0)), params, reference)
    return 0.5 * weight * jax.tree.reduce(jnp.add, gaps)
