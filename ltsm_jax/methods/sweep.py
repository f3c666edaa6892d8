"""Several runs of strategies at once: alpha x seed x learning rate x method as lanes of one
program.

Runs whose phases train the same leaves of the same model on the same windows can share a program,
see `training.lanes`: full fine-tuning from whatever start (ff, tfs, sff, noise), linear probing
beside the first phase of lpff, pruned models under their masks. What cannot is trained by itself,
and so is everything where a short measurement finds that lanes gain nothing.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax

from ltsm_jax.methods import run
from ltsm_jax.methods.run import Params, Running, RunResult
from ltsm_jax.methods.strategies import Strategy
from ltsm_jax.models import Model
from ltsm_jax.stacks import Over, TreeStack
from ltsm_jax.tasks.base import Task
from ltsm_jax.training import FitResult, NonFiniteError, TrainConfig, lanes, memory

BESIDE = 8  # trees of parameters that a run has in memory: start, state, best, gradient, copies
FREE_SHARE = 0.8


def sweep(
    model: Model,
    params: Params,
    strategies: Sequence[Strategy],
    data: Any,
    *,
    task: Task = run.FORECASTING,
    seeds: Sequence[int] = (0,),
    lrs: Sequence[float | None] = (None,),
    config: TrainConfig | None = None,
    lanes: lanes.Asked = "auto",
    folder: str | Path | None = None,
    test: bool = True,
    show_progress: bool = True,
) -> list[RunResult | NonFiniteError]:
    """Run every strategy with every learning rate and every seed, as lanes of one program where
    that is quicker.

    Each run ends as `run.run` would end it alone, to the rounding of float32.

    Args:
      model, params, data, task, test: as for `run.run`.
      lrs: learning rates; None: that of the config or the model's recipe. A phase of a strategy
        that names its own keeps it.
      config: of all runs, but for the learning rate and the seed.
      lanes: "auto": as a short measurement says; "on": lanes whatever they cost; "off": one run
        after the other.
      folder: where checkpoints go, a folder for each run; a sweep that was killed goes on from
        there.
    Returns: a result for each strategy x learning rate x seed, the seeds innermost; where a run
      diverged, the NonFiniteError that tells why.
    Raises: as `run.run`.
    Example:
    `sweep(model, params, [sff(0.5), sff(0.7), ff()], splits, seeds=(0, 1), lrs=(1e-4, 3e-4))`
    """
    makers = []
    for strategy in strategies:
        for lr in lrs:
            for seed in seeds:
                settings = config or TrainConfig()
                if lr is not None:
                    settings = dataclasses.replace(settings, lr=lr)
                place = None if folder is None else Path(folder) / _name(strategy, lr, seed)

                def make(strategy=strategy, settings=settings, seed=seed, place=place) -> Running:
                    return Running(
                        model=model,
                        params=params,
                        strategy=strategy,
                        data=data,
                        task=task,
                        seed=seed,
                        config=settings,
                        folder=place,
                        show_progress=show_progress,
                    )

                makers.append(make)

    def finish(running: Running) -> RunResult:
        return running.result(test=test)

    place = None if folder is None else Path(folder) / "lanes"
    found = train(makers, params, lanes=lanes, folder=place, finish=finish)
    return [outcome for outcome in found if outcome is not None]


def train(
    makers: Sequence[Callable[[], Running]],
    params: Params,
    *,
    lanes: lanes.Asked = "auto",
    folder: str | Path | None = None,
    others: bool = True,
    finish: Callable[[Running], Any] = lambda running: None,
) -> list[Any]:
    """Train the phases of several runs, those that are alike as lanes.

    Args:
      makers: begin the runs; called for as many of them at a time as memory has room for.
      params: of the model, for their size.
      lanes: see `sweep`. folder: of all lanes, see `training.lanes.fit_jobs`.
      others: False: what is not trained as a lane is left where it is.
      finish: what to make of a run that is trained to its end.
    Returns: for each run what `finish` gives, the NonFiniteError of one that diverged, or None for
      one that was left.
    """
    found: list[Any] = []
    room = _room(params, len(makers))
    for first in range(0, len(makers), room):
        runs = [make() for make in makers[first : first + room]]
        stopped = _train(runs, lanes, folder, others=others)
        for i, running in enumerate(runs):
            if i in stopped:
                found.append(stopped[i])
                continue
            try:
                found.append(finish(running))
            except NonFiniteError as err:
                found.append(err)
    return found


def _train(
    runs: Sequence[Running], asked: lanes.Asked, folder: str | Path | None, others: bool
) -> dict[int, NonFiniteError | None]:
    """Train to the end, phase by phase. Returns: why runs were not, None for those that
    were left.
    """
    stopped: dict[int, NonFiniteError | None] = {}
    while waiting := [
        i for i, each in enumerate(runs) if i not in stopped and not each.trained_out
    ]:
        jobs = {i: runs[i].job() for i in waiting}
        groups: dict[Hashable, list[int]] = {}
        for i in waiting:
            groups.setdefault(_group(runs[i], jobs[i], i), []).append(i)
        for members in groups.values():
            outcomes = lanes.fit_jobs(
                [jobs[i] for i in members],
                lanes=asked,
                folder=folder,
                evaluate=evaluation(runs[members[0]]),
                others=others,
            )
            for i, outcome in zip(members, outcomes, strict=True):
                if isinstance(outcome, FitResult):
                    runs[i].take(outcome)
                else:
                    stopped[i] = outcome
    return stopped


def _group(running: Running, job: dict[str, Any], own: int) -> Hashable:
    """Give what runs must have in common to be lanes: the program of their steps, and of their
    validation.
    """
    signature = lanes.signature(job)
    if signature is None:
        return own
    facts = json.dumps(running.task.facts(running.data), sort_keys=True, default=str)
    return signature, running.model, running.task, facts, running.whole is run.itself


def evaluation(running: Running) -> lanes.Evaluate | None:
    """Make the validation of all lanes in one program, where the task has one."""
    of_task = getattr(running.task, "evaluate_lanes", None)
    if of_task is None or running.whole is not run.itself:
        return None

    def evaluate(over: Over, params: TreeStack) -> Sequence[dict[str, Any]]:
        return of_task(running.model, params, running.data, part="val", over=over)

    return evaluate


def _room(params: Params, n: int) -> int:
    """Count the runs that memory holds at once."""
    free = memory.available()
    if free is None:
        return max(n, 1)
    one = BESIDE * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return max(min(int(FREE_SHARE * free // max(one, 1)), n), 2)


def _name(strategy: Strategy, lr: float | None, seed: int) -> str:
    record = json.dumps(strategy.record(), sort_keys=True)
    parts = [strategy.name, hashlib.sha256(record.encode()).hexdigest()[:8]]
    if lr is not None:
        parts.append(f"lr{lr!r}")
    return "-".join([*parts, f"seed{seed}"])
