"""Compare a checkpoint, what tuning makes of it and naive forecasts on a panel, and say what to
deploy.

Everything is chosen on validation windows: the epoch, the method, the naive forecast. What was
chosen is then scored on the test span, which nothing has looked at, and `decision.decide` says what
to deploy.
"""

import dataclasses
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ltsm_jax import hosts, sharding, training
from ltsm_jax.data.panel import Panel
from ltsm_jax.data.panel_windows import MOST_SCORED, MOST_TRAIN, PanelSplits, cut_panel, spread
from ltsm_jax.data.windows import Windows
from ltsm_jax.frequency import count_unit, microseconds, to_wall
from ltsm_jax.layers.masks import apply_masks, place
from ltsm_jax.methods import auto_ets
from ltsm_jax.methods.alpha import GRID
from ltsm_jax.methods.binding import (
    check_params,
    default_mode,
    drawn,
    positive_int,
    shorter_contexts,
    takes,
    target_len,
)
from ltsm_jax.methods.checks import Difference, bootstrap_difference
from ltsm_jax.methods.decision import TITLES, ZERO_SHOT, Candidate, Verdict, decide, few_blocks
from ltsm_jax.methods.pruning import refuse_pruned
from ltsm_jax.methods.run import RunResult, run
from ltsm_jax.methods.starts import start_params
from ltsm_jax.methods.strategies import MIXED, Strategy, strategy
from ltsm_jax.models import Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks import forecasting
from ltsm_jax.tasks.forecasting import MODES, Errors, Forecasting, Mode
from ltsm_jax.training import compiling, progress
from ltsm_jax.trees import Params

__all__ = [
    "BUDGET",
    "BoundPanel",
    "Compared",
    "TuningPlan",
    "Verdict",
    "bind_panel",
    "compare",
    "named",
    "tuning",
]

Methods = str | Strategy | Sequence[str | Strategy]
Alpha = float | Literal["auto"] | None
BUDGET = 400  # steps of each method
EPOCHS = 5  # validations in a budget
LARGEST_BATCH = 256
# batches that a table of training windows is cut into at least, where it has 16 windows for each
STEPS = 8
SMALLEST_BATCH = 16
REPEATS = 10  # of a small table in one epoch
MOST_ETS = 64  # windows that AutoETS is fitted on, in validation and in test: about a second each
EXAMPLES = 4
DAYS = {"B": 1.4, "M": 30.436875, "Q": 91.310625, "Y": 365.2425}


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """Result of `compare`.

    Attributes:
      verdict: what was found.
      model, params: those to forecast with: of what is deployed or, where that is a naive forecast,
        of the best model on validation.
      splits: what it was found on. task: how the model sees it.
      results: the runs of the training methods by name.
    """

    verdict: Verdict
    model: Model
    params: Params
    splits: PanelSplits
    task: Forecasting
    results: Mapping[str, RunResult]


def named(methods: Methods, model: Model, alpha: Alpha = None) -> dict[str, Strategy]:
    """The training methods by the name that a verdict calls them by.

    Args:
      methods: "auto" (full and smoothed full fine-tuning; where the family's recipe trains a part
        of the weights or adapters: that recipe), names of `STRATEGIES`, a text of them with commas,
        or `Strategy` objects. "zero_shot" and naive forecasts take part in any case.
      alpha: weight of the pretrained side in methods by name that mix (`MIXED`); None: 0.7. "auto":
        a method for each of `alpha.GRID`, of which validation picks as it does of all, at the same
        budget; 1, which mixes nothing, is left out beside "ff".
    Raises: ValueError for unknown names and duplicates, and for an alpha that no method takes.
    """
    if isinstance(methods, str):
        methods = [name.strip() for name in methods.split(",") if name.strip()]
    elif isinstance(methods, Strategy):
        methods = [methods]
    if list(methods) == ["auto"]:
        recipe = model.recipe()
        partly = recipe.lora is not None or recipe.trainable is not None
        methods = ["recipe"] if partly else ["ff", "sff"]

    wanted = []
    for given in methods:
        if isinstance(given, str) and given in TITLES:
            continue
        for found in _by_name(given, alpha, methods) if isinstance(given, str) else [given]:
            if found.multiscale is not None:
                raise ValueError(
                    f"{found.name} makes a model with further parameters, which a comparison with "
                    "its checkpoint does not hold: tune by ltsm_jax.fit(..., method=...), and "
                    "give what comes out to a Forecaster"
                )
            if found.phases:
                wanted.append(found)
    if alpha is not None and not any(method in MIXED for method in methods):
        raise ValueError(
            f"alpha is for {', '.join(MIXED)} by name, and none of them is among the methods"
        )
    names = [found.name for found in wanted]
    result = {}
    for found in wanted:
        name = found.name
        if names.count(name) > 1 and found.alpha is not None:
            name = f"{name}-{found.alpha:g}"
        if name in result or name in TITLES:
            raise ValueError(f"duplicate method {name}: give each Strategy a name of its own")
        result[name] = found
    return result


