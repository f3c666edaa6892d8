"""Choices of alpha: how much of a fresh model to mix into a checkpoint, and where.

    found = choose(model, params, splits, by="grid")
    print(found)                  # a table of what was tried
    run(model, params, found.strategy, splits)

| by | alpha | price, beside the scores of what is tried |
| --- | --- | --- |
| grid | one, from a grid | nothing |
| groups | one for each group of leaves | one after the other: (grid - 1) * groups + 1 scores |
| layers | by the curvature of each layer | `samples` Hessian-vector products |
| learned | gradient of the validation loss | see `learn` |

Scores are those of validation; the test part is never looked at. What is tried is scored after
training (`epochs`), which is dear and what counts, or as it starts (`epochs=0`), which is cheap and
knows nothing of what training makes of it.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import curvature, hosts, training, trees
from ltsm_jax.landscape import SplitLoss, split_loss
from ltsm_jax.layers.masks import apply_masks, place
from ltsm_jax.methods.run import FORECASTING, RunResult, run
from ltsm_jax.methods.starts import Interpolated, body_layer_of, groups_of, other_side, start_params
from ltsm_jax.methods.strategies import MIXED, Strategy, strategy
from ltsm_jax.models import Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Loss, Source, Task
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import NonFiniteError, TrainConfig, progress
from ltsm_jax.trees import Params

By = Literal["grid", "groups", "layers", "learned"]
GRID = (0.5, 0.7, 0.9, 1.0)
SAMPLE = 256  # windows of the losses that curvature and gradients are taken of
MOST = 2.0  # times 1 - alpha: a layer is mixed no more than that, however sharp it is
INNER_LR = 1e-2  # of SGD; far below 2 / top eigenvalue of models at the errors of standardised data
INNER_BATCH = 64
OUTER_LR = 0.3  # of Adam, in logits: from 0.7 to 0.9 in five steps


@dataclasses.dataclass(frozen=True)
class Trial:
    """A start that was tried.

    Attributes:
      strategy: with its alphas.
      score: validation metric that decided; infinite where training failed.
      start: the same metric before the first step.
      epochs: trained for this score.
      seconds: scoring and training.
      note: what went wrong, in words.
    """

    strategy: Strategy
    score: float
    start: float
    epochs: int
    seconds: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class AlphaChoice:
    """Result of `choose_alpha`; print it for a table.

    Attributes:
      strategy: the start with the lowest score.
      by: how it was found. selects: name of the metric.
      trials: everything that was tried, in order.
      result: the whole run of the winner, where it was trained for as long as the configuration
        says; else None.
      steps: of "learned": alphas and validation loss after each outer step.
    """

    strategy: Strategy
    by: By
    selects: str
    trials: tuple[Trial, ...]
    result: RunResult | None = None
    steps: tuple[dict[str, float], ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of all trials."""
        return sum(trial.seconds for trial in self.trials)

    def table(self) -> list[dict[str, Any]]:
        """One row per trial: alpha, alphas (of groups and layers), start, score, epochs, seconds,
        picked.
        """
        rows = []
        for trial in self.trials:
            start = trial.strategy.start
            assert isinstance(start, Interpolated), "nothing else is tried"
            row: dict[str, Any] = {"alpha": start.alpha, "alphas": dict(start.alphas)}
            row |= {
                name: getattr(trial, name)
                for name in ("start", "score", "epochs", "seconds", "note")
            }
            rows.append(row | {"picked": trial.strategy == self.strategy})
        return rows

    def __str__(self) -> str:
        rows = self.table()
        texts = [describe(row["alpha"], row["alphas"]) for row in rows]
        width = max(map(len, (*texts, "alpha")))
        lines = [
            "  "
            f"{'alpha':{width}}{'start':>10}{'val ' + self.selects:>12}{'epochs':>8}{'seconds':>9}"
        ]
        for row, text in zip(rows, texts, strict=True):
            mark = "> " if row["picked"] else "  "
            lines.append(
                f"{mark}{text:{width}}{row['start']:10.4f}{row['score']:12.4f}"
                f"{row['epochs']:8}{row['seconds']:9.1f}"
                + (f"  {row['note']}" if row["note"] else "")
            )
        return "\n".join(lines)


def describe(alpha: float, alphas: Mapping[str, float]) -> str:
    """Write alphas in a line: "0.7", or "head 1, norms 0.9, else 0.7"."""
    if not alphas:
        return f"{alpha:g}"
    return ", ".join(
        [*(f"{name} {value:.3g}" for name, value in alphas.items()), f"else {alpha:g}"]
    )


