"""The training loop. There is one; strategies, pre-training and the three tasks differ in what they
hand to it.

Many steps run in one dispatch, inside a loop on the device (`step.advance`). How many is chosen
from the measured time of a step.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, storage, trees
from ltsm_jax.data import windows
from ltsm_jax.sharding import Placement
from ltsm_jax.training import (
    checkpoints,
    compiling,
    diagnosis,
    memory,
    optimizers,
    parts,
    progress,
    step,
    timing,
)
from ltsm_jax.training.config import MOST_STEPS, TrainConfig, keys
from ltsm_jax.trees import Tree

MOST_OF_ALL = 2**31 - 1  # steps of a run: they are counted in 32 bits
DISPATCH_SECONDS = 0.5  # long enough to hide Python, short enough for a live progress bar


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Result of training.

    Attributes:
      params: weights of the epoch with the lowest validation MSE (without validation: of the last
        epoch); with `ema` or `swa` of the config, averages.
      last_params: weights after the last step.
      history: a dict per epoch: epoch (from 1), step, train_loss (mean over the epoch's windows),
        lr (of its last step), and what `validate` returned under "val_<name>".
      best_epoch: from 1; None without validation.
      steps: optimiser steps taken.
      seconds: of training and validation, over all launches, without compilation.
      compile_seconds: those that training and validation waited for the compiler, over all
        launches: nearly none for whoever comes second with the same shapes.
    """

    params: Tree
    last_params: Tree
    history: list[dict[str, Any]]
    best_epoch: int | None
    steps: int
    seconds: float
    compile_seconds: float = 0.0


class NonFiniteError(ValueError):
    """A loss, a gradient or a validation error is not finite; the message names the step, tensors
    and windows.
    """