def _by_name(name: str, alpha: Alpha, methods: Sequence[str | Strategy]) -> list[Strategy]:
    """The method of a name; those of a grid where its alpha is to be found."""
    if alpha is None:
        return [strategy(name)]
    if isinstance(alpha, str):
        if alpha != "auto":
            raise ValueError(f"alpha is a number or 'auto'; got {alpha!r}")
        if name not in MIXED:
            return [strategy(name)]
        return [strategy(name, alpha=value) for value in GRID if value < 1 or "ff" not in methods]
    return [strategy(name, alpha=alpha)]


@dataclasses.dataclass(frozen=True, eq=False)
class BoundPanel:
    """A model and the windows of a panel that go together; what `compare` begins with.

    Attributes:
      model, params: made ready for the panel; what the masks prune is 0.
      splits: windows. task: how the model sees them, with the loss that takes them.
      train_context: rows that training windows show.
      masks: where the parameters lie, or None.
      notes: what was done on the way.
    """

    model: Model
    params: Params
    splits: PanelSplits
    task: Forecasting
    train_context: int
    masks: Params | None
    notes: tuple[str, ...]


def bind_panel(
    model: Model,
    params: Params,
    panel: Panel,
    horizon: int,
    *,
    masks: Params | None = None,
    context_len: int | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    most_scored: int = MOST_SCORED,
) -> BoundPanel:
    """Make a model ready for a panel, and cut windows that its training takes; arguments as in
    `compare`.

    Raises: ValueError (DataError) for data, names and lengths that do not work.
    """
    horizon = positive_int(horizon, "horizon")
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    model.check_task("forecasting")
    check_params(model, params)
    ready, start = model.for_series(
        params,
        n_variates=panel.n_variates,
        freq=panel.model_freq or panel.freq,
        key=training.keys(seed)["init"],
    )
    fresh = drawn(params, start)
    model, start = ready, sharding.colocate(start)
    placement = Placement.of(start)
    if masks is not None:
        masks = place(masks, start, placement)
        start = apply_masks(start, masks, placement)

    lengths = _lengths(model, start, panel, horizon=horizon, context_len=context_len, mode=mode)
    splits = cut_panel(
        panel,
        lengths.context_len,
        horizon,
        train_context=lengths.train_context,
        target_len=target_len(model, lengths.mode, horizon),
        joint=model.variates == "joint",
        covariates=model.covariates,
        most_scored=most_scored,
        seed=seed,
    )
    notes = [*splits.notes, *lengths.notes]
    if fresh:
        notes.append(
            f"{len(fresh)} arrays of the model were drawn at random: before tuning it knows "
            f"nothing ({fresh[0]})"
        )
    notes += _covariate_notes(model, panel)
    task = Forecasting(lengths.mode, "context")
    return BoundPanel(
        model=model,
        params=start,
        splits=splits,
        task=task,
        train_context=lengths.train_context,
        masks=masks,
        notes=tuple(notes),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TuningPlan:
    """Methods to tune, and the training windows they see.

    Attributes:
      strategies: by the names of the verdict; {} where nothing can be tuned.
      splits: windows, of training as many as an epoch sees.
      config: how to train; what it leaves out is the model's recipe.
      available: training windows that there are; 0 where nothing is tuned.
      notes: what was decided on the way.
    """

    strategies: Mapping[str, Strategy]
    splits: PanelSplits
    config: training.TrainConfig
    available: int
    notes: tuple[str, ...] = ()


def tuning(
    prepared: BoundPanel,
    strategies: Mapping[str, Strategy],
    config: training.TrainConfig | None = None,
    budget: int | None = BUDGET,
) -> TuningPlan:
    """Fit the training of some methods (see `named`) to a budget of steps; arguments as in
    `compare`.
    """
    config = config or training.TrainConfig()
    splits = prepared.splits
    if not strategies:
        return TuningPlan(strategies={}, splits=splits, config=config, available=0)
    available = prepared.task.windows(prepared.model, splits).n
    if not available:
        horizon = splits.test.horizon
        note = (
            f"nothing is tuned: no item has training rows for a context and {horizon} rows of "
            "target"
        )
        return TuningPlan(strategies={}, splits=splits, config=config, available=0, notes=(note,))
    splits, config, notes = _budgeted(
        prepared.model, splits, config, budget=budget, available=available
    )
    return TuningPlan(
        strategies=strategies, splits=splits, config=config, available=available, notes=notes
    )


@hosts.interruptible()
def compare(
    model: Model,
    params: Params,
    panel: Panel,
    horizon: int,
    *,
    methods: Methods = "auto",
    alpha: Alpha = None,
    masks: Params | None = None,
    config: training.TrainConfig | None = None,
    budget: int | None = BUDGET,
    context_len: int | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    most_scored: int = MOST_SCORED,
    prepared: BoundPanel | None = None,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> Compared:
    """Tune a checkpoint on a panel, and find out whether that, or a model at all, is worth it.

    Args:
      model, params: from `ltsm_jax.load`; neither is modified.
      panel: items with their targets. Models that take covariates are tuned and scored with them.
      horizon: rows to forecast.
      methods, alpha: see `named`.
      masks: of a pruned model, see `methods.pruning`; all models of the comparison keep them. A
        model with channels of zeros is refused without; `masks={}` trains them all the same.
      config: how to train; what it leaves out is the model's recipe, with at most 256 windows a
        batch.
      budget: optimiser steps of each phase of each method; an epoch is then a fifth of it
        (`config.epochs` says otherwise), of windows drawn evenly or, where there are few, repeated
        up to ten times. None: epochs of all training windows, as many as the recipe has.
      context_len: rows that models see at most; None: what the model was trained with.
      mode: the training loss, see `tasks.forecasting.Forecasting`; None: that of the recipe, or the
        other where no item is long enough for it.
      seed: of the random model, data order, dropout and intervals.
      most_scored: windows of validation and of test at most.
      prepared: result of `bind_panel` for these same arguments, where it was called before; None:
        it is called here.
      folder: checkpoints, so that a killed run continues.
      show_progress: a bar on a terminal, else a line every few seconds.
    Raises: ValueError (DataError) for data, names and lengths that do not work, before anything is
      trained.
    """
    if budget is not None:
        budget = positive_int(budget, "budget")
    strategies = named(methods, model, alpha)
    if strategies and masks is None:
        check_params(model, params)
        refuse_pruned(model, params)
    if prepared is None:
        prepared = bind_panel(
            model,
            params,
            panel,
            horizon=horizon,
            masks=masks,
            context_len=context_len,
            mode=mode,
            seed=seed,
            most_scored=most_scored,
        )
    elif prepared.splits.panel is not panel or prepared.splits.test.horizon != horizon:
        raise ValueError("these windows were prepared of another panel or for another horizon")

    work = tuning(prepared, strategies, config, budget=budget)
    scorer = _Scorer(
        model=prepared.model,
        splits=work.splits,
        task=prepared.task,
        placement=Placement.of(prepared.params),
    )
    candidates = scorer.untuned(prepared.params)
    tuned = _tune(prepared, work, scorer, seed=seed, folder=folder, show_progress=show_progress)
    candidates |= tuned.candidates
    weights = {ZERO_SHOT: prepared.params}
    if tuned.best is not None and tuned.params is not None:
        weights[tuned.best] = tuned.params

    pairs = _pairs(candidates, tuned.best, scorer.best_naive())
    for name in dict.fromkeys(itertools.chain.from_iterable(pairs.values())):
        candidates[name] = scorer.tested(candidates[name], weights.get(name))
    differences = {key: scorer.difference(*pair, seed) for key, pair in pairs.items()}

    settings = _settings(prepared, work, seed=seed, budget=budget)
    verdict = _verdict(
        prepared,
        work,
        scorer,
        candidates=candidates,
        tuned=tuned,
        weights=weights,
        differences=differences,
        settings=settings,
    )
    use = verdict.deploy if verdict.deploy in weights else verdict.best_model
    return Compared(
        verdict=verdict,
        model=prepared.model,
        params=weights[use],
        splits=work.splits,
        task=prepared.task,
        results=tuned.results,
    )


def _settings(
    prepared: BoundPanel, work: TuningPlan, *, seed: int, budget: int | None
) -> dict[str, Any]:
    """Settings of a comparison that its verdict records."""
    settings = {
        "mode": prepared.task.mode,
        "seed": seed,
        "budget": budget,
        "train_context": prepared.train_context,
    }
    if work.strategies:
        settings["train"] = work.config.filled(prepared.model.recipe(), seed=seed).record()
    return settings


@dataclasses.dataclass(frozen=True, eq=False)
class _Tuned:
    """Outcome of the training methods.

    candidates, results: by name. best: the one with the lowest validation error, None without any;
    params: its weights, the only ones that are kept. notes: of runs that failed.
    """

    candidates: dict[str, Candidate]
    results: dict[str, RunResult]
    best: str | None
    params: Params | None
    notes: tuple[str, ...]


def _tune(
    prepared: BoundPanel,
    work: TuningPlan,
    scorer: "_Scorer",
    seed: int,
    folder: str | Path | None,
    show_progress: bool,
) -> _Tuned:
    """Run every method, and keep the weights of the one that validates best."""
    candidates: dict[str, Candidate] = {}
    results: dict[str, RunResult] = {}
    notes: list[str] = []
    best, params = None, None
    for number, (name, chosen) in enumerate(work.strategies.items(), 1):
        try:
            with progress.part(number, len(work.strategies)):
                result = run(
                    prepared.model,
                    prepared.params,
                    chosen,
                    data=work.splits,
                    task=prepared.task,
                    seed=seed,
                    config=work.config,
                    folder=None if folder is None else Path(folder) / name,
                    test=False,
                    label=name,
                    show_progress=show_progress,
                    masks=prepared.masks,
                )
        except training.NonFiniteError as err:
            notes.append(f"{name}: training failed: {str(err).splitlines()[0]}")
            continue
        candidates[name] = scorer.trained(
            name, chosen, result, start=prepared.params, seed=seed, masks=prepared.masks
        )

        # Of the others only the scores are kept: weights may be large.
        if best is None or candidates[name].val["mse"] < candidates[best].val["mse"]:
            if best is not None:
                results[best] = dataclasses.replace(results[best], params=None)
            best, params = name, result.params
            results[name] = result
        else:
            results[name] = dataclasses.replace(result, params=None)
    return _Tuned(
        candidates=candidates, results=results, best=best, params=params, notes=tuple(notes)
    )


def _pairs(
    candidates: Mapping[str, Candidate], tuned: str | None, naive: str
) -> dict[str, tuple[str, str]]:
    """Pair the candidates for the test span: the checkpoint, the best naive forecast, and what
    tuning improved.
    """
    pairs = {"zero_shot_vs_naive": (ZERO_SHOT, naive)}
    if tuned is None or not candidates[tuned].val["mse"] < candidates[ZERO_SHOT].val["mse"]:
        return pairs
    return {"tuned_vs_zero_shot": (tuned, ZERO_SHOT), "tuned_vs_naive": (tuned, naive)} | pairs


def _verdict(
    prepared: BoundPanel,
    work: TuningPlan,
    scorer: "_Scorer",
    candidates: Mapping[str, Candidate],
    tuned: _Tuned,
    weights: Mapping[str, Params],
    differences: Mapping[str, Difference],
    settings: Mapping[str, Any],
) -> Verdict:
    """Decide, and write down all that the decision rests on."""
    splits, panel = work.splits, work.splits.panel
    naive = scorer.best_naive()
    val = {name: found.val["mse"] for name, found in candidates.items()}
    deploy, reason = decide(val, tuned.best, naive, differences=differences)

    tested = [
        name for name, found in candidates.items() if found.test is not None and name != "auto_ets"
    ]
    return Verdict(
        deploy=deploy,
        reason=reason,
        candidates=tuple(sorted(candidates.values(), key=lambda found: found.kind == "naive")),
        tuned=tuned.best,
        naive=naive,
        differences=differences,
        name=panel.name,
        model=prepared.model.family,
        columns=panel.columns,
        horizon=splits.test.horizon,
        context_len=splits.test.context_len,
        freq=panel.freq,
        items=int((splits.edges[:, 0] < splits.edges[:, 2]).sum()),
        windows={"train": work.available, "val": splits.val.n, "test": splits.test.n},
        spans=_spans(splits),
        settings=settings,
        notes=(
            *prepared.notes,
            *work.notes,
            *tuned.notes,
            *few_blocks(differences["zero_shot_vs_naive"]),
        ),
        examples=scorer.examples(tested, weights),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions and the device that a result was computed with."""
    device = jax.devices()[0]
    try:
        own = importlib.metadata.version("ltsm-jax")
    except importlib.metadata.PackageNotFoundError:
        own = "a checkout"
    return {
        "ltsm-jax": own,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "device": device.device_kind,
    }


def _covariate_notes(model: Model, panel: Panel) -> list[str]:
    """Say which covariates the model is tuned and scored with, and which play no part."""
    kinds = {"known": panel.known, "past": panel.past}
    used, unused = [], []
    for kind, names in kinds.items():
        taken = used if kind in model.covariates else unused
        taken.extend(names)
    notes = []
    if used:
        notes.append(f"{model.family} is tuned and scored with covariates: {', '.join(used)}")
    if unused:
        notes.append(
            f"covariates take no part, as {model.family} does not use them: {', '.join(unused)}"
        )
    return notes


# --- lengths and budget


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """Rows that scored windows show, and those that training windows do; the loss that
    takes them.
    """

    context_len: int
    train_context: int
    mode: Mode
    notes: tuple[str, ...] = ()


def _lengths(
    model: Model,
    params: Params,
    panel: Panel,
    horizon: int,
    context_len: int | None,
    mode: Mode | None,
) -> _Lengths:
    """Lengths that half of the items can fill; shorter items get missing values in front."""
    rows = panel.lengths[panel.lengths >= 2 * horizon + 1]
    typical = int(np.median(rows if len(rows) else panel.lengths))
    before = max(typical - 2 * horizon, 1) if typical * 0.2 < horizon else int(typical * 0.7)
    if context_len is not None:
        context_len = positive_int(context_len, "context_len")

    # A model sees whole patches where there is one; what is over is the oldest.
    seen = min(context_len or model.context_len, max(before, 1))
    if context_len is None and seen >= model.patch_len:
        seen = seen // model.patch_len * model.patch_len

    own = mode or default_mode(model)
    modes = (own,) if mode else (own, *(other for other in MODES if other != own))
    usual = context_len or model.recipe().context_len
    for which in modes:
        target = target_len(model, which, horizon)
        room = before - target
        fits = [usual] if context_len is not None or usual <= room else []
        if room >= 1:
            fits += shorter_contexts(min(room, usual), usual, room, horizon=horizon)
        # Shorter than what the loss takes: missing values fill it up.
        if which == modes[-1]:
            fits += sorted(d for d in range(1, usual + 1) if usual % d == 0)
        for length in fits:
            if not takes(
                model,
                params,
                which,
                context_len=length,
                horizon=horizon,
                n_variates=panel.n_variates,
            ):
                continue
            notes = []
            if which != own:
                notes.append(
                    f"training loss: {which}, as items are too short for the model's {own}"
                )
            if length != usual:
                notes.append(
                    f"training context of {length} rows instead of {usual}: items have {typical}, "
                    "typically"
                )
            return _Lengths(context_len=seen, train_context=length, mode=which, notes=tuple(notes))
    return _Lengths(
        context_len=seen,
        train_context=usual,
        mode=own,
        notes=(f"training of {model.family} takes no windows of these lengths",),
    )


def _budgeted(
    model: Model,
    splits: PanelSplits,
    config: training.TrainConfig,
    budget: int | None,
    available: int,
) -> tuple[PanelSplits, training.TrainConfig, tuple[str, ...]]:
    """A table of training windows for a budget of steps, and the configuration that goes
    with it.
    """
    recipe = model.recipe()
    steady = max(SMALLEST_BATCH, available // STEPS)
    batch = config.batch_size or min(recipe.batch_size, LARGEST_BATCH, steady)
    if budget is None:
        return splits, dataclasses.replace(config, batch_size=batch), ()
    epochs = min(config.epochs or EPOCHS, budget)
    wanted = max(budget // epochs, 1) * batch
    config = dataclasses.replace(config, epochs=epochs, batch_size=batch)
    if wanted < available:
        said = (
            f"training: {wanted:,} of {available:,} windows an epoch, spread evenly, for a budget "
            f"of {budget} steps"
        )
        return dataclasses.replace(splits, most_train=min(wanted, MOST_TRAIN)), config, (said,)
    repeats = min(max(wanted // available, 1), REPEATS)
    return dataclasses.replace(splits, repeats=repeats), config, ()


# --- scores


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Errors of windows, of all of them or of those numbered `of`."""

    errors: Errors
    of: np.ndarray | None = None

    def gaps(self, other: "_Scores") -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Squared errors minus the other's and observed steps of each window [W] that both have;
        which these are.
        """
        mine, theirs, of = self.errors, other.errors, self.of if self.of is not None else other.of
        if of is not None:
            mine = mine if self.of is not None else _part(mine, of)
            theirs = theirs if other.of is not None else _part(theirs, of)
        gap = (mine.squared - theirs.squared).sum(axis=1)
        return gap, mine.steps.sum(axis=1), of


def _part(errors: Errors, of: np.ndarray) -> Errors:
    arrays = {}
    for field in dataclasses.fields(errors):
        value = getattr(errors, field.name)
        arrays[field.name] = value[of] if isinstance(value, np.ndarray) else value
    return Errors(**arrays)


def _record(found: _Scores) -> dict[str, Any]:
    scores = forecasting.summarise(found.errors)
    return {name: scores[name] for name in ("mse", "mae", "windows")}


class _Scorer:
    """Scores candidates on the windows of a panel, and remembers the errors of those on the test
    span.
    """

    def __init__(self, model: Model, splits: PanelSplits, task: Forecasting, placement: Placement):
        self.splits, self.task, self.net = splits, task, model
        self.placement = placement
        self.predictor = task.predictor(model)
        self.season = splits.season if splits.season <= splits.val.context_len else 1
        self.predictors = forecasting.naive_forecasts(self.season)
        self.naive = [*self.predictors, *(["auto_ets"] if auto_ets.is_installed() else [])]
        self.val: dict[str, _Scores] = {}
        self.test: dict[str, _Scores] = {}

    def model(self, name: str, params: Params) -> Candidate:
        """Score a model on validation."""
        self.val[name], seconds, compiling_ = self._timed(
            lambda: self._errors(name, params, self.splits.val),
        )
        scores = _record(self.val[name])
        history = ({"epoch": 0, "val_mse": scores["mse"], "val_mae": scores["mae"]},)
        return Candidate(
            name, "model", scores, seconds=seconds, compile_seconds=compiling_, history=history
        )

    def untuned(self, params: Params) -> dict[str, Candidate]:
        """Score the checkpoint and the naive forecasts on validation."""
        found = {ZERO_SHOT: self.model(ZERO_SHOT, params)}
        for name in self.naive:
            found[name] = self.naive_candidate(name)
        return found

    def naive_candidate(self, name: str) -> Candidate:
        """Score a naive forecast on validation."""
        self.val[name], seconds, compiling_ = self._timed(
            lambda: self._errors(name, None, self.splits.val),
        )
        found = self.val[name]
        notes = ()
        if found.of is not None and len(found.of) < self.splits.val.n:
            notes = (f"scored on {len(found.of)} windows, spread evenly",)
        return Candidate(
            name, "naive", _record(found), seconds=seconds, compile_seconds=compiling_, notes=notes
        )

    def trained(
        self,
        name: str,
        chosen: Strategy,
        result: RunResult,
        start: Params,
        seed: int,
        masks: Params | None,
    ) -> Candidate:
        """Make a candidate of a training run, with the error before its first step."""
        begin = start_params(chosen, self.net, start, aux_key=training.keys(seed)["aux"])
        if begin is start:
            before = _record(self.val[ZERO_SHOT])
        else:
            begin = begin if masks is None else apply_masks(begin, masks, self.placement)
            before = self.task.evaluate(
                self.net, begin, self.splits, part="val", placement=self.placement
            )
        history: list[dict[str, Any]] = [
            {"epoch": 0, "val_mse": before["mse"], "val_mae": before["mae"]}
        ]
        for entry in result.history:
            history.append(
                {key: entry[key] for key in ("epoch", "val_mse", "val_mae", "train_loss", "lr")}
            )
        return Candidate(
            name,
            "model",
            {key: result.val[key] for key in ("mse", "mae", "windows")},
            seconds=result.seconds,
            compile_seconds=result.compile_seconds,
            epochs=result.epochs,
            best_epoch=result.best_epoch,
            history=tuple(history),
            notes=result.warnings,
        )

    def tested(self, candidate: Candidate, params: Params | None) -> Candidate:
        """The same candidate with its scores on the test span."""
        self.test[candidate.name] = self._errors(candidate.name, params, self.splits.test)
        return dataclasses.replace(candidate, test=_record(self.test[candidate.name]))

    def best_naive(self) -> str:
        """The naive forecast with the lowest error on the validation windows that all of them were
        scored on.
        """
        errors = {}
        part = next(
            (self.val[name].of for name in self.naive if self.val[name].of is not None), None
        )
        for name in self.naive:
            found = self.val[name].errors
            if part is not None and self.val[name].of is None:
                found = _part(found, part)
            errors[name] = forecasting.summarise(found)["mse"]
        return min(errors, key=lambda name: errors[name])

    def difference(self, first: str, second: str, seed: int) -> Difference:
        """Difference of two candidates on the test span."""
        gap, steps, of = self.test[first].gaps(self.test[second])
        item, origin = self.splits.origins(self.splits.test)
        block = (calendar(self.splits.panel)[item] + origin) // self.splits.test.horizon
        if of is not None:
            item, block = item[of], block[of]
        return bootstrap_difference(gap, steps, block, item_W=item, seed=seed)

    def examples(
        self, names: Sequence[str], weights: Mapping[str, Params]
    ) -> tuple[dict[str, Any], ...]:
        """Test windows spread evenly, in data units: the end of the context, the truth and the
        forecasts.
        """
        splits, windows = self.splits, self.splits.test
        numbers = np.unique(np.linspace(0, windows.n - 1, EXAMPLES + 2).astype(int)[1:-1])
        item, origin = splits.origins(windows)
        found = {}
        for name in names:
            predictor = self.predictors.get(name, self.predictor)
            params = weights.get(name, {})
            found[name] = forecasting.forecast_windows(
                predictor, params, windows, indices=numbers, placement=self.placement
            )
        shown = min(2 * windows.horizon, windows.context_len)
        examples = []
        for k, i in enumerate(numbers):
            variate = k % splits.panel.n_variates if windows.rows is None else int(windows.rows[i])
            row = variate if windows.rows is None else 0
            mean, std = splits.layout.mean[variate, item[i]], splits.layout.std[variate, item[i]]
            context, target, _ = (x[k, row] * std + mean for x in found[names[0]])
            own = min(shown, int(origin[i]))
            examples.append(
                {
                    "item": str(splits.panel.ids[item[i]]),
                    "column": splits.panel.columns[variate],
                    "stamps": stamps(
                        splits.panel, int(item[i]), int(origin[i]) - own, n=own + windows.horizon
                    ),
                    "context": context[len(context) - own :].tolist(),
                    "target": target.tolist(),
                    "forecasts": {
                        name: (found[name][2][k, row] * std + mean).tolist() for name in names
                    },
                }
            )
        return tuple(examples)

    def _errors(self, name: str, params: Params | None, windows: Windows) -> _Scores:
        if name == "auto_ets":
            of = spread(windows.n, MOST_ETS, seed=0)
            return _Scores(auto_ets.ets_errors(windows, of, self.season), of)
        predictor = self.predictors.get(name, self.predictor)
        params = {} if params is None else params
        return _Scores(forecasting.errors(predictor, params, windows, placement=self.placement))

    @staticmethod
    def _timed(work: Callable[[], _Scores]) -> tuple[_Scores, float, float]:
        began = time.monotonic()
        with compiling.measured() as waited:
            found = work()
        return found, time.monotonic() - began - waited.seconds, waited.seconds


# --- time


def calendar(panel: Panel) -> np.ndarray:
    """Row [N] of a calendar common to all items where each item begins; without stamps all end
    together.
    """
    if panel.first is None or panel.freq is None:
        return int(panel.lengths.max()) - panel.lengths
    count, unit = count_unit(panel.freq)
    step = microseconds(panel.freq) or count * DAYS[unit] * 86400e6
    since = (panel.first - panel.first.min()).astype("timedelta64[us]").astype(np.int64)
    return np.round(since / step).astype(np.int64)


def stamps(panel: Panel, item: int, row: int, n: int) -> list[str] | None:
    """Stamps of `n` rows of an item from `row` on, as the clock on the wall shows them; None
    without stamps.
    """
    found = panel.stamps_at(np.array([item]), np.arange(row, row + n)[None])
    if found is None:
        return None
    return [str(stamp).removesuffix(".000000") for stamp in to_wall(found[0], panel.tz)]


def _spans(splits: PanelSplits) -> dict[str, tuple[str, str]]:
    """First and last stamp of the targets of each part; of training its rows."""
    panel = splits.panel
    if panel.first is None:
        return {}
    begins = calendar(panel)
    scored = np.flatnonzero(splits.edges[:, 0] < splits.edges[:, 2])
    everything = np.arange(panel.n_items)
    found = {}
    lo = np.zeros(panel.n_items, np.int64)
    for part, hi in zip(("train", "val", "test"), splits.edges.T, strict=True):
        items = everything if part == "train" else scored
        early = items[np.argmin((begins + lo)[items])]
        late = items[np.argmax((begins + hi)[items])]
        ends = [
            stamps(panel, int(early), int(lo[early]), n=1),
            stamps(panel, int(late), int(hi[late]) - 1, n=1),
        ]
        if None not in ends:
            found[part] = tuple(end[0] for end in ends if end)
        lo = hi
    return found
