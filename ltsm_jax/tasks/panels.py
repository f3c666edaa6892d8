"""Forecasts from many origins of a panel: one compiled program per shape, in bounded memory.

An origin is an item and the row after its context. Where a forecast begins at the end of every
item, origins are the items; rolling origins further back serve calibration.

Every choice that touches a forecast's value (how long its context is, what fills it up) is made
from the item alone, so that a forecast does not depend on which other items are in the call.

Shapes: M origins, C targets, K covariates, L context length, H horizon, W quantile levels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.data import DataError
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.windows import context_scale, scaled_covariates
from ltsm_jax.models.family import Forecast, Model
from ltsm_jax.tasks.forecasting import MEMBERS, Predictor
from ltsm_jax.trees import Tree

CONTEXT_BYTES = 1 << 27  # of the contexts of one batch, in float64
SMALLEST_UNIT = 0.01  # of errors, of a context that repeats itself exactly
FEW = 8  # names shown in a message
SHORTEST = 64  # length of the shortest contexts that are filled up in front


@dataclasses.dataclass(frozen=True, eq=False)
class Origins:
    """Origins of forecasts.

    items: [M] numbers of the panel's items. ends: [M] row of the panel behind each context.
    """

    items: np.ndarray
    ends: np.ndarray

    @classmethod
    def after(cls, panel: Panel) -> "Origins":
        """The end of every item: what comes after it is the future."""
        return cls(np.arange(panel.n_items), np.asarray(panel.bounds[1:]))

    @classmethod
    def none(cls) -> "Origins":
        """No origin."""
        return cls(np.zeros(0, int), np.zeros(0, int))

    def take(self, rows: Any) -> "Origins":
        """Some of them, by number."""
        return Origins(self.items[rows], self.ends[rows])

    def and_then(self, more: "Origins") -> "Origins":
        """These and `more`, in this order."""
        return Origins(np.append(self.items, more.items), np.append(self.ends, more.ends))


@dataclasses.dataclass(frozen=True, eq=False)
class PanelForecast:
    """Forecasts in data units.

    point: [M, C, H] float64. quantiles: [M, C, H, W] at rising `levels`: the requested ones that
    the model has. unit: [M, C] the unit of errors, see `error_unit`; ones where not requested.
    """

    point: np.ndarray
    quantiles: np.ndarray
    levels: tuple[float, ...]
    unit: np.ndarray

    def take(self, rows: Any) -> "PanelForecast":
        """The forecasts of some origins, by number."""
        return dataclasses.replace(
            self, point=self.point[rows], quantiles=self.quantiles[rows], unit=self.unit[rows]
        )


def covariate_counts(model: Any, panel: Panel, covariates: bool = True) -> tuple[int, int]:
    """How many of the panel's covariates, of the past and known ahead, a model takes."""
    takes = getattr(model, "covariates", ()) if covariates else ()
    return len(panel.past) * ("past" in takes), len(panel.known) * ("known" in takes)


# --- quantiles


def own_levels(
    model: Predictor,
    params: Tree,
    n_variates: int,
    horizon: int,
    wanted: Sequence[float],
    covariates: tuple[int, int] = (0, 0),
) -> tuple[float, ...]:
    """Levels among `wanted`, rising, that a model says itself, without a guess at the tails.

    From n samples those between 1 / (n + 1) and n / (n + 1); from
    quantiles those between the lowest and the highest; none from a point alone.

    covariates: how many of the past, and how many known ahead, the model is given.
    """
    if not len(wanted):
        return ()
    low, high = _range(model, params, n_variates, horizon=horizon, covariates=covariates)
    slack = 1e-9  # 0.1 is 0.1 however it was computed
    return tuple(level for level in sorted(wanted) if low - slack <= level <= high + slack)


_RANGES: dict[
    tuple[Predictor, int, tuple[int, int]], tuple[float, float]
] = {}  # tracing a large model takes a second