def choose_alpha(
    model: Model,
    params: Params,
    data: Any,
    *,
    by: By = "grid",
    method: str = "sff",
    grid: Sequence[float] = GRID,
    alpha: float = 0.7,
    epochs: int | None = None,
    task: Task = FORECASTING,
    seed: int = 0,
    config: TrainConfig | None = None,
    masks: Params | None = None,
    samples: int = 8,
    outer_steps: int = 20,
    inner_steps: int = 8,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> AlphaChoice:
    """Choose the alpha of a method that mixes, or one for each group or layer, on the validation
    part.

    Args:
      model, params, data, task, seed, config, masks: as for `methods.run.run`.
      by: "grid": the alpha of `grid` with the lowest score; 1 is the checkpoint itself, so that
        `sff` then is plain full fine-tuning. "groups": from `alpha` everywhere, one group of
        `starts.GROUPS` after the other takes the value of `grid` with the lowest score. "layers":
        for each alpha of `grid` below 1 the alphas of `by_curvature`.
        "learned": the alphas of `learn`, from `alpha` on. The last two are for forecasting alone.
      method: name of `strategies.MIXED`.
      epochs: to train for a score: None: as the configuration says, and the winner's run is kept;
        0: none.
      samples: see `by_curvature`. outer_steps, inner_steps: see `learn`.
      folder: checkpoints of the runs, so that a killed one continues.
    Returns: the winner, with a table of what was tried. Of equal scores the first wins.
    Raises: ValueError for other names or alphas outside [0, 1]; `NonFiniteError` where every
    training failed.
    Example: `print(choose_alpha(model, params, splits, by="groups", epochs=1))`
    """
    _check_choice(by, method, grid, epochs=epochs, task=task)
    placement = Placement.of(params)
    masks = None if masks is None else place(masks, params, placement)
    scorer = _Scorer(
        model=model,
        params=params,
        data=data,
        task=task,
        seed=seed,
        config=config,
        epochs=epochs,
        masks=masks,
        folder=folder,
        show_progress=show_progress,
        placement=placement,
    )
    if by == "groups":
        return _by_groups(scorer, strategy(method, alpha=alpha), tuple(grid))

    steps: tuple[dict[str, float], ...] = ()
    if by == "grid":
        wanted = [strategy(method, alpha=value) for value in grid]
    elif by == "layers":
        assert isinstance(task, Forecasting)
        sharpness = layer_sharpness(model, params, data, task=task, seed=seed, samples=samples)
        wanted = []
        for value in grid:
            if value < 1:
                alphas = by_curvature(sharpness, value)
                wanted.append(with_alphas(strategy(method, alpha=value), alphas))
    else:
        assert isinstance(task, Forecasting)
        begin = strategy(method, alpha=alpha)
        alphas, steps = learn(
            model,
            params,
            data,
            begin=begin,
            task=task,
            seed=seed,
            outer_steps=outer_steps,
            inner_steps=inner_steps,
        )
        wanted = [with_alphas(begin, alphas)]
    for number, candidate in enumerate(wanted, 1):
        with progress.part(number, len(wanted)):
            scorer.score(candidate)
    return scorer.choice(by, steps)


def _check_choice(
    by: str, method: str, grid: Sequence[float], *, epochs: int | None, task: Task
) -> None:
    """Raises: ValueError for arguments of `choose_alpha` that do not work."""
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}; got {by!r}")
    require_mixing(method)
    if not grid:
        raise ValueError("the grid of alphas is empty")
    if epochs is not None and epochs < 0:
        raise ValueError(
            f"epochs must be 0 or more, or None for those of the configuration; got {epochs}"
        )
    if by in ("layers", "learned") and not isinstance(task, Forecasting):
        raise ValueError(
            f"by={by!r} takes derivatives of the error of a forecast: it is for forecasting alone"
        )


def require_mixing(method: str) -> None:
    """Raises: ValueError where a method has no alpha to choose."""
    if method not in MIXED:
        raise ValueError(
            f"there is no alpha to choose for {method!r}; it is for {', '.join(MIXED)}"
        )
    if any(phase.mix for phase in strategy(method).phases):
        raise ValueError(
            f"{method} mixes more than once, and a search looks at one mix: give it an alpha"
        )


def with_alphas(base: Strategy, alphas: Mapping[str, float]) -> Strategy:
    """The same strategy with alphas of groups or layers of their own."""
    assert isinstance(base.start, Interpolated), "only a mix has alphas"
    return dataclasses.replace(
        base, start=dataclasses.replace(base.start, alphas=tuple(alphas.items()))
    )


