"""Fine-tuning strategies as data: where a run starts and what it trains, nothing else.

All of them go through the same code with the same data order, so that a difference between two rows
of a table is a difference between two of these small values.

| name | start | trains | source |
| --- | --- | --- | --- |
| zero_shot | pretrained | nothing | |
| ff | pretrained | all | full fine-tuning |
| tfs | random | all | training from scratch |
| sff | alpha * pretrained + (1 - alpha) * random | all | arXiv 2606.08578, Meteor-Stars/SFF |
| lp | pretrained, head re-initialised | head | linear probing |
| lpff | the same | head, then all | LP-FT, arXiv 2202.10054 |
| l2sp | pretrained | all, pulled back | L2-SP, arXiv 1802.01483 |
| noise | alpha * pretrained + (1 - alpha) * noise | all | control for sff |
| shrink | alpha * pretrained | all | control for sff |
| perturb | pretrained + (1 - alpha) * random | all | control for sff |
| sff_norm, sff_channel | as sff, each tensor or output channel of its pretrained norm | all | |
| sff_sphere | as sff, but on the sphere of the pretrained norm | all | |
| sff_keep | as sff, head and embedding pretrained | all | |
| sff_warm | as sff | head for an epoch, then all | |
| sff_stages, noise_stages | as sff, noise: half of it | all, an epoch; other half; all | |
| sam | pretrained | all, by gradients from uphill | SAM, arXiv 2010.01412 |
| ema | pretrained | all; a moving average is kept | arXiv 1703.01780 |
| swa | pretrained | all; a mean over epochs is kept | SWA, arXiv 1803.05407 |
| norms | pretrained | norms and biases | BitFit, arXiv 2106.10199, and norms |
| last_k | pretrained | the last layers and the head | |
| anchor | pretrained | all, forecasts pulled back | |
| mixout | pretrained | all, some put back in each step | Mixout, arXiv 1909.11299 |
| wise_ft | pretrained | all, then mixed with it | WiSE-FT, arXiv 2109.01903 |
| lora | pretrained | adapters of low rank | LoRA, arXiv 2106.09685 |
| msft | pretrained, at several scales | adapters of each scale, ... | MSFT, arXiv 2506.14087 |
| recipe | pretrained | as the recipe of the model says | `Model.recipe` |
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ltsm_jax import trees
from ltsm_jax.layers.multiscale import MultiScale
from ltsm_jax.methods.phases import Phase
from ltsm_jax.methods.starts import Interpolated, Pretrained, Random, Start
from ltsm_jax.models.family import Lora

# fields that folders of earlier versions record whatever they are; others are recorded where they
# are not the default
FIRST = (
    "name",
    "start",
    "phases",
    "reinit_head",
    "alpha",
    "trainable",
    "epochs",
    "lr",
    "l2_sp",
    "lora",
    "rank",
)
GRID = tuple(i / 10 for i in range(11))


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A start point and the phases of training that follow, each from the best weights of the one
    before.

    Attributes:
      name: in tables and folders.
      start: the parameters it starts from.
      phases: of training; none: the start is scored and nothing else.
      reinit_head: start from a new, random head.
      wise: after the last phase, mix `w * tuned + (1 - w) * checkpoint` for each of these weights
        w, and keep the mix that validates best; empty: keep the tuned weights.
      multiscale: train with these further scales of the series, see `layers.multiscale`; what comes
        out is a model with scales, `RunResult.model`.
    Raises: ValueError for weights outside [0, 1].
    """

    name: str
    start: Start = dataclasses.field(default_factory=Pretrained)
    phases: tuple[Phase, ...] = (Phase(),)
    reinit_head: bool = False
    wise: tuple[float, ...] = ()
    multiscale: MultiScale | None = None

    def __post_init__(self):
        if odd := [w for w in self.wise if not 0 <= w <= 1]:
            raise ValueError(
                "wise lists weights of the tuned side, between 0 and 1; got "
                f"{', '.join(map(str, odd))}"
            )

    @property
    def alpha(self) -> float | None:
        """Weight of the pretrained side where the start is a mixture, else None."""
        return getattr(self.start, "alpha", None)

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON types, without later additions that are at their defaults."""
        return _recorded(self)


def _recorded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_recorded(entry) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if field.name in FIRST or own != field.default:
            found[field.name] = _recorded(own)
    return found


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
    """Smoothed Full Fine-tuning: mix the checkpoint with a random model, once, then full
    fine-tuning.

    Args:
      alpha: weight of the PRETRAINED side; 1 is `ff`, 0 is `tfs`, bit for bit at the same seed. The
        released script uses 0.7.
      norm, keep, alphas: how to mix otherwise than the release: what becomes of the norms of
        tensors, groups that stay pretrained, groups or layers with an alpha of their own. See
        `starts.Interpolated`.
    Source: arXiv 2606.08578, Meteor-Stars/SFF.
    Example:
    `sff(0.7, norm="tensor", keep=("head",), alphas={"layer_0": 0.9})`
    """
    return Strategy(
        "sff",
        Interpolated(
            alpha=alpha, norm=norm, keep=tuple(keep), alphas=tuple((alphas or {}).items())
        ),
    )


def sff_norm(alpha: float = 0.7) -> Strategy:
    """`sff` that shrinks no tensor: m * |p| / |m|, with p a pretrained tensor and m = alpha * p +
    (1 - alpha) * r.

    Mixing with an independent draw r makes tensors smaller, by about alpha, and that alone costs
    accuracy.
    """
    return Strategy("sff_norm", Interpolated(alpha, norm="tensor"))


def sff_channel(alpha: float = 0.7) -> Strategy:
    """`sff` that shrinks no output channel: as `sff_norm`, each column of a kernel (each filter)
    for itself.
    """
    return Strategy("sff_channel", Interpolated(alpha, norm="channel"))


def sff_sphere(alpha: float = 0.7) -> Strategy:
    """`sff` on a sphere: each tensor turns, at its own norm, from p towards r, a share 1 - alpha of
    the angle w.

    |p| * (sin(alpha w) p / |p| + sin((1 - alpha) w) r / |r|) / sin(w).
    """
    return Strategy("sff_sphere", Interpolated(alpha, norm="sphere"))


def sff_keep(alpha: float = 0.7) -> Strategy:
    """`sff` without the maps between data and width D: head and embedding stay pretrained (see
    `starts.groups_of`).
    """
    return Strategy("sff_keep", Interpolated(alpha, keep=("head", "embedding")))


def sff_warm(alpha: float = 0.7) -> Strategy:
    """`sff` with a warm-up: an epoch of the head alone on the mixed body, then full fine-tuning
    from its best.
    """
    return Strategy("sff_warm", Interpolated(alpha), (Phase("head", epochs=1), Phase()))


def sff_stages(alpha: float = 0.7) -> Strategy:
    """`sff` in two stages: mix with sqrt(alpha), train an epoch, mix once more with the same random
    model, train on.

    After both, as much of the checkpoint is left as in `sff`, alpha, but the first epoch has
    repaired half of the damage before the rest is done. It trains an epoch more than `ff`: alpha 1
    is `ff` with a fresh optimiser after an epoch, the control for that.
    """
    half = Interpolated(math.sqrt(alpha))
    return Strategy("sff_stages", half, (Phase(epochs=1), Phase(mix=half)))


def noise_stages(alpha: float = 0.7) -> Strategy:
    """Control for `sff_stages`: `noise` in its two stages."""
    half = Interpolated(math.sqrt(alpha), other="noise")
    return Strategy("noise_stages", half, (Phase(epochs=1), Phase(mix=half)))


def lp() -> Strategy:
    """Linear probing: a new head on the frozen pretrained body."""
    return Strategy("lp", phases=(Phase("head"),), reinit_head=True)


def lpff() -> Strategy:
    """Linear probing, then full fine-tuning from its best weights with a fresh optimiser and the
    same learning rate.

    Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", ICLR 2022, arXiv 2202.10054.
    """
    return Strategy("lpff", phases=(Phase("head"), Phase("all")), reinit_head=True)


def l2sp(weight: float = 0.1) -> Strategy:
    """Full fine-tuning with the penalty weight/2 * |params - pretrained|^2.

    Every parameter here is pretrained, so the second term of the paper (plain decay of new layers)
    is empty.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning", ICML 2018,
    arXiv 1802.01483.
    """
    return Strategy("l2sp", phases=(Phase(l2_sp=weight),))


def noise(alpha: float = 0.7) -> Strategy:
    """Control for `sff`: Gaussian noise, tensor by tensor as large as the random model, in the
    random model's place.

    Where it does as well as `sff`, what helps is shrinking and shaking the checkpoint, not the
    initialisation scheme.
    """
    return Strategy("noise", Interpolated(alpha, other="noise"))


def shrink(alpha: float = 0.7) -> Strategy:
    """Control for `sff`: the pretrained part of its mix without the random one, alpha
    * pretrained.
    """
    return Strategy("shrink", Interpolated(alpha, other="zeros"))


def perturb(alpha: float = 0.7) -> Strategy:
    """Control for `sff`: the random part of its mix on the whole checkpoint, pretrained + (1 -
    alpha) * random.
    """
    return Strategy("perturb", Interpolated(alpha, other="sum"))


def sam(rho: float = 0.05) -> Strategy:
    """Sharpness-aware fine-tuning: each step takes the gradient at params + rho * g / |g|, g that
    at params.

    It looks for weights around which the loss is low as well, and takes twice the time of `ff`.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", ICLR 2021, arXiv 2010.01412.
    """
    return Strategy("sam", phases=(Phase(rho=rho),))


def ema(decay: float = 0.999) -> Strategy:
    """Full fine-tuning that validates and keeps a moving average of the parameters.

    After each step it is decay * average + (1 - decay) * params. It starts at the checkpoint and
    follows over about 1 / (1 - decay) steps: take a smaller decay for a short run.

    Source: Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv
    1703.01780.
    """
    return Strategy("ema", phases=(Phase(ema=decay),))


def swa(share: float = 0.5) -> Strategy:
    """Full fine-tuning at a constant rate that keeps the mean of the weights after each of the last
    epochs.

    Args:
      share: of the epochs whose weights are averaged, at least one. Only averages are selected by
        validation.
    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018, arXiv 1803.05407. The checkpoint takes the place of their conventional training
    before.
    """
    return Strategy("swa", phases=(Phase(schedule="constant", swa=share),))


def norms() -> Strategy:
    """Fine-tuning of the biases and the scales of norms alone; all matrices stay.

    Source: the biases are BitFit's, Ben Zaken, Ravfogel, Goldberg, ACL 2022, arXiv 2106.10199; some
    models have none.
    """
    return Strategy("norms", phases=(Phase("norms"),))


def last_k(layers: int = 1) -> Strategy:
    """Fine-tuning of the head and of the last `layers` layers; of an encoder and a decoder, the
    last of each.
    """
    return Strategy("last_k", phases=(Phase("last", layers=layers),))


def anchor(weight: float = 1.0) -> Strategy:
    """Full fine-tuning with weight * (mean squared distance to the checkpoint's forecasts) added to
    the loss.

    It is to forecasts what `l2sp` is to parameters: where the data say little, the model stays what
    it was. See `phases.anchor_distance` for what it costs.
    """
    return Strategy("anchor", phases=(Phase(anchor=weight),))


def mixout(probability: float = 0.1) -> Strategy:
    """Full fine-tuning in which each step sees each weight replaced by the checkpoint's with this
    probability.

    The others are moved away from the checkpoint by 1 / (1 - probability), so that the mean stays.
    The draws are new in each step, and in each part of a batch that is taken in parts.

    Source: Lee, Cho, Kang, "Mixout", ICLR 2020, arXiv 1909.11299.
    """
    return Strategy("mixout", phases=(Phase(mixout=probability),))


def wise_ft(grid: Sequence[float] = GRID) -> Strategy:
    """Full fine-tuning, then w * tuned + (1 - w) * checkpoint, with the w of the grid that
    validates best.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.
    """
    return Strategy("wise_ft", wise=tuple(grid))


def lora(rank: int = 4) -> Strategy:
    """LoRA: adapters of this rank beside every linear layer are trained, times 2; the weights stay.

    It wants a larger learning rate than full fine-tuning: that of Chronos-2 is advised to be ten
    times as large.

    Source: see `methods.lora`.
    """
    return Strategy("lora", phases=(Phase(lora=Lora(rank, 2.0 * rank)),))


def msft(scales: int = 2, *, rank: int = 16) -> Strategy:
    """Multi-scale fine-tuning: series averaged over 2, 4, ... steps beside themselves, each with
    adapters of its own.

    For encoders over patches that declare `Model.scalable` (Moirai). The finest scale begins at the
    checkpoint's forecasts; those of all scales are mixed, by equal weights at first, which are
    trained as well. What comes out is a model with further parameters, `RunResult.model` with
    `RunResult.params`: it is saved, loaded and forecasts as any other, and cannot be merged into
    the original's weights.

    Args:
      scales: beside the series itself. The paper has up to 3 for contexts of thousands of steps.
      rank: of the adapters on queries, keys and values.
    Source: Qiao et al., NeurIPS 2025, arXiv 2506.14087; see `layers.multiscale` for what is as
    there.
    """
    return Strategy("msft", phases=(Phase("scales"),), multiscale=MultiScale(scales, rank))


def recipe() -> Strategy:
    """The family's own recipe: from the checkpoint, only the leaves that `Model.recipe().trainable`
    names, or adapters where `Model.recipe().lora` says so.
    """
    return Strategy("recipe", phases=(Phase("recipe"),))


_MIXING = (
    sff,
    noise,
    shrink,
    perturb,
    sff_norm,
    sff_channel,
    sff_sphere,
    sff_keep,
    sff_warm,
    sff_stages,
    noise_stages,
)
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    f.__name__: f
    for f in (
        *(zero_shot, ff, tfs, sff, lp, lpff, l2sp, *_MIXING[1:]),
        *(sam, ema, swa, norms, last_k, anchor, mixout, wise_ft, lora, msft, recipe),
    )
}
MIXED = tuple(f.__name__ for f in _MIXING)  # those that take an alpha
VARIANTS = tuple(
    name for name in MIXED if name not in ("sff", "noise")
)  # as sff, but for how the start is mixed


# as ff, but for how it is trained
TOOLBOX = ("sam", "ema", "swa", "norms", "last_k", "anchor", "mixout", "wise_ft", "msft")
# the option of `strategy` that each method with one takes
OPTIONS = dict.fromkeys(MIXED, "alpha") | {
    "l2sp": "l2_sp",
    "lora": "lora_rank",
    "sam": "rho",
    "ema": "decay",
    "swa": "share",
    "last_k": "layers",
    "anchor": "anchor",
    "mixout": "mixout",
    "msft": "scales",
}


def strategy(
    name: str,
    *,
    alpha: float = 0.7,
    l2_sp: float = 0.1,
    lora_rank: int = 4,
    rho: float = 0.05,
    decay: float = 0.999,
    share: float = 0.5,
    layers: int = 1,
    anchor: float = 1.0,
    mixout: float = 0.1,
    scales: int = 2,
) -> Strategy:
    """The strategy called `name`; each option reaches the methods it is for (`OPTIONS`): `alpha`
    those that mix.

    Args:
      alpha: of `MIXED`, the weight of the pretrained side.
      l2_sp: weight of the penalty of l2sp.  lora_rank: of lora.  rho: of sam.  decay: of ema.
      share: of the epochs that swa averages.  layers: of last_k.
      anchor: weight of the distance of anchor.  mixout: the probability of mixout.
      scales: of msft, beside the series itself.
    Raises: ValueError for an unknown name (with the known ones), and for an option out of range.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown method {name!r}{hint}; known: {', '.join(STRATEGIES)}")
    options: dict[str, Any] = {
        "alpha": float(alpha),
        "l2_sp": float(l2_sp),
        "lora_rank": lora_rank,
        "rho": float(rho),
        "decay": float(decay),
        "share": float(share),
        "layers": layers,
        "anchor": float(anchor),
        "mixout": float(mixout),
        "scales": scales,
    }
    option = OPTIONS.get(name)
    if option is None:
        return STRATEGIES[name]()
    value = options[option]
    fits, says = _RANGES[option]
    if not fits(value):
        raise ValueError(f"{says}; got {value}")
    return STRATEGIES[name](value)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _below_1(value: float) -> bool:
    return 0 < value < 1


def _count(value: int) -> bool:
    return value >= 1


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (_share, "alpha is the weight of the pretrained side, between 0 and 1"),
    "l2_sp": (_positive, "the l2sp weight must be positive"),
    "lora_rank": (_count, "the rank of LoRA must be at least 1"),
    "rho": (_positive, "the distance rho of SAM must be positive"),
    "decay": (_below_1, "the decay of the average lies between 0 and 1"),
    "share": (_share, "swa averages a share of the epochs, between 0 and 1"),
    "layers": (_count, "last_k trains at least 1 layer"),
    "anchor": (_positive, "the weight of the anchor must be positive"),
    "scales": (_count, "msft adds at least 1 scale"),
    "mixout": (_below_1, "the probability of Mixout lies between 0 and 1"),
}
