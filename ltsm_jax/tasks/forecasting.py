"""Forecasting: windows, the loss of a batch, and the score of every window of a split."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, storage
from ltsm_jax.data.panel_windows import PanelSplits
from ltsm_jax.data.splits import Splits
from ltsm_jax.data.windows import OwnScale, Windows, context_scale, scaled_covariates
from ltsm_jax.layers.missing import fill_missing
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.models.family import Batch, Forecast, Model
from ltsm_jax.sharding import Placement
from ltsm_jax.stacks import Over, TreeStack
from ltsm_jax.tasks.base import Loss, Part, Source
from ltsm_jax.tasks.batches import in_batches, in_chunks, rounded
from ltsm_jax.trees import Tree

Mode = Literal["ims", "direct"]
Scaling = Literal["train", "context"]
MODES = get_args(Mode)
MEMBERS = 10  # of a group, what `eval_batch` of a joint family reckons with
COLLAPSED = (
    0.01  # a forecast that varies less than this share of what it should follow is a flat line
)


class Predictor(Protocol):
    """Anything that forecasts: a `Model` or a baseline. Must be hashable; it is static
    under jit.
    """

    @property
    def eval_batch(self) -> int: ...

    def predict(
        self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None
    ) -> Forecast: ...


@dataclasses.dataclass(frozen=True)
class SeasonalNaive:
    """Baseline: the last `season` observed steps, over and over; season 1 repeats the last value.

    Where a step of the season is missing, its value of the season before takes its place; one that
    is missing in every season takes the last value of all.
    """

    season: int = 1
    eval_batch: int = 2048

    def predict(
        self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None
    ) -> Forecast:
        season = min(self.season, context.shape[-1])
        repeats = -(-horizon // season)
        whole = context.shape[-1] // season * season
        seasons = context[..., -whole:].reshape(*context.shape[:-1], -1, season)

        # Of each step of the season, the newest value that there is.
        missing = jnp.isnan(seasons)
        newest = seasons.shape[-2] - 1 - jnp.argmin(missing[..., ::-1, :], axis=-2, keepdims=True)
        last = jnp.take_along_axis(seasons, newest, axis=-2)[..., 0, :]
        last = jnp.where(jnp.isnan(last), fill_missing(context)[..., -1:], last)
        return Forecast(jnp.tile(last, (1, 1, repeats))[..., :horizon])


@dataclasses.dataclass(frozen=True)
class ContextMean:
    """Baseline: the mean of what is observed in the context, at every step."""

    eval_batch: int = 2048

    def predict(
        self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None
    ) -> Forecast:
        mean, _ = context_scale(context)
        return Forecast(jnp.broadcast_to(mean, (*context.shape[:-1], horizon)))


def naive_forecasts(season: int = 1) -> dict[str, Predictor]:
    """The baselines by name: the last value, the mean of the context and, with a season, the
    seasonal naive.
    """
    found: dict[str, Predictor] = {"last_value": SeasonalNaive()}
    if season > 1:
        found["seasonal_naive"] = SeasonalNaive(season)
    return found | {"mean": ContextMean()}


@dataclasses.dataclass(frozen=True)
class ScaledByContext:
    """A model that sees each window standardised by its own context, and answers in the units of
    the window.

    Rows before the `context_len` that the model was trained with have no say in the scale.
    """

    model: Model

    @property
    def eval_batch(self) -> int:
        """Windows of one forward pass."""
        return self.model.eval_batch

    @property
    def covariates(self) -> frozenset[str]:
        """Kinds of covariates that the model takes."""
        return self.model.covariates

    def predict(
        self, params: Tree, context: jax.Array, horizon: int, key: jax.Array | None = None
    ) -> Forecast:
        """`Model.predict`, between scaling and scaling back."""
        seen = context[..., -self.model.context_len :]
        mean, std = context_scale(seen)
        return self._scaled_back(
            self.model.predict(params, (seen - mean) / std, horizon, key=key), mean, std
        )

    def predict_with(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        *,
        past: jax.Array | None = None,
        known: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Forecast:
        """`Model.predict_with` likewise; covariates by `scaled_covariates`, as a forecast of a
        table has them.
        """
        seen = context[..., -self.model.context_len :]
        length = seen.shape[-1]
        if past is not None:
            past = scaled_covariates(past[..., -length:], length)
        if known is not None:
            known = scaled_covariates(known[..., -(length + horizon) :], length)
        mean, std = context_scale(seen)
        found = self.model.predict_with(
            params, (seen - mean) / std, horizon, past=past, known=known, key=key
        )
        return self._scaled_back(found, mean, std)

    @staticmethod
    def _scaled_back(found: Forecast, mean: jax.Array, std: jax.Array) -> Forecast:
        point = found.point * std + mean
        more = {}
        for name in ("quantiles", "samples"):
            values = getattr(found, name)
            more[name] = None if values is None else values * std[..., None] + mean[..., None]
        return dataclasses.replace(found, point=point, **more)


def loss_fn(
    model: Model, mode: Mode = "ims"
) -> Callable[[Tree, Batch, jax.Array | None, bool], jax.Array]:
    """Return the training loss `f(params, batch, key, train) -> scalar`, in the (squared) units of
    the batch.

    mode: "ims", iterative multi-step, is the family's own loss (Timer: next token); "direct" is the
    MSE of the point forecast.
    """
    model.check_task("forecasting")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    return model.loss if mode == "ims" else model.point_loss


@functools.cache
def _loss(model: Model, mode: Mode) -> Loss:
    # methods of two equal models are not equal: without this each load of a checkpoint compiles the
    # step again
    return loss_fn(model, mode)


def training_windows(model: Model, splits: Splits | PanelSplits, mode: Mode) -> Windows:
    """The training windows of `splits`, with the target length that the loss of `mode` wants.

    The next-token loss needs targets of the model's own horizon whatever horizon is scored; longer
    ones would only cost windows, shorter ones do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    return splits.training(splits.train.horizon if mode == "direct" else model.horizon)


