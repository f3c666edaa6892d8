"""A pruning run: epochs over the training windows, a selection after every group of batches,
validation, early stop.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, storage, training, trees
from ltsm_jax.data import windows as orders
from ltsm_jax.layers.masks import apply_masks, masks_by_weight, place
from ltsm_jax.methods.binding import model_facts
from ltsm_jax.methods.pruning.channels import (
    Masks,
    Params,
    cut,
    full_masks,
    gradient_sums,
    importance_of,
    no_sums,
    pruning_step,
    share_left,
)
from ltsm_jax.methods.pruning.config import PruneConfig
from ltsm_jax.methods.pruning.depth import (
    block_influence,
    check_depth,
    drop_layers,
    least_influential,
)
from ltsm_jax.methods.pruning.experts import expert_usage, keep_experts, kept_experts
from ltsm_jax.models import Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Task
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import checkpoints, progress

CHECKPOINT_SECONDS = 60.0
FORECASTING = Forecasting()


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """Result of pruning.

    Attributes:
      model, params: what the masks are for: those handed in, made ready for the data, or with
        experts taken out. The weights are not masked: fine-tuning starts from them
          (`methods.run.run(..., masks=masks)`). `pruned`
        has the masks in it, `ltsm_jax.remove` makes the model smaller.
      masks: of the epoch with the lowest validation MSE; ones where no channel was pruned. Whole on
        every host, wherever the parameters lie.
      scores: importance of every channel then, 0 for pruned ones, NaN where none is known (without
        any pruning step, or of an expert that no token has reached).
      order: int32 rank of every channel, those pruned first, then the others by importance: see
        `cut`.
      history: one dict per epoch from 0, the model before pruning: epoch, steps (pruning steps so
        far), left (share of the channels), val_mse and the other validation metrics of the merged
        model; later ones also train_loss.
      best_epoch: the one the masks are from; 0 without any pruning epoch.
      cuts: validation metrics of `cut(order, share)`, by share, where asked for.
      usage: of experts, see `expert_usage`; None where no threshold was given.
      influence: of layers before any went, see `block_influence`, and gone: which went, by their
        paths then; None and () where no depth was asked for.
      stopped: why no further epoch followed: "epochs", "patience", or "max_prune_ratio".
      splits: the data that was looked at.
    """

    model: Model
    params: Params
    masks: Masks
    scores: Masks
    order: Masks
    history: list[dict[str, Any]]
    best_epoch: int
    cuts: dict[float, dict[str, Any]]
    usage: dict[str, np.ndarray] | None
    influence: dict[str, float] | None
    gone: tuple[str, ...]
    stopped: str
    splits: Any

    @property
    def pruned(self) -> Params:
        """`params` with the masks multiplied in."""
        return apply_masks(self.params, self.masks)


@hosts.interruptible()
def prune(
    model: Model,
    params: Params,
    data: Any,
    config: PruneConfig,
    *,
    task: Task = FORECASTING,
    seed: int = 0,
    folder: str | Path | None = None,
    label: str = "pruning",
    show_progress: bool = True,
) -> PruneResult:
    """Find what of a pretrained model a data set does not need. No weight is trained.

    The training windows run through the frozen model in the order in which fine-tuning with this
    seed sees them. After every group of batches the scores of its windows enter each channel's
    average importance, I = s at first and then ema * s + (1 - ema) * I, and `pruning_step` takes
    the share r_step = ratio * (batches of a group) / (batches of an epoch). So about exp(-ratio) of
    the channels are left after an epoch. Each epoch ends with a validation of the masked model.

    It happens where the parameters lie, as in `training.fit`: over a mesh each device has its own
    rows of every batch. Several hosts all call with the same arguments and see one folder; SIGTERM
    to one of them (inside `hosts.session`) makes all save and stop at the same batch. A run may go
    on with another number of devices or hosts.

    Args:
      params: pretrained weights; not modified.
      data: what the task works on, for forecasting `Splits`; its training and its validation
        windows are looked at.
      config: how to prune.
      task: whose loss is scored and whose validation selects the epoch.
      seed: of the order of windows and of losses that draw.
      folder: of the run. A killed run goes on from there, and ends with the same bits (on as many
        devices).
      label, show_progress: of the bar on a terminal, else a line every few seconds.
    Raises: ValueError for a folder that has another run, or on several hosts for parameters that do
      not lie over all of their devices; training.NonFiniteError; hosts.Stopped after SIGTERM.
    Source: see the module's docstring.
    """
    placement = Placement.of(params)
    placement.check_hosts()
    windows = _strided(task.windows(model, data), config.stride)
    candidates = {
        "include_embed": config.include_embed,
        "include_head": config.include_head,
        "quirks": config.quirks,
    }
    full_masks(model, **candidates)  # says what is wrong early
    check_depth(model, params, config.depth)
    batch_size = min(config.batch_size or model.recipe().batch_size, windows.n)
    settings = config.record() | {"batch_size": batch_size, "seed": seed}
    with contextlib.ExitStack() as open_until_the_end:
        run = None
        if folder is not None:
            facts = settings | {"method": "prune"} | model_facts(model, params) | task.facts(data)
            facts["windows_sha256"] = storage.sha256_of(windows)
            run = training.RunFolder(folder, facts)
            open_until_the_end.enter_context(contextlib.closing(run))
        # A run that goes on has its first validation in its history.
        first = {}
        if run is None or not run.steps():
            first = task.evaluate(model, params, data, part="val", placement=placement)
        reduced = _reduce(
            model,
            params,
            config,
            task=task,
            data=data,
            windows=windows,
            batch_size=batch_size,
            folder=None if folder is None else Path(folder),
            placement=placement,
        )
        model, params = reduced.model, reduced.params
        pruning = _Pruning(
            model,
            params,
            full_masks(model, **candidates),
            windows=windows,
            data=data,
            task=task,
            settings=settings,
            chunk=config.chunk,
            run=run,
            placement=placement,
        )
        pruning.start(
            {"epoch": 0, "steps": 0, "left": 1.0} | {f"val_{k}": v for k, v in first.items()}
        )
        show = show_progress and hosts.first()
        with progress.Bar(
            pruning.total, max(config.epochs, 1), label, done=pruning.done, show=show
        ) as bar:
            pruning.go_on(bar)
        order = pruning.order()
        cuts = {}
        for share in config.ratios:
            masked = apply_masks(params, cut(order, share), placement)
            cuts[share] = task.evaluate(model, masked, data, part="val", placement=placement)
    return _result(pruning, reduced, order=order, cuts=cuts)


class _Reduced(NamedTuple):
    """A model without the layers and experts that go before channels do, and why these."""

    model: Model
    params: Params
    usage: dict[str, np.ndarray] | None
    influence: dict[str, float] | None
    gone: tuple[str, ...]


def _reduce(
    model: Model,
    params: Params,
    config: PruneConfig,
    *,
    task: Task,
    data: Any,
    windows: Any,
    batch_size: int,
    folder: Path | None,
    placement: Placement,
) -> _Reduced:
    """Take out the layers and the experts that the config asks to remove, layers first."""
    influence, gone = None, ()
    if config.depth:
        influence = _influence(
            model,
            params,
            [windows],
            task=task,
            batch_size=batch_size,
            folder=folder,
            placement=placement,
        )
        gone = least_influential(model, params, influence, count=config.depth)
        model, params = drop_layers(model, params, gone)

    usage, top = None, getattr(model.config, "top_k", 0)
    if config.expert_threshold is not None:
        parts = [windows, task.windows(model, data, "val")]
        usage = _usage(model, params, parts, folder=folder, placement=placement)
        kept = kept_experts(usage, config.expert_threshold, top)
        model, params = keep_experts(model, params, kept)
    return _Reduced(model=model, params=params, usage=usage, influence=influence, gone=gone)


def _result(
    pruning: "_Pruning", reduced: _Reduced, *, order: Masks, cuts: dict[float, Any]
) -> PruneResult:
    """Collect what a finished run found, with the masks of its best epoch."""
    best = pruning.best
    return PruneResult(
        model=reduced.model,
        params=reduced.params,
        masks=jax.tree.map(
            lambda step: jnp.asarray(np.asarray(step) == 0, jnp.float32), best["step"]
        ),
        scores=jax.tree.map(jnp.asarray, best["importance"]),
        order=order,
        history=pruning.history,
        best_epoch=pruning.best_epoch,
        cuts=cuts,
        usage=reduced.usage,
        influence=reduced.influence,
        gone=reduced.gone,
        stopped=pruning.stopped,
        splits=pruning.data,
    )


def _strided(windows: Any, stride: int) -> Any:
    if stride == 1:
        return windows
    if not hasattr(windows, "starts"):
        raise ValueError(
            f"stride={stride} is for windows of a series, and these examples are none: leave it at "
            "1"
        )
    starts = np.asarray(windows.starts)
    return windows.take(np.flatnonzero((starts - starts.min()) % stride == 0))


def _usage(
    model: Model, params: Params, parts: Sequence[Any], folder: Path | None, placement: Placement
) -> dict[str, np.ndarray]:
    """`expert_usage`, counted once per run folder."""

    def count() -> dict[str, Any]:
        return {
            path: f_E.tolist()
            for path, f_E in expert_usage(model, params, parts, placement=placement).items()
        }

    found = _once(None if folder is None else folder / "experts.json", "usage", count)
    return {path: np.asarray(f_E) for path, f_E in found.items()}


def _influence(
    model: Model,
    params: Params,
    parts: Sequence[Any],
    task: Task,
    batch_size: int,
    folder: Path | None,
    placement: Placement,
) -> dict[str, float]:
    """`block_influence`, measured once per run folder: devices of another number must not choose
    other layers.
    """

    def measure() -> dict[str, float]:
        return block_influence(
            model, params, parts, task=task, batch_size=batch_size, placement=placement
        )

    return _once(None if folder is None else folder / "layers.json", "influence", measure)


def _once(file: Path | None, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read what a run folder has, or make and keep it; the folder's config says of which weights
    and windows it is.
    """
    if file is None:
        return make()
    record = hosts.on_first(lambda: storage.read_record(file) if file.exists() else None)
    if record is not None:
        return record[name]
    found = make()

    def write() -> None:
        temporary = file.with_suffix(".tmp")
        storage.write_record(temporary, {name: found})
        os.replace(temporary, file)

    hosts.on_first(write)
    return found