def _range(
    model: Any, params: Tree, n_variates: int, horizon: int, covariates: tuple[int, int]
) -> tuple[float, float]:
    """The lowest and the highest level that a model says; (1, 0) where it says none."""
    if (model, n_variates, covariates) not in _RANGES:
        n_past, n_known = covariates
        one = jax.ShapeDtypeStruct((1, n_variates, SHORTEST), jnp.float32)
        given = {}
        if n_past:
            given["past"] = jax.ShapeDtypeStruct((1, n_past, SHORTEST), jnp.float32)
        if n_known:
            given["known"] = jax.ShapeDtypeStruct((1, n_known, SHORTEST + horizon), jnp.float32)

        def ask(params, x, given):
            if given:
                return model.predict_with(params, x, horizon, **given)
            return model.predict(params, x, horizon)

        found = jax.eval_shape(ask, params, one, given)
        ends = 1.0, 0.0
        if found.samples is not None:
            n = found.samples.shape[-1]
            ends = 1 / (n + 1), n / (n + 1)
        elif found.quantiles is not None:
            ends = min(found.levels), max(found.levels)
        _RANGES[model, n_variates, covariates] = ends
    return _RANGES[model, n_variates, covariates]


def quantiles_at(found: Forecast, levels: Sequence[float]) -> jax.Array:
    """Quantiles [..., W] of a forecast at rising `levels` of its range, which never cross.

    Of samples the empirical ones; else linear between the sorted values at the model's levels.
    """
    if not levels:
        return jnp.zeros((*found.point.shape, 0), found.point.dtype)
    if found.samples is not None:
        at = jnp.quantile(found.samples, jnp.asarray(levels, jnp.float32), axis=-1)
        return jnp.moveaxis(at, 0, -1)
    assert found.quantiles is not None
    have = np.asarray(found.levels)
    rising = jnp.sort(found.quantiles[..., np.argsort(have)], axis=-1)
    have = np.sort(have)
    place = np.interp(np.asarray(levels), have, np.arange(len(have)))
    # 0.1 + 0.2 is not 0.3: a level of the model's own is taken as it is.
    place = np.where(np.abs(place - place.round()) < 1e-6, place.round(), place)
    low = np.floor(place).astype(int)
    high = np.ceil(place).astype(int)
    share = jnp.asarray(place - low, rising.dtype).reshape((1,) * (rising.ndim - 1) + (-1,))
    return rising[..., low] + (rising[..., high] - rising[..., low]) * share


# --- lengths of contexts


def rung_below(rows: np.ndarray, patch: int) -> np.ndarray:
    """A length among a few that is at most `rows`: whole patches, eight lengths in every octave.

    Up to fifteen patches are all kept; of more, the oldest ninth goes at most.
    """
    unit = np.where(rows < patch, 1, patch)
    count = rows // unit
    shift = np.maximum(np.floor(np.log2(count)).astype(int) - 3, 0)
    return (count >> shift << shift) * unit


def rung_above(rows: np.ndarray) -> np.ndarray:
    """A length among a few that is at least `rows`: the powers of two from `SHORTEST` on."""
    return 1 << np.ceil(np.log2(np.maximum(rows, SHORTEST))).astype(int)


def lengths_of(model: Predictor, rows: np.ndarray, context_len: int) -> np.ndarray:
    """Context length [M] that is used for origins with `rows` rows before them.

    Few lengths, as each is compiled. A family for which missing values in front change nothing gets
    them. For others the oldest rows are left away: those that fill no patch, and of more than
    fifteen patches a ninth at most. What other items are in the call plays no part.
    """
    if isinstance(model, Model) and not model.missing_in_front:
        found = rung_below(rows, model.patch_len)
    else:
        found = rung_above(rows)
    return np.where(rows >= context_len, context_len, np.minimum(found, context_len))


# --- forecasts


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """Forecasts from contexts of one length, `size` of them in each batch.

    rows: the forecasts by number: origins, or of windows of one target origins times targets.
    """

    length: int
    rows: np.ndarray
    size: int

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.rows) // self.size)


def passes(
    model: Predictor,
    panel: Panel,
    origins: Origins,
    *,
    context_len: int,
    joint: bool = False,
    covariates: bool = False,
    batch_size: int | None = None,
) -> list[Pass]:
    """Sort forecasts by the length of their contexts, each of which is a program; arguments as for
    `forecast_panel`.
    """
    c = panel.n_variates
    members = c if joint else 1
    width = members + sum(covariate_counts(model, panel, covariates))
    lengths = lengths_of(model, origins.ends - panel.bounds[origins.items], context_len)
    found = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        if not joint:
            rows = (rows[:, None] * c + np.arange(c)).ravel()
        found.append(
            Pass(
                int(length),
                rows,
                batch_size or _batch_size(model, width, int(length), count=len(rows)),
            )
        )
    return found


