"""The compiled step: gradients of a batch that the device gathers itself, and the update, many
times over.

How many steps run in one dispatch is an argument of the compiled program, so neither compilation
nor a single bit of the result depends on it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ltsm_jax import sharding, trees
from ltsm_jax.data import windows
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.sharding import Placement
from ltsm_jax.training import optimizers
from ltsm_jax.training.config import MOST_STEPS, REMAT, TrainConfig, keys
from ltsm_jax.trees import Tree

TINY = 1e-12
POLICIES = {"all but products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclasses.dataclass(frozen=True)
class How:
    """Settings of a gradient's computation; static under jit.

    Attributes: `accumulate`, `remat`, `rho` and `ema` of a `TrainConfig`.
    """

    accumulate: int
    remat: str
    rho: float = 0.0
    ema: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> "How":
        """Read it off a config. Raises: ValueError for what is still open in it."""
        if config.accumulate == "auto":
            raise ValueError("accumulate='auto' is for `fit` to settle: say a number of parts here")
        if config.remat == "auto":
            names = ", ".join(REMAT)
            raise ValueError(f"remat='auto' is for `fit` to settle: say one of {names} here")
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def runtime_of(config: TrainConfig, placement: Placement, platform: str | None = None) -> Runtime:
    """Give what a step of this config computes with, on the devices of its parameters."""
    compute = None if config.compute == "float32" else config.compute
    return Runtime(compute, placement, platform)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Placement of parameters and optimiser state on a mesh; hashable, so that it may be static
    under jit.
    """

    structure: Any
    shardings: tuple[jax.sharding.NamedSharding, ...]

    @classmethod
    def of(cls, state: Tree) -> "StateLayout":
        """Take the layout of what the step gives back out of a tree of shardings for the whole
        state.
        """
        outputs = (state["params"], state["optimizer"], state.get("average"))
        return cls(jax.tree.structure(outputs), tuple(jax.tree.leaves(outputs)))

    def pin(
        self, moving: Tree, opt_state: Tree, average: Tree | None
    ) -> tuple[Tree, Tree, Tree | None]:
        """Hold what comes out of a step to this layout.

        Without it the compiler may choose another one, and compile the next step again.
        """
        shardings = jax.tree.unflatten(self.structure, self.shardings)
        return jax.lax.with_sharding_constraint((moving, opt_state, average), shardings)


def objective(moving, frozen, batch, key, loss_fn, penalty, runtime: Runtime) -> jax.Array:
    """Compute what is minimised: the loss of a batch, and the penalty."""
    params = trees.combine(moving, frozen)
    loss = runtime.call(loss_fn, params, batch, key, True)
    return loss if penalty is None else loss + penalty(params)


def recomputing(function: Callable, how: How) -> Callable:
    """Wrap `function` so that its backward pass computes again what `how.remat` does not keep."""
    return function if how.remat == "none" else jax.checkpoint(function, policy=POLICIES[how.remat])


def gather(source, indices, weight, placement: Placement) -> dict[str, jax.Array]:
    """Gather the windows of a batch; on a mesh each device gathers its own rows."""
    indices, weight = placement.rows((indices, weight))
    return placement.rows(source.gather(indices)) | {"weight": weight}


def _of_batch(moving, frozen, source, rows, key, loss_fn, penalty, how: How, runtime: Runtime):
    """Loss and gradients of the batch of `rows` (window numbers [B], weights [B]), in
    `how.accumulate` parts.
    """

    def of_batch(moving, batch, key):
        return objective(
            moving, frozen, batch, key=key, loss_fn=loss_fn, penalty=penalty, runtime=runtime
        )

    placement = runtime.placement
    gradients = jax.value_and_grad(recomputing(of_batch, how))
    if how.accumulate == 1:
        return gradients(moving, gather(source, rows[0], rows[1], placement=placement), key)

    def part(total, inputs):
        (indices, weight), number = inputs
        share = weight.sum()
        weight = jnp.where(
            share > 0, weight, 1.0
        )  # a part of padding alone has no mean; it counts 0 below
        batch = gather(source, indices, weight, placement=placement)
        found = gradients(moving, batch, jax.random.fold_in(key, number))
        return jax.tree.map(lambda sum_, new: sum_ + share * new, total, found), None

    parts = jax.tree.map(lambda x: x.reshape(how.accumulate, -1), rows)
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, moving))
    total, _ = jax.lax.scan(part, zero, (parts, jnp.arange(how.accumulate)))
    return jax.tree.map(lambda x: x / rows[1].sum(), total)