@functools.partial(
    jax.jit,
    static_argnames=("model", "task", "batch_size", "squares", "chunk", "stacks", "placement"),
)
def _batch_sums(
    model,
    params,
    masks,
    windows,
    order,
    b,
    key,
    task: Task,
    batch_size: int,
    squares: bool,
    chunk: int | None,
    stacks: tuple[str, ...],
    placement: Placement,
):
    indices, weight = orders.batch_at(order, b, batch_size)
    loss = task.loss(model)
    batch = windows.gather(indices) | {"weight": weight}
    key = jax.random.fold_in(key, b)
    sums = gradient_sums(
        loss,
        params,
        masks,
        batch=batch,
        key=key,
        squares=squares,
        chunk=chunk,
        stacks=stacks,
        placement=placement,
    )
    return placement.everywhere(sums)


_order = jax.jit(orders.epoch_order, static_argnames="n")
_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


@functools.partial(jax.jit, static_argnames="placement")
def _zeros(params: Params, masks: Masks, placement: Placement) -> jax.Array:
    merged = jax.tree.leaves(apply_masks(params, masks))
    n = sum((jnp.sum(x == 0, dtype=jnp.float32) for x in merged), jnp.zeros(()))
    return placement.everywhere(n / trees.count(merged))


class _Pruning:
    """One call of `prune` at work. `state`: trees like the masks, flat arrays on the host; the rest
    is the position. Every host has the same of all of it.

    state: importance, NaN where there is none yet; step at which each channel was pruned, counted
    from 1, 0 for the others; last, its importance before that. best: the same after the best epoch.
    sums: of the group that is not full, whole on every device.
    """

    def __init__(
        self,
        model,
        params,
        masks: Masks,
        *,
        windows,
        data,
        task: Task,
        settings,
        chunk,
        run,
        placement,
    ):
        self.model, self.params, self.data, self.run, self.chunk = model, params, data, run, chunk
        self.task, self.placement = task, placement
        self.windows = windows.over(placement.mesh)
        self.settings, self.like = settings, masks
        self.squares = settings["score"] != "taylor1" or settings["average_expert_score"]
        self.n = orders.steps_per_epoch(windows.n, settings["batch_size"])
        macro, batch = settings["macro_batch"], settings["batch_size"]
        self.group = min(macro // batch, self.n) if macro > batch else 1
        self.r_step = settings["ratio"] / self.n * self.group
        self.total = settings["epochs"] * self.n
        self.keys = training.keys(settings["seed"])
        self.stacks = _stacks(params, masks)
        self.counted = tuple(self.stacks) if settings["average_expert_score"] else ()

    # --- where the run is

    def start(self, first: dict[str, Any]) -> None:
        """From the beginning, or from what the folder has."""
        unknown = jax.tree.map(lambda m: np.full(m.shape, np.nan, np.float32), self.like)
        steps = jax.tree.map(lambda m: np.zeros(m.shape, np.int32), self.like)
        begin = {"importance": unknown, "step": steps, "last": unknown}
        self.state, self.best, self.sums = dict(begin), dict(begin), self._no_sums()
        self.done = self.steps = self.waiting = self.best_epoch = 0
        self.loss, self.finished, self.stopped, self.history = (
            0.0,
            self.settings["epochs"] == 0,
            "epochs",
            [first],
        )
        self.saved, self.saved_at = time.monotonic(), 0
        if self.run is None:
            return
        if (found := self.run.restore(self.placement.replicate(self._tree()))) is None:
            self.run.record([first])
            return
        tree, position = found

        def host(branch):
            return jax.tree.map(sharding.on_host, branch)

        self.state, self.best, self.sums = host(tree["state"]), host(tree["best"]), tree["sums"]
        self.sums = {"squares": {}, "seen": {}} | self.sums
        self.saved_at = position["step"]
        self.done, self.steps, self.waiting = (position[k] for k in ("step", "steps", "waiting"))
        self.loss, self.finished, self.stopped = (
            position[k] for k in ("loss", "finished", "stopped")
        )
        self.history, self.best_epoch = position["history"], position["best_epoch"]

    def _tree(self) -> Any:
        sums = {
            name: value for name, value in self.sums.items() if not isinstance(value, dict) or value
        }
        return {
            "state": self.state,
            "best": self.best,
            "sums": sums,
        }  # a folder keeps no empty branches

    def save(self) -> None:
        """Tell the folder where the run is."""
        if self.run is None:
            return
        names = ("steps", "waiting", "loss", "finished", "stopped", "history", "best_epoch")
        self.run.save(
            self._tree(), {"step": self.done} | {name: getattr(self, name) for name in names}
        )
        self.saved, self.saved_at = time.monotonic(), self.done

    def _settle(self) -> None:
        """Between two batches the hosts agree whether to save or to stop.

        Raises: what `hosts.stopped` makes, when a signal has come to one of them, after a
        checkpoint.
        """
        new = self.done > self.saved_at
        due = new and self.waiting == 0 and time.monotonic() - self.saved > CHECKPOINT_SECONDS
        (due_now,), stop = checkpoints.settle(self.run, due)
        if new and (due_now or stop):
            self.save()
        if stop:
            kept = "nothing to keep"
            if self.run is not None:
                self.run.wait()
                kept = f"checkpoint: {self.run.path(self.done)}" if self.done else kept
            raise hosts.stopped(f"after batch {self.done} of {self.total}; {kept}")

    def _no_sums(self) -> Any:
        return self.placement.replicate(
            no_sums(self.like, squares=self.squares, stacks=self.counted)
        )

    @property
    def masks(self) -> Masks:
        """Masks of the channels that are there now, on the host."""
        return jax.tree.map(lambda step: np.asarray(step == 0, np.float32), self.state["step"])

    # --- the schedule

    def go_on(self, bar: progress.Bar) -> None:
        """Batches, pruning steps and validations until the run is over."""
        masks, one = place(self.masks, self.params, self.placement), self.settings["epochs"] == 1
        order = key = None
        while not self.finished:
            self._settle()
            epoch, b = divmod(self.done, self.n)
            if b == 0 or order is None:
                drawn = (
                    _order(self.keys["data"], epoch, self.windows.n),
                    jax.random.fold_in(self.keys["aux"], epoch),
                )
                order, key = self.placement.replicate(drawn)
            found = _batch_sums(
                self.model,
                self.params,
                masks,
                windows=self.windows,
                order=order,
                b=b,
                key=key,
                task=self.task,
                batch_size=self.settings["batch_size"],
                squares=self.squares,
                chunk=self.chunk,
                stacks=self.counted,
                placement=self.placement,
            )
            loss, rows = float(found["loss"]), int(found["rows"])
            if not math.isfinite(loss):
                raise training.NonFiniteError(
                    f"batch {b + 1} of epoch {epoch + 1}: the loss is {loss}; look at the data and "
                    "the weights"
                )
            self.sums, self.loss = _add(self.sums, found), self.loss + loss
            self.done, self.waiting = self.done + 1, self.waiting + 1
            last = self.done % self.n == 0
            full = False
            if self.waiting == self.group or (last and one):
                full = self._full(masks)
                if not full:
                    masks = place(self._step(), self.params, self.placement)
            bar.update(
                self.done,
                epoch + 1,
                rows,
                loss=loss / rows,
                note=f"  {100 * share_left(self.masks):.1f} % left",
            )
            if last or full:
                self._validate(masks, epoch + 1, full)
                self.save()
        if self.run is not None:
            self.run.wait()

    def _full(self, masks: Masks) -> bool:
        limit = self.settings["max_prune_ratio"]
        return limit < 1 and float(_zeros(self.params, masks, self.placement)) + self.r_step > limit

    def _step(self) -> Masks:
        """Scores of the group into the importance, and one selection: the masks after it."""
        masks, sums = (
            self.masks,
            jax.tree.map(lambda x: jnp.asarray(sharding.on_host(x)), self.sums),
        )
        scored, a = self._scored(), np.float32(self.settings["ema"])
        old, new = trees.flatten(self.state["importance"]), {}
        for path, s in trees.flatten(importance_of(sums, masks, self.settings["score"])).items():
            s = np.abs(s) if self.settings["ema_abs"] else np.asarray(s)
            average = np.where(np.isnan(old[path]), s, a * s + (1 - a) * old[path])
            new[path] = np.where(scored.get(path, True), average, old[path])
        before = trees.unflatten(new)
        after, importance = pruning_step(before, masks, self.r_step, scored=scored)
        self.steps += 1
        gone = jax.tree.map(lambda was, now: (was != 0) & (now == 0), masks, after)
        self.state = {
            "importance": importance,
            "step": jax.tree.map(
                lambda g, old: np.where(g, np.int32(self.steps), old), gone, self.state["step"]
            ),
            "last": jax.tree.map(
                lambda g, x, old: np.where(g, x, old), gone, before, self.state["last"]
            ),
        }
        self.sums, self.waiting = self._no_sums(), 0
        return after

    def _scored(self) -> dict[str, np.ndarray]:
        """Mark stacked experts that a token of the group has reached: booleans [E, 1] by flat path
        of a mask.

        Of an expert that none has reached, no mask has a gradient in any row, and the group says
        nothing of its channels.
        """
        sums = trees.flatten(self.sums["squares"] if self.squares else self.sums["h"])
        found = {}
        for stack in self.stacks:
            paths = [path for path in sums if path.startswith(f"{stack}/")]
            reached = [(sharding.on_host(sums[path]) != 0).any(axis=1) for path in paths]
            found |= dict.fromkeys(paths, np.any(reached, axis=0)[:, None])
        return found

    def _validate(self, masks: Masks, epoch: int, full: bool) -> None:
        selects, merged = self.task.selects, apply_masks(self.params, masks, self.placement)
        scores = self.task.evaluate(
            self.model, merged, self.data, part="val", placement=self.placement
        )
        if not math.isfinite(scores[selects]):
            raise training.NonFiniteError(
                f"epoch {epoch}: the validation {selects} of the pruned model is {scores[selects]}"
            )
        seen = (self.done - 1) % self.n + 1
        rows = min(seen * self.settings["batch_size"], self.windows.n)
        entry = {
            "epoch": epoch,
            "steps": self.steps,
            "left": share_left(self.masks),
            "train_loss": self.loss / rows,
        }
        entry |= {f"val_{name}": value for name, value in scores.items()}
        lowest = min((h[f"val_{selects}"] for h in self.history[1:]), default=math.inf)
        self.history, self.loss = [*self.history, entry], 0.0
        if scores[selects] <= lowest:  # as low is as good, and smaller
            self.best, self.best_epoch = dict(self.state), epoch
        if self.run is not None:
            self.run.record([entry])
        if full:
            self.finished, self.stopped = True, "max_prune_ratio"
        elif self.done == self.total:
            self.finished, self.stopped = True, "epochs"
        elif epoch - self.best_epoch >= self.settings["patience"]:
            self.finished, self.stopped = True, "patience"

    def order(self) -> Masks:
        """Rank of every channel at the best epoch: by the step that pruned it, then by its
        importance; channels of experts that were never seen come last.
        """
        flat = {name: trees.flatten(tree) for name, tree in self.best.items()}

        def joined(name: str) -> np.ndarray:
            return np.concatenate([np.ravel(flat[name][path]) for path in flat["step"]])

        step, last, now = joined("step"), joined("last"), joined("importance")
        alive = step == 0
        size = np.abs(np.where(alive, now, last))
        ranks = np.empty(len(step), np.int32)
        ranks[np.lexsort((np.where(np.isnan(size), np.inf, size), step, alive))] = np.arange(
            len(step), dtype=np.int32
        )
        ends = np.cumsum([x.size for x in flat["step"].values()])[:-1]
        parts = np.split(ranks, ends)
        return trees.unflatten(
            {p: r.reshape(x.shape) for (p, x), r in zip(flat["step"].items(), parts, strict=True)}
        )


def _stacks(params: Params, masks: Masks) -> list[str]:
    """Paths of the stacked experts that have masks."""
    return sorted(
        {
            path.rpartition("/")[0]
            for path in masks_by_weight(params, masks)
            if not path.endswith("/kernel")
        }
    )