def trace_program(
    model: Predictor,
    params: Tree,
    panel: Panel,
    horizon: int,
    of: Pass,
    *,
    levels: tuple[float, ...] = (),
    joint: bool = False,
    covariates: bool = False,
) -> jax.stages.Traced:
    """Trace the program that forecasts a batch, from shapes alone."""

    def shape(width: int, length: int) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct((of.size, width, length), jnp.float32) if width else None

    n_past, n_known = covariate_counts(model, panel, covariates)
    past, known = shape(n_past, of.length), shape(n_known, of.length + horizon)
    context = shape(panel.n_variates if joint else 1, of.length)
    key = jax.random.key(0)
    return _forecast.trace(
        model,
        params,
        context,
        past=past,
        known=known,
        key=key,
        horizon=horizon,
        levels=levels,
    )


def program(
    model: Any,  # a `Predictor`; with covariates a `Model`
    params: Tree,
    context: jax.Array,
    past: jax.Array | None,
    known: jax.Array | None,
    key: jax.Array,
    horizon: int,
    levels: tuple[float, ...],
) -> tuple[jax.Array, jax.Array]:
    """Forecast a batch of scaled windows: point [B, C, H], quantiles [B, C, H, W] at `levels`."""
    if past is None and known is None:
        found = model.predict(params, context, horizon, key=key)
    else:
        found = model.predict_with(params, context, horizon, past=past, known=known, key=key)
    return found.point, quantiles_at(found, levels)


_forecast = functools.partial(jax.jit, static_argnames=("model", "horizon", "levels"))(program)