def uphill(moving: Tree, gradients: Tree, rho: float) -> Tree:
    """Move the weights up a gradient, to where SAM takes its own: `moving + rho * g / |g|`.

    |g| is the norm of all gradients together; weights whose gradient is 0 everywhere stay.

    Source: Foret et al., "Sharpness-Aware Minimization" (ICLR 2021, arXiv 2010.01412), equation 2.
    """
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), gradients)
    length = jnp.sqrt(jax.tree.reduce(jnp.add, squares))
    share = rho / jnp.maximum(length, TINY)
    return jax.tree.map(lambda p, g: (p + share * g).astype(p.dtype), moving, gradients)


def loss_and_gradients(
    gradients_at: Callable[[Tree], tuple[jax.Array, Tree]], moving: Tree, how: How
):
    """Compute the loss at `moving`, and the gradients there or, with a rho, those of SAM.

    gradients_at: weights -> (loss, gradients), of one and the same batch and dropout.
    """
    loss, gradients = gradients_at(moving)
    if how.rho:
        _, gradients = gradients_at(uphill(moving, gradients, how.rho))
    return loss, gradients


def update(
    moving,
    opt_state,
    frozen,
    source,
    rows,
    rate,
    key,
    loss_fn,
    penalty,
    *,
    tx,
    how: How,
    runtime: Runtime,
):
    """Take one step on the batch of `rows` (window numbers [B], weights [B]) at this learning rate.

    A step whose loss or gradient is not finite changes nothing.

    Args:
      key: of the dropout of this step.
      tx: the optimiser, see `optimizers.adam`.
      runtime: on a mesh, each device gathers and computes its own rows.
    Returns: loss, whether the step was finite, parameters, optimiser state.
    """

    def gradients_at(weights):
        return _of_batch(
            weights,
            frozen,
            source,
            rows=rows,
            key=key,
            loss_fn=loss_fn,
            penalty=penalty,
            how=how,
            runtime=runtime,
        )

    loss, grads = loss_and_gradients(gradients_at, moving, how)
    # the sum is finite only if every addend is
    sizes = sum(jnp.sum(jnp.abs(g), dtype=jnp.float32) for g in jax.tree.leaves(grads))
    good = jnp.isfinite(loss) & jnp.isfinite(sizes)
    directions, new_opt_state = tx.update(grads, opt_state, moving)
    new_moving = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), moving, directions)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
    return loss.astype(jnp.float32), good, keep(new_moving, moving), keep(new_opt_state, opt_state)


@functools.partial(
    jax.jit,
    static_argnames=("batch_size", "rule", "how", "runtime", "layout"),
    donate_argnames=("moving", "opt_state", "average"),
)
def advance(
    moving,
    opt_state,
    average,
    frozen,
    source,
    order,
    rates,
    key,
    loss_fn,
    penalty,
    place,
    count,
    step,
    *,
    batch_size,
    rule,
    how,
    runtime,
    layout,
):
    """Take `count` steps from batch `place` of the epoch, step `step` of the run.

    Stops before a step that is not finite. average: moving average of the parameters, None without
    `how.ema`.

    Returns: parameters, optimiser state, average, losses [MOST_STEPS] (those past the last step are
    0), steps taken.
    """
    tx = rule.transformation()
    pin = (lambda *state: state) if layout is None else layout.pin

    def one(carry):
        i, _, moving, opt_state, average, losses = carry
        rows = windows.batch_at(order, place + i, batch_size)
        loss, good, new_moving, new_opt_state = update(
            moving,
            opt_state,
            frozen,
            source=source,
            rows=rows,
            rate=rates[place + i],
            key=jax.random.fold_in(key, step + i),
            loss_fn=loss_fn,
            penalty=penalty,
            tx=tx,
            how=how,
            runtime=runtime,
        )
        if how.ema:
            mixed = trees.ema(average, new_moving, how.ema)
            average = jax.tree.map(lambda new, old: jnp.where(good, new, old), mixed, average)
        losses = losses.at[i].set(loss)
        return i + good, good, *pin(new_moving, new_opt_state, average), losses

    def more(carry):
        return (carry[0] < count) & carry[1]

    losses = jnp.zeros(MOST_STEPS, jnp.float32)
    start = (jnp.int32(0), jnp.bool_(True), moving, opt_state, average, losses)
    done, _, moving, opt_state, average, losses = jax.lax.while_loop(more, one, start)
    return *pin(moving, opt_state, average), *runtime.placement.everywhere((losses, done))


