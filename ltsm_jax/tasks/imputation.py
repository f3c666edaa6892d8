"""Imputation: parts of a window are hidden, and the model is asked for them.

The protocol of Timer (thuml/Large-Time-Series-Model) and of Smoothed Full Fine-tuning
(Meteor-Stars/SFF): windows of 192 rows of all variates, patches of 24, each patch of each variate
hidden with probability `rate`, never the first.
Only hidden points are scored, all of a split pooled, so every point counts the same.

Windows come from `data.prepare(series, 192, 192, joint=True)`. The horizon is not used, but it is
how the originals
count: as if a target as long as the window followed (ETTh1: 8257, 2689 and 2689 windows). Two
things are better than
released: `few_shot` keeps a fixed subset of the training windows, where the script sees another one
every epoch, and a window's mask in validation and test is a function of (seed, split, window),
where the script draws new ones each time.

Holes of other kinds than the protocol's (`HOLES`) come at the same expected share, rate * (N - 1) /
N of all points with N patches in a window, and never reach into the first patch:

| kind | hidden, of each variate by itself |
| --- | --- |
| `patches` | each whole patch with probability `rate`: the protocol |
| `points` | each point with probability `rate` |
| `blocks` | one run of uniform length: on average `rate` of the steps that may be hidden |
| `outages` | with probability `rate`, the variate from the second patch to the end of the window |
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import storage
from ltsm_jax.data.splits import Splits
from ltsm_jax.data.windows import Windows
from ltsm_jax.layers.missing import fill_missing, interpolate_missing
from ltsm_jax.models.family import Batch, Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Loss, Part, Source
from ltsm_jax.tasks.batches import in_batches
from ltsm_jax.trees import Tree

Holes = Literal["patches", "points", "blocks", "outages"]
HOLES: tuple[Holes, ...] = get_args(Holes)
Kinds = Holes | tuple[Holes, ...]


def hole_mask(
    key: jax.Array,
    n_steps: int,
    n_variates: int,
    patch_len: int,
    rate: float | jax.Array,
    holes: Holes = "patches",
) -> jax.Array:
    """Draw the points of one window that stay visible: bool [C, T]; the kinds of holes are in the
    module docstring.

    In the protocol a patch is hidden when u <= rate, u ~ U[0, 1). The expected hidden share of all
    points is rate * (N - 1) / N with N = T / P patches.

    Raises: ValueError for an unknown kind, and when the window is not made of whole patches, at
    least two.
    """
    if n_steps % patch_len or n_steps < 2 * patch_len:
        raise ValueError(
            f"imputation needs windows of at least two whole patches of {patch_len}, got {n_steps} "
            "steps"
        )
    steps = jnp.arange(n_steps)
    if holes == "patches":
        hidden_CN = jax.random.uniform(key, (n_variates, n_steps // patch_len)) <= rate
        hidden_CT = jnp.repeat(hidden_CN, patch_len, axis=1)
    elif holes == "points":
        hidden_CT = jax.random.uniform(key, (n_variates, n_steps)) <= rate
    elif holes == "outages":
        hidden_CT = jnp.broadcast_to(
            jax.random.uniform(key, (n_variates, 1)) <= rate, (n_variates, n_steps)
        )
    elif holes == "blocks":
        # The mean of a length in [1, 2 rate R] is that of a share `rate` of R steps; beyond a half
        # it would not fit, so that the lengths then run from (2 rate - 1) R to R.
        room = n_steps - patch_len
        length_key, start_key = jax.random.split(key)
        shortest, longest = jnp.maximum(2 * rate - 1, 0.0) * room, jnp.minimum(2 * rate, 1.0) * room
        drawn_C1 = jax.random.uniform(length_key, (n_variates, 1), minval=shortest, maxval=longest)
        length_C1 = jnp.round(drawn_C1).astype(jnp.int32)
        start_C1 = patch_len + jnp.floor(
            jax.random.uniform(start_key, (n_variates, 1)) * (room - length_C1 + 1)
        ).astype(jnp.int32)
        hidden_CT = (steps[None] >= start_C1) & (steps[None] < start_C1 + length_C1)
    else:
        raise ValueError(f"holes are {', '.join(HOLES)}; got {holes!r}")
    return ~(hidden_CT & (steps >= patch_len)[None])


def hidden_error(
    model: Model,
    params: Tree,
    x: jax.Array,
    visible: jax.Array,
    key: jax.Array | None,
    train: bool,
    ims: bool,
) -> tuple[jax.Array, jax.Array]:
    """(error, scored), both [B, C, T]: reconstruction minus truth where a known point was hidden, 0
    elsewhere.

    x: windows [B, C, T], NaN = missing: such points are neither shown to the model nor scored.
    Hidden values are set to 0 before the model sees them, so it cannot use them by mistake.
    """
    known = ~jnp.isnan(x)
    scored = known & ~visible
    y = filled(model, params, jnp.where(visible, x, jnp.nan), key=key, train=train, ims=ims)
    return jnp.where(scored, y - jnp.where(known, x, 0.0), 0.0), scored


def filled(
    model: Model,
    params: Tree,
    x: jax.Array,
    *,
    key: jax.Array | None = None,
    train: bool = False,
    ims: bool = True,
) -> jax.Array:
    """The model's output at every point of windows [B, C, T], of which it sees those that are not
    NaN.

    The model gets 0 in place of what is missing, and a mask. ims: as in `loss_fn`.
    """
    observed = ~jnp.isnan(x)
    shown = jnp.where(observed, x, 0.0)
    return model.impute(params, shown, observed.astype(x.dtype), key=key, train=train, ims=ims)


def anchored(y: jax.Array, x: jax.Array) -> jax.Array:
    """Move a reconstruction y [..., T] so that it meets what is known of x [..., T] (NaN: unknown).

    The straight line between the errors at the known points around a hole is taken off: both ends
    of a filled hole agree with the values beside it. A model that says a constant becomes linear
    interpolation.
    """
    line, begun = interpolate_missing(x - y)
    first = jnp.argmax(
        ~jnp.isnan(x), axis=-1, keepdims=True
    )  # before the first known point: its error
    before = jnp.take_along_axis(jnp.where(jnp.isnan(x), 0.0, x - y), first, axis=-1)
    return y + jnp.where(begun, line, before)


def _check(model: Model, rate: float) -> None:
    model.check_task("imputation")
    if not 0 < rate < 1:
        raise ValueError(f"rate is the share of patches to hide, between 0 and 1; got {rate}")


def loss_fn(
    model: Model,
    *,
    rate: float = 0.25,
    ims: bool = True,
    holes: Kinds = "patches",
    patch_len: int | None = None,
) -> Callable[[Tree, Batch, jax.Array | None, bool], jax.Array]:
    """The training loss `f(params, batch, key, train) -> scalar`: mean squared error of the hidden
    points of the batch.

    New masks are drawn from `key` at every call, so a key is needed also with train=False. Of the
    batch it reads `context` [B, C, T] and `weight` [B]. In the squared units of the batch; 0 when
    nothing was hidden.

    Args:
      rate: share hidden of what follows the first patch. The originals' scripts: 0.125, 0.25,
        0.375, 0.5.
      ims: True: a patch is what the token before it predicts, as Timer's checkpoint was trained.
        False: the hidden token's own output, the default of the released SFF script.
      holes: a kind, see the module docstring; of several, each window draws one.
      patch_len: steps of a hidden patch, and of the first one; None: the model's own.
    Raises: ValueError for a rate outside (0, 1) or a model without this task.
    """
    _check(model, rate)
    shared = _loss(model, ims, _kinds(holes), patch_len=patch_len or model.config.patch_len)
    # Partial: the rate reaches the compiled step as an argument, so that all rates share a
    # compilation.
    return jax.tree_util.Partial(shared, np.float32(rate))


@functools.cache
def _loss(
    model: Model, ims: bool, kinds: tuple[Holes, ...], patch_len: int
) -> Callable[..., jax.Array]:
    """Give the loss of every rate, which comes first; one function object for equal arguments."""

    def loss(
        rate: jax.Array, params: Tree, batch: Batch, key: jax.Array | None, train: bool
    ) -> jax.Array:
        if key is None:
            raise ValueError("the imputation loss draws its masks from a key: give one")
        x_BCT = batch["context"]
        mask_key, dropout_key = jax.random.split(key)
        visible_BCT = _masks(
            jax.random.split(mask_key, x_BCT.shape[0]),
            x_BCT,
            rate,
            kinds=kinds,
            patch_len=patch_len,
        )
        error_BCT, scored_BCT = hidden_error(
            model, params, x_BCT, visible=visible_BCT, key=dropout_key, train=train, ims=ims
        )
        weight_B = batch.get("weight", jnp.ones(x_BCT.shape[0]))
        total = (jnp.square(error_BCT).sum((1, 2)) * weight_B).sum()
        points = (scored_BCT.sum((1, 2)) * weight_B).sum()
        return jnp.where(points > 0, total / jnp.where(points > 0, points, 1.0), 0.0)

    return loss


def _kinds(holes: Kinds) -> tuple[Holes, ...]:
    kinds = (holes,) if isinstance(holes, str) else tuple(holes)
    if not kinds or set(kinds) - set(HOLES):
        raise ValueError(f"holes are of {', '.join(HOLES)}; got {holes!r}")
    return kinds


def _masks(
    keys: jax.Array,
    x_BCT: jax.Array,
    rate: float | jax.Array,
    kinds: tuple[Holes, ...],
    patch_len: int,
) -> jax.Array:
    """Draw the masks of a batch, a key for each window: bool [B, C, T]."""
    _, n_variates, n_steps = x_BCT.shape

    def one(key: jax.Array, kind: Holes) -> jax.Array:
        return hole_mask(key, n_steps, n_variates, patch_len=patch_len, rate=rate, holes=kind)

    if len(kinds) == 1:
        return jax.vmap(lambda key: one(key, kinds[0]))(keys)

    def drawn(key: jax.Array) -> jax.Array:
        which_key, key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, len(kinds))
        return jnp.stack([one(key, kind) for kind in kinds])[which]

    return jax.vmap(drawn)(keys)


@functools.partial(jax.jit, static_argnames=("model", "ims", "kinds", "patch_len"))
def _batch_sums(
    model: Model,
    params: Tree,
    windows: Windows,
    indices: jax.Array,
    key: jax.Array,
    rate: jax.Array,
    ims: bool,
    kinds: tuple[Holes, ...],
    patch_len: int,
) -> dict[str, jax.Array]:
    x_BCT = windows.gather(indices)["context"]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
        indices
    )  # by window: the batch size changes no mask
    visible_BCT = _masks(keys, x_BCT, rate, kinds=kinds, patch_len=patch_len)
    shown_BCT = jnp.where(visible_BCT, x_BCT, jnp.nan)
    scored_BCT = ~jnp.isnan(x_BCT) & ~visible_BCT
    y_BCT = filled(model, params, shown_BCT, ims=ims)
    sums = {"points": scored_BCT.sum((1, 2))}
    for prefix, guess_BCT in (("", y_BCT), ("anchored_", anchored(y_BCT, shown_BCT))):
        error_BCT = jnp.where(scored_BCT, guess_BCT - jnp.where(scored_BCT, x_BCT, 0.0), 0.0)
        sums[f"{prefix}mse"] = jnp.square(error_BCT).sum((1, 2))
        sums[f"{prefix}mae"] = jnp.abs(error_BCT).sum((1, 2))
    return sums


def evaluate(
    model: Model,
    params: Tree,
    windows: Windows,
    *,
    rate: float = 0.25,
    ims: bool = True,
    holes: Kinds = "patches",
    patch_len: int | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 128,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Score a split over all its hidden points, no window dropped: mse and mae in the units of the
    windows.

    Args:
      windows: the split; `joint` windows hide patches of each variate by itself.
      rate, ims, holes, patch_len: as in `loss_fn`.
      split, seed: they fix the masks: the same window of the same split and seed always has the
        same ones.
      batch_size: windows per forward pass; changes the speed, not the value.
      placement: of the parameters; None: ask them.
    Returns: {"mse", "mae", "anchored_mse", "anchored_mae" (see `anchored`), "points" (hidden and
    scored), "windows"}.
    Raises: ValueError when there is no window, no point was hidden, or as `loss_fn`.
    """
    found = window_sums(
        model,
        params,
        windows,
        rate=rate,
        ims=ims,
        holes=holes,
        patch_len=patch_len,
        split=split,
        seed=seed,
        batch_size=batch_size,
        placement=placement,
    )
    sums = {name: per_window.sum() for name, per_window in found.items()}
    points = int(sums.pop("points"))
    if not points:
        raise ValueError(
            f"no point of the {windows.n} windows was hidden at rate {rate}: use more windows or a "
            "higher rate"
        )
    return {name: float(total / points) for name, total in sums.items()} | {
        "points": points,
        "windows": windows.n,
    }