@dataclasses.dataclass
class Position:
    """Position of a run: everything of its state that is not an array on the device."""

    step: int = 0
    loss_sum: float = 0.0  # over the windows of this epoch so far
    best_epoch: int | None = None
    best: float = math.inf  # the lowest value of the metric that selects
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON."""
        # inf is no JSON; it can be read off the history
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "best"}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], select: str) -> "Position":
        """Read it back; `select` names the metric that selects an epoch."""
        position = cls(
            **{f.name: stored[f.name] for f in dataclasses.fields(cls) if f.name in stored}
        )
        if position.best_epoch is not None:
            position.best = position.history[position.best_epoch - 1][f"val_{select}"]
        return position


@hosts.interruptible()
def fit(
    loss_fn: Callable[[Tree, dict[str, jax.Array], jax.Array, bool], jax.Array],
    params: Tree,
    train_source: Any,
    *,
    config: TrainConfig,
    validate: Callable[[Tree], Mapping[str, float]] | None = None,
    watch: Callable[[Tree, int], Mapping[str, float]] | None = None,
    select: str = "mse",
    trainable: Tree | None = None,
    penalty: Callable[[Tree], jax.Array] | None = None,
    folder: str | Path | None = None,
    label: str = "",
    facts: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> FitResult:
    """Train `params` and give back the weights of the best epoch.

    Training happens where the parameters lie: on one device, or, where `sharding.shard` laid them
    over a mesh, on all of its devices, each with its part of every batch. The batches are the same
    ones for any mesh, so that a run may go on with another number of devices or hosts. On several
    hosts all call with the same arguments, and the folder is one that all see. When SIGTERM or
    Ctrl-C comes to one of them (inside `hosts.session`), all save and stop at the same step.
    Outside of a session Ctrl-C does the same to this process.

    Compiled once for a loss function and the shapes it sees: hand in the same function object (not
    a new lambda) for every run that should share the compilation. A `jax.tree_util.Partial` may
    carry arrays, as arguments.

    Args:
      loss_fn: (params, batch, key, train) -> scalar; the mean over the batch's rows weighted by
        `batch["weight"]` [B], which is 0 for the rows that fill up the last batch.
      params: start; left as it is.
      train_source: a pytree with `n` windows, `gather(indices [B]) -> batch`, and `over(mesh)`,
        itself where the steps can use it (`ltsm_jax.data.windows.Windows`).
      config: how to train; every field of a recipe and the seed must be said
        (`TrainConfig.filled`).
      validate: params -> {"mse": ..., ...}, called after each epoch.
      watch: params, epoch (from 1) -> further numbers of it, under their own names in the history;
        they select nothing.
      select: which of these metrics selects the epoch: its lowest value (strictly) wins.
      trainable: tree of booleans like `params` (`trees.select`); None trains everything. The rest
        stays bit for bit, has no optimiser state, and keeps its dropout.
      penalty: params -> scalar, added to the loss.
      folder: of the run; None keeps nothing on disk. A run killed at any moment goes on from its
        newest checkpoint when called again with the same arguments, and ends with the same bits; a
        finished one is only read.
      label: for the progress bar.
      facts: JSON-able facts that decide the result and cannot be seen from here (model, loss, data
        set, ...). Kept in the folder's config.json; a rerun with others is refused.
      show_progress: a bar on a terminal, else a line every few seconds, on stderr.
    Raises: ValueError for an empty source, nothing to train, a run that does not fit into memory
      (naming the batch size that does), or a folder that holds another run; NonFiniteError;
      checkpoints.WriteError; storage.DamagedError; after SIGTERM hosts.Stopped; after Ctrl-C that
      or, outside `hosts.session`, KeyboardInterrupt.
    """
    config.require_filled()
    if int(train_source.n) < 1:
        raise ValueError("there is no training window")
    if config.patience is not None and validate is None:
        raise ValueError(
            "patience counts epochs without a better validation MSE, so it needs `validate`"
        )
    fitting, moving, trainable = _prepared(
        loss_fn,
        params,
        train_source,
        config=config,
        validate=validate,
        select=select,
        trainable=trainable,
        penalty=penalty,
        folder=folder,
        watch=watch,
    )
    config, frozen = fitting.config, fitting.frozen
    params = trees.combine(moving, frozen)

    run, takes = None, ""
    if folder is None or not hosts.on_first(checkpoints.begun, folder):
        # it traces the loss: what is refused here has made no folder
        takes = fitting.check_memory(allocated=0, writes=folder is not None)
    if folder is not None:
        record = config_record(
            config,
            facts,
            params,
            trainable=trainable,
            source=train_source,
            select=validate and select,
        )
        run = checkpoints.RunFolder(folder, record, config.keep_checkpoints)
    with contextlib.closing(run) if run else contextlib.nullcontext():
        fitting.start(moving, run)
        if not fitting.position.finished:
            takes = takes or fitting.check_memory(
                allocated=memory.bytes_on_one(fitting.shapes), writes=True
            )
            done = fitting.position.step
            show = show_progress and hosts.first()
            with progress.Bar(
                fitting.total, config.epochs or 0, label, done=done, show=show
            ) as bar:
                bar.say(f"{bar.label}: {takes}")
                if done:
                    bar.say(f"{bar.label}: going on from step {done} of {fitting.total}")
                fitting.train(run, bar)

    state, position = fitting.state, fitting.position
    last = trees.combine(state["params"], frozen)
    kept = state["best"] if validate else state.get("average", state["params"])
    return FitResult(
        params=trees.combine(kept, frozen),
        last_params=last,
        history=position.history,
        best_epoch=position.best_epoch,
        steps=position.step,
        seconds=position.seconds,
        compile_seconds=position.compile_seconds,
    )


def step_time(
    loss_fn: Callable,
    params: Tree,
    train_source: Any,
    *,
    config: TrainConfig,
    validate: Callable[[Tree], Mapping[str, float]] | None = None,
    trainable: Tree | None = None,
    penalty: Callable[[Tree], jax.Array] | None = None,
    folder: str | Path | None = None,
    work_follows: bool = True,
) -> timing.Piece:
    """Time one step of `fit`, whose arguments these are, in the program that `fit` will run;
    nothing is trained.

    work_follows: see `timing.of`.
    """
    fitting, moving, _ = _prepared(
        loss_fn,
        params,
        train_source,
        config=config,
        validate=validate,
        select="mse",
        trainable=trainable,
        penalty=penalty,
        folder=folder,
        watch=None,
    )
    fitting.start(moving, None)
    fitting.begin_epoch(0)
    return timing.of(lambda: fitting.advance(0, 1), fitting.trace, work_follows=work_follows)


def _prepared(
    loss_fn,
    params: Tree,
    source: Any,
    *,
    config: TrainConfig,
    validate,
    select: str,
    trainable: Tree | None,
    penalty,
    folder: str | Path | None,
    watch,
) -> tuple["Fitting", Tree, Tree]:
    """One call of `fit` before its start; what moves at the start, and the tree of what does.

    Raises: ValueError where nothing is to be trained.
    """
    params = sharding.colocate(jax.tree.map(step.strong, params))
    trainable = trees.select(params, None) if trainable is None else trainable
    moving, frozen = trees.partition(params, trainable)
    if not jax.tree.leaves(moving):
        raise ValueError("nothing to train: `trainable` is False for every leaf")
    loss, placement = step.as_pytree(loss_fn), Placement.of(params)
    config = parts.settled(
        config,
        moving,
        frozen,
        source=source,
        loss_fn=loss,
        key=keys(config.seed or 0)["dropout"],
        placement=placement,
        folder=folder,
    )
    fitting = Fitting(
        config=config,
        loss_fn=loss,
        penalty=step.as_pytree(penalty),
        source=source,
        moving=moving,
        frozen=frozen,
        validate=validate,
        placement=placement,
        select=select,
        watch=watch,
    )
    return fitting, moving, trainable


class Fitting:
    """One call of `fit` at work: what it was given, and `state` (arrays) and `position` (the rest),
    which move.
    """

    def __init__(
        self,
        config: TrainConfig,
        loss_fn,
        penalty,
        source,
        moving: Tree,
        frozen: Tree,
        validate,
        placement: Placement,
        select: str,
        watch=None,
    ):
        self.config, self.loss_fn, self.penalty = config, loss_fn, penalty
        self.select, self.watch = select, watch
        self.source, self.frozen, self.validate = source, frozen, validate
        assert config.epochs and config.batch_size and config.lr and config.schedule, "filled"
        self.n = int(source.n)
        self.placement = placement
        self.mesh = placement.mesh
        placement.check_hosts()
        self.batch_size = min(config.batch_size, self.n)
        self.how = step.How.of(config)
        self.runtime = step.runtime_of(config, placement)
        placement.check_batch(self.batch_size, self.how.accumulate)
        self.placed = source.over(self.mesh)  # without the host-only facts that `source` has
        self.steps_per_epoch = windows.steps_per_epoch(self.n, self.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        if self.total > MOST_OF_ALL:
            raise ValueError(
                f"{config.epochs} epochs of {self.steps_per_epoch} steps are more than "
                f"{MOST_OF_ALL} steps"
            )
        self.rates = optimizers.schedule(
            config.schedule,
            config.lr,
            config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup=config.warmup,
        )
        self.rule = optimizers.Rule.of(config)
        self.keys = placement.replicate(keys(config.seed or 0))
        self.pace = Pace(config.steps_per_dispatch)
        self.saved_step = 0
        self.run: checkpoints.RunFolder | None = None
        self.shapes = jax.eval_shape(self.state_of, moving)
        self.shardings: Tree | None = None
        self.layout: step.StateLayout | None = None
        if self.mesh is not None:
            self.shardings = sharding.like(self.shapes, moving, self.mesh)
            self.layout = step.StateLayout.of(self.shardings)
            self.shapes = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                self.shapes,
                self.shardings,
            )

    def state_of(self, moving: Tree) -> Tree:
        """Make the state at the start of a run."""
        return _state_of(
            moving, rule=self.rule, averages=self.config.averages, best=bool(self.validate)
        )

    def start(self, moving: Tree, run: checkpoints.RunFolder | None) -> None:
        """Take state and position from the start of the run, or from where an earlier launch came
        to.
        """
        self.run = run
        restored = run.restore(self.shapes) if run else None
        if restored is not None:
            self.state, self.position = restored[0], Position.from_json(restored[1], self.select)
            self.saved_step = self.position.step
            return
        self.position = Position()
        if self.shardings is not None:
            self.state = jax.jit(self.state_of, out_shardings=self.shardings)(moving)
        else:
            self.state = sharding.colocate(self.state_of(moving))

    def check_memory(self, *, allocated: int, writes: bool) -> str:
        """Say what training takes, of which `allocated` bytes a device are taken already.

        Raises: ValueError naming what fits, where it does not.
        """
        found = memory.estimate(
            self.shapes,
            self.frozen,
            self.source,
            loss_fn=self.loss_fn,
            key=self.keys["dropout"],
            batch_size=self.batch_size,
            how=self.how,
            runtime=self.runtime,
            writes_checkpoints=writes,
        )
        free = memory.available()
        return found.check(None if free is None else free + found.sharing * allocated)

    def train(self, run: checkpoints.RunFolder | None, bar: progress.Bar) -> None:
        """Take the rest of the run's steps, with their validations and checkpoints."""
        with compiling.measured() as self.waited:
            self._train(run, bar)

    def count_time(self) -> None:
        """Bring the seconds of all launches up to date."""
        self.position.compile_seconds = self.compiled_before + self.waited.seconds
        self.position.seconds = time.monotonic() - self.began - self.position.compile_seconds

    def _train(self, run: checkpoints.RunFolder | None, bar: progress.Bar) -> None:
        self.bar, config = bar, self.config
        self.compiled_before = self.position.compile_seconds
        self.began = time.monotonic() - self.position.seconds - self.position.compile_seconds
        self.saved = time.monotonic()
        if run:
            device = jax.devices()[0].device_kind
            run.clock(
                launch_at_step=self.position.step,
                jax=jax.__version__,
                device=device,
                cores=os.cpu_count(),
            )
        while not self.position.finished:
            began, first = time.monotonic(), self.position.step
            epoch = len(
                self.position.history
            )  # a run may have been stopped between its last step and its validation
            self.begin_epoch(epoch)
            start = epoch * self.steps_per_epoch
            while self.position.step < start + self.steps_per_epoch:
                # an epoch's last step is saved with its validation, below, and so not once more
                # here
                due = (
                    self.position.step > start
                    and time.monotonic() - self.saved >= config.checkpoint_seconds
                )
                self.dispatch(epoch, self.position.step - start, self.settle(run, due))
            trained = time.monotonic()
            try:
                self.end_epoch(epoch)
            except (hosts.Stopped, KeyboardInterrupt) as err:
                # out of the middle of a validation: it comes again, from a checkpoint of the last
                # step
                if not hosts.asked_for(err):
                    raise
                raise self.stopped(run) from None
            if run:
                run.clock(
                    epoch=epoch + 1,
                    train_seconds=round(trained - began, 3),
                    validation_seconds=round(time.monotonic() - trained, 3),
                    steps_per_second=round((self.position.step - first) / (trained - began), 3),
                    compile_seconds_so_far=round(self.position.compile_seconds, 3),
                )
                # an epoch shorter than a write need not wait for the disk
                if self.position.finished or not hosts.agree(run.saving).any():
                    self.save(run)
        if run:
            run.wait()

    def settle(self, run: checkpoints.RunFolder | None, due: bool) -> int:
        """Between two dispatches the hosts agree: how many steps come next, whether to save or to
        stop.

        Raises: what `hosts.stopped` makes, when a signal has come to one of them, after a
        checkpoint.
        """
        (steps, due_now), stop = checkpoints.settle(run, self.pace.steps, due)
        if stop:
            raise self.stopped(run)
        if run and due_now:
            self.save(run)
        return int(steps)

    def stopped(self, run: checkpoints.RunFolder | None) -> BaseException:
        """Save, where there is something to save, and make the exception that says so."""
        kept = "nothing to keep"
        if run:
            if self.position.step > self.saved_step:
                self.save(run)
            run.wait()
            if self.position.step:
                kept = f"checkpoint: {run.path(self.position.step)}"
        return hosts.stopped(f"after step {self.position.step} of {self.total}; {kept}")

    def begin_epoch(self, epoch: int, order: jax.Array | None = None) -> None:
        """Set the order of an epoch's windows, where it is not known already, and its learning
        rates.
        """
        if order is None:
            order = self.placement.replicate(step.epoch_order(self.keys["data"], epoch, self.n))
        self.order = order
        steps = np.arange(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        self.lr = np.asarray(self.rates(steps), np.float32)

    def advance(self, place: int, count: int) -> tuple[np.ndarray, int]:
        """Take `count` steps from batch `place` of the epoch. Returns: losses, and how many steps
        were finite.
        """
        taken = step.advance(**self._of_step(place, count))
        self.state["params"], self.state["optimizer"], average, losses, done = taken
        if average is not None:
            self.state["average"] = average
        return np.asarray(losses), int(done)

    def trace(self) -> jax.stages.Traced:
        """Trace the program of `advance`."""
        return step.advance.trace(**self._of_step(0, 1))

    def _of_step(self, place: int, count: int) -> dict[str, Any]:
        """Arguments of `step.advance`."""
        return {
            "moving": self.state["params"],
            "opt_state": self.state["optimizer"],
            "average": self.state["average"] if self.how.ema else None,
            "frozen": self.frozen,
            "source": self.placed,
            "order": self.order,
            "rates": self.lr,
            "key": self.keys["dropout"],
            "loss_fn": self.loss_fn,
            "penalty": self.penalty,
            "place": np.int32(place),
            "count": np.int32(count),
            "step": np.int32(self.position.step),
            "batch_size": self.batch_size,
            "rule": self.rule,
            "how": self.how,
            "runtime": self.runtime,
            "layout": self.layout,
        }

    def dispatch(self, epoch: int, place: int, steps: int) -> None:
        """`steps` steps, but none past the epoch's end, from batch `place` of the epoch, and their
        records.
        """
        position, began = self.position, time.monotonic()
        count = min(steps, self.steps_per_epoch - place)
        losses, done = self.advance(place, count)
        lines = self.account(epoch, place, losses[:done])
        if self.run:
            self.run.record(lines)
        self.count_time()
        if done < count:
            raise NonFiniteError(self.diagnose(epoch, place + done) + self.kept())
        self.pace.learn(count, time.monotonic() - began)
        windows_seen = sum(map(self.rows_of, range(place, place + count)))
        self.bar.update(
            position.step,
            epoch + 1,
            windows_seen,
            loss=float(losses[count - 1]),
            note=self.best_so_far(),
        )

    def account(self, epoch: int, place: int, losses: np.ndarray) -> list[dict[str, Any]]:
        """Count the steps taken from batch `place` of the epoch, which gave `losses`; give their
        lines of metrics.
        """
        position = self.position
        lines = []
        # one by one: however the steps fell into dispatches, the sum has the same bits
        for i, loss in enumerate(losses):
            position.step += 1
            position.loss_sum += float(loss) * self.rows_of(place + i)
            lr = _short(self.lr[place + i])
            lines.append(
                {"step": position.step, "epoch": epoch + 1, "loss": _short(loss), "lr": lr}
            )
        return lines

    def rows_of(self, place: int) -> int:
        """Windows of batch `place` of an epoch."""
        return min(self.batch_size, self.n - self.batch_size * place)

    def end_epoch(self, epoch: int) -> None:
        """Validation, selection, and whether this was the last epoch."""
        kept = self.to_keep(epoch)
        found = self.validate(trees.combine(kept, self.frozen)) if self.validate else None
        watched = self.watch(trees.combine(kept, self.frozen), epoch + 1) if self.watch else {}
        if self.judge(epoch, found, watched):
            self.state["best"] = _copied(kept)
        if self.config.swa:
            # Not before: a stop inside the validation comes back to this epoch, which must not
            # count twice.
            self.state["average"] = kept
        self.count_time()
        row = self.position.history[-1]
        if self.run:
            self.run.record([row])
        self.bar.update(
            self.position.step, epoch + 1, 0, loss=row["train_loss"], note=self.best_so_far()
        )

    def judge(
        self, epoch: int, found: Mapping[str, Any] | None, watched: Mapping[str, Any] | None = None
    ) -> bool:
        """Add the epoch's row to the history; say whether its weights are the best so far.

        found: of its validation, where there is one. watched: further numbers for the row, see
        `fit`.
        """
        position = self.position
        row = {
            "epoch": epoch + 1,
            "step": position.step,
            "train_loss": position.loss_sum / self.n,
            "lr": _short(self.lr[-1]),
        }
        better = False
        if found is not None:
            row |= {
                f"val_{name}": value.item() if hasattr(value, "item") else value
                for name, value in found.items()
            }
            value = row[f"val_{self.select}"]
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"validation after epoch {epoch + 1} (step {position.step}) gives "
                    f"{self.select} {value}, although every training loss was finite{self.kept()}"
                )
            selectable = not self.config.swa or epoch >= self.config.first_averaged
            better = selectable and value < position.best
            if better:
                position.best, position.best_epoch = value, epoch + 1
        row |= watched or {}
        position.history.append(row)
        position.loss_sum = 0.0
        waited = epoch + 1 - (position.best_epoch or epoch + 1)
        position.finished = epoch + 1 == self.config.epochs or waited >= (
            self.config.patience or math.inf
        )
        return better

    def to_keep(self, epoch: int) -> Tree:
        """Give the weights that are validated after an epoch: those of the last step, or their
        average.
        """
        params, config = self.state["params"], self.config
        if config.swa:
            before = max(epoch - config.first_averaged, 0)
            return step.running_mean(self.state["average"], params, jnp.float32(before))
        return self.state["average"] if config.ema else params

    def save(self, run: checkpoints.RunFolder) -> None:
        """Write a checkpoint."""
        run.save(self.state, self.position.to_json())
        self.saved, self.saved_step = time.monotonic(), self.position.step

    def best_so_far(self) -> str:
        """Say the best validation, for the progress bar."""
        return (
            ""
            if self.position.best_epoch is None
            else f"  best val {self.select} {self.position.best:.4f}"
        )

    def kept(self) -> str:
        """For an error: which checkpoint is left."""
        if not self.run:
            return ""
        self.run.wait()
        steps = self.run.steps()
        return (
            f"\n  last good checkpoint, kept: {self.run.path(steps[-1])}"
            if steps
            else "\n  no checkpoint was made yet"
        )

    def diagnose(self, epoch: int, place: int) -> str:
        """Describe batch `place` of the epoch, whose update was not applied; the batch is taken
        once more.
        """
        rows = windows.batch_at(jnp.asarray(sharding.on_host(self.order)), place, self.batch_size)
        indices, weight = map(np.asarray, rows)
        batch = jax.tree.map(sharding.on_host, step.taken(self.placed, indices, self.placement))
        key = jax.random.fold_in(self.keys["dropout"], self.position.step)
        placed = self.placement.replicate(batch | {"weight": weight})
        whole = dataclasses.replace(self.runtime, placement=Placement())
        loss, grads = step.gradients_of(
            self.state["params"],
            self.frozen,
            placed,
            key=key,
            loss_fn=self.loss_fn,
            penalty=self.penalty,
            how=self.how,
            runtime=whole,
        )
        params = trees.combine(self.state["params"], self.frozen)
        describe = getattr(self.source, "describe", lambda window: {"window": window})
        lines = [
            f"loss {float(loss)} at step {self.position.step + 1} (epoch {epoch + 1}, batch "
            f"{place + 1} of {self.steps_per_epoch})",
            diagnosis.of_tree("parameters", params),
            diagnosis.of_tree("gradients", grads),
            *diagnosis.of_batch(batch, indices, weight, describe=describe),
        ]
        return "\n".join(lines)