@functools.partial(jax.jit, static_argnames=("how", "runtime"))
def gradients_of(moving, frozen, batch, key, loss_fn, penalty, how: How, runtime: Runtime):
    """Compute the loss and gradients of one batch, all of it at once."""

    def gradients_at(weights):
        return jax.value_and_grad(objective)(
            weights,
            frozen,
            batch,
            key=key,
            loss_fn=loss_fn,
            penalty=penalty,
            runtime=runtime,
        )

    return loss_and_gradients(gradients_at, moving, how)


@jax.jit
def running_mean(mean: Tree, tree: Tree, count: jax.Array) -> Tree:
    """Mean of `count` trees before and this one: of the first, itself."""

    def add(old, new):
        mixed = (old + (new - old) / (count + 1)).astype(old.dtype)
        return jnp.where(count == 0, new, mixed)

    return jax.tree.map(add, mean, tree)


epoch_order = jax.jit(windows.epoch_order, static_argnames="n")


@functools.partial(jax.jit, static_argnames="placement")
def taken(source, indices, placement: Placement) -> dict[str, jax.Array]:
    """Gather the windows numbered `indices` where every host can read them."""
    return placement.everywhere(source.gather(indices))


def as_pytree(f: Callable | None) -> Any:
    """Make a pytree of `f`: arrays it carries become arguments of the compiled step, not constants
    in it.
    """
    return f if f is None or isinstance(f, jax.tree_util.Partial) else jax.tree_util.Partial(f)


def strong(leaf: Any) -> jax.Array:
    """Take the weak type of flax's ones from `leaf`: no step returns one, so it would be compiled
    twice.
    """
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def trace_step(
    loss_fn: Callable[[Tree, dict[str, jax.Array], jax.Array, bool], jax.Array],
    params: Tree,
    train_source: Any,
    *,
    config: TrainConfig,
    trainable: Tree | None = None,
    penalty: Callable[[Tree], jax.Array] | None = None,
) -> jax.stages.Traced:
    """Trace the compiled step of `fit` from shapes alone: `.lower().compile()` of it is what `fit`
    runs.

    Nothing is computed and no device has to be there, so a step can be compiled for a machine that
    is not at hand: the one that the shardings of the parameters name.

    Args:
      params: tree of `jax.ShapeDtypeStruct` with shardings, over a mesh or all on one device.
      train_source: as for `fit`; of its arrays, only the shapes are looked at.
      loss_fn, config, trainable, penalty: as for `fit`.
    Raises: ValueError, as `fit`, for a batch that does not divide among the devices, and for a
      config that does not say batch_size, weight_decay and clip, which are in the program.
    """
    if missing := [
        name for name in ("batch_size", "weight_decay", "clip") if name in config.unfilled
    ]:
        raise ValueError(f"to trace a step the TrainConfig must say {', '.join(missing)}")
    assert config.batch_size and config.weight_decay is not None
    placement = Placement.of(params)
    mesh = placement.mesh
    given = jax.tree.leaves(params)[0].sharding
    # Of the devices that the parameters are laid on, which need not be this machine's.
    platform = None if given is None else next(iter(given.device_set)).platform
    if mesh is None:
        whole = given
    else:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shapes(tree, shardings=None):
        shardings = jax.tree.map(lambda _: whole, tree) if shardings is None else shardings
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    n = int(train_source.n)
    batch_size = min(config.batch_size, n)
    placement.check_batch(batch_size, How.of(config).accumulate)
    moving, frozen = trees.partition(
        params, trees.select(params, None) if trainable is None else trainable
    )
    rule = optimizers.Rule.of(config)
    opt_state = jax.eval_shape(rule.transformation().init, moving)
    state = {"params": moving, "optimizer": opt_state} | ({"average": moving} if config.ema else {})
    placed = mesh and sharding.like(state, moving, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rates = jax.ShapeDtypeStruct((windows.steps_per_epoch(n, batch_size),), jnp.float32)
    order = jax.ShapeDtypeStruct((n,), jnp.int32)
    key = jax.eval_shape(keys, 0)["dropout"]
    return advance.trace(
        moving=moving,
        opt_state=shapes(opt_state, placed and placed["optimizer"]),
        average=state.get("average"),
        frozen=frozen,
        source=shapes(train_source),
        order=shapes(order),
        rates=rates,
        key=shapes(key),
        loss_fn=as_pytree(loss_fn),
        penalty=as_pytree(penalty),
        place=number,
        count=number,
        step=number,
        batch_size=batch_size,
        rule=rule,
        how=How.of(config),
        runtime=runtime_of(config, placement, platform),
        layout=placed and StateLayout.of(placed),
    )
