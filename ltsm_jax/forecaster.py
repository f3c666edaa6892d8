"""`Forecaster`: one object that forecasts tables, with intervals, covariates and what is known of
it.

Where `ltsm_jax.load` gives a model and its parameters to work with, this is what forecasts with
them: it reads tables of many items, scales every context by itself, says what it did, and keeps
the licence, the calibration and the verdict with the weights.
"""

import dataclasses
import functools
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ltsm_jax import hosts, sharding, trees
from ltsm_jax.data import BENCHMARKS, DataError, Panel, Series, load_series, read_panel
from ltsm_jax.data.panel_windows import PanelSplits, spread
from ltsm_jax.loading import Loaded, export, load_whole
from ltsm_jax.methods import auto_ets, estimates
from ltsm_jax.methods.binding import check_params, drawn, positive_int
from ltsm_jax.methods.conformal import WINDOWS, Calibration, rolling_origins
from ltsm_jax.methods.decision import ZERO_SHOT, Verdict
from ltsm_jax.methods.strategies import Strategy
from ltsm_jax.methods.verdict import (
    BUDGET,
    Alpha,
    BoundPanel,
    Compared,
    TuningPlan,
    bind_panel,
    compare,
)
from ltsm_jax.models import Model, folders
from ltsm_jax.plotting import plot_forecast
from ltsm_jax.report import write_report
from ltsm_jax.tasks import panels
from ltsm_jax.tasks.forecasting import Mode, Predictor, SeasonalNaive, naive_forecasts
from ltsm_jax.tasks.panels import Origins, PanelForecast
from ltsm_jax.training import TrainConfig, progress, timing
from ltsm_jax.trees import Params