def window_sums(
    model: Model,
    params: Tree,
    windows: Windows,
    *,
    rate: float = 0.25,
    ims: bool = True,
    holes: Kinds = "patches",
    patch_len: int | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 128,
    placement: Placement | None = None,
) -> dict[str, np.ndarray]:
    """Sums over the hidden points of each window [N] of what `evaluate` gives the mean of, and
    "points"; arguments as there."""
    _check(model, rate)
    kinds, patch = _kinds(holes), patch_len or model.config.patch_len
    key = _split_key(seed, split)
    placement = placement or Placement.of(params)
    placed, placed_key = windows.over(placement.mesh), placement.replicate(key)

    def one_batch(indices: jax.Array) -> dict[str, jax.Array]:
        return _batch_sums(
            model,
            params,
            placed,
            indices=indices,
            key=placed_key,
            rate=rate,
            ims=ims,
            kinds=kinds,
            patch_len=patch,
        )

    return in_batches(one_batch, windows.n, batch_size, placement=placement)


def examples(
    model: Model,
    params: Tree,
    windows: Windows,
    indices: np.ndarray,
    *,
    rate: float = 0.25,
    ims: bool = True,
    holes: Kinds = "patches",
    patch_len: int | None = None,
    split: str = "test",
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill some windows under the masks that `evaluate` scores them with; arguments as there.

    indices: numbers of the windows, int [K].
    Returns: truth, what is visible (bool) and what the model says at every point, each [K, C, T].
    """
    _check(model, rate)
    numbers = jnp.asarray(indices, jnp.int32)
    x_KCT = windows.gather(numbers)["context"]
    key = _split_key(seed, split)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
    visible_KCT = _masks(
        keys, x_KCT, rate, kinds=_kinds(holes), patch_len=patch_len or model.config.patch_len
    )
    y_KCT = filled(model, params, jnp.where(visible_KCT, x_KCT, jnp.nan), ims=ims)
    return np.asarray(x_KCT), np.asarray(visible_KCT), np.asarray(y_KCT)


def _split_key(seed: int, split: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(split.encode()))


@functools.cache
def _task_loss(model: Model, rate: float, ims: bool, holes: Kinds, patch_len: int | None) -> Loss:
    return loss_fn(model, rate=rate, ims=ims, holes=holes, patch_len=patch_len)


@dataclasses.dataclass(frozen=True)
class Imputation:
    """The task of imputation on `data.Splits` of joint windows, of which the contexts are used.

    Attributes:
      rate, ims, holes, patch_len: see `loss_fn`.
      seed: of the masks in validation and test.
    """

    rate: float = 0.25
    ims: bool = True
    seed: int = 0
    holes: Kinds = "patches"
    patch_len: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `evaluate` and `examples`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def selects(self) -> str:
        """The mean squared error of the hidden points."""
        return "mse"

    def windows(self, model: Model, data: Splits, part: Part = "train") -> Source:
        """The windows of a part as they are."""
        return getattr(data, part)

    def loss(self, model: Model) -> Loss:
        """Mean squared error of points hidden anew at every call, see `loss_fn`."""
        return _task_loss(model, self.rate, self.ims, holes=self.holes, patch_len=self.patch_len)

    def evaluate(
        self,
        model: Model,
        params: Tree,
        data: Splits,
        part: Part = "val",
        placement: Placement | None = None,
    ) -> dict[str, Any]:
        """See `evaluate`, of every window of a part."""
        return evaluate(
            model, params, getattr(data, part), split=part, placement=placement, **self.options
        )

    def baselines(
        self, model: Model, data: Splits, part: Part = "val"
    ) -> dict[str, dict[str, Any]]:
        """Fill without a model, with the masks that the model is scored with: "linear", the
        straight line between the visible points; "last", the last visible value; with a season,
        "seasonal naive", see `seasonal`."""
        sizes, season = _Patches(model.config.patch_len), data.series.season
        fillers = {"linear": _Filler(sizes, "linear"), "last": _Filler(sizes, "last")}
        if 1 < season < data.train.context_len:
            fillers["seasonal naive"] = _Filler(sizes, "seasonal", season)
        found = {}
        for name, filler in fillers.items():
            found[name] = self.evaluate(filler, {}, data, part=part)  # pyright: ignore[reportArgumentType]
        return found

    def warnings(
        self, model: Model, params: Tree, data: Splits, placement: Placement | None = None
    ) -> tuple[str, ...]:
        """Nothing: no kind of collapse is known."""
        return ()

    def facts(self, data: Splits) -> dict[str, Any]:
        """The options, and digests of the windows."""
        digests = {part: storage.sha256_of(getattr(data, part)) for part in ("train", "val")}
        return {"task": "imputation"} | dataclasses.asdict(self) | {"data_sha256": digests}

    def row(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """MSE and MAE of the hidden points, and how many there are."""
        return {name: scores[name] for name in ("mse", "mae", "points")}


# --- without a model


def linear(x: jax.Array) -> jax.Array:
    """Fill NaN of x [..., T] on the straight line; before the first known value with that, after
    the last with that."""
    line, begun = interpolate_missing(x)
    return jnp.where(begun, line, fill_missing(x))


def seasonal(x: jax.Array, season: int) -> jax.Array:
    """Fill NaN of x [..., T] with the known value a whole number of seasons away: one before, one
    after, two before ...

    What no season reaches is filled by `linear`.
    """
    n_steps = x.shape[-1]
    filled, nothing = x, jnp.full_like(x, jnp.nan)
    for shift in range(season, n_steps, season):
        before = jnp.concatenate([nothing[..., :shift], x[..., :-shift]], axis=-1)
        after = jnp.concatenate([x[..., shift:], nothing[..., :shift]], axis=-1)
        for other in (before, after):
            filled = jnp.where(jnp.isnan(filled), other, filled)
    return jnp.where(jnp.isnan(filled), linear(x), filled)


@dataclasses.dataclass(frozen=True)
class _Patches:
    patch_len: int


@dataclasses.dataclass(frozen=True)
class _Filler:
    """Stands in for a model in `evaluate`."""

    config: _Patches
    how: Literal["linear", "last", "seasonal"]
    season: int = 0

    def check_task(self, task: str) -> None:
        pass

    def impute(self, params: Tree, x: jax.Array, observed: jax.Array, **how: Any) -> jax.Array:
        holes = jnp.where(observed > 0, x, jnp.nan)
        if self.how == "seasonal":
            return seasonal(holes, self.season)
        return linear(holes) if self.how == "linear" else fill_missing(holes)