class _Scorer:
    """Scores starts on validation, and keeps the run of the best."""

    def __init__(
        self,
        model,
        params,
        data,
        task,
        seed,
        config,
        epochs,
        masks,
        folder,
        show_progress,
        placement,
    ):
        self.model, self.params, self.data, self.task, self.seed = model, params, data, task, seed
        self.config = config or TrainConfig()
        self.epochs, self.masks, self.placement = epochs, masks, placement
        self.folder = None if folder is None else Path(folder)
        self.show_progress = show_progress
        self.trials: dict[Strategy, Trial] = {}
        self.best: Strategy | None = None
        self.result: RunResult | None = None

    def score(self, candidate: Strategy) -> float:
        """Score a start, once."""
        if candidate in self.trials:
            return self.trials[candidate].score
        began = time.monotonic()
        start = self.at_start(candidate)
        score, trained, result, note = start, 0, None, ""
        if self.epochs != 0:
            try:
                result = self.train(candidate)
                score, trained = float(result.val[self.task.selects]), result.epochs
            except NonFiniteError as err:
                score, note = math.inf, str(err).splitlines()[0]
        trial = Trial(
            strategy=candidate,
            score=score,
            start=start,
            epochs=trained,
            seconds=round(time.monotonic() - began, 3),
            note=note,
        )
        self.trials[candidate] = trial
        # One tuned model is kept, of the best so far.
        if self.best is None or score < self.trials[self.best].score:
            self.best, self.result = candidate, result
        return score

    def at_start(self, candidate: Strategy) -> float:
        """Validation metric before the first step."""
        begin = start_params(
            candidate, self.model, self.params, aux_key=training.keys(self.seed)["aux"]
        )
        if self.masks is not None:
            begin = apply_masks(begin, self.masks, self.placement)
        return float(
            self.task.evaluate(self.model, begin, self.data, part="val", placement=self.placement)[
                self.task.selects
            ]
        )

    def train(self, candidate: Strategy) -> RunResult:
        """Run a strategy for as long as a score takes."""
        start = candidate.start
        assert isinstance(start, Interpolated)
        config = (
            self.config
            if self.epochs is None
            else dataclasses.replace(self.config, epochs=self.epochs)
        )
        text = describe(start.alpha, dict(start.alphas))
        name = text.replace("/", "_").replace(", ", "_").replace(" ", "-")
        return run(
            self.model,
            self.params,
            candidate,
            data=self.data,
            task=self.task,
            seed=self.seed,
            config=config,
            masks=self.masks,
            folder=None if self.folder is None else self.folder / f"alpha-{name}",
            test=False,
            label=f"{candidate.name}, alpha {text}",
            show_progress=self.show_progress,
        )

    def choice(self, by: By, steps: tuple[dict[str, float], ...] = ()) -> AlphaChoice:
        """Put the winner and all trials together."""
        tried = tuple(self.trials.values())
        if all(math.isinf(trial.score) for trial in tried):
            raise NonFiniteError(f"training failed at every alpha that was tried: {tried[0].note}")
        assert self.best is not None
        kept = self.result if self.epochs is None else None
        return AlphaChoice(
            strategy=self.best,
            by=by,
            selects=self.task.selects,
            trials=tried,
            result=kept,
            steps=steps,
        )


def _by_groups(scorer: _Scorer, base: Strategy, grid: tuple[float, ...]) -> AlphaChoice:
    """Coordinate search: one group after the other takes the alpha with the lowest score."""
    start = base.start
    assert isinstance(start, Interpolated), "checked"
    found = groups_of(scorer.model, scorer.params).values()
    groups: list[str] = [group for group in dict.fromkeys(found) if group not in start.keep]
    current = dict.fromkeys(groups, start.alpha)
    scorer.score(with_alphas(base, current))
    for group in groups:
        hosts.pause()
        scores = {
            value: scorer.score(with_alphas(base, current | {group: value})) for value in grid
        }
        before = scorer.score(with_alphas(base, current))
        best = min(grid, key=lambda value: scores[value])
        if scores[best] < before:
            current[group] = best
    return scorer.choice("groups")


# --------------------------------------------------------------------------------------------------
# by the curvature of each layer


def places_of(model: Model, params: Params) -> dict[str, str]:
    """The layer of every leaf that takes part in mixing or, outside the layers, its group; by its
    path.
    """
    return {
        path: body_layer_of(model, path) or group
        for path, group in groups_of(model, params).items()
    }