# Both are one program, where each shape of a copy and of a moment would be one of its own.
@jax.jit
def _copied(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnames=("rule", "averages", "best"))
def _state_of(moving: Tree, *, rule: optimizers.Rule, averages: bool, best: bool) -> Tree:
    """Make the state at the start of a run. averages, best: whether it has these trees."""
    # copies: the steps donate their input, and the caller's arrays must live
    state = {
        "params": jax.tree.map(jnp.copy, moving),
        "optimizer": rule.transformation().init(moving),
    }
    if averages:
        state["average"] = jax.tree.map(jnp.copy, moving)
    return state | ({"best": jax.tree.map(jnp.copy, moving)} if best else {})


class Pace:
    """Chooses the number of steps of the next dispatch: as many as fill DISPATCH_SECONDS."""

    def __init__(self, fixed: int | None):
        self.fixed, self.steps, self.compiled = fixed, fixed or 1, False

    def learn(self, steps: int, seconds: float) -> None:
        """Set the next number of steps by how long a dispatch of `steps` took."""
        if self.fixed is None and self.compiled:
            fill = DISPATCH_SECONDS / max(seconds / steps, 1e-9)
            self.steps = int(min(max(fill, 1), 4 * self.steps, MOST_STEPS))
        self.compiled = (
            True  # the first dispatch waits for the compiler and says nothing about a step
        )


