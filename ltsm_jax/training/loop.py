"""The training loop. There is one; strategies, pre-training and the three tasks differ in what they hand to it.

Many steps run in one dispatch, inside a loop on the device that gathers its own windows. How many is chosen from the
measured time of a step and is an argument of the compiled program, so neither compilation nor a single bit of the
result depends on it.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, storage, trees
from ltsm_jax.data import windows
from ltsm_jax.layers.experts import rows_over
from ltsm_jax.layers.linear import compute_in
from ltsm_jax.sharding import Placement
from ltsm_jax.training import checkpoints, optimizers, progress

Tree = Any
MOST_STEPS = 4096  # length of the loss buffer, so the largest dispatch
HUGE = 1e6  # beyond any scaled series; one such value swamps all others in a float32 sum of squares
DISPATCH_SECONDS = 0.5  # long enough to hide Python, short enough for a live progress bar
COMPUTE = ("float32", "bfloat16")
REMAT = {"none": None, "all but products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
KEY_NAMES = ("init", "aux", "data", "dropout")


def keys(seed: int) -> dict[str, jax.Array]:
    """Named keys of one seed: `init`, `aux` (the random model SFF mixes in), `data` (order), `dropout`.

    A key depends on its name and the seed alone, so methods that use more keys than others still see the same data.
    """
    return {name: jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())) for name in KEY_NAMES}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are those of the SFF release (Meteor-Stars/SFF).

    Attributes:
      epochs: passes over the training windows.
      batch_size: windows per step; the last, partial batch of an epoch is kept.
      lr, schedule, warmup: see `optimizers.schedule`.
      weight_decay, clip: see `optimizers.adam`.
      patience: stop after this many epochs without a better validation MSE; None: never.
      seed: of the data order and dropout.
      checkpoint_seconds: time between checkpoints inside an epoch; one more follows each epoch.
      keep_checkpoints: how many stay; each has the best weights, too. A finished run keeps its last.
      steps_per_dispatch: None: from the measured time of a step. Has no influence on results.
      compute: dtype of the matrix products, "float32" or "bfloat16"; parameters, norms and losses stay in float32.
      accumulate: parts a batch is taken in, one after the other, for the memory of one part at a time.
      remat: what the backward pass computes again instead of keeping it: "none", or "all but products" (everything but
        the results of matrix products without batch axes), for less memory and more time.
    Raises: ValueError listing every field out of range.
    """

    epochs: int = 10
    batch_size: int = 2048
    lr: float = 3e-5
    schedule: str = "halving"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    patience: int | None = None
    seed: int = 0
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = checkpoints.KEEP
    steps_per_dispatch: int | None = None
    compute: str = "float32"
    accumulate: int = 1
    remat: str = "none"

    def __post_init__(self):
        bad = {
            "epochs must be at least 1": self.epochs < 1,
            "batch_size must be at least 1": self.batch_size < 1,
            "lr must be positive and finite": not 0 < self.lr < math.inf,
            f"schedule must be one of {', '.join(optimizers.SCHEDULES)}": self.schedule not in optimizers.SCHEDULES,
            "warmup is a share of the run, in [0, 1)": not 0 <= self.warmup < 1,
            "weight_decay must not be negative": not 0 <= self.weight_decay < math.inf,
            "clip must be positive": self.clip is not None and not self.clip > 0,
            "patience must be at least 1": self.patience is not None and self.patience < 1,
            "seed must be in [0, 2**32)": not 0 <= self.seed < 2**32,
            "checkpoint_seconds must not be negative": not self.checkpoint_seconds >= 0,
            "keep_checkpoints must be at least 1": self.keep_checkpoints < 1,
            f"steps_per_dispatch must be in [1, {MOST_STEPS}]": self.steps_per_dispatch is not None
            and not 1 <= self.steps_per_dispatch <= MOST_STEPS,
            f"compute must be one of {', '.join(COMPUTE)}": self.compute not in COMPUTE,
            "accumulate must be at least 1": self.accumulate < 1,
            f"remat must be one of {', '.join(REMAT)}": self.remat not in REMAT,
        }
        if problems := [text for text, is_bad in bad.items() if is_bad]:
            raise ValueError(f"{self}: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What training gave.

    Attributes:
      params: weights of the epoch with the lowest validation MSE (without validation: of the last epoch).
      last_params: weights after the last step.
      history: a dict per epoch: epoch (from 1), step, train_loss (mean over the epoch's windows), lr (of its last
        step), and what `validate` returned under "val_<name>".
      best_epoch: from 1; None without validation.
      steps: optimiser steps taken.
      seconds: of training and validation, over all launches; compilation included.
    """

    params: Tree
    last_params: Tree
    history: list[dict[str, Any]]
    best_epoch: int | None
    steps: int
    seconds: float


class NonFiniteError(ValueError):
    """A loss, a gradient or a validation error is not finite; the message names the step, tensors and windows."""


@dataclasses.dataclass
class _Position:
    """Where a run is: everything of its state that is not an array on the device."""

    step: int = 0
    loss_sum: float = 0.0  # over the windows of this epoch so far
    best_epoch: int | None = None
    best_mse: float = math.inf
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        # inf is no JSON; best_mse can be read off the history
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "best_mse"}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "_Position":
        position = cls(**{f.name: stored[f.name] for f in dataclasses.fields(cls) if f.name in stored})
        if position.best_epoch is not None:
            position.best_mse = position.history[position.best_epoch - 1]["val_mse"]
        return position


def fit(
    loss_fn: Callable[[Tree, dict[str, jax.Array], jax.Array, bool], jax.Array],
    params: Tree,
    train_source: Any,
    *,
    config: TrainConfig,
    validate: Callable[[Tree], Mapping[str, float]] | None = None,
    trainable: Tree | None = None,
    penalty: Callable[[Tree], jax.Array] | None = None,
    folder: str | Path | None = None,
    label: str = "",
    facts: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> FitResult:
    """Train `params` and give back the weights of the best epoch.

    Training happens where the parameters lie: on one device, or, where `sharding.shard` laid them over a mesh, on all
    of its devices, each with its part of every batch. The batches are the same ones for any mesh, so that a run may go
    on with another number of devices or hosts. On several hosts all call with the same arguments, and the folder is one
    that all see. When SIGTERM comes to one of them (inside `hosts.session`), all save and stop at the same step.

    Compiled once for a loss function and the shapes it sees: hand in the same function object (not a new lambda)
    for every run that should share the compilation. A `jax.tree_util.Partial` may carry arrays, as arguments.

    Args:
      loss_fn: (params, batch, key, train) -> scalar; the mean over the batch's rows weighted by `batch["weight"]` [B],
        which is 0 for the rows that fill up the last batch.
      params: start; left as it is.
      train_source: a pytree with `n` windows, `gather(indices [B]) -> batch`, and `over(mesh)`, itself where the steps
        can use it (`ltsm_jax.data.windows.Windows`).
      config: how to train.
      validate: params -> {"mse": ..., ...}, called after each epoch; the lowest "mse" (strictly) wins.
      trainable: tree of booleans like `params` (`trees.select`); None trains everything. The rest stays bit for bit,
        has no optimiser state, and keeps its dropout.
      penalty: params -> scalar, added to the loss.
      folder: of the run; None keeps nothing on disk. A run killed at any moment goes on from its newest checkpoint
        when called again with the same arguments, and ends with the same bits; a finished one is only read.
      label: for the progress bar.
      facts: JSON-able facts that decide the result and cannot be seen from here (model, loss, data set, ...). Kept in
        the folder's config.json; a rerun with others is refused.
      show_progress: a bar on a terminal, else a line every few seconds, on stderr.
    Raises: ValueError for an empty source, nothing to train, a run that does not fit into memory (naming the batch
      size that does), or a folder that holds another run; NonFiniteError; checkpoints.WriteError;
      storage.DamagedError; hosts.Stopped after SIGTERM.
    """
    if int(train_source.n) < 1:
        raise ValueError("there is no training window")
    if config.patience is not None and validate is None:
        raise ValueError("patience counts epochs without a better validation MSE, so it needs `validate`")
    params = sharding.together(jax.tree.map(_strong, params))
    trainable = trees.select(params, None) if trainable is None else trainable
    moving, frozen = trees.partition(params, trainable)
    if not jax.tree.leaves(moving):
        raise ValueError("nothing to train: `trainable` is False for every leaf")
    fitting = _Fitting(config, _partial(loss_fn), _partial(penalty), train_source, moving, frozen, validate,
                       Placement.of(params))  # fmt: skip

    run = None
    if folder is not None:
        record = _config_record(config, facts, params, trainable, train_source, validate)
        run = checkpoints.RunFolder(folder, record, config.keep_checkpoints)
    with contextlib.closing(run) if run else contextlib.nullcontext():
        memory = fitting.start(moving, run)
        if not fitting.position.finished:
            done = fitting.position.step
            show = show_progress and hosts.first()
            with progress.Bar(fitting.total, config.epochs, label, done=done, show=show) as bar:
                bar.say(f"{bar.label}: {memory}")
                if done:
                    bar.say(f"{bar.label}: going on from step {done} of {fitting.total}")
                fitting.train(run, bar)

    state, position = fitting.state, fitting.position
    last = trees.merge(state["params"], frozen)
    return FitResult(
        params=trees.merge(state["best"], frozen) if validate else last,
        last_params=last,
        history=position.history,
        best_epoch=position.best_epoch,
        steps=position.step,
        seconds=position.seconds,
    )


def trace_step(
    loss_fn: Callable[[Tree, dict[str, jax.Array], jax.Array, bool], jax.Array],
    params: Tree,
    train_source: Any,
    *,
    config: TrainConfig,
    trainable: Tree | None = None,
    penalty: Callable[[Tree], jax.Array] | None = None,
) -> jax.stages.Traced:
    """The compiled step of `fit`, traced from shapes alone: `.lower().compile()` of it is what `fit` runs.

    Nothing is computed and no device has to be there, so a step can be compiled for a machine that is not at hand.

    Args:
      params: tree of `jax.ShapeDtypeStruct` with shardings, over a mesh or all on one device.
      train_source: as for `fit`; of its arrays, only the shapes are looked at.
      loss_fn, config, trainable, penalty: as for `fit`.
    Raises: ValueError, as `fit`, for a batch that does not divide among the devices.
    """
    placement, first = Placement.of(params), jax.tree.leaves(params)[0]
    mesh = placement.mesh
    whole = first.sharding if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shapes(tree, shardings=None):
        shardings = jax.tree.map(lambda _: whole, tree) if shardings is None else shardings
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    n = int(train_source.n)
    batch_size = min(config.batch_size, n)
    placement.check_batch(batch_size, config.accumulate)
    moving, frozen = trees.partition(params, trees.select(params, None) if trainable is None else trainable)
    opt_state = jax.eval_shape(optimizers.adam(config.weight_decay, config.clip).init, moving)
    placed = mesh and sharding.like({"params": moving, "optimizer": opt_state}, moving, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rates = jax.ShapeDtypeStruct((windows.steps_per_epoch(n, batch_size),), jnp.float32)
    order, key = jax.ShapeDtypeStruct((n,), jnp.int32), jax.eval_shape(keys, config.seed)["dropout"]
    return _advance.trace(
        moving, shapes(opt_state, placed and placed["optimizer"]), frozen, shapes(train_source), shapes(order), rates,
        shapes(key), _partial(loss_fn), _partial(penalty), number, number, number,
        batch_size=batch_size, weight_decay=config.weight_decay, clip=config.clip,
        how=_How(config.compute, config.accumulate, config.remat), layout=mesh and _Layout.of(mesh, placed),
    )  # fmt: skip


class _Fitting:
    """One call of `fit` at work: what it was given, and `state` (arrays) and `position` (the rest), which move."""

    def __init__(
        self, config: TrainConfig, loss_fn, penalty, source, moving: Tree, frozen: Tree, validate, placement: Placement
    ):
        self.config, self.loss_fn, self.penalty = config, loss_fn, penalty
        self.source, self.frozen, self.validate = source, frozen, validate
        self.n = int(source.n)
        self.placement = placement
        self.mesh = placement.mesh
        placement.check_hosts()
        self.batch_size = min(config.batch_size, self.n)
        placement.check_batch(self.batch_size, config.accumulate)
        self.placed = source.over(self.mesh)  # without the host-only facts that `source` has
        self.steps_per_epoch = windows.steps_per_epoch(self.n, self.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.rates = optimizers.schedule(config.schedule, config.lr, config.epochs, self.steps_per_epoch, config.warmup)
        self.keys = placement.replicate(keys(config.seed))
        self.pace = _Pace(config.steps_per_dispatch)
        self.layout: _Layout | None = None
        self.saved_step = 0
        self.how = _How(config.compute, config.accumulate, config.remat)

    def start(self, moving: Tree, run: checkpoints.RunFolder | None) -> str:
        """State and position at the start of the run, or where an earlier launch came to; a line on memory."""

        def state_of(moving):
            # copies: the steps donate their input, and the caller's arrays must live
            state = {
                "params": jax.tree.map(jnp.copy, moving),
                "optimizer": optimizers.adam(self.config.weight_decay, self.config.clip).init(moving),
            }
            return state | ({"best": jax.tree.map(jnp.copy, moving)} if self.validate else {})

        self.run, shapes = run, jax.eval_shape(state_of, moving)
        layout = None if self.mesh is None else sharding.like(shapes, moving, self.mesh)
        if layout is not None and self.mesh is not None:
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
            self.layout = _Layout.of(self.mesh, layout)
        restored = run.restore(shapes) if run else None
        if restored is None:
            self.position = _Position()
            memory = self.check_memory(shapes, allocated=0)
            if layout is not None:
                self.state = jax.jit(state_of, out_shardings=layout)(moving)
                return memory
            self.state = sharding.together(state_of(moving))
            return memory
        self.state, self.position = restored[0], _Position.from_json(restored[1])
        self.saved_step = self.position.step
        return "" if self.position.finished else self.check_memory(shapes, allocated=_bytes_on_one(shapes))

    def train(self, run: checkpoints.RunFolder | None, bar: progress.Bar) -> None:
        self.bar, config = bar, self.config
        self.began = time.monotonic() - self.position.seconds
        self.saved = time.monotonic()
        if run:
            device = jax.devices()[0].device_kind
            run.clock(launch_at_step=self.position.step, jax=jax.__version__, device=device, cores=os.cpu_count())
        while not self.position.finished:
            began, first = time.monotonic(), self.position.step
            epoch = first // self.steps_per_epoch
            self.order = self.placement.replicate(_epoch_order(self.keys["data"], epoch, self.n))
            steps = np.arange(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
            self.lr = np.asarray(self.rates(steps), np.float32)
            while self.position.step <= steps[-1]:
                # an epoch's last step is saved with its validation, below, and so not once more here
                due = self.position.step > steps[0] and time.monotonic() - self.saved >= config.checkpoint_seconds
                self.dispatch(epoch, self.position.step - int(steps[0]), self.settle(run, due))
            trained = time.monotonic()
            self.end_epoch(epoch)
            if run:
                run.clock(
                    epoch=epoch + 1,
                    train_seconds=round(trained - began, 3),
                    validation_seconds=round(time.monotonic() - trained, 3),
                    steps_per_second=round((self.position.step - first) / (trained - began), 3),
                )
                # an epoch shorter than a write need not wait for the disk
                if self.position.finished or not hosts.agree(run.saving).any():
                    self.save(run)
        if run:
            run.wait()

    def settle(self, run: checkpoints.RunFolder | None, due: bool) -> int:
        """Between two dispatches the hosts agree: how many steps come next, whether to save or to stop.

        Raises: hosts.Stopped when SIGTERM has come to one of them, after a checkpoint.
        """
        (steps, due_now), stop = checkpoints.settle(run, self.pace.steps, due)
        if stop and run:
            if self.position.step > self.saved_step:
                self.save(run)
            run.wait()
        elif run and due_now:
            self.save(run)
        if stop:
            kept = f"checkpoint: {run.path(self.position.step)}" if run and self.position.step else "nothing to keep"
            raise hosts.Stopped(f"stopped by SIGTERM after step {self.position.step} of {self.total}; {kept}")
        return int(steps)

    def dispatch(self, epoch: int, place: int, steps: int) -> None:
        """`steps` steps, but none past the epoch's end, from batch `place` of the epoch, and their records."""
        position, began = self.position, time.monotonic()
        count = min(steps, self.steps_per_epoch - place)
        self.state["params"], self.state["optimizer"], losses, done = _advance(
            self.state["params"], self.state["optimizer"], self.frozen, self.placed, self.order, self.lr,
            self.keys["dropout"], self.loss_fn, self.penalty,
            np.int32(place), np.int32(count), np.int32(position.step),
            batch_size=self.batch_size, weight_decay=self.config.weight_decay, clip=self.config.clip,
            how=self.how, layout=self.layout,
        )  # fmt: skip
        losses, done = np.asarray(losses), int(done)
        rows = np.minimum(self.batch_size, self.n - self.batch_size * (place + np.arange(done)))
        for loss, row in zip(losses.tolist(), rows.tolist()):  # one by one: however the steps fell into dispatches,
            position.loss_sum += loss * row  # the sum has the same bits
        if self.run:
            facts = zip(range(position.step + 1, self.total + 1), losses[:done], self.lr[place:])
            self.run.record(
                {"step": step, "epoch": epoch + 1, "loss": _short(loss), "lr": _short(lr)} for step, loss, lr in facts
            )
        position.step += done
        position.seconds = time.monotonic() - self.began
        if done < count:
            raise NonFiniteError(self.diagnose(epoch, place + done) + self.kept())
        self.pace.learn(count, time.monotonic() - began)
        self.bar.update(position.step, epoch + 1, int(rows.sum()), float(losses[count - 1]), self.best_so_far())

    def end_epoch(self, epoch: int) -> None:
        """Validation, selection, and whether this was the last epoch."""
        position = self.position
        row = {
            "epoch": epoch + 1,
            "step": position.step,
            "train_loss": position.loss_sum / self.n,
            "lr": _short(self.lr[-1]),
        }
        if self.validate:
            found = self.validate(trees.merge(self.state["params"], self.frozen))
            row |= {f"val_{name}": value.item() if hasattr(value, "item") else value for name, value in found.items()}
            if not math.isfinite(row["val_mse"]):
                raise NonFiniteError(
                    f"validation after epoch {epoch + 1} (step {position.step}) gives mse {row['val_mse']}, although "
                    f"every training loss was finite{self.kept()}"
                )
            if row["val_mse"] < position.best_mse:
                position.best_mse, position.best_epoch = row["val_mse"], epoch + 1
                self.state["best"] = jax.tree.map(jnp.copy, self.state["params"])
        position.history.append(row)
        position.loss_sum = 0.0
        waited = epoch + 1 - (position.best_epoch or epoch + 1)
        position.finished = epoch + 1 == self.config.epochs or waited >= (self.config.patience or math.inf)
        position.seconds = time.monotonic() - self.began
        if self.run:
            self.run.record([row])
        self.bar.update(position.step, epoch + 1, 0, row["train_loss"], self.best_so_far())

    def save(self, run: checkpoints.RunFolder) -> None:
        run.save(self.state, self.position.to_json())
        self.saved, self.saved_step = time.monotonic(), self.position.step

    def best_so_far(self) -> str:
        return "" if self.position.best_epoch is None else f"  best val mse {self.position.best_mse:.4f}"

    def kept(self) -> str:
        """For an error: which checkpoint is left."""
        if not self.run:
            return ""
        self.run.wait()
        steps = self.run.steps()
        return (
            f"\n  last good checkpoint, kept: {self.run.path(steps[-1])}" if steps else "\n  no checkpoint was made yet"
        )

    def diagnose(self, epoch: int, place: int) -> str:
        """What is wrong with batch `place` of the epoch, whose update was not applied; the batch is taken once more."""
        rows = windows.batch_at(jnp.asarray(sharding.on_host(self.order)), place, self.batch_size)
        indices, weight = map(np.asarray, rows)
        batch = jax.tree.map(sharding.on_host, _taken(self.placed, indices, self.placement))
        key = jax.random.fold_in(self.keys["dropout"], self.position.step)
        placed = self.placement.replicate(batch | {"weight": weight})
        loss, grads = _gradients(self.state["params"], self.frozen, placed, key, self.loss_fn, self.penalty, self.how)
        lines = [
            f"loss {float(loss)} at step {self.position.step + 1} "
            f"(epoch {epoch + 1}, batch {place + 1} of {self.steps_per_epoch})"
        ]
        for what, tree in (("parameters", trees.merge(self.state["params"], self.frozen)), ("gradients", grads)):
            flat = trees.flatten(tree)
            bad = [path for path, leaf in flat.items() if not bool(jnp.isfinite(leaf).all())]
            names = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
            lines.append(f"  {what}: " + (f"not finite in {len(bad)} of {len(flat)}: {names}" if bad else "all finite"))
        real = np.flatnonzero(np.asarray(weight) > 0)
        suspects, largest = [], 0.0
        for name, values in batch.items():
            size = np.abs(np.asarray(values, np.float64)[real]).reshape(len(real), -1)
            top = np.where(np.isfinite(size).all(1), size.max(1), np.inf)
            largest = max(largest, float(np.max(top[np.isfinite(top)], initial=0)))
            for i in np.flatnonzero(top > HUGE):
                window = int(indices[real[i]])
                where = self.source.describe(window) if hasattr(self.source, "describe") else {"window": window}
                what = f"{name} is not finite" if np.isinf(top[i]) else f"{name} reaches {top[i]:.3g}"
                suspects.append(f"    {what}: " + ", ".join(f"{k} {v}" for k, v in where.items() if v is not None))
        if suspects:
            lines.append(f"  suspect windows of this batch ({len(suspects)} of {len(real)}):")
            lines += suspects[:5] + (["    ..."] if len(suspects) > 5 else [])
        else:
            lines.append(
                f"  the {len(real)} windows of this batch are finite, no value is beyond {largest:.3g}: "
                "a smaller lr, or clip, may help"
            )
        return "\n".join(lines)

    def check_memory(self, state: Tree, allocated: int) -> str:
        """One line on the memory training takes on a device, of which `allocated` bytes are taken already.

        Counted: the state, a gradient, what the backward pass keeps of the forward pass, and its own scratch. On the
        CPU also the copy that a checkpoint is written from, and all devices of this host, which share its memory.
        Rough: the compiler fuses some of it away. `experiments.aot` asks the compiler.

        Raises: ValueError naming the batch size that fits, when this one does not.
        """

        def kept_by_backward(moving, frozen, source, loss_fn):
            rows = windows.batch_at(jnp.arange(source.n), 0, self.batch_size // self.how.accumulate)
            batch, key = _gather(source, *rows, Placement()), self.keys["dropout"]
            objective = _recomputing(lambda m: _objective(m, frozen, batch, key, loss_fn, None, self.how), self.how)
            return jax.vjp(objective, moving)[1]

        moving = state["params"]
        kept = jax.eval_shape(kept_by_backward, moving, self.frozen, self.source, self.loss_fn)
        # XLA's own figures for Timer, known only after compiling, are 1.2 (timer-tiny) and 1.4 (67M) of what is kept
        weights = _bytes(moving) + _bytes(self.frozen) if self.how.compute == "float32" else 0  # else it keeps copies
        on_cpu = jax.default_backend() == "cpu"
        sharing = len(self.mesh.local_devices) if self.mesh and on_cpu else 1
        rows = self.placement.row_parts
        activations = int(1.4 * max(_bytes(kept) - weights, 0) * sharing / rows)
        fixed = sharing * (_bytes_on_one(state) * (2 if self.run and on_cpu else 1) + _bytes_on_one(moving))
        line = (
            f"{_gb(fixed)} of memory for parameters and optimiser, {_gb(activations)} for a batch of {self.batch_size}"
        )
        available = _available_memory()
        if hosts.count() > 1:  # the host with the least decides for all; in MB, for they agree in 32 bits
            least = int(hosts.agree(-1 if available is None else available // 2**20).min())
            available = None if least < 0 else least * 2**20
        if available is None:
            return f"about {line}"
        left = available + sharing * allocated - fixed
        if activations > left:
            fits = int(left / max(activations, 1) * self.batch_size)
            fits -= fits % (rows * self.how.accumulate)
            advice = f"batch_size={fits} fits" if fits >= 1 else "take a smaller model or train fewer parameters"
            if self.batch_size > rows * self.how.accumulate:
                advice += f"; or take the batch in more parts (accumulate, now {self.how.accumulate})"
            raise ValueError(f"training takes about {line}, but only {_gb(available)} is available: {advice}")
        return f"about {line}; {_gb(available)} is available"


@dataclasses.dataclass(frozen=True)
class _How:
    """How a gradient is computed: dtype of the products, parts a batch is taken in, what is computed again."""

    compute: str
    accumulate: int
    remat: str


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where parameters and optimiser state lie on a mesh; hashable, so that it may be static under jit."""

    mesh: jax.sharding.Mesh
    structure: Any
    shardings: tuple[jax.sharding.NamedSharding, ...]

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh, state: Tree) -> "_Layout":
        """The layout of what the step gives back, from a tree of shardings for the whole state."""
        outputs = (state["params"], state["optimizer"])
        return cls(mesh, jax.tree.structure(outputs), tuple(jax.tree.leaves(outputs)))

    def pin(self, moving: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
        """Without it the compiler may choose another layout for what comes out, and compile the next step again."""
        return jax.lax.with_sharding_constraint((moving, opt_state), jax.tree.unflatten(self.structure, self.shardings))


def _objective(moving, frozen, batch, key, loss_fn, penalty, how: _How):
    params = trees.merge(moving, frozen)
    with compute_in(None if how.compute == "float32" else how.compute):
        loss = loss_fn(params, batch, key, True)
    return loss if penalty is None else loss + penalty(params)


def _recomputing(objective, how: _How):
    return objective if how.remat == "none" else jax.checkpoint(objective, policy=REMAT[how.remat])


def _loss_and_gradients(moving, frozen, source, rows, key, loss_fn, penalty, how: _How, placement: Placement):
    """Loss and gradients of the batch of `rows` (window numbers [B], weights [B]), in `how.accumulate` parts."""

    def objective(moving, batch, key):
        with rows_over(placement.mesh):
            return _objective(moving, frozen, batch, key, loss_fn, penalty, how)

    gradients = jax.value_and_grad(_recomputing(objective, how))
    if how.accumulate == 1:
        return gradients(moving, _gather(source, rows[0], rows[1], placement), key)

    def part(total, inputs):
        (indices, weight), number = inputs
        share = weight.sum()
        weight = jnp.where(share > 0, weight, 1.0)  # a part of padding alone has no mean; it counts 0 below
        found = gradients(moving, _gather(source, indices, weight, placement), jax.random.fold_in(key, number))
        return jax.tree.map(lambda sum_, new: sum_ + share * new, total, found), None

    parts = jax.tree.map(lambda x: x.reshape(how.accumulate, -1), rows)
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, moving))
    total, _ = jax.lax.scan(part, zero, (parts, jnp.arange(how.accumulate)))
    return jax.tree.map(lambda x: x / rows[1].sum(), total)


@functools.partial(
    jax.jit,
    static_argnames=("batch_size", "weight_decay", "clip", "how", "layout"),
    donate_argnames=("moving", "opt_state"),
)
def _advance(
    moving, opt_state, frozen, source, order, rates, key, loss_fn, penalty, place, count, step,
    *, batch_size, weight_decay, clip, how, layout,
):  # fmt: skip
    """`count` steps from batch `place` of the epoch, step `step` of the run, stopping before one that is not finite.

    Returns: parameters, optimiser state, losses [MOST_STEPS] (those past the last step are 0), steps taken.
    """
    tx = optimizers.adam(weight_decay, clip)
    placement = Placement(None if layout is None else layout.mesh)
    pin = (lambda *state: state) if layout is None else layout.pin

    def one(carry):
        i, _, moving, opt_state, losses = carry
        rows = windows.batch_at(order, place + i, batch_size)
        loss, grads = _loss_and_gradients(
            moving, frozen, source, rows, jax.random.fold_in(key, step + i), loss_fn, penalty, how, placement
        )
        # the sum is finite only if every addend is
        good = jnp.isfinite(loss) & jnp.isfinite(
            sum(jnp.sum(jnp.abs(g), dtype=jnp.float32) for g in jax.tree.leaves(grads))
        )
        directions, new_opt_state = tx.update(grads, opt_state, moving)
        new_moving = jax.tree.map(lambda p, d: (p - rates[place + i] * d).astype(p.dtype), moving, directions)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
        losses = losses.at[i].set(loss.astype(jnp.float32))
        return i + good, good, *pin(keep(new_moving, moving), keep(new_opt_state, opt_state)), losses

    start = (jnp.int32(0), jnp.bool_(True), moving, opt_state, jnp.zeros(MOST_STEPS, jnp.float32))
    done, _, moving, opt_state, losses = jax.lax.while_loop(lambda c: (c[0] < count) & c[1], one, start)
    return *pin(moving, opt_state), *placement.everywhere((losses, done))


_gradients = jax.jit(jax.value_and_grad(_objective), static_argnames="how")


@functools.partial(jax.jit, static_argnames="placement")
def _taken(source, indices, placement: Placement):
    """The windows numbered `indices`, where every host can read them."""
    return placement.everywhere(source.gather(indices))


def _gather(source, indices, weight, placement: Placement):
    """The windows of a batch; on a mesh each device gathers its own rows."""
    indices, weight = placement.rows((indices, weight))
    return placement.rows(source.gather(indices)) | {"weight": weight}


def _strong(leaf: Any) -> jax.Array:
    """`leaf` without the weak type of flax's ones: no step returns one, so it would be compiled twice."""
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype)


_epoch_order = jax.jit(windows.epoch_order, static_argnames="n")


class _Pace:
    """How many steps to put into the next dispatch: as many as fill DISPATCH_SECONDS."""

    def __init__(self, fixed: int | None):
        self.fixed, self.steps, self.compiled = fixed, fixed or 1, False

    def learn(self, steps: int, seconds: float) -> None:
        if self.fixed is None and self.compiled:
            fill = DISPATCH_SECONDS / max(seconds / steps, 1e-9)
            self.steps = int(min(max(fill, 1), 4 * self.steps, MOST_STEPS))
        self.compiled = True  # the first dispatch waits for the compiler and says nothing about a step


def _partial(f: Callable | None) -> Any:
    """`f` as a pytree: arrays it carries become arguments of the compiled step, not constants in it."""
    return f if f is None or isinstance(f, jax.tree_util.Partial) else jax.tree_util.Partial(f)


def _short(x: np.float32) -> float:
    return float(str(x))  # the shortest decimal that is this float32 and no other


def _config_record(config, facts, params, trainable, source, validate) -> dict[str, Any]:
    free = ("checkpoint_seconds", "keep_checkpoints", "steps_per_dispatch")  # no influence on results
    one = jax.eval_shape(lambda s: s.gather(jnp.zeros(1, jnp.int32)), source)
    return {
        "train": {k: v for k, v in dataclasses.asdict(config).items() if k not in free},
        "facts": dict(facts or {}),
        "selection": "lowest validation mse" if validate else "last epoch",
        "windows": {
            "n": int(source.n),
            "shapes": {k: list(v.shape[1:]) for k, v in one.items()},
            "sha256": hosts.on_first(storage.sha256_of, source),  # the others need not read it for that
        },
        "start": {
            "parameters": trees.count(params),
            "trainable": sum(p.size for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(trainable)) if t),
            "params_sha256": storage.sha256_of(params),
            "trainable_sha256": storage.sha256_of(jax.tree.map(np.bool_, trainable)),
        },
    }


def _available_memory() -> int | None:
    """Bytes free on the default device; on the CPU those the system, and the container, can still give."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit != "max":
            free.append(int(limit) - used + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return min(free)


def _bytes_on_one(tree: Tree) -> int:
    """Of `_bytes`, those that lie on one device."""

    def part(x):
        whole = getattr(x, "sharding", None) is None
        return jax.ShapeDtypeStruct(x.shape if whole else x.sharding.shard_shape(x.shape), x.dtype)

    return _bytes(jax.tree.map(part, tree))


def _bytes(tree: Tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "shape"))


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.2f} MB"