def layer_sharpness(
    model: Model,
    params: Params,
    data: Any,
    *,
    task: Forecasting | None = None,
    seed: int = 0,
    samples: int = 8,
    sample: int = SAMPLE,
) -> dict[str, float]:
    """Estimate the mean curvature of each layer: the trace of its block of the Hessian over its
    size.

    The loss is the mean squared error of forecasts of training windows. By Hutchinson's estimate
    for all layers at once: with random signs v, the sum of v * (H v) over the entries of a layer
    has its trace as mean.

    Args:
      samples: Hessian-vector products; each costs about two gradients of `sample` training windows.
    Returns: by the names of `places_of`.
    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989).
    """
    loss = split_loss(
        model, data.train, sample=sample, task=task or Forecasting(), placement=Placement.of(params)
    )
    return _sharpness_by_place(
        loss, params, places_of(model, params), key=jax.random.key(seed), samples=samples
    )


def _sharpness_by_place(
    loss: curvature.Loss, params: Params, places: Mapping[str, str], key: jax.Array, samples: int
) -> dict[str, float]:
    leaves, structure = jax.tree.flatten(params)
    paths = list(trees.flatten(params))
    sizes = dict.fromkeys(places.values(), 0)
    totals = dict.fromkeys(places.values(), 0.0)
    for path, leaf in zip(paths, leaves, strict=True):
        if path in places:
            sizes[places[path]] += leaf.size
    for one in jax.random.split(key, samples):
        hosts.pause()
        drawn = []
        for leaf, leaf_key in zip(leaves, jax.random.split(one, len(leaves)), strict=True):
            drawn.append(
                jax.random.rademacher(leaf_key, leaf.shape, jnp.float32).astype(leaf.dtype)
            )
        found = _signed_products(loss, params, jax.tree.unflatten(structure, drawn))
        for path, value in zip(paths, jax.tree.leaves(found), strict=True):
            if path in places:
                totals[places[path]] += float(value) / samples
    return {name: totals[name] / sizes[name] for name in totals}


@jax.jit
def _signed_products(loss: curvature.Loss, params: Params, signs: Params) -> Params:
    """For each leaf the sum of v * (H v)."""
    product = curvature.hvp(loss, params, signs)
    return jax.tree.map(
        lambda v, hv: jnp.sum(v.astype(jnp.float32) * hv.astype(jnp.float32)), signs, product
    )


