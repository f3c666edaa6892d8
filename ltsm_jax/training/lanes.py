"""Train several runs as lanes of one program: compiled, dispatched, validated and saved together.

Runs can be lanes where they differ in numbers alone: the start, the learning rate and its
schedule, the seed, masks, the weight of a penalty. Each ends as `training.fit` would end it alone:
with the same bits where the program takes the lanes one after the other ("mapped"), to the
rounding of float32 where it takes them at once ("batched"). A lane that has finished early, or
whose loss is not finite, changes no more, and the others go on.

Whether lanes are quicker depends on machine and model: a batched step of eight small models keeps
an accelerator busy that one of them leaves idle, while the cores of a CPU are busy already. So a
few steps of each way are timed first (`LanePlan`).

    folder/choice.json    which way was chosen for which shapes, so that a sweep goes on as it began
    folder/lanes-<id>/    a run folder of all lanes; gone when each has a run folder of its own
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, stacks, storage, trees
from ltsm_jax.data import windows
from ltsm_jax.sharding import Placement
from ltsm_jax.stacks import Over, TreeStack
from ltsm_jax.training import checkpoints, compiling, loop, memory, parts, progress, step
from ltsm_jax.training.config import FREE, MOST_STEPS, TrainConfig, keys
from ltsm_jax.training.loop import FitResult, NonFiniteError
from ltsm_jax.trees import Tree

Asked = Literal["auto", "on", "off"]
Way = Literal["batched", "mapped", "separate"]
ASKED: tuple[Asked, ...] = get_args(Asked)
Outcome = FitResult | NonFiniteError
# Scores of every lane: how to compute for each of them, and a stack of their parameters.
Evaluate = Callable[[Over, TreeStack], Sequence[Mapping[str, Any]]]

# Fields of a TrainConfig that lanes must have in common, as they are in the program, and those in
# which they may differ. A run with any other field that is not at its default is none of these.
ALIKE = (
    "epochs",
    "batch_size",
    "weight_decay",
    "clip",
    "compute",
    "accumulate",
    "remat",
    "optimizer",
    "betas",
    "eps",
    "rho",
)
DIFFERING = ("lr", "seed", "schedule", "warmup", "patience", *FREE)
JOB = (
    "loss_fn",
    "params",
    "train_source",
    "config",
    "validate",
    "watch",
    "select",
    "trainable",
    "penalty",
    "folder",
    "label",
    "facts",
    "show_progress",
)

GAIN = 0.95  # lanes must take at most this share of the time of separate runs to be chosen
BATCHED_GAIN = (
    0.9  # and batched ones of the time of mapped ones, which give the bits of separate runs
)
CLEAR_GAIN = 0.8  # batched lanes below this share are taken without compiling mapped ones
LONG_STEP = (
    0.05  # seconds; a CPU that a step keeps busy for longer has no idle units that lanes would fill
)
TIMED_SECONDS = 0.3  # of one timed dispatch at most
TIMED_SHARE = (
    0.005  # of the time of all runs: what all timed dispatches may take beside a step of each way
)
ROUNDS = 3  # timed dispatches of each way, in turns
LEAST_COMPILING = 1.0  # seconds that a program of lanes takes to compile at least
WORTH_TIMING = 100  # how many times as long as a compilation all runs must take, to find out
TINY_STEP = 0.005  # seconds; below it a step is so short that batching is likely to gain
WORTH_TIMING_TINY = 20
# Fewer steps than that of all runs together are too short or too long for lanes, whatever a step
# takes.
FEWEST_STEPS = LEAST_COMPILING * min(WORTH_TIMING / LONG_STEP, WORTH_TIMING_TINY / TINY_STEP)
FREE_SHARE = 0.8  # of the free memory that lanes may take: the estimate is rough
CHOICE = "choice.json"


@dataclasses.dataclass(frozen=True)
class LanePlan:
    """Plan for training runs that are alike.

    Attributes:
      way: "batched" or "mapped", see `stacks.Over`, or "separate", one run after the other.
      most: lanes of one program at most.
      why: in words, with the ratios that were measured.
    """

    way: Way
    most: int
    why: str


# --------------------------------------------------------------------------------------------------
# what can be lanes


def signature(job: Mapping[str, Any]) -> Hashable | None:
    """Give what two jobs must have in common to be lanes of one program; None: it can be no lane.

    job: arguments of `training.fit` by name.
    """
    config, plain = job["config"], TrainConfig()
    if hosts.process_count() > 1 or any(name not in JOB for name in job):
        return None
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*ALIKE, *DIFFERING) and value != getattr(plain, field.name):
            return None

    params, source = job["params"], job["train_source"]
    placement = Placement.of(params)
    if placement.mesh is not None and not _whole_everywhere(params, source, placement):
        return None
    loss_fn, penalty = step.as_pytree(job["loss_fn"]), step.as_pytree(job.get("penalty"))
    shapes, structure = jax.tree.flatten((params, loss_fn, penalty))
    chosen = job.get("trainable")
    trainable = (
        None if chosen is None or all(jax.tree.leaves(chosen)) else tuple(jax.tree.leaves(chosen))
    )
    leaves = tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in shapes)
    settings = tuple(getattr(config, name) for name in ALIKE)
    absent = tuple(job.get(name) is None for name in ("validate", "watch", "folder"))
    return (
        structure,
        leaves,
        trainable,
        (jax.tree.structure(source), storage.sha256_of(source)),
        settings,
        (placement, job.get("select", "mse")),
        absent,
    )


def _whole_everywhere(params: Tree, source: Any, placement: Placement) -> bool:
    """Return whether each device of the mesh can train alone: it has all parameters and all
    windows.
    """
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(source.over(placement.mesh))]
    return all(leaf.is_fully_replicated for leaf in leaves if hasattr(leaf, "is_fully_replicated"))


# --------------------------------------------------------------------------------------------------
# the compiled steps


@functools.partial(
    jax.jit,
    static_argnames=("over", "batch_size", "rule", "how", "runtime"),
    donate_argnames=("moving", "opt_state"),
)
def advance_lanes(
    moving,
    opt_state,
    alive,
    fixed,
    turn,
    source,
    place,
    count,
    first,
    *,
    over,
    batch_size,
    rule,
    how,
    runtime,
):
    """Take `count` steps of every lane that is alive, from batch `place` of the epoch.

    A lane stops before a step that is not finite.

    Args:
      moving, opt_state: [L, ...]. alive: [L] booleans.
      fixed: stack of {"frozen", "loss_fn", "penalty"}. turn: stack of {"order", "rates", "key"}.
      first: number in the run of the first step.
    Returns: parameters, optimiser state, losses [L, MOST_STEPS], steps taken [L].
    """
    state = TreeStack.whole({"params": moving, "optimizer": opt_state, "alive": alive})
    common = {"source": source, "place": place, "count": count, "first": first}
    settings = {"batch_size": batch_size, "rule": rule, "how": how, "runtime": runtime}
    if over.mode == "mapped":
        lane = functools.partial(_alone, **settings)
        return over.each(lane, state, fixed, turn, shared=common)
    return over.spread(functools.partial(_at_once, **settings), state, fixed, turn, shared=common)


def _alone(state, fixed, turn, common, *, batch_size, rule, how, runtime):
    """Take the steps of one lane with the program of a separate run."""
    count = jnp.where(state["alive"], common["count"], 0)
    moving, opt_state, _, losses, done = step.advance(
        moving=state["params"],
        opt_state=state["optimizer"],
        average=None,
        frozen=fixed["frozen"],
        source=common["source"],
        order=turn["order"],
        rates=turn["rates"],
        key=turn["key"],
        loss_fn=fixed["loss_fn"],
        penalty=fixed["penalty"],
        place=common["place"],
        count=count,
        step=common["first"],
        batch_size=batch_size,
        rule=rule,
        how=how,
        runtime=runtime,
        layout=None,
    )
    return moving, opt_state, losses, done


def _at_once(state, fixed, turn, *, shared, batch_size, rule, how, runtime):
    """Take each step of all lanes at once. Where they share the order, the batch is
    gathered once.
    """
    tx, batched = rule.transformation(), Over("batched")

    def lane(now, fixed, turn, at):
        rows = windows.batch_at(turn["order"], shared["place"] + at, batch_size)
        loss, good, moving, opt_state = step.update(
            now["params"],
            now["optimizer"],
            fixed["frozen"],
            source=shared["source"],
            rows=rows,
            rate=turn["rates"][shared["place"] + at],
            key=jax.random.fold_in(turn["key"], shared["first"] + at),
            loss_fn=fixed["loss_fn"],
            penalty=fixed["penalty"],
            tx=tx,
            how=how,
            runtime=runtime,
        )
        alive = now["alive"]
        hold = functools.partial(jax.tree.map, lambda new, old: jnp.where(alive, new, old))
        held = {
            "params": hold(moving, now["params"]),
            "optimizer": hold(opt_state, now["optimizer"]),
        }
        return held | {"alive": alive & good}, jnp.where(alive, loss, 0.0)

    def one(carry):
        i, now, done, losses = carry
        new, loss = batched.each(lane, TreeStack.whole(now), fixed, turn, shared=i)
        return i + 1, new, done + new["alive"], losses.at[:, i].set(loss)

    def more(carry):
        return (carry[0] < shared["count"]) & carry[1]["alive"].any()

    now = state.lane(state.own)
    n_lanes = now["alive"].shape[0]
    losses = jnp.zeros((n_lanes, MOST_STEPS), jnp.float32)
    start = (jnp.int32(0), now, jnp.zeros(n_lanes, jnp.int32), losses)
    _, now, done, losses = jax.lax.while_loop(more, one, start)
    return now["params"], now["optimizer"], losses, done


@functools.partial(jax.jit, donate_argnames="best")
def _keep_better(best: Tree, params: Tree, better: jax.Array) -> Tree:
    """Take the parameters of the lanes that are `better` [L], and the best so far of the others."""

    def choose(old, new):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, best, params)


# --------------------------------------------------------------------------------------------------
# lanes at work


class Sweep:
    """Runs that take their steps together: `state` (arrays [L, ...]) and a `loop.Fitting` of each,
    for its position.

    Args:
      jobs: arguments of `training.fit` by name, all of one `signature`.
      over: how the lanes are computed. Where its devices do not divide their number, the last one
        is repeated, without steps.
      evaluate: scores all lanes; None: each lane's own `validate` does, one after the other.
    """

    def __init__(
        self, jobs: Sequence[Mapping[str, Any]], over: Over, evaluate: Evaluate | None = None
    ):
        self.jobs, self.over, self.evaluate = jobs, over, evaluate
        self.fittings, self.moving, self.trainable = [], [], []
        strong: dict[
            int, tuple[Any, jax.Array]
        ] = {}  # what lanes have in common must stay one array

        def made_strong(leaf):
            if id(leaf) not in strong:
                strong[id(leaf)] = leaf, step.strong(leaf)
            return strong[id(leaf)][1]

        source = jobs[0]["train_source"]
        for job in jobs:
            params = jax.tree.map(made_strong, job["params"])
            trainable = job.get("trainable")
            trainable = trees.select(params, None) if trainable is None else trainable
            moving, frozen = trees.partition(params, trainable)
            fitting = loop.Fitting(
                config=job["config"],
                loss_fn=step.as_pytree(job["loss_fn"]),
                penalty=step.as_pytree(job.get("penalty")),
                source=source,
                moving=moving,
                frozen=frozen,
                validate=job.get("validate"),
                placement=Placement(),
                select=job.get("select", "mse"),
                watch=job.get("watch"),
            )
            fitting.position = loop.Position()
            self.fittings.append(fitting)
            self.moving.append(moving)
            self.trainable.append(trainable)

        first = self.fittings[0]
        self.first, self.total, self.steps_per_epoch = first, first.total, first.steps_per_epoch
        self.validates = first.validate is not None
        self.surplus = -len(jobs) % over.devices
        self.source = source.over(over.mesh)
        self.dropout = {f.config.seed: f.keys["dropout"] for f in self.fittings}
        self.fixed = self.stacked(
            [
                {"frozen": f.frozen, "loss_fn": f.loss_fn, "penalty": f.penalty}
                for f in self.fittings
            ]
        )
        self.failed: list[NonFiniteError | None] = [None] * len(jobs)
        self.step, self.epoch = 0, 0
        self.seconds = self.compile_seconds = 0.0
        self.run: checkpoints.RunFolder | None = None

    def stacked(self, lanes: Sequence[Tree]) -> TreeStack:
        """Stack a tree of each lane, those that fill up the devices included."""
        return self.over.stack([*lanes, *[lanes[-1]] * self.surplus])

    @property
    def alive(self) -> list[bool]:
        """Mask of the lanes that have steps to take."""
        pairs = zip(self.fittings, self.failed, strict=True)
        return [not fitting.position.finished and failed is None for fitting, failed in pairs]

    @property
    def finished(self) -> bool:
        """Whether no lane has a step or a validation left."""
        return not any(self.alive)

    # start, save, go on

    def start(self, run: checkpoints.RunFolder | None) -> None:
        """Take the state from the start of the runs, or from where an earlier launch came to."""
        self.run = run
        self.saved_step = 0
        restored = (
            run.restore(jax.eval_shape(self._state_of, self._moving(jnp.stack, 0))) if run else None
        )
        if restored is None:
            self.state = self._state_of(self._moving(self.over.join, self.surplus))
            return
        self.state = jax.tree.map(self._put, restored[0])
        stored = restored[1]
        self.step = self.saved_step = stored["step"]
        self.epoch = self.step // self.steps_per_epoch
        self.seconds, self.compile_seconds = stored["seconds"], stored["compile_seconds"]
        for lane, (fitting, own) in enumerate(zip(self.fittings, stored["lanes"], strict=True)):
            fitting.position = loop.Position.from_json(own, fitting.select)
            self.failed[lane] = None if own["failed"] is None else NonFiniteError(own["failed"])
        if stored["validated"] < self.epoch:
            self.epoch -= 1  # stopped between the last step of an epoch and its validation

    def _moving(self, join: Callable[[Sequence[Any]], Any], surplus: int) -> Tree:
        lanes = [*self.moving, *[self.moving[-1]] * surplus]
        return jax.tree.map(lambda *leaves: join(leaves), *lanes)

    def _state_of(self, moving: Tree) -> Tree:
        """Make the state at the start of the runs. moving: [L, ...]."""
        where = None if self.over.mesh is None or self._traced(moving) else self.over.sharding
        init = jax.jit(jax.vmap(self.first.rule.transformation().init), out_shardings=where)
        state = {"params": moving, "optimizer": init(moving)}
        return state | ({"best": jax.tree.map(jnp.copy, moving)} if self.validates else {})

    def _traced(self, tree: Tree) -> bool:
        return any(map(trees.traced, jax.tree.leaves(tree)))

    def _put(self, leaf: jax.Array) -> jax.Array:
        """Lay an array of a checkpoint, which has no surplus lanes, over the devices."""
        if self.over.mesh is None:
            return leaf
        on_host = sharding.on_host(leaf)
        filled = np.concatenate([on_host, np.repeat(on_host[-1:], self.surplus, axis=0)])
        return sharding.put(filled, self.over.sharding)

    def save(self, run: checkpoints.RunFolder) -> None:
        """Write a checkpoint of all lanes."""
        self.count_time()
        state = self.state
        if self.surplus:
            state = jax.tree.map(lambda leaf: leaf[: len(self.jobs)], state)
        own = []
        for fitting, failed in zip(self.fittings, self.failed, strict=True):
            own.append(fitting.position.to_json() | {"failed": failed and str(failed)})
        position = {
            "step": self.step,
            "validated": self.epoch,
            "finished": self.finished,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "lanes": own,
        }
        run.save(state, position)
        self.saved, self.saved_step = time.monotonic(), self.step

    # training

    def train(self, bar: progress.Bar) -> None:
        """Take the rest of the steps, with their validations and checkpoints."""
        self.bar = bar
        with compiling.measured() as self.waited:
            self.compiled_before = self.compile_seconds
            self.began = time.monotonic() - self.seconds - self.compile_seconds
            self.saved = time.monotonic()
            self.pace = loop.Pace(self.first.config.steps_per_dispatch)
            while not self.finished:
                self._epoch()
            if self.run:
                self.run.wait()

    def count_time(self) -> None:
        """Bring the seconds of all launches up to date."""
        self.compile_seconds = self.compiled_before + self.waited.seconds
        self.seconds = time.monotonic() - self.began - self.compile_seconds

    def _epoch(self) -> None:
        epoch, start = self.epoch, self.epoch * self.steps_per_epoch
        seconds = min(fitting.config.checkpoint_seconds for fitting in self.fittings)
        self.begin_epoch(epoch)
        while self.step < start + self.steps_per_epoch and not self.finished:
            # the last step of an epoch is saved with its validation, below, and so not once more
            # here
            due = self.step > start and time.monotonic() - self.saved >= seconds
            self.dispatch(epoch, self.step - start, self.settle(due))
        try:
            self.end_epoch(epoch)
        except (hosts.Stopped, KeyboardInterrupt) as err:
            # out of the middle of a validation: it comes again, from a checkpoint of the last step
            if not hosts.asked_for(err):
                raise
            raise self.stopped() from None
        self.epoch += 1
        # an epoch shorter than a write need not wait for the disk
        if self.run and (self.finished or not self.run.saving):
            self.save(self.run)

    def begin_epoch(self, epoch: int) -> None:
        """Make the stack of what an epoch brings: the order of its windows, its learning rates, the
        dropout's key.
        """
        orders: dict[Any, jax.Array] = {}
        turns = []
        for fitting in self.fittings:
            seed = fitting.config.seed
            fitting.begin_epoch(epoch, orders.get(seed))
            orders[seed] = fitting.order
            turns.append({"order": fitting.order, "rates": fitting.lr, "key": self.dropout[seed]})
        self.turn = self.stacked(turns)

    def advance(self, place: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Take `count` steps from batch `place` of the epoch.

        Returns: losses [L, count], and how many steps were finite [L].
        """
        alive = np.array([*self.alive, *[False] * self.surplus])
        first = self.first
        self.state["params"], self.state["optimizer"], losses, done = advance_lanes(
            self.state["params"],
            self.state["optimizer"],
            alive,
            fixed=self.fixed,
            turn=self.turn,
            source=self.source,
            place=np.int32(place),
            count=np.int32(count),
            first=np.int32(self.step),
            over=self.over,
            batch_size=first.batch_size,
            rule=first.rule,
            how=first.how,
            runtime=first.runtime,
        )
        return np.asarray(losses)[:, :count], np.asarray(done)

    def dispatch(self, epoch: int, place: int, steps: int) -> None:
        """Take `steps` steps, but none past the epoch's end, and write their records."""
        began = time.monotonic()
        count = min(steps, self.steps_per_epoch - place)
        alive = [lane for lane, lives in enumerate(self.alive) if lives]
        losses, done = self.advance(place, count)
        for lane in alive:
            fitting = self.fittings[lane]
            self.record(lane, fitting.account(epoch, place, losses[lane, : done[lane]]))
            if done[lane] < count:
                fitting.state = {"params": self.of_lane("params", lane)}
                self.fail(lane, fitting.diagnose(epoch, place + int(done[lane])))
        self.step += count
        self.count_time()
        self.pace.learn(count, time.monotonic() - began)
        seen = len(alive) * sum(map(self.first.rows_of, range(place, place + count)))
        self.bar.update(
            self.step,
            epoch + 1,
            seen,
            loss=float(losses[alive, -1].mean()),
            note=self.best_so_far(),
        )

    def end_epoch(self, epoch: int) -> None:
        """Validate and select, lane by lane; whether this was its last epoch."""
        alive = [lane for lane, lives in enumerate(self.alive) if lives]
        found = self.validate(alive) if self.validates and alive else {}
        # All of it before any is judged: a stop inside comes back to this epoch, which must not
        # count twice.
        watched = {lane: self.watched(lane, epoch) for lane in alive}
        better = np.zeros(len(self.jobs) + self.surplus, bool)
        for lane in alive:
            fitting = self.fittings[lane]
            try:
                better[lane] = fitting.judge(epoch, found.get(lane), watched[lane])
            except NonFiniteError as err:
                self.fail(lane, str(err))
            else:
                self.record(lane, [fitting.position.history[-1]])
        if better.any():
            self.state["best"] = _keep_better(self.state["best"], self.state["params"], better)
        self.count_time()
        self.bar.update(self.step, epoch + 1, 0, note=self.best_so_far())

    def validate(self, alive: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        """Score the lanes that are `alive`."""
        if self.evaluate is not None:
            params = TreeStack.whole(self.state["params"]).merge(self._frozen())
            scores = self.evaluate(self.over, params)
            return {lane: scores[lane] for lane in alive}
        found = {}
        for lane in alive:
            fitting = self.fittings[lane]
            found[lane] = fitting.validate(
                trees.combine(self.of_lane("params", lane), fitting.frozen)
            )
        return found

    def watched(self, lane: int, epoch: int) -> Mapping[str, Any]:
        """Give the further numbers of a lane's epoch, see `training.fit`."""
        fitting = self.fittings[lane]
        if fitting.watch is None:
            return {}
        return fitting.watch(trees.combine(self.of_lane("params", lane), fitting.frozen), epoch + 1)

    def _frozen(self) -> TreeStack:
        return self.stacked([fitting.frozen for fitting in self.fittings])

    def record(self, lane: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines of one lane to the metrics of all."""
        if self.run:
            self.run.record([{"lane": lane, **line} for line in lines])

    def fail(self, lane: int, message: str) -> None:
        """End a lane; the others go on."""
        self.failed[lane] = NonFiniteError(message)
        self.bar.say(
            f"{self.jobs[lane].get('label') or f'lane {lane}'}: {message.splitlines()[0]}; the "
            "others go on"
        )

    def settle(self, due: bool) -> int:
        """Between two dispatches: how many steps come next, whether to save or to stop.

        Raises: what `hosts.stopped` makes, after a signal and a checkpoint.
        """
        (steps, due_now), stop = checkpoints.settle(self.run, self.pace.steps, due)
        if stop:
            raise self.stopped()
        if self.run and due_now:
            self.save(self.run)
        return int(steps)

    def stopped(self) -> BaseException:
        """Save, where there is something to save, and make the exception that says so."""
        kept = "nothing to keep"
        if self.run:
            if self.step > self.saved_step:
                self.save(self.run)
            self.run.wait()
            if self.step:
                kept = f"checkpoint: {self.run.path(self.step)}"
        return hosts.stopped(
            f"after step {self.step} of {self.total} of {len(self.jobs)} lanes; {kept}"
        )

    def best_so_far(self) -> str:
        """Say the best validation of all lanes, for the progress bar."""
        best = min(fitting.position.best for fitting in self.fittings)
        return "" if math.isinf(best) else f"  best val {self.first.select} {best:.4f}"

    # results

    def of_lane(self, name: str, lane: int) -> Tree:
        """Take the part `name` of the state of one lane, laid where its parameters were."""
        part = stacks.take(self.state[name], lane)
        return Placement(self.over.mesh).replicate(part)

    def outcome(self, lane: int) -> Outcome:
        """Give what `training.fit` would have given for a lane, or raised."""
        if (failed := self.failed[lane]) is not None:
            return failed
        fitting, share = self.fittings[lane], 1 / len(self.jobs)
        last = trees.combine(self.of_lane("params", lane), fitting.frozen)
        best = trees.combine(self.of_lane("best", lane), fitting.frozen) if self.validates else last
        return FitResult(
            params=best,
            last_params=last,
            history=fitting.position.history,
            best_epoch=fitting.position.best_epoch,
            steps=fitting.position.step,
            seconds=self.seconds * share,
            compile_seconds=self.compile_seconds * share,
        )

    def hand_out(self, lane: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Give a lane the run folder that it would have had alone. lines: its metrics."""
        job, fitting, share = self.jobs[lane], self.fittings[lane], 1 / len(self.jobs)
        with contextlib.closing(
            checkpoints.RunFolder(job["folder"], record_of(job), fitting.config.keep_checkpoints)
        ) as run:
            run.restore(
                fitting.shapes
            )  # there is nothing, but perhaps lines of a launch that was killed here
            run.clock(lane=lane, lanes=len(self.jobs), way=self.over.mode, jax=jax.__version__)
            run.record(lines)
            position = fitting.position
            position.seconds, position.compile_seconds = (
                self.seconds * share,
                self.compile_seconds * share,
            )
            run.save({name: self.of_lane(name, lane) for name in self.state}, position.to_json())
            run.wait()


def record_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """Give the config.json of a job's own run folder."""
    params = job["params"]
    trainable = job.get("trainable")
    trainable = trees.select(params, None) if trainable is None else trainable
    select = job.get("select", "mse") if job.get("validate") else None
    return loop.config_record(
        job["config"],
        job.get("facts"),
        params,
        trainable=trainable,
        source=job["train_source"],
        select=select,
    )


# --------------------------------------------------------------------------------------------------
# which way


def plan_lanes(
    jobs: Sequence[Mapping[str, Any]], asked: Asked = "auto", *, writes: bool = False
) -> LanePlan:
    """Choose how to train runs of one `signature`, by timing a few steps of each way where that is
    worth its time.

    asked: "on": as lanes, whatever it costs. writes: whether checkpoints are written.
    """
    n, mesh = len(jobs), Placement.of(jobs[0]["params"]).mesh
    on_cpu = jax.default_backend() == "cpu"
    separate = f"{n} runs one after the other"
    short = f"{separate}: too short to find out whether lanes are quicker"
    if on_cpu and asked != "on" and n * Sweep(jobs[:1], Over("mapped")).total < FEWEST_STEPS:
        return LanePlan("separate", 1, short)
    if asked == "on":
        room, able = _ways(jobs, mesh, writes)
        if not able:
            return LanePlan("separate", 1, f"{separate}: memory has room for one")
        way: stacks.Mode = "mapped" if on_cpu and "mapped" in able else able[0]
        return LanePlan(way, room[way], f"{n} lanes, {way}, as asked for")

    # First what may settle it: the memory of lanes takes two traces of a step to find out.
    alone = _Timed(_separate(jobs[0]), 1)
    work = alone.seconds * n * alone.work.total
    worth = WORTH_TIMING_TINY if alone.seconds < TINY_STEP else WORTH_TIMING
    if on_cpu and work < worth * max(alone.compile_seconds, LEAST_COMPILING):
        return LanePlan("separate", 1, short)
    if on_cpu and alone.seconds > LONG_STEP:
        took = f"a step of one keeps the processor busy for {alone.seconds:.2f} s"
        return LanePlan("separate", 1, f"{separate}: {took}")
    room, able = _ways(jobs, mesh, writes)
    if not able:
        return LanePlan("separate", 1, f"{separate}: memory has room for one")
    dispatch = min(TIMED_SHARE * work / (2 * ROUNDS * len(able)), TIMED_SECONDS)
    ratios: dict[stacks.Mode, float] = {}
    for way in able:
        lanes = min(n, room[way])
        sweep = Sweep(jobs[:lanes], Over(way, mesh))
        sweep.start(None)
        timed = _Timed(sweep, lanes)
        for _ in range(ROUNDS):
            alone.again(dispatch)
            timed.again(dispatch)
        ratios[way] = timed.seconds / alone.seconds
        if way == "batched" and ratios[way] < CLEAR_GAIN:
            break
    way = min(ratios, key=lambda way: ratios[way])
    if (
        way == "batched"
        and ratios.get("mapped", math.inf) <= GAIN
        and ratios[way] > BATCHED_GAIN * ratios["mapped"]
    ):
        way = "mapped"
    if ratios[way] > GAIN:
        said = ", ".join(f"{way} {ratio:.2f}x" for way, ratio in ratios.items())
        return LanePlan("separate", 1, f"{separate}: lanes would take {said} the time")
    return LanePlan(
        way, room[way], f"{n} lanes, {way}: {ratios[way]:.2f}x the time of one after the other"
    )


def _ways(
    jobs: Sequence[Mapping[str, Any]], mesh: jax.sharding.Mesh | None, writes: bool
) -> tuple[dict[stacks.Mode, int], list[stacks.Mode]]:
    """Give how many lanes memory has room for in each mode, and the modes that are worth a try."""
    room: dict[stacks.Mode, int] = {
        mode: _room(jobs, Over(mode, mesh), writes) for mode in stacks.MODES
    }
    able: list[stacks.Mode] = [mode for mode in stacks.MODES if room[mode] >= min(len(jobs), 2)]
    if jax.default_backend() != "cpu" and "batched" in able:
        able = able[:1]  # an accelerator takes mapped lanes in the time of separate runs
    return room, able


def _separate(job: Mapping[str, Any]) -> loop.Fitting:
    """Set up one run on its own devices for steps whose results are discarded."""
    sweep = Sweep([job], Over("mapped"))
    params = sharding.colocate(jax.tree.map(step.strong, job["params"]))
    moving, frozen = trees.partition(params, sweep.trainable[0])
    one = sweep.first
    fitting = loop.Fitting(
        config=one.config,
        loss_fn=one.loss_fn,
        penalty=one.penalty,
        source=job["train_source"],
        moving=moving,
        frozen=frozen,
        validate=one.validate,
        placement=Placement.of(params),
        select=one.select,
    )
    fitting.start(moving, None)
    return fitting


class _Timed:
    """Steps of one way, timed. seconds: of one step of one run, the best so far; compile_seconds:
    of its program.
    """

    def __init__(self, work: Any, lanes: int):
        self.work, self.lanes = work, lanes
        work.begin_epoch(0)
        with compiling.measured() as waited:
            first = self._time(1)
        self.compile_seconds = waited.seconds
        self.seconds = max(first - waited.seconds, 0.0) / lanes
        if self.seconds * lanes < TIMED_SECONDS:
            self.seconds = math.inf  # what a first call does besides its step counts then
            self.again(0.0)

    def again(self, seconds: float) -> None:
        """Time one more dispatch, of as many steps as take about so long, at least one."""
        fill = 1 if math.isinf(self.seconds) else seconds / max(self.seconds * self.lanes, 1e-9)
        steps = int(min(max(fill, 1), self.work.steps_per_epoch, MOST_STEPS))
        self.seconds = min(self.seconds, self._time(steps) / steps / self.lanes)

    def _time(self, steps: int) -> float:
        began = time.perf_counter()
        self.work.advance(0, steps)
        return time.perf_counter() - began


def _room(jobs: Sequence[Mapping[str, Any]], over: Over, writes: bool) -> int:
    """Count the lanes that memory has room for."""
    free = memory.available()
    if free is None:
        return len(jobs)
    one = Sweep(jobs[:1], Over("mapped")).first
    found = memory.estimate(
        one.shapes,
        one.frozen,
        one.source,
        loss_fn=one.loss_fn,
        key=one.keys["dropout"],
        batch_size=one.batch_size,
        how=one.how,
        runtime=one.runtime,
        writes_checkpoints=writes,
    )
    # On a CPU the devices share the memory; elsewhere each has its own.
    here = FREE_SHARE * free / (over.devices if jax.default_backend() == "cpu" else 1)
    if over.mode == "batched":
        lanes = here // (found.fixed + found.activations)
    else:
        # a map reads one copy of the state and writes another
        lanes = (here - found.activations) // (found.fixed + memory.bytes_on_one(one.shapes))
    return max(int(lanes), 0) * over.devices


# --------------------------------------------------------------------------------------------------
# runs in, results out


@hosts.interruptible()
def fit_jobs(
    jobs: Sequence[Mapping[str, Any]],
    *,
    lanes: Asked = "auto",
    folder: str | Path | None = None,
    evaluate: Evaluate | None = None,
    others: bool = True,
) -> list[Outcome | None]:
    """Train runs of one `signature`, as lanes of one program or one after the other.

    Args:
      jobs: arguments of `training.fit` by name. A job with a folder ends with the run folder that
        `training.fit` would have left there; where it has a checkpoint already, it goes on by
        itself.
      lanes: "auto": the way that a short measurement finds to be the quickest; "on": lanes; "off":
        one after the other.
      folder: of the sweep, for checkpoints of all lanes and the choice. A sweep that was killed
        goes on from there, and ends with the same bits. None keeps nothing on disk on the way.
      evaluate: scores all lanes in one program, see `Evaluate`; None: `validate` of each job does.
      others: False: leave to the caller what is not trained as a lane, and is not finished either;
        its outcome is None.
    Returns: for each job what `training.fit` returns, or the NonFiniteError that it would raise.
    Raises: as `training.fit`, for all of them.
    """
    if lanes not in ASKED:
        raise ValueError(f"lanes must be one of {', '.join(ASKED)}; got {lanes!r}")
    jobs = [_settled(job) for job in jobs]
    outcomes: dict[int, Outcome] = {}
    together = lanes != "off" and len(jobs) > 1 and signature(jobs[0]) is not None
    if together:
        for members, over, place in _begun(jobs, folder):
            outcomes |= _as_lanes(jobs, members, over, place=place, evaluate=evaluate)
        fresh = [i for i in range(len(jobs)) if i not in outcomes and not _has_checkpoint(jobs[i])]
        # A folder without a checkpoint may still say another number of parts.
        numbers = [jobs[i]["config"].accumulate for i in fresh]
        fresh = [i for i, number in zip(fresh, numbers, strict=True) if number == numbers[0]]
        if len(fresh) > 1:
            choice = _chosen(jobs, fresh, lanes, folder=folder)
            if choice.way != "separate":
                over = Over(choice.way, Placement.of(jobs[0]["params"]).mesh)
                for members in _chunks(fresh, choice.most):
                    place = (
                        None if folder is None else Path(folder) / f"lanes-{_digest(jobs, members)}"
                    )
                    outcomes |= _as_lanes(jobs, members, over, place=place, evaluate=evaluate)
    for i, job in enumerate(jobs):
        if i not in outcomes and (others or _is_finished(job)):
            outcomes[i] = _by_itself(job)
    return [outcomes.get(i) for i in range(len(jobs))]


def fit_as_lanes(
    jobs: Sequence[Mapping[str, Any]], over: Over, evaluate: Evaluate | None = None
) -> list[Outcome]:
    """Train runs of one `signature` as lanes of one program, whatever would be quicker; nothing is
    kept on disk.
    """
    found = _as_lanes(
        [_settled(job) for job in jobs], range(len(jobs)), over, place=None, evaluate=evaluate
    )
    return [found[i] for i in range(len(jobs))]


def _settled(job: Mapping[str, Any]) -> dict[str, Any]:
    """Put values in a job where its config leaves them open, as `training.fit` would."""
    if "auto" not in [getattr(job["config"], field) for field in parts.OPEN]:
        return dict(job)
    params = jax.tree.map(step.strong, job["params"])
    trainable = job.get("trainable")
    moving, frozen = trees.partition(
        params, trees.select(params, None) if trainable is None else trainable
    )
    config = parts.settled(
        job["config"],
        moving,
        frozen,
        source=job["train_source"],
        loss_fn=step.as_pytree(job["loss_fn"]),
        key=keys(job["config"].seed or 0)["dropout"],
        placement=Placement.of(params),
        folder=job.get("folder"),
    )
    return {**job, "config": config}


def _by_itself(job: Mapping[str, Any]) -> Outcome:
    try:
        return loop.fit(**job)
    except NonFiniteError as err:
        return err


def _has_checkpoint(job: Mapping[str, Any]) -> bool:
    return job.get("folder") is not None and bool(checkpoints.steps(Path(job["folder"])))


def _is_finished(job: Mapping[str, Any]) -> bool:
    return job.get("folder") is not None and checkpoints.finished(job["folder"])


def _chunks(members: Sequence[int], most: int) -> list[list[int]]:
    """Split lanes into programs of nearly equal numbers of them, at most `most`."""
    parts = -(-len(members) // most)
    return [part.tolist() for part in np.array_split(np.array(members), parts)]


def _digest(jobs: Sequence[Mapping[str, Any]], members: Sequence[int]) -> str:
    return _sha256([record_of(jobs[i]) for i in members])


def _sha256(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(
    jobs: Sequence[Mapping[str, Any]],
    members: Sequence[int],
    asked: Asked,
    folder: str | Path | None,
) -> LanePlan:
    """Choose, or take the choice of an earlier launch, with whose bits the sweep has to go on."""
    some = [jobs[i] for i in members]
    file = None if folder is None else Path(folder) / CHOICE
    one = record_of(some[0])
    shapes = jax.tree.map(lambda x: [*x.shape], some[0]["params"])
    key = _sha256(
        [
            trees.flatten({"shapes": jax.tree.map(str, shapes)}),
            one["windows"],
            asked,
            jax.default_backend(),
        ]
    )
    known: dict[str, Any] = {}
    if file is not None and file.is_file():
        known = storage.read_record(file)["choices"]
    if key in known:
        choice = LanePlan(known[key]["way"], known[key]["most"], f"{known[key]['why']} (as before)")
    else:
        choice = plan_lanes(some, asked, writes=folder is not None)
    if file is not None and key not in known:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_record(file, {"choices": known | {key: dataclasses.asdict(choice)}})
    if some[0].get("show_progress", True) and hosts.first():
        print(choice.why, file=sys.stderr, flush=True)
    return choice


def _begun(jobs: Sequence[Mapping[str, Any]], folder: str | Path | None):
    """Find sweeps of an earlier launch all of whose lanes are asked for: members, how, folder."""
    found = []
    if folder is None or not Path(folder).is_dir():
        return found
    digests = {_sha256(record_of(job)): i for i, job in enumerate(jobs)}
    mesh = Placement.of(jobs[0]["params"]).mesh
    for place in sorted(Path(folder).glob("lanes-*")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            config = json.loads((place / checkpoints.CONFIG).read_text())
            members = [digests.get(digest) for digest in config["lanes"]]
            if None not in members:
                found.append((members, Over(config["way"], mesh), place))
    return found


def _as_lanes(
    jobs: Sequence[Mapping[str, Any]],
    members: Sequence[int],
    over: Over,
    place: Path | None,
    evaluate: Evaluate | None,
) -> dict[int, Outcome]:
    """Train some of the jobs as lanes of one program; `place`: the folder of these lanes."""
    some = [jobs[i] for i in members]
    sweep = Sweep(some, over, evaluate)
    config = {"way": over.mode, "lanes": [_sha256(record_of(job)) for job in some]}
    keep = some[0]["config"].keep_checkpoints
    run = None if place is None else checkpoints.RunFolder(place, config, keep)
    with contextlib.closing(run) if run else contextlib.nullcontext():
        sweep.start(run)
        if not sweep.finished:
            show = some[0].get("show_progress", True) and hosts.first()
            label = f"{len(some)} lanes"
            epochs = some[0]["config"].epochs or 0
            with progress.Bar(sweep.total, epochs, label, done=sweep.step, show=show) as bar:
                if sweep.step:
                    bar.say(f"{bar.label}: going on from step {sweep.step} of {sweep.total}")
                sweep.train(bar)
        lines = _lines(place, len(some))
        for lane, job in enumerate(some):
            wanted = job.get("folder") is not None and sweep.failed[lane] is None
            if wanted and not _has_checkpoint(job):
                sweep.hand_out(lane, lines[lane])
    outcomes = {i: sweep.outcome(lane) for lane, i in enumerate(members)}
    if place is not None and all(job.get("folder") is not None for job in some):
        doomed = place.with_name(f".{place.name}.old")
        place.rename(doomed)  # a sweep that is half deleted must not look like one to go on with
        shutil.rmtree(doomed, ignore_errors=True)
    return outcomes


def _lines(place: Path | None, n: int) -> list[list[dict[str, Any]]]:
    """Read the metrics of each lane out of those of all."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    if place is None:
        return found
    for text in (place / checkpoints.METRICS).read_text().splitlines():
        line = json.loads(text)
        found[line.pop("lane")].append(line)
    return found