@dataclasses.dataclass(frozen=True)
class Forecasting:
    """The task of forecasting `data.Splits` at their horizon.

    Attributes:
      mode: the training loss. "ims": the model's own (Timer: every next token), on windows of the
        model's own horizon.
        "direct": MSE of the forecast at the horizon of the splits.
      scaling: what a model sees. "train": windows standardised by the training part, the protocol
        of the benchmarks.
        "context": each window standardised by its own context, as a forecast of a table is. Scores
          are in units
        standardised by the training part in any case.
    """

    mode: Mode = "ims"
    scaling: Scaling = "train"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.scaling not in get_args(Scaling):
            raise ValueError(
                f"scaling must be one of {', '.join(get_args(Scaling))}; got {self.scaling!r}"
            )

    @property
    def selects(self) -> str:
        """The mean squared error."""
        return "mse"

    def windows(self, model: Model, data: Splits | PanelSplits, part: Part = "train") -> Source:
        """Windows of a part as the model sees them; of the training part as the loss wants them."""
        found = training_windows(model, data, self.mode) if part == "train" else getattr(data, part)
        return OwnScale(found) if self.scaling == "context" else found

    def loss(self, model: Model) -> Loss:
        """The model's own loss, or the MSE of its forecast."""
        return _loss(model, self.mode)

    def predictor(self, model: Model) -> Predictor:
        """The predictor of the windows of the splits: the model, with the scaling around it."""
        return ScaledByContext(model) if self.scaling == "context" else model

    def evaluate(
        self,
        model: Model,
        params: Tree,
        data: Splits | PanelSplits,
        part: Part = "val",
        placement: Placement | None = None,
    ) -> dict[str, Any]:
        """See `evaluate`, of every window of a part."""
        return evaluate(self.predictor(model), params, getattr(data, part), placement=placement)

    def evaluate_lanes(
        self, model: Model, params: TreeStack, data: Splits | PanelSplits, part: Part, over: Over
    ) -> list[dict[str, Any]]:
        """As `evaluate`, for each lane of a stack of parameters, in one program."""
        return evaluate_lanes(self.predictor(model), params, getattr(data, part), over=over)

    def baselines(
        self, model: Model, data: Splits | PanelSplits, part: Part = "val"
    ) -> dict[str, dict[str, Any]]:
        """The last value and, where the step of the series has a season, the seasonal naive
        forecast.
        """
        seasons = {"last value": 1}
        if data.season > 1:
            seasons["seasonal naive"] = data.season
        windows = getattr(data, part)
        return {
            name: evaluate(SeasonalNaive(season), {}, windows) for name, season in seasons.items()
        }

    def warnings(
        self,
        model: Model,
        params: Tree,
        data: Splits | PanelSplits,
        placement: Placement | None = None,
    ) -> tuple[str, ...]:
        """See `collapse`."""
        return collapse(self.predictor(model), params, data.val, placement=placement)

    def facts(self, data: Splits | PanelSplits) -> dict[str, Any]:
        """Mode, horizon, scaling where it is not that of the benchmarks, and digests of windows and
        stamps.
        """
        stamps = data.timestamps
        found = {"mode": self.mode, "horizon": data.val.horizon}
        if self.scaling != "train":
            found["scaling"] = self.scaling
        digests = {"train": storage.sha256_of(data.train), "val": storage.sha256_of(data.val)}
        if stamps is not None:
            digests["stamps"] = storage.sha256_of({"stamps": np.asarray(stamps).view(np.int64)})
        return found | {"data_sha256": digests}

    def row(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """MSE and MAE."""
        return {name: scores[name] for name in ("mse", "mae")}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of every window, summed over the horizon: squared, absolute, absolute over |target|
    [N, C].

    zeros [N, C]: steps whose target is exactly 0; they have no percentage error and are left out of
    MAPE alone. steps [N, C]: steps whose target was observed; the others are in none of the sums.
    variates [N, C]: which variate each entry is of. horizon: steps per entry.
    """

    squared: np.ndarray
    absolute: np.ndarray
    percentage: np.ndarray
    zeros: np.ndarray
    steps: np.ndarray
    variates: np.ndarray
    horizon: int


def _point(predictor: Predictor, params: Tree, batch: Batch) -> jax.Array:
    """The point forecast of a batch, from its covariates too where the predictor takes them."""
    context, horizon = batch["context"], batch["target"].shape[-1]
    covariates = {
        name: batch[name] for name in getattr(predictor, "covariates", ()) if name in batch
    }
    if covariates:
        assert isinstance(predictor, Model | ScaledByContext)
        return predictor.predict_with(params, context, horizon, **covariates).point
    return predictor.predict(params, context, horizon).point


@functools.partial(jax.jit, static_argnames=("predictor", "placement"))
def _batch_errors(
    predictor: Predictor, params: Tree, windows: Windows, indices: jax.Array, placement: Placement
) -> dict[str, jax.Array]:
    def of_rows(indices: jax.Array) -> dict[str, jax.Array]:
        batch = placement.rows(windows.gather(indices))
        target = batch["target"]
        point = Runtime(placement=placement).call(_point, predictor, params, batch)
        observed = ~jnp.isnan(target)
        difference = jnp.where(observed, point - target, 0.0)
        zero = target == 0
        share = jnp.where(
            zero | ~observed, 0.0, difference / jnp.where(zero | ~observed, 1.0, target)
        )
        return {
            "squared": jnp.square(difference).sum(-1),
            "absolute": jnp.abs(difference).sum(-1),
            "percentage": jnp.abs(share).sum(-1),
            "zeros": zero.sum(-1),
            "steps": observed.sum(-1),
        }

    return placement.everywhere(in_chunks(of_rows, indices, placement))


def errors(
    predictor: Predictor,
    params: Tree,
    windows: Windows,
    *,
    batch_size: int | None = None,
    placement: Placement | None = None,
) -> Errors:
    """Errors of every window, none dropped, forecast on device in batches.

    The last batch is filled up with repeated windows, whose errors are cut off again: one
    compilation serves all. Where the parameters lie over a mesh, each device forecasts its part of
    a batch; every host gets all errors. batch_size: windows per forward pass; None: the predictor's
    `eval_batch` (for each device that has rows). placement: of the parameters; None: ask them.
    """
    placement = placement or Placement.of(params)
    placed = windows.over(placement.mesh)
    sums = in_batches(
        lambda indices: _batch_errors(
            predictor, params, placed, indices=indices, placement=placement
        ),
        windows.n,
        batch_size or _batch_size(predictor, windows, placement),
        placement=placement,
    )
    return _errors_of(sums, windows)


def _errors_of(sums: dict[str, np.ndarray], windows: Windows) -> Errors:
    shape = sums["squared"].shape
    rows = np.arange(shape[1])[None] if windows.joint else np.asarray(windows.rows)[:, None]
    return Errors(**sums, variates=np.broadcast_to(rows, shape), horizon=windows.horizon)


@functools.partial(jax.jit, static_argnames=("predictor", "over"))
def _lane_errors(
    predictor: Predictor, params: TreeStack, windows: Windows, indices: jax.Array, over: Over
) -> dict[str, jax.Array]:
    def of_lane(params: Tree, shared: tuple[Windows, jax.Array]) -> dict[str, jax.Array]:
        return _batch_errors(predictor, params, *shared, placement=Placement())

    found = over.each(of_lane, params, shared=(windows, indices))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)  # windows first, then lanes


def evaluate_lanes(
    predictor: Predictor, params: TreeStack, windows: Windows, over: Over
) -> list[dict[str, Any]]:
    """Score a split with each of several trees of parameters, in one program; see `evaluate`.

    over: how their lanes are computed. Mapped, they get the bits that each would get alone.
    """
    placed = windows.over(over.mesh)
    size = _batch_size(predictor, windows, Placement())
    if over.mode == "batched":
        size = max(size * over.devices // params.own[0].shape[0], 1)
    sums = in_batches(
        lambda indices: _lane_errors(predictor, params, placed, indices=indices, over=over),
        windows.n,
        size,
    )
    found = []
    for lane in range(sums["squared"].shape[1]):
        own = {name: values[:, lane] for name, values in sums.items()}
        found.append(summarise(_errors_of(own, windows)))
    return found


def _batch_size(predictor: Predictor, windows: Windows, placement: Placement) -> int:
    size = predictor.eval_batch * placement.row_parts
    if windows.n_past + windows.n_known:
        members = windows.values.shape[-2]
        size = max(size * MEMBERS // max(members, MEMBERS), 1)
    return size


@dataclasses.dataclass(frozen=True, eq=False)
class OneBatch:
    """The first of `count` batches that `errors` scores, to time it: `call` does it, `trace` traces
    it.
    """

    call: Callable[[], Any]
    trace: Callable[[], jax.stages.Traced]
    count: int


def one_batch(
    predictor: Predictor, params: Tree, windows: Windows, placement: Placement | None = None
) -> OneBatch:
    """Take the first batch of `errors`, compiled as there; arguments as there."""
    placement = placement or Placement.of(params)
    size, n = rounded(_batch_size(predictor, windows, placement), windows.n, placement), windows.n
    indices = placement.put_rows(np.minimum(np.arange(size, dtype=np.int32), n - 1))
    # Named as in `errors`: arguments that are given in another way compile the function again.
    given = predictor, params, windows.over(placement.mesh)
    named: dict[str, Any] = {"indices": indices, "placement": placement}
    return OneBatch(
        lambda: _batch_errors(*given, **named),
        lambda: _batch_errors.trace(*given, **named),
        -(-n // size),
    )


def summarise(found: Errors, naive_scale: np.ndarray | None = None) -> dict[str, float]:
    """Means over all windows, observed steps and variates: mse, mae, rmse, mape (a fraction), and
    mase with a scale.

    Summed in float64 on the host, so the value does not depend on the batch size beyond the
    rounding of the forward pass itself.

    Args:
      found: from `errors`.
      naive_scale: [variates], the in-sample seasonal-naive MAE of each variate in the units of the
        data.
    """
    steps = found.steps.sum()
    if not steps:
        raise ValueError("no target of these windows is observed: there is nothing to score")
    mse = found.squared.sum() / steps
    scored = steps - found.zeros.sum()
    result = {
        "mse": mse,
        "mae": found.absolute.sum() / steps,
        "rmse": float(np.sqrt(mse)),
        "mape": found.percentage.sum() / scored if scored else float("nan"),
    }
    if naive_scale is not None:
        scale = np.asarray(naive_scale)[found.variates]
        usable = scale > 0  # a constant variate has no scale
        total = found.steps[usable].sum()
        per_entry = found.absolute[usable] / scale[usable]
        result["mase"] = per_entry.sum() / total if total else float("nan")
    return {name: float(value) for name, value in result.items()} | {
        "windows": int((found.steps > 0).sum())
    }


def evaluate(
    predictor: Predictor,
    params: Tree,
    windows: Windows,
    *,
    batch_size: int | None = None,
    naive_scale: np.ndarray | None = None,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Score of a split: mse, mae, rmse, mape, (mase), and the number of windows scored (one per
    variate).

    Args:
      predictor: a model or a baseline.
      params: its parameters; `{}` for a baseline.
      windows: the split. Horizons past the model's own are rolled out; missing targets (NaN) are
        not scored.
      batch_size: windows per forward pass; changes the speed, not the value. None: the predictor's
        `eval_batch`.
      naive_scale: see `summarise`.
      placement: of the parameters; None: ask them.
    Raises: ValueError when there is no window.
    """
    return summarise(
        errors(predictor, params, windows, batch_size=batch_size, placement=placement), naive_scale
    )


@functools.partial(jax.jit, static_argnames=("predictor", "placement"))
def _forecast(
    predictor: Predictor, params: Tree, windows: Windows, indices: jax.Array, placement: Placement
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = windows.gather(indices)
    point = _point(predictor, params, batch)
    return placement.everywhere((batch["context"], batch["target"], point))


def forecast_windows(
    predictor: Predictor,
    params: Tree,
    windows: Windows,
    indices: np.ndarray,
    placement: Placement | None = None,
) -> tuple[np.ndarray, ...]:
    """(context [B, C, L], target [B, C, H], point forecast [B, C, H]) of windows number `indices`
    [B], float64.
    """
    placement = placement or Placement.of(params)
    placed = windows.over(placement.mesh)
    found = _forecast(
        predictor, params, placed, indices=np.asarray(indices, np.int32), placement=placement
    )
    return tuple(sharding.on_host(x).astype(np.float64) for x in found)


def collapse(
    predictor: Predictor,
    params: Tree,
    windows: Windows,
    sample: int = 256,
    placement: Placement | None = None,
) -> tuple[str, ...]:
    """Warn of forecasts that are flat lines although what they should follow moves.

    Compares the variance inside the forecasts with that inside their targets, over `sample` windows
    spread evenly.
    """
    indices = np.linspace(0, windows.n - 1, min(sample, windows.n)).astype(np.int32)
    _, target, point = forecast_windows(
        predictor, params, windows, indices=indices, placement=placement
    )
    observed = ~np.isnan(target)
    some = observed.any(axis=-1)
    got = float(point.var(axis=-1).mean())
    count = observed[some].sum(axis=-1, keepdims=True)
    kept = np.where(observed[some], target[some], 0.0)
    centred = np.where(observed[some], kept - kept.sum(axis=-1, keepdims=True) / count, 0.0)
    expected = (
        float((np.square(centred).sum(axis=-1, keepdims=True) / count).mean())
        if some.any()
        else 0.0
    )
    if windows.horizon == 1 or got >= COLLAPSED * expected:
        return ()
    share = got / expected
    return (
        f"collapsed: forecasts vary {share:.2%} as much as the data, nearly flat lines; lower lr "
        "or start closer",
    )