def _short(x: np.float32) -> float:
    return float(str(x))  # the shortest decimal that is this float32 and no other


def _stamps(source: Any) -> dict[str, str]:
    """The digest of a source's time stamps, where it has any; no array of the device holds them."""
    stamps = getattr(source, "timestamps", None)
    if stamps is None:
        return {}
    stamps = np.asarray(stamps)
    if stamps.dtype.kind == "M":
        stamps = stamps.astype("datetime64[us]").astype(
            np.int64
        )  # the same in whatever unit they came
    else:
        stamps = np.frombuffer("\n".join(map(str, stamps)).encode(), np.uint8)
    return {"stamps_sha256": hosts.on_first(storage.sha256_of, {"stamps": stamps})}


def config_record(config, facts, params, trainable, source, select) -> dict[str, Any]:
    """Give what the config.json of a run holds: everything that decides its result. On several
    hosts all call.
    """
    one = jax.eval_shape(lambda s: s.gather(jnp.zeros(1, jnp.int32)), source)
    shapes = {name: list(array.shape[1:]) for name, array in one.items()}
    return {
        "train": config.record(),
        "facts": dict(facts or {}),
        "selection": f"lowest validation {select}" if select else "last epoch",
        "windows": {
            "n": int(source.n),
            "shapes": shapes,
            "sha256": hosts.on_first(
                storage.sha256_of, source
            ),  # the others need not read it for that
            **_stamps(source),
        },
        "start": {
            "parameters": trees.count(params),
            "trainable": sum(
                p.size for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(trainable)) if t
            ),
            "params_sha256": storage.sha256_of(params),
            "trainable_sha256": storage.sha256_of(jax.tree.map(np.bool_, trainable)),
        },
    }