def forecast_panel(
    model: Predictor,
    params: Tree,
    panel: Panel,
    horizon: int,
    *,
    context_len: int,
    origins: Origins | None = None,
    levels: Sequence[float] = (),
    joint: bool = False,
    covariates: bool = False,
    season: int | None = None,
    key: jax.Array | None = None,
    on_host: Callable[[np.ndarray, int], np.ndarray] | None = None,
    batch_size: int | None = None,
    told: Callable[[int, int], None] | None = None,
) -> PanelForecast:
    """Forecast `horizon` rows after each origin, from contexts standardised by themselves.

    Args:
      model, params: ready for the panel (`Model.for_series`), or a baseline and {}.
      context_len: rows of a context at most.
      origins: by default the end of every item.
      levels: quantile levels; those that the model does not have are left out of the result.
      joint: forecast the targets of an item jointly.
      covariates: pass the covariates of the kinds that the model takes to it
        (`Model.predict_with`).
      season: rows of a season, for `PanelForecast.unit`; None: no units are computed.
      key: of the draws of models that sample.
      on_host: forecasts [B, H] of contexts [B, L], in place of `model`, which then says its batch
        size alone.
      batch_size: windows of one forward pass; by default what `eval_batch` and the memory allow.
      told: called after each batch with the forecasts that are done, and all of them.
    Returns: forecasts; NaN where a context in the past holds no value.
    Raises: DataError where one at the end of its item holds none, naming items and targets.
    """
    origins = Origins.after(panel) if origins is None else origins
    key = jax.random.key(0) if key is None else key
    m, c = len(origins.items), panel.n_variates
    members, count = (c, m) if joint else (1, m * c)
    kinds = covariate_counts(model, panel, covariates)
    said = ()
    if on_host is None:
        said = own_levels(model, params, members, horizon=horizon, wanted=levels, covariates=kinds)
    how = {"key": key, "horizon": horizon, "levels": said}
    point = np.empty((count, members, horizon))
    quantiles = np.empty((count, members, horizon, len(said)))
    unit = np.ones((count, members))

    def collect(rows, answer, mean, scale) -> None:
        y, q = (np.asarray(x, np.float64)[: len(rows)] for x in answer)
        point[rows] = y * scale + mean
        quantiles[rows] = q * scale[..., None] + mean[..., None]

    pending: tuple[np.ndarray, Any, np.ndarray, np.ndarray] | None = None
    done = 0
    for group in passes(
        model,
        panel,
        origins,
        context_len=context_len,
        joint=joint,
        covariates=covariates,
        batch_size=batch_size,
    ):
        length, size = group.length, group.size
        for rows in _batches(group.rows, size):
            here = origins.take(rows if joint else rows // c)
            cut = _Cut(panel, here, length=length, horizon=horizon)
            variates = None if joint else rows % c
            context = cut.contexts(panel.values, variates)
            mean, scale = context_scale(context)
            scale[_empty(context, cut, variates)] = np.nan
            if season is not None:
                unit[rows] = _units(
                    cut, context, mean, scale=scale, variates=variates, season=season
                )
            scaled = _filled_up(((context - mean) / scale).astype(np.float32), size)
            if on_host is None:
                past, known = cut.covariates(size, kinds)
                answer = _forecast(model, params, scaled, past=past, known=known, **how)
            else:
                answer = _forecast_on_host(on_host, scaled[: len(rows)], horizon)
            # While the device works on this batch, the host takes in the one before.
            if pending is not None:
                collect(*pending)
            pending = rows, answer, mean, scale
            done += len(rows)
            if told is not None:
                told(done, count)
    if pending is not None:
        collect(*pending)
    return PanelForecast(
        point=point.reshape(m, c, horizon),
        quantiles=quantiles.reshape(m, c, horizon, -1),
        levels=said,
        unit=unit.reshape(m, c),
    )


def _forecast_on_host(
    on_host: Callable[[np.ndarray, int], np.ndarray], context_BCL: np.ndarray, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """Forecasts [B, C, H] of `on_host`, and no quantiles [B, C, H, 0]."""
    b, c, length = context_BCL.shape
    y = on_host(context_BCL.reshape(-1, length), horizon).reshape(b, c, horizon)
    return y, np.zeros((b, c, horizon, 0))


def _units(
    cut: "_Cut",
    context: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    *,
    variates: np.ndarray | None,
    season: int,
) -> np.ndarray:
    """Units [B, M] of errors after contexts [B, M, L], in data units.

    A context that does not move has the unit of all rows of the item before its origin.
    """
    units = error_unit((context - mean) / scale, season) * scale[..., 0]
    for row, member in np.argwhere(units == 0):
        variate = int(member if variates is None else variates[row])
        units[row, member] = cut.unit_of_all(int(row), variate, season)
    return units


def error_unit(z: np.ndarray, season: int) -> np.ndarray:
    """Unit [...] in which errors of forecasts after contexts z [..., L] are alike.

    The geometric mean of the standard deviation and of the mean difference of rows one season
    apart: the first says how far the context strays, the second how well it repeats itself. Where
    both are known, errors in this unit keep their distribution longer than in either of them.
    0 for a context that does not move.

    z: standardised by `context_scale`; NaN = missing.
    """
    observed = ~np.isnan(z)
    known = np.where(observed, z, 0.0)
    count = np.maximum(observed.sum(axis=-1), 1)
    std = np.sqrt(np.square(known).sum(axis=-1) / count)
    lag = season if season < z.shape[-1] else 1
    gap = np.abs(z[..., lag:] - z[..., :-lag])
    there = ~np.isnan(gap)
    repeated = np.where(there, gap, 0.0).sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)
    repeated = np.where(there.any(axis=-1), repeated, std)

    # A perfect repetition does not go on for ever.
    found = np.sqrt(std * np.maximum(repeated, SMALLEST_UNIT * std))
    # Standardised contexts have a deviation of 1, those that do not move one of rounding.
    return np.where(std > 0.5, found, 0.0)


def batch_of(model: Predictor, width: int, length: int) -> int:
    """Most windows of one forward pass: a power of two, so that few shapes are compiled."""
    most = min(model.eval_batch, max(CONTEXT_BYTES // (8 * width * length), 1))
    if width > MEMBERS:
        most = max(most * MEMBERS // width, 1)
    return 1 << (most.bit_length() - 1)


def _batch_size(model: Predictor, width: int, length: int, count: int) -> int:
    return min(batch_of(model, width, length), 1 << max(count - 1, 0).bit_length())


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _filled_up(x: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row until there are `size`, so that every batch has one shape."""
    missing = size - len(x)
    return x if missing == 0 else np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Cut:
    """The contexts of one batch of origins, all of one length."""

    panel: Panel
    origins: Origins
    length: int
    horizon: int

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B, L] of the panel, and which of them are the item's own."""
        ends, items = self.origins.ends, self.origins.items
        at = ends[:, None] - self.length + np.arange(self.length)
        return at, at >= self.panel.bounds[items][:, None]

    def contexts(self, values: np.ndarray, variates: np.ndarray | None = None) -> np.ndarray:
        """[B, C, L] of `values` [C, R]; with `variates` [B] only that row of each, [B, 1, L]."""
        at, inside = self._places
        at = np.where(inside, at, 0)
        if variates is not None:
            return np.where(inside, values[variates[:, None], at], np.nan)[:, None]
        return np.where(inside, values[:, at], np.nan).swapaxes(0, 1)

    def unit_of_all(self, row: int, variate: int, season: int) -> float:
        """The unit of errors that all rows of the item before the origin give, 0 if none moves."""
        start, end = self.panel.bounds[self.origins.items[row]], self.origins.ends[row]
        x = self.panel.values[variate, start:end]
        mean, scale = context_scale(x)
        return float(error_unit((x - mean) / scale, season) * scale[0])

    def covariates(
        self, size: int, kinds: tuple[int, int]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Past covariates [size, K, L] and known ones [size, K', L + H], standardised likewise;
        None for a kind of which `kinds` says 0.
        """
        panel, past, known = self.panel, None, None
        n_past, n_known = kinds
        if n_past:
            assert panel.past_values is not None
            x = self.contexts(panel.past_values)
            past = _filled_up(scaled_covariates(x, self.length), size)
        if n_known:
            assert panel.known_values is not None
            x = np.concatenate([self.contexts(panel.known_values), self._ahead()], axis=-1)
            known = _filled_up(scaled_covariates(x, self.length), size)
        return past, known

    def _ahead(self) -> np.ndarray:
        """The known covariates after each origin [B, K, H]: rows of the item, then its future."""
        panel, ends, items = self.panel, self.origins.ends, self.origins.items
        assert panel.known_values is not None
        at = ends[:, None] + np.arange(self.horizon)
        stop = panel.bounds[items + 1][:, None]
        rows = panel.known_values[:, np.minimum(at, panel.n_rows - 1)]
        found = np.where(at < stop, rows, np.nan)
        if panel.future_values is not None and panel.future_values.shape[-1]:
            later = at - stop
            there = (later >= 0) & (later < panel.future_values.shape[-1])
            at_item = np.broadcast_to(items[:, None], at.shape)
            future = panel.future_values[:, at_item, np.where(there, later, 0)]
            found = np.where(there, future, found)
        return found.swapaxes(0, 1)


def _empty(context: np.ndarray, cut: _Cut, variates: np.ndarray | None) -> np.ndarray:
    """Mark the contexts [B, C] that hold no value.

    Raises: DataError naming items (and targets) where that is the end of the item.
    """
    panel, origins = cut.panel, cut.origins
    empty: Any = np.isnan(context).all(axis=-1)
    last = origins.ends == panel.bounds[origins.items + 1]
    names = []
    for row, member in np.argwhere(empty & last[:, None]):
        column = panel.columns[member if variates is None else variates[row]]
        names.append(
            column if panel.id_name is None else f"{column} of {panel.ids[origins.items[row]]}"
        )
    if names:
        shown = ", ".join(names[:FEW]) + (
            f" and {len(names) - FEW} more" if len(names) > FEW else ""
        )
        raise DataError(
            f"{panel.name}: no value in the last {cut.length} rows of {shown}; leave these out, or "
            "end the table where they have values"
        )
    return empty


def notes_on_lengths(model: Predictor, panel: Panel, context_len: int) -> tuple[str, ...]:
    """Say how many items are shorter than the context, and whether rows of them are left away."""
    rows = panel.lengths
    short = int((rows < context_len).sum())
    if not short:
        return ()
    lengths = lengths_of(model, rows, context_len)
    whole = np.minimum(rows, context_len)
    said = f"{short} of {len(rows)} items have fewer rows than the context of {context_len}"
    if cut := int((lengths < whole).sum()):
        share = 1 - (lengths / whole).min()
        said += (
            f"; of {cut} the oldest rows, at most {share:.0%}, are not seen: contexts have few "
            "lengths"
        )
    return (said,)
