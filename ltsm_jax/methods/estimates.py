"""How long a forecast of a panel, a comparison and a pruning will take, said before they begin.

A batch of forecasts and a step of training are timed in the programs that do the work; see
`training.timing`. What remains is counting: batches, steps, validations, and programs to compile.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ltsm_jax.data.panel import Panel
from ltsm_jax.methods import auto_ets
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.strategies import Phase
from ltsm_jax.methods.verdict import MOST_ETS, BoundPanel, TuningPlan
from ltsm_jax.tasks import forecasting, panels
from ltsm_jax.tasks.forecasting import Predictor
from ltsm_jax.tasks.panels import Origins
from ltsm_jax.training import timing
from ltsm_jax.training.loop import step_time
from ltsm_jax.training.timing import TimeEstimate
from ltsm_jax.trees import Params

ETS_SECONDS = 1.0  # of a forecast by AutoETS, and more than that for long contexts
NAIVE_SECONDS = 0.3  # to compile and score one naive forecast
PRUNING = 8.0  # a batch with gradients of single windows, in forward passes
PRUNING_PROGRAM = 10.0  # to compile it, in compilations of a forward pass


def of_forecast(
    model: Predictor,
    params: Params,
    panel: Panel,
    horizon: int,
    *,
    context_len: int,
    origins: Origins,
    on_host: Callable[..., Any] | None = None,
    work_follows: bool = True,
    **options: Any,
) -> TimeEstimate:
    """Estimate what `tasks.panels.forecast_panel` with these arguments takes.

    options: `levels` (those that the model says), `joint`, `covariates`, `season`.
    """
    count = len(origins.items) * (1 if options.get("joint") else panel.n_variates)
    if on_host is not None:
        return TimeEstimate(ETS_SECONDS * count, 0.0)
    kind = {name: options[name] for name in ("joint", "covariates") if name in options}
    groups = panels.passes(model, panel, origins, context_len=context_len, **kind)
    if not groups:
        return TimeEstimate(0.0, 0.0)

    # The largest group is timed; a context takes as long as it has rows.
    def work(group: panels.Pass) -> int:
        return group.batches * group.size * group.length

    largest = max(groups, key=work)
    first = largest.rows[: largest.size]
    if not options.get("joint"):
        first = np.unique(first // panel.n_variates)

    def one_batch() -> Any:
        found = panels.forecast_panel(
            model,
            params,
            panel,
            horizon=horizon,
            context_len=context_len,
            origins=origins.take(first),
            batch_size=largest.size,
            **options,
        )
        return found.point

    levels = tuple(options.get("levels", ()))
    piece = timing.of(
        one_batch,
        lambda: panels.trace_program(
            model, params, panel, horizon=horizon, of=largest, levels=levels, **kind
        ),
        work_follows=work_follows,
    )
    batches = sum(map(work, groups)) / (largest.size * largest.length)
    return TimeEstimate.of(piece, batches, len(groups))


def of_comparison(
    prepared: BoundPanel,
    work: TuningPlan,
    *,
    seed: int = 0,
    work_follows: bool = True,
) -> TimeEstimate:
    """Estimate what `verdict.compare` takes."""
    model, splits = prepared.model, work.splits
    predictor = prepared.task.predictor(model)
    batch = forecasting.one_batch(predictor, prepared.params, splits.val)
    piece = timing.of(batch.call, batch.trace, work_follows=work_follows)

    # Validation and test, and a few windows to show.
    test = forecasting.one_batch(predictor, prepared.params, splits.test)
    once = batch.count + test.count
    found = TimeEstimate.of(piece, once, 3)
    naive = len(forecasting.naive_forecasts(splits.season))
    found += TimeEstimate(0.0, NAIVE_SECONDS * (naive + 1))
    if auto_ets.is_installed():
        found += TimeEstimate(2 * ETS_SECONDS * min(MOST_ETS, splits.val.n), 0.0)
    if not work.strategies:
        return found

    available = prepared.task.windows(model, splits).n
    steps, validations, programs = 0, 0, set()
    for chosen in work.strategies.values():
        validations += 2  # of its start, and what `RunResult.warnings` looks at
        for phase in chosen.phases:
            epochs = phase.epochs or work.config.epochs or model.recipe().epochs
            batch_size = work.config.batch_size or model.recipe().batch_size
            steps += epochs * -(-available // batch_size)
            validations += epochs
            programs.add(_program(phase))
    first = next(iter(work.strategies.values()))
    running = Running(
        model=model,
        params=prepared.params,
        strategy=first,
        data=splits,
        task=prepared.task,
        seed=seed,
        config=work.config,
        masks=prepared.masks,
    )
    given: Mapping[str, Any] = running.job()
    names = ("loss_fn", "params", "train_source", "config", "validate", "trainable", "penalty")
    step = step_time(**{name: given[name] for name in names}, work_follows=work_follows)
    found += TimeEstimate.of(step, steps, len(programs))
    return found + TimeEstimate.of(piece, validations * batch.count + test.count, 1)


def of_pruning(prepared: BoundPanel, epochs: int, *, work_follows: bool = True) -> TimeEstimate:
    """Estimate what `pruning.prune` takes: gradients of the training windows, and a validation
    after each epoch.
    """
    model, splits = prepared.model, prepared.splits
    batch = forecasting.one_batch(prepared.task.predictor(model), prepared.params, splits.val)
    piece = timing.of(batch.call, batch.trace, work_follows=work_follows)
    rows = -(-splits.val.n // batch.count)
    scored = PRUNING * prepared.task.windows(model, splits).n / rows
    return TimeEstimate.of(
        piece, epochs * (scored + batch.count) + batch.count, PRUNING_PROGRAM + 1
    )


def _program(phase: Phase) -> Any:
    """Give the facts of a phase that its compiled step depends on."""
    return phase.trainable, phase.lora, bool(phase.l2_sp)