def by_curvature(sharpness: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Alphas of layers: the sharper, the more is mixed in.

    With c the sharpness of a layer (0 where it is negative) and mean(c) that of all layers,

        alpha(layer) = 1 - (1 - alpha) * min(c / mean(c), 2)

    so that 1 - alpha is the mean of what is mixed in, where no layer is at the limit.

    Raises: ValueError where no layer has a positive sharpness.
    """
    sharp = {name: max(value, 0.0) for name, value in sharpness.items()}
    mean = float(np.mean(list(sharp.values())))
    if not mean > 0:
        raise ValueError("no layer has a positive curvature here: choose alpha by the grid")
    most = min(MOST, 1 / (1 - alpha)) if alpha < 1 else MOST
    return {name: 1 - (1 - alpha) * min(value / mean, most) for name, value in sharp.items()}


# --------------------------------------------------------------------------------------------------
# by the gradient of the validation loss


def learn(
    model: Model,
    params: Params,
    data: Any,
    begin: Strategy,
    *,
    task: Forecasting | None = None,
    seed: int = 0,
    outer_steps: int = 20,
    inner_steps: int = 8,
    inner_lr: float = INNER_LR,
    outer_lr: float = OUTER_LR,
    batch_size: int = INNER_BATCH,
    sample: int = SAMPLE,
) -> tuple[dict[str, float], tuple[dict[str, float], ...]]:
    """Learn an alpha for each group of leaves by gradient descent on the validation loss after a
    few steps of training.

    With logits t, alpha(group) = sigmoid(t(group)); the mix of these alphas takes `inner_steps`
    steps of SGD on the training loss; the mean squared error of forecasts on `sample` validation
    windows after them is differentiated through all steps, back to t, which Adam follows.

    Time: an outer step is about 3 * inner_steps gradients of the training loss and 2 of the
    validation loss. Memory: inner_steps + 2 times the parameters, and the activations of one step.
    A few steps of SGD are no whole training: what is best for them tends towards the checkpoint.

    Args:
      begin: a method that mixes; its alpha (below 1) is where all groups begin.
      outer_lr: step size in logits. inner_lr: of SGD. batch_size: training windows of a step, drawn
        anew for each.
    Returns: alpha by group, those with the lowest validation loss on the way; alphas and "loss"
    before each outer step.
    Raises: ValueError for steps below 1, or where the loss is not finite.
    Source: Franceschi et al., "Bilevel Programming for Hyperparameter Optimization and
      Meta-Learning" (ICML 2018, arXiv 1806.04910).
    """
    import optax

    if outer_steps < 1 or inner_steps < 1:
        raise ValueError(
            f"outer and inner steps must be at least 1, got {outer_steps} and {inner_steps}"
        )
    task = task or Forecasting()
    placement = Placement.of(params)
    keys = training.keys(seed)
    start = begin.start
    if not isinstance(start, Interpolated):
        raise ValueError(f"{begin.name} mixes nothing: there is no alpha to learn")
    other = other_side(start, model, params, aux_key=keys["aux"])
    windows = task.windows(model, data).over(placement.mesh)
    validation = split_loss(model, data.val, sample=sample, task=task, placement=placement)
    mixing = _Mixing(groups_of(model, params), start)

    first = min(max(start.alpha, 0.01), 0.99)
    logits: Any = dict.fromkeys(mixing.groups, jnp.float32(math.log(first / (1 - first))))
    optimizer = optax.adam(outer_lr)
    state = optimizer.init(logits)
    steps = []
    for key in jax.random.split(jax.random.fold_in(keys["data"], 1), outer_steps):
        hosts.pause()
        draw, noise = jax.random.split(key)
        batches = jax.random.randint(draw, (inner_steps, min(batch_size, windows.n)), 0, windows.n)
        loss, slope = _outer(
            logits,
            params,
            other,
            windows=windows,
            validation=validation,
            batches=batches,
            key=noise,
            inner_lr=jnp.float32(inner_lr),
            mixing=mixing,
            loss=task.loss(model),
        )
        if not math.isfinite(float(loss)):
            raise ValueError(
                f"the validation loss is not finite after {inner_steps} steps of SGD at "
                f"{inner_lr:g}"
            )
        alphas = {group: float(jax.nn.sigmoid(value)) for group, value in logits.items()}
        steps.append(alphas | {"loss": float(loss)})
        updates, state = optimizer.update(slope, state)
        logits = optax.apply_updates(logits, updates)
    best = min(steps, key=lambda step: step["loss"])
    return {group: round(best[group], 4) for group in mixing.groups}, tuple(steps)


class _Mixing:
    """Index of each leaf's alpha: static under jit."""

    def __init__(self, group_of: Mapping[str, str], start: Interpolated):
        free = {path: group for path, group in group_of.items() if group not in start.keep}
        self.group_of, self.moving = tuple(free.items()), frozenset(group_of)
        self.norm: trees.Norm = start.norm

    @property
    def _key(self) -> Any:
        return self.group_of, self.moving, self.norm

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that are mixed."""
        return tuple(dict.fromkeys(group for _, group in self.group_of))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mixing) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, params: Params, other: Params, alphas: Mapping[str, jax.Array]) -> Params:
        """Mix two trees."""
        group_of = dict(self.group_of)

        def alpha_of(path: str) -> Any:
            return alphas[group_of[path]] if path in group_of else 1.0

        return trees.interpolate(
            params, other, alpha_of, only=group_of.__contains__, norm=self.norm
        )


@functools.partial(jax.jit, static_argnames=("mixing", "loss"))
def _outer(
    logits: dict[str, jax.Array],
    params: Params,
    other: Params,
    windows: Source,
    validation: SplitLoss,
    batches: jax.Array,
    key: jax.Array,
    inner_lr: jax.Array,
    *,
    mixing: _Mixing,
    loss: Loss,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Validation loss after steps of SGD on the windows `batches` [steps, B], and its gradient by
    the logits.
    """

    # Of a step only its parameters are kept; what else its gradient needs is computed again.
    @jax.checkpoint
    def step(tuned: Params, at: tuple[jax.Array, jax.Array]) -> tuple[Params, None]:
        indices, noise = at
        slope = jax.grad(loss)(tuned, windows.gather(indices), noise, True)

        def descend(path: Any, leaf: jax.Array, g: jax.Array) -> jax.Array:
            # What the family fixes is data.
            return (
                (leaf - inner_lr * g).astype(leaf.dtype)
                if trees.path_of(path) in mixing.moving
                else leaf
            )

        return jax.tree_util.tree_map_with_path(descend, tuned, slope), None

    def after(logits: dict[str, jax.Array]) -> jax.Array:
        mixed = mixing(params, other, jax.tree.map(jax.nn.sigmoid, logits))
        tuned, _ = jax.lax.scan(step, mixed, (batches, jax.random.split(key, len(batches))))
        return validation(tuned)

    return jax.value_and_grad(after)(logits)