FACTS = "forecaster"  # entry of a model folder's provenance
LEVELS = (0.1, 0.5, 0.9)
MOST_ETS = 100  # forecasts that AutoETS is calibrated on; each is a fit of its own
NAIVE = ("last_value", "seasonal_naive", "mean", "auto_ets")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Forecaster:
    """A model that forecasts tables; print it.

    Attributes:
      model, params: as from `ltsm_jax.load`.
      freq: step of the table that it was fitted on, or None.
      targets, past, known, static: names of the columns that it was fitted on; () before a fit.
      id, time: names of these columns (several ids: a tuple), or None. They are what `predict`
        reads unless told otherwise.
      context_len: rows of an item that are looked at, at most; None: the model's own.
      licence: of the weights.
      provenance: where the weights are from.
      calibration: errors of past forecasts, for quantiles that the model does not say.
      baseline: the naive forecast that a verdict found best, which then is what forecasts; or None.
      verdict: what `fit` found, or None; print it.
      buffers: tensors of the original that are not learned, for `export`.
    """

    model: Model
    params: Params
    _: dataclasses.KW_ONLY
    freq: str | None = None
    targets: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    id: str | tuple[str, ...] | None = None
    time: str | None = None
    context_len: int | None = None
    licence: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None
    baseline: str | None = None
    verdict: Verdict | None = None
    buffers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_params(self.model, self.params)
        if self.baseline is not None and self.baseline not in NAIVE:
            raise ValueError(f"baseline must be one of {', '.join(NAIVE)}; got {self.baseline!r}")
        if not self.licence:
            told = self.provenance.get("licence")
            object.__setattr__(
                self, "licence", told if isinstance(told, str) else self.model.licence
            )

    # --- in and out

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        accept_license: bool = False,
    ) -> "Forecaster":
        """Load whatever `ltsm_jax.load` takes, and folders that `save` wrote.

        Args:
          source, revision, token, accept_license: as for `ltsm_jax.load`.
        Raises: as `ltsm_jax.load`.
        Example: `Forecaster.load("timer-tiny").predict("sales.csv", 48)`
        """
        found = load_whole(source, revision=revision, token=token, accept_license=accept_license)
        provenance = dict(found.provenance)
        facts = _read_facts(provenance.pop(FACTS, {}), source)
        return cls(found.model, found.params, provenance=provenance, buffers=found.buffers, **facts)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a model folder that `load` reads, and `ltsm_jax.load` as well.

        overwrite: replace a model folder; no other folder is ever replaced.
        Returns: the folder.
        Raises: FileExistsError.
        """
        return folders.save(
            folder,
            self.model,
            self.params,
            provenance={**self.provenance, FACTS: self._facts()},
            buffers=self.buffers,
            overwrite=overwrite,
        )

    def export(self, path: str | Path, *, overwrite: bool = False) -> list[str]:
        """Write the model as what the original's code in PyTorch loads.

        The weights alone: calibration, verdict and a naive forecast have no place there.

        Args:
          path: file (.safetensors, .bin, .pth, .ckpt), or, without a suffix, a folder in the form
            of the hub.
          overwrite: replace an earlier export; nothing else is ever replaced.
        Returns: notes on what could not be kept.
        Raises: ValueError for a model that the original can't hold; FileExistsError.
        """
        notes = []
        if self.baseline is not None:
            notes.append(
                f"the verdict was to forecast with {self.baseline}; what is exported is the model"
            )
        found = Loaded(
            model=self.model, params=self.params, provenance=self.provenance, buffers=self.buffers
        )
        return notes + export(found, path, overwrite=overwrite)

    def _facts(self) -> dict[str, Any]:
        """Everything but the weights, as JSON types."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        for name in _NAMES:
            facts[name] = list(getattr(self, name))
        facts["id"] = list(self.id) if isinstance(self.id, tuple) else self.id
        facts["context_len"] = self.context_len
        facts["calibration"] = None if self.calibration is None else self.calibration.to_json()
        facts["verdict"] = None if self.verdict is None else self.verdict.to_json()
        return facts

    def __str__(self) -> str:
        model, count = self.model, trees.count(self.params)
        source = self.provenance.get("source", "")
        lines = [
            f"Forecaster: {model.family}, {count:,} parameters, context of {model.context_len} "
            "rows",
            f"weights: {source + ', ' if source else ''}licence {self.licence}",
        ]
        if self.targets:
            fitted = f"fitted on: {', '.join(self.targets)}"
            lines.append(fitted + (f", step {self.freq}" if self.freq else ""))
        for name in ("past", "known", "static"):
            if columns := getattr(self, name):
                lines.append(f"{name} covariates: {', '.join(columns)}")
        if self.baseline:
            lines.append(f"forecasts with: {self.baseline}, as the verdict says")
        if self.calibration:
            lines.append(f"calibrated: errors of {self.calibration.told}")
        if self.verdict is not None:
            lines.append(f"verdict: {self.verdict.reason}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        fitted = f" fitted on {', '.join(self.targets)}" if self.targets else ""
        return f"<Forecaster {self.model.family}, {trees.count(self.params):,} parameters{fitted}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    # --- fitting

    @hosts.interruptible()
    def fit(
        self,
        df: Any,
        horizon: int,
        *,
        methods: str | Strategy | Sequence[str | Strategy] = "auto",
        method: str | Strategy | None = None,
        alpha: Alpha = None,
        masks: Params | None = None,
        id: str | None = None,
        time: str | Sequence[str] | None = None,
        target: str | Sequence[str] | None = None,
        future: Any = None,
        known: str | Sequence[str] | None = None,
        past: str | Sequence[str] | None = None,
        static: Any = None,
        freq: str | None = None,
        date_format: str | None = None,
        missing: str | None = None,
        irregular: str | None = None,
        name: str | None = None,
        config: TrainConfig | None = None,
        budget: int | None = BUDGET,
        mode: Mode | None = None,
        seed: int = 0,
        prepared: BoundPanel | None = None,
        folder: str | Path | None = None,
        show_progress: bool = True,
    ) -> "Forecaster":
        """Tune on a table, and get a forecaster that forecasts with what is worth deploying.

        The checkpoint, what each method makes of it and naive forecasts are compared on validation
        windows; the best of each kind meet on an untouched test span, and `verdict` says what they
        showed. Where that is no tuned model, the checkpoint or a naive forecast is what forecasts.

        Args:
          df, id, time, target, future, known, past, static, freq, date_format, missing, irregular,
            name: a table and how it is read, as for `predict`. A model that forecasts with
            covariates is tuned and scored with them.
          horizon: rows that will be forecast.
          methods: "auto"; names such as "ff" or "zero_shot,ff,sff", `Strategy` objects, or a list
            of both, see `methods.verdict.named`. method: one of them, in place of `methods`.
          alpha: for the methods that mix (`methods.strategies.MIXED`), the weight of the pretrained
            side; by default 0.7. "auto": several, of which validation picks, see
            `methods.verdict.named`.
          masks: of a pruned model, see `prune`; what they prune stays 0.
          config: a `TrainConfig`; what it leaves out is the model's recipe.
          budget: optimiser steps of each method; None: the epochs of the recipe over all windows.
          mode: the training loss, "ims" or "direct"; None: that of the recipe.
          seed: of the random model, data order, dropout and intervals.
          prepared: what `prepared` gave for the same table and options, so that its windows are not
            cut twice.
          folder: for what is made: `model` (this forecaster, saved), verdict.json, report.md and
            report.html; and checkpoints in `training`, so that a killed run continues when called
            again.
          show_progress: a bar on a terminal, else a line every few seconds.
        Returns: a new forecaster, with its verdict, and with intervals calibrated on what was held
          out of training. This one is not modified.
        Raises: ValueError (DataError) for data, names and lengths that do not work, before anything
          is trained.
        Example:
        `fitted = Forecaster.load("timer-tiny").fit("sales.csv", 48); print(fitted.verdict)`
        """
        if method is not None:
            if methods != "auto":
                raise ValueError("method is one method in place of methods: give one of the two")
            methods = method
        panel = self.read(
            df,
            id=id,
            time=time,
            target=target,
            future=future,
            known=known,
            past=past,
            static=static,
            freq=freq,
            date_format=date_format,
            missing=missing,
            irregular=irregular,
            name=name,
        )
        found = compare(
            self.model,
            self.params,
            panel,
            horizon=horizon,
            methods=methods,
            alpha=alpha,
            masks=masks,
            config=config,
            budget=budget,
            context_len=self.context_len,
            mode=mode,
            seed=seed,
            prepared=prepared,
            folder=None if folder is None else Path(folder) / "training",
            show_progress=show_progress,
        )
        fitted = self._deployed(panel, found)._calibrated_on_held_out(found, seed)
        if folder is not None:
            fitted.save(Path(folder) / "model", overwrite=True)
            write_report(found.verdict, folder)
        return fitted

    def _deployed(self, panel: Panel, found: Compared) -> "Forecaster":
        """Take over what a comparison found worth deploying, and the columns it was found on."""
        deploy, scored = found.verdict.deploy, found.verdict.context_len
        # What was tuned or chosen on shorter contexts forecasts from such; the checkpoint as it is
        # needs no other.
        shorter = deploy != ZERO_SHOT and scored < (self.context_len or self.model.context_len)
        return dataclasses.replace(
            self,
            model=found.model,
            params=found.params,
            context_len=scored if shorter else self.context_len,
            freq=panel.freq,
            targets=panel.columns,
            past=panel.past,
            known=panel.known,
            static=() if panel.static is None else tuple(map(str, panel.static.columns)),
            id=panel.id_name if panel.id_parts is None else panel.id_columns,
            time=panel.time_name,
            calibration=None,
            baseline=deploy if deploy in NAIVE else None,
            verdict=found.verdict,
        )

    def prepared(
        self,
        panel: Panel,
        horizon: int,
        *,
        masks: Params | None = None,
        mode: Mode | None = None,
        seed: int = 0,
    ) -> BoundPanel:
        """Cut the windows that `fit` works on, to look at them first; arguments as there.

        Raises: ValueError (DataError) for data, names and lengths that do not work.
        """
        return bind_panel(
            self.model,
            self.params,
            panel,
            horizon=horizon,
            masks=masks,
            context_len=self.context_len,
            mode=mode,
            seed=seed,
        )

    def _calibrated_on_held_out(self, found: Compared, seed: int) -> "Forecaster":
        """The same with errors of its forecasts of validation and test targets; without where none
        can be measured.
        """
        splits = found.splits
        origins = _held_out(splits, WINDOWS if self.baseline != "auto_ets" else MOST_ETS, seed)
        horizon = found.verdict.horizon
        try:
            return self.calibrated(
                splits.panel, horizon, origins, source="held out of training", seed=seed
            )
        except ValueError:
            return self  # `predict` measures, or says what is missing

    # --- forecasts

    @hosts.interruptible()
    def predict(
        self,
        df: Any,
        horizon: int,
        *,
        quantile_levels: Sequence[float] = LEVELS,
        id: str | None = None,
        time: str | Sequence[str] | None = None,
        target: str | Sequence[str] | None = None,
        future: Any = None,
        known: str | Sequence[str] | None = None,
        past: str | Sequence[str] | None = None,
        static: Any = None,
        freq: str | None = None,
        date_format: str | None = None,
        missing: str | None = None,
        irregular: str | None = None,
        name: str | None = None,
        seed: int = 0,
        show_progress: bool = True,
    ) -> pd.DataFrame:
        """Forecast what comes after the end of every item of a table, in its own units.

        A model sees the last `context_len` rows of an item, each column standardised by what it has
        there. Quantiles are the model's own at levels that it says, between them interpolated, and
        else split-conformal: from the errors of its forecasts of the past.

        Args:
          df: a table (pandas, polars, Arrow, a CSV, parquet or Excel file, a benchmark's name), or
            a `Panel` or `Series`.
          horizon: rows to forecast.
          quantile_levels: in (0, 1); () for the point forecast alone.
          id, time, target, known, past, static, freq, date_format, missing, irregular, name: how
            the table is read, see `data.panel.PanelOptions`.
          future: table with what is known of the rows to come: id, time, known covariates.
          seed: of the draws of models that sample.
          show_progress: a bar on a terminal, else a line every few seconds, where it takes longer
            than that.
        Returns: one row per item, target and step, in that order: the id and time columns, all of
          them, under their own names (a time of several columns or without a name as "timestamp"),
          `target_name` where there are several targets, `predictions` (the model's point forecast),
          and a column per level, "0.1", ..., which never cross. `attrs["notes"]` says what was done
          to the data and where quantiles are from.
        Raises: ValueError (DataError) for data that cannot be used, and for levels that neither the
          model nor the history can say.
        """
        horizon = positive_int(horizon, "horizon")
        levels = _checked_levels(quantile_levels)
        options = {
            "id": id,
            "time": time,
            "target": target,
            "future": future,
            "known": known,
            "past": past,
            "static": static,
            "freq": freq,
            "date_format": date_format,
            "missing": missing,
            "irregular": irregular,
            "name": name,
        }
        panel = self.read(df, **options)
        found, notes = self._forecast(
            panel, horizon, levels, seed=seed, show_progress=show_progress
        )
        return _table(panel, found, levels, notes=(*panel.notes, *notes))

    def estimate(
        self,
        panel: Panel,
        horizon: int,
        *,
        quantile_levels: Sequence[float] = LEVELS,
        work_follows: bool = True,
    ) -> timing.TimeEstimate:
        """Estimate the time that `predict` takes for a panel (see `read`): a batch is timed, and
        compiled for it.

        work_follows: False reckons the time of a large model instead of compiling it.
        """
        by = self._forecasts_with(panel)
        own, rest = by.split(panel, horizon, _checked_levels(quantile_levels))
        every, _ = self._origins(by, panel, horizon, rest=rest)
        return self._estimate(
            by,
            panel,
            every,
            horizon=horizon,
            levels=own,
            measured=bool(rest),
            work_follows=work_follows,
        )

    def estimate_fit(
        self, prepared: BoundPanel, work: TuningPlan, *, seed: int = 0, work_follows: bool = True
    ) -> timing.TimeEstimate:
        """Estimate the time of `fit` on windows that `prepared` cut: tuning, scores, and errors for
        intervals.

        work: see `methods.verdict.tuning`. work_follows: as in `estimate`.
        """
        splits = prepared.splits
        by = self._forecasts_with(splits.panel)
        origins = _held_out(splits, WINDOWS, seed)
        horizon = splits.test.horizon
        intervals = self._estimate(
            by,
            splits.panel,
            origins,
            horizon=horizon,
            levels=(),
            measured=True,
            work_follows=work_follows,
        )
        return (
            estimates.of_comparison(prepared, work, seed=seed, work_follows=work_follows)
            + intervals
        )

    def _estimate(
        self,
        by: "Way",
        panel: Panel,
        origins: Origins,
        horizon: int,
        levels: tuple[float, ...],
        *,
        measured: bool,
        work_follows: bool,
    ) -> timing.TimeEstimate:
        """Estimate `_from`."""
        return estimates.of_forecast(
            by.predictor,
            by.params,
            panel,
            horizon=horizon,
            context_len=by.context_len,
            origins=origins,
            on_host=by.on_host,
            work_follows=work_follows,
            levels=levels,
            joint=by.joint,
            covariates=self.baseline is None and bool(self._used_covariates(panel)),
            season=panel.season if measured else None,
        )

    def plot(
        self,
        df: Any,
        forecast: pd.DataFrame,
        path: str | Path | None = None,
        *,
        items: Sequence[Any] | None = None,
        history: int | None = None,
        **reading: Any,
    ) -> Any:
        """Draw a forecast behind the end of the table that it was made from.

        Args:
          df: the table that was forecast. forecast: what `predict` returned for it.
          path: file to write (.png, .svg, .pdf), or None.
          items: ids to draw; by default the first few.
          history: rows of history; by default a few horizons.
          reading: the options that `predict` read the table with (id, time, target, ...).
        Returns: the matplotlib Figure.
        Raises: ImportError with what to install; ValueError for a forecast of another table.
        """
        panel = self.read(df, **reading)
        rows = panel.n_items * panel.n_variates
        same = "predictions" in forecast and len(forecast) % rows == 0
        if panel.id_parts is not None and set(panel.id_columns) <= set(forecast):
            joined = forecast[list(panel.id_columns)].astype(str).agg("/".join, axis=1)
            forecast = forecast.assign(**{str(panel.id_name): joined})
        if panel.id_name is not None:
            same &= panel.id_name in forecast and set(panel.ids) == set(forecast[panel.id_name])
        if not same:
            raise ValueError(
                f"this forecast is not one of the {panel.n_items} items of {panel.name}"
            )
        return plot_forecast(panel, forecast, path, items=items, history=history)

    def read(self, df: Any, **options: Any) -> Panel:
        """Read a table as `predict` does; what it gives may be handed in in place of the table.

        What is not given is as in the table that the forecaster was fitted on.

        options: those of `predict` about reading: id, time, target, future, known, ...
        Raises: ValueError (DataError) for data that cannot be used, and for options beside a table
          that has been read already.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(df, Panel | Series):
            return read_panel(df, **given)
        if isinstance(df, str) and df in BENCHMARKS:
            return Panel.of(load_series(df, **given))
        fitted = {
            "id": list(self.id) if isinstance(self.id, tuple) else self.id,
            "time": self.time,
            "target": list(self.targets),
            "known": list(self.known),
            "past": list(self.past),
            "static": list(self.static),
        }
        if self.targets and not isinstance(df, np.ndarray):
            given = {name: value for name, value in fitted.items() if value} | given
        return read_panel(df, **given)

    def _forecast(
        self, panel: Panel, horizon: int, levels: tuple[float, ...], seed: int, show_progress: bool
    ) -> tuple[PanelForecast, tuple[str, ...]]:
        """Forecast after the end of every item; quantiles at all `levels`."""
        by = self._forecasts_with(panel)
        own, rest = by.split(panel, horizon, levels)
        every, before = self._origins(by, panel, horizon, rest=rest)
        calibration = self._calibration_of(panel, horizon)
        with progress.Counter("forecast", "contexts", show_progress) as told:
            found = self._from(
                by,
                panel,
                every,
                horizon=horizon,
                levels=own,
                measured=bool(rest),
                seed=seed,
                told=told,
            )
        past, found = found.take(slice(panel.n_items, None)), found.take(slice(panel.n_items))
        notes = [
            *([f"forecast with {self.baseline}, as the verdict says"] if self.baseline else []),
            *self._covariate_notes(panel, horizon),
            *panels.notes_on_lengths(by.predictor, panel, by.context_len),
        ]
        if rest:
            # Where nothing has ever moved there is no error to measure, and none to expect.
            if calibration is None and found.unit.any():
                try:
                    calibration = Calibration.measured(panel, before, past, source="of the history")
                except ValueError as err:
                    raise self._unmeasured(panel, horizon, rest, problem=str(err)) from None
            if calibration is not None:
                notes.append(calibration.describe(rest))
            if still := int((found.unit == 0).sum()):
                notes.append(
                    f"{still} of {found.unit.size} contexts do not move: there these quantiles lie "
                    "on the forecast"
                )
        return _with_quantiles(found, rest, calibration), tuple(notes)

    def _calibration_of(self, panel: Panel, horizon: int) -> Calibration | None:
        """The calibration that is kept, where it is one of such forecasts."""
        kept = self.calibration
        return kept if kept is not None and kept.fits(horizon, panel.n_variates) else None

    def _origins(
        self, by: "Way", panel: Panel, horizon: int, rest: tuple[float, ...]
    ) -> tuple[Origins, Origins]:
        """Origins of forecasts: the end of every item, and then those in the past, which come alone
        as well.

        Errors at the levels `rest` need origins in the past where they are not measured yet. These
        are forecast together with the end of every item, so that no shape is compiled twice.
        """
        before = Origins.none()
        if rest and self._calibration_of(panel, horizon) is None:
            before = rolling_origins(
                panel, horizon, by.context_len, windows=MOST_ETS if by.on_host else None
            )
        return Origins.after(panel).and_then(before), before

    def after(
        self,
        panel: Panel,
        origins: Origins,
        horizon: int,
        levels: Sequence[float] = (),
        *,
        seed: int = 0,
    ) -> PanelForecast:
        """Forecast after any rows of a panel, as arrays: for scores of past forecasts.

        Args:
          origins: items, and the rows behind their contexts.
          levels: quantile levels. Those that the model does not say come from the calibration that
            is kept, see `calibrated`: one of the panel itself would know what comes after origins.
        Raises: ValueError for levels that neither model nor calibration say.
        """
        by = self._forecasts_with(panel)
        own, rest = by.split(panel, horizon, _checked_levels(levels))
        calibration = self.calibration
        if rest and (calibration is None or not calibration.fits(horizon, panel.n_variates)):
            raise ValueError(
                f"{self.baseline or self.model.family} does not say levels {rest} itself: "
                "calibrate the forecaster on rows before the origins, "
                f"forecaster.calibrated(panel, {horizon})"
            )
        found = self._from(
            by, panel, origins, horizon=horizon, levels=own, measured=bool(rest), seed=seed
        )
        return _with_quantiles(found, rest, calibration)

    def calibrated(
        self,
        panel: Panel,
        horizon: int,
        origins: Origins | None = None,
        *,
        source: str = "of the history",
        seed: int = 0,
    ) -> "Forecaster":
        """The same with a calibration that is kept: errors of its forecasts after `origins`.

        Args:
          panel: whose past is forecast. horizon: steps ahead that are calibrated.
          origins: such that targets lie in the panel, and outside of what the model was trained on;
            by default spread over the whole history.
          source: what they are, for notes.
        Raises: ValueError where nothing could be measured.
        """
        by = self._forecasts_with(panel)
        if origins is None:
            origins = rolling_origins(
                panel, horizon, by.context_len, windows=MOST_ETS if by.on_host else None
            )
        if not len(origins.items):
            raise ValueError("no item is long enough")
        found = self._from(by, panel, origins, horizon=horizon, levels=(), measured=True, seed=seed)
        return dataclasses.replace(
            self, calibration=Calibration.measured(panel, origins, found, source=source)
        )

    def _from(
        self,
        by: "Way",
        panel: Panel,
        origins: Origins,
        horizon: int,
        levels: tuple[float, ...],
        *,
        measured: bool,
        seed: int,
        told: Callable[[int, int], None] | None = None,
    ) -> PanelForecast:
        """Forecast after `origins`.

        Raises: ValueError where that at the end of an item is not finite.
        """
        found = panels.forecast_panel(
            by.predictor,
            by.params,
            panel,
            horizon=horizon,
            context_len=by.context_len,
            origins=origins,
            levels=levels,
            joint=by.joint,
            covariates=self.baseline is None and bool(self._used_covariates(panel)),
            season=panel.season if measured else None,
            key=jax.random.key(seed),
            on_host=by.on_host,
            told=told,
        )
        last = origins.ends == panel.bounds[origins.items + 1]
        if not np.isfinite(found.point[last]).all():
            _refuse_bad_weights(by.params)
            raise ValueError(
                f"{panel.name}: the forecast is not finite although data and weights are"
            )
        return found

    def _forecasts_with(self, panel: Panel) -> "Way":
        """Choose what forecasts a panel: the model adapted to it, or the naive forecast of a
        verdict.
        """
        return self.way(panel.n_variates, panel.model_freq or panel.freq, panel.season)

    def way(self, n_targets: int, freq: str | None, season: int) -> "Way":
        """Give what forecasts items of so many targets: the model made ready, or a naive forecast.

        Args:
          freq: step of the table, None where unknown. season: rows of its season, for naive ones.
        Raises: ValueError for a model that has to be tuned on such data first.
        """
        context_len = self.context_len or self.model.context_len
        if self.baseline is None:
            model, params = self._ready(n_targets, freq)
            return Way(
                predictor=model,
                params=params,
                context_len=context_len,
                joint=model.variates == "joint",
            )
        if self.baseline == "auto_ets":
            if not auto_ets.is_installed():
                raise ValueError(
                    "this forecaster forecasts with AutoETS: pip install statsforecast"
                )
            # Windows of one call; the model plays no part.
            return Way(
                predictor=SeasonalNaive(),
                params={},
                context_len=context_len,
                joint=False,
                on_host=functools.partial(_ets, season=season),
            )
        # Of a step without a season, the seasonal naive forecast is the last value.
        naive = naive_forecasts(season) | {"seasonal_naive": SeasonalNaive(season)}
        return Way(predictor=naive[self.baseline], params={}, context_len=context_len, joint=False)

    def _ready(self, n_targets: int, freq: str | None) -> tuple[Model, Params]:
        """The model ready for such data; nothing is drawn at random."""
        self.model.check_task("forecasting")
        model, params = self.model.for_series(
            self.params, n_variates=n_targets, freq=freq, key=jax.random.key(0)
        )
        if fresh := drawn(self.params, params):
            raise ValueError(
                f"this {model.family} model has no parameters for {n_targets} targets such as "
                f"these: {len(fresh)} arrays ({fresh[0]}, ...) would be drawn at random. Tune it "
                "on them first"
            )
        return model, sharding.colocate(params)

    def _unmeasured(
        self, panel: Panel, horizon: int, levels: tuple[float, ...], problem: str
    ) -> DataError:
        """The error for levels that neither model nor history can say."""
        shown = ", ".join(f"{level:g}" for level in levels)
        return DataError(
            f"{panel.name}: {self.baseline or self.model.family} does not say quantiles {shown} "
            f"itself, and its errors {horizon} rows ahead cannot be measured on this history "
            f"({problem}; the longest item has {panel.lengths.max()} rows). Bring more rows, a "
            "shorter horizon, or ask for the point forecast alone: quantile_levels=()"
        )

    def _used_covariates(self, panel: Panel) -> tuple[str, ...]:
        takes = self.model.covariates if self.baseline is None else ()
        return (panel.past if "past" in takes else ()) + (panel.known if "known" in takes else ())

    def _covariate_notes(self, panel: Panel, horizon: int) -> tuple[str, ...]:
        used = self._used_covariates(panel)
        static = () if panel.static is None else tuple(map(str, panel.static.columns))
        notes = []
        unused = [name for name in (*panel.past, *panel.known, *static) if name not in used]
        if unused:
            notes.append(
                f"{self.baseline or self.model.family} does not use covariates: {', '.join(unused)}"
            )
        for name in panel.known:
            if name not in used:
                continue
            ahead = _known_ahead(panel, name)
            few = int((ahead < horizon).sum())
            if few:
                where = f" in {few} of {panel.n_items} items" if panel.n_items > 1 else ""
                notes.append(
                    f"{name} is known {ahead.min()} rows ahead{where}, and the forecast has "
                    f"{horizon}: it is unknown after that"
                )
        return tuple(notes)


def _held_out(splits: PanelSplits, most: int, seed: int) -> Origins:
    """Origins of the validation and test targets, `most` of these places at most, spread evenly."""
    pairs = []
    for windows in (splits.val, splits.test):
        # Windows of several targets of an item begin in one place.
        item, row = splits.origins(windows)
        pairs.append(np.unique(np.stack([item, row], axis=1), axis=0))
    item, row = np.concatenate(pairs).T
    kept = spread(len(item), most, seed)
    return Origins(item[kept], splits.panel.bounds[item[kept]] + row[kept])


def _known_ahead(panel: Panel, name: str) -> np.ndarray:
    """Rows after its end [N] up to which a covariate is known in each item."""
    future = panel.future_values
    if future is None or not future.size:
        return np.zeros(panel.n_items, int)
    known = ~np.isnan(future[panel.known.index(name)])
    return (known * (1 + np.arange(known.shape[1]))).max(axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """A way to forecast: a predictor on the device, or a function on the host in its place."""

    predictor: Predictor
    params: Params
    context_len: int
    joint: bool
    on_host: Callable[[np.ndarray, int], np.ndarray] | None = None

    def split(
        self, panel: Panel, horizon: int, levels: Sequence[float]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Those of `levels` that it says itself, and those that it does not; both rising."""
        own = ()
        if self.on_host is None:
            members = panel.n_variates if self.joint else 1
            kinds = panels.covariate_counts(self.predictor, panel)
            own = panels.own_levels(
                self.predictor,
                self.params,
                members,
                horizon=horizon,
                wanted=levels,
                covariates=kinds,
            )
        return own, tuple(level for level in sorted(levels) if level not in own)


def _with_quantiles(
    found: PanelForecast, levels: tuple[float, ...], calibration: Calibration | None
) -> PanelForecast:
    """A forecast with its quantiles and those at `levels` that a calibration says, rising.

    Without a calibration these lie on the forecast.
    """
    quantiles = found.quantiles
    if levels:
        more = np.repeat(found.point[..., None], len(levels), axis=-1)
        if calibration is not None:
            more = calibration.quantiles(found, levels)
        quantiles = np.concatenate([quantiles, more], axis=-1)
    # Quantiles of one forecast from two sources may cross.
    rising = np.sort(quantiles, axis=-1)
    return dataclasses.replace(
        found, quantiles=rising, levels=tuple(sorted((*found.levels, *levels)))
    )


def _ets(contexts: np.ndarray, horizon: int, season: int) -> np.ndarray:
    return auto_ets.ets_forecast(contexts, horizon, season)


_PLAIN = ("freq", "time", "licence", "baseline")  # texts or None
_NAMES = ("targets", "past", "known", "static")


def _read_facts(facts: Any, source: Any) -> dict[str, Any]:
    """Turn the result of `_facts` into arguments of `Forecaster`; facts of a later version are left
    out.

    Raises: ValueError for anything else.
    """
    try:
        found: dict[str, Any] = {}
        for name in _PLAIN:
            value = facts.get(name)
            if not isinstance(value, str | None):
                raise ValueError(f"{name} is a {type(value).__name__}")
            found[name] = value
        for name in _NAMES:
            values = facts.get(name, [])
            if not isinstance(values, list) or not all(isinstance(x, str) for x in values):
                raise ValueError(f"{name} is no list of names")
            found[name] = tuple(values)
        told = facts.get("id")
        if isinstance(told, list) and all(isinstance(x, str) for x in told):
            told = tuple(told)
        elif not isinstance(told, str | None):
            raise ValueError("id is no name and no list of names")
        found["id"] = told
        told = facts.get("calibration")
        found["calibration"] = None if told is None else Calibration.from_json(told)
        found["context_len"] = facts.get("context_len")
        if found["context_len"] is not None:
            found["context_len"] = positive_int(found["context_len"], "context_len")
        told = facts.get("verdict")
        found["verdict"] = None if told is None else Verdict.from_json(told)
    except (AttributeError, ValueError) as err:
        raise ValueError(f"{source}: what it holds of a Forecaster can't be read ({err})") from None
    found["licence"] = found["licence"] or ""
    return found


def _checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Raises: ValueError for levels that are not numbers between 0 and 1, each once."""
    try:
        found = tuple(float(level) for level in levels)
    except (TypeError, ValueError):
        found = (np.nan,)
    # Levels are names of columns, in six digits: those that differ later would be one column.
    names = {f"{level:g}" for level in found}
    if not all(0 < level < 1 for level in found) or len(names) < len(found):
        raise ValueError(
            f"quantile_levels are numbers between 0 and 1, each once, such as {LEVELS}; got "
            f"{levels!r}"
        )
    return found


def _refuse_bad_weights(params: Params) -> None:
    """Raises: ValueError naming the parameters that are not finite."""
    flat = trees.flatten(params)
    bad = [path for path, leaf in flat.items() if not bool(jnp.isfinite(leaf).all())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise ValueError(
            f"{len(bad)} of {len(flat)} parameters are not finite ({shown}): the weights are "
            "damaged"
        )


def _table(
    panel: Panel, found: PanelForecast, levels: tuple[float, ...], notes: tuple[str, ...]
) -> pd.DataFrame:
    """The long table of a forecast."""
    n, c, horizon = found.point.shape
    columns: list[tuple[str, Any]] = []
    if panel.id_parts is not None:
        columns += [
            (name, np.repeat(panel.id_parts[name].to_numpy(), c * horizon))
            for name in panel.id_columns
        ]
    elif panel.id_name is not None:
        columns.append((panel.id_name, np.repeat(panel.ids, c * horizon)))
    stamps = panel.stamps_after(horizon)
    if stamps is not None:
        every = np.broadcast_to(stamps[:, None], (n, c, horizon)).ravel()
        index = pd.DatetimeIndex(every)
        if panel.tz is not None:
            index = index.tz_localize("UTC").tz_convert(panel.tz)
        columns.append((panel.time_name or "timestamp", index))
    if c > 1:
        names = np.array(panel.columns, object)
        columns.append(("target_name", np.tile(np.repeat(names, horizon), n)))
    columns.append(("predictions", found.point.ravel()))
    for level in levels:
        columns.append((f"{level:g}", found.quantiles[..., found.levels.index(level)].ravel()))
    names = [name for name, _ in columns]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise DataError(
            f"{panel.name}: the forecast would have two columns called "
            f"{', '.join(map(repr, twice))}; rename those of the table"
        )
    table = pd.DataFrame(dict(columns))
    table.attrs["notes"] = list(notes)
    return table
