"""Channels: which there are, how much each matters, and which go first.

A channel's score is written s, its importance, an average of scores, I, its mask m.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, trees
from ltsm_jax.layers import masks as layer_masks
from ltsm_jax.layers.masks import masked
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.models import Model, parts
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Params

Masks = Any  # nested dict, see `full_masks`; importance and order are trees of the same structure
Score = Literal["taylor2", "taylor1", "taylor2-mean-loss"]
HERE = Placement()  # where the arrays lie
CHUNK = 32  # rows whose gradients are computed side by side

PRUNING_QUIRKS = frozenset({"head-only", "every-linear"})
REFUSED = {
    "all-experts": "a negative threshold that prunes every expert (Q6) leaves no mixture; None "
    "prunes none of them",
    "counts-per-process": "experts counted by each process alone (Q8) differ between processes; "
    "there is one count",
    "one-label": "validation against one label for 4096 forecasts (Q14) says nothing of any epoch",
    "tail-as-full": "weights of the last batch that ignore its size (Q19) make no mean",
    "lowest-threshold": "a threshold that is the lowest of several devices' (Q20) depends on their "
    "number",
    "dropout-again": "dropout that comes back in the middle of an epoch (Q22) makes scores of "
    "another model",
    "raw-labels": "labels in another scale than the output (Q3): Timer's loss here scales both "
    "alike",
    "pruned-in-balance": "a balance loss that counts experts that are gone (Q7) pulls tokens to "
    "where nobody is",
}


@functools.cache
def _shapes(model: Model) -> Mapping[str, Any]:
    return trees.flatten(layer_masks.mask_shapes(model.init, jax.random.key(0)))


@functools.cache
def _routers(model: Model) -> frozenset[str]:
    return layer_masks.routers(model.init, jax.random.key(0))


def full_masks(
    model: Model,
    *,
    include_embed: bool = False,
    include_head: bool = False,
    quirks: Collection[str] = (),
) -> Masks:
    """Masks of ones for every channel that may be pruned: those of the linears in the model's
    blocks.

    Routers and gates of shared experts are not among them; convolutions, embeddings of tokens and
    norms never are.

    Args:
      include_embed: the linears before the blocks as well. include_head: those of the head.
      quirks: "head-only": only the head's linear (released for TTM). "every-linear": all (released
        for Timer).
    Returns: nested dict {..path of the linear..: {"in": [*inputs], "out": [*outputs]}}, float32: of
      a projection from heads, `in` is [H, K]. Of stacked experts {..path..: {"gate": {"in": [E, D],
      "out": [E, F]}, "up": alike,
      "down": {"in": [E, F], "out": [E, D]}}}.
    Raises: ValueError for a quirk that is not known, or refused, and for a choice without any
    linear.
    """
    quirks = known_quirks(quirks)
    flat = _shapes(model)
    linears = {path.rsplit("/", 1)[0] for path in flat}
    heads = {path for path in linears if re.search(model.head_leaves, f"{path}/kernel")}
    routers = _routers(model)
    blocks = {path for path in linears if parts.layer_of(model, path)} - heads - routers
    if "every-linear" in quirks:
        chosen = linears
    elif "head-only" in quirks:
        chosen = heads
    else:
        chosen = blocks | (heads if include_head else set())
        chosen |= linears - blocks - heads - routers if include_embed else set()
    if not chosen:
        raise ValueError(
            f"{model.family} has no linear of that kind; there are: {', '.join(sorted(linears))}"
        )
    return trees.unflatten(
        {
            path: jnp.ones(leaf.shape, leaf.dtype)
            for path, leaf in flat.items()
            if path.rsplit("/", 1)[0] in chosen
        }
    )


def known_quirks(quirks: Collection[str]) -> frozenset[str]:
    """The names as a set. Raises: ValueError for those that are unknown, refused, or exclude each
    other.
    """
    quirks = frozenset({quirks} if isinstance(quirks, str) else quirks)
    problems = [f"{name}: refused, {REFUSED[name]}" for name in sorted(quirks & REFUSED.keys())]
    problems += [
        f"{name}: unknown, there are {', '.join(sorted(PRUNING_QUIRKS))}"
        for name in quirks - PRUNING_QUIRKS - REFUSED.keys()
    ]
    if len(quirks & {"head-only", "every-linear"}) == 2:
        problems.append("head-only and every-linear exclude each other")
    if problems:
        raise ValueError("quirks: " + "; ".join(problems))
    return quirks


def gradient_sums(
    loss: Any,
    params: Params,
    masks: Masks,
    batch: Any,
    key=None,
    *,
    squares: bool = True,
    chunk: int | None = None,
    stacks: Collection[str] = (),
    placement: Placement = HERE,
) -> dict[str, Any]:
    """Sums over the rows of a batch of h and h^2, h being the gradient of a row's own loss with
    respect to the masks.

    One backward pass, without gradients of weights: each row has its own gradient of the masks,
    which all its tokens share. Rows of weight 0 do not count. Works under jit.

    Args:
      loss: (params, batch, key, train) -> scalar, the mean over rows weighted by batch["weight"].
      masks: where the gradient is taken; float32.
      batch: as for `Model.loss`. Rows are windows: of one variate, or of all where the model joins
        them.
      key: for losses that draw; each row draws its own.
      squares: False: sums of h alone, from one gradient of the batch's mean loss, which needs less
        memory.
      chunk: rows of one backward pass, rounded up to what the devices of the mesh divide; None: 32,
        for each device that has rows. Bounds the memory and does not change the sums.
      stacks: paths of stacked experts whose rows are counted; needs `squares`.
      placement: of the parameters, under jit: over a mesh each device has its own rows of a chunk
        and their gradients, and the sums of all meet.
    Returns: {"rows": how many count, "loss": their sum, "h": tree like masks, "squares": alike, or
      {}, "seen": with stacks, {..path of the stack..: rows [E] of which a token reached the expert,
      so that one of its masks has a gradient}, else {}}.
    """
    if stacks and not squares:
        raise ValueError(
            "stacks: rows are counted by their own gradients, which squares=False does without"
        )
    rows = {name: value for name, value in batch.items() if name != "weight"}
    b, devices = len(rows["context"]), placement.row_parts
    chunk = -(-min(chunk or CHUNK * devices, b) // devices) * devices
    place = jnp.arange(-(-b // chunk) * chunk)
    weight = jnp.where(place < b, batch.get("weight", jnp.ones(b))[jnp.minimum(place, b - 1)], 0.0)
    place = jnp.minimum(place, b - 1)
    parts = jax.tree.map(lambda x: x[place].reshape(-1, chunk, *x.shape[1:]), rows)
    keys = (
        None
        if key is None
        else jax.vmap(jax.random.fold_in, (None, 0))(key, place).reshape(-1, chunk)
    )

    def of_rows(masks, rows, weight, key):
        with masked(masks):
            return loss(params, rows if weight is None else rows | {"weight": weight}, key, False)

    def of_row(masks, row, key):
        return of_rows(masks, {name: value[None] for name, value in row.items()}, None, key=key)

    def add(sums, part):
        rows, weight, keys = placement.rows(part)
        count = weight.sum()
        if squares:
            value, h = jax.vmap(jax.value_and_grad(of_row), (None, 0, 0))(masks, rows, keys)
            new = {
                "loss": weight @ value,
                "h": jax.tree.map(lambda x: jnp.tensordot(weight, x, 1), h),
                "squares": jax.tree.map(lambda x: jnp.tensordot(weight, jnp.square(x), 1), h),
                "seen": trees.unflatten(
                    {path: weight @ _reached(trees.flatten(h), path) for path in stacks}
                ),
            }
        else:
            gradient = jax.value_and_grad(of_rows)
            key = None if keys is None else keys[0]
            value, g = Runtime(placement=placement).call(gradient, masks, rows, weight, key)

            def counted(x):
                return jnp.where(count > 0, x * count, 0.0)

            new = {"loss": counted(value), "h": jax.tree.map(counted, g), "squares": {}, "seen": {}}
        return jax.tree.map(jnp.add, sums, new | {"rows": count}), None

    start = no_sums(masks, squares=squares, stacks=stacks)
    return jax.lax.scan(add, start, (parts, weight.reshape(-1, chunk), keys))[0]


def no_sums(masks: Masks, *, squares: bool = True, stacks: Collection[str] = ()) -> dict[str, Any]:
    """The result of `gradient_sums` for no rows at all."""
    zeros, flat = jax.tree.map(jnp.zeros_like, masks), trees.flatten(masks)
    experts = {}
    for path in stacks:
        first = next(mask for name, mask in flat.items() if name.startswith(f"{path}/"))
        experts[path] = first.shape[0]
    return {
        "rows": jnp.zeros(()),
        "loss": jnp.zeros(()),
        "h": zeros,
        "squares": zeros if squares else {},
        "seen": trees.unflatten({path: jnp.zeros(e) for path, e in experts.items()}),
    }


def _reached(h: Mapping[str, jax.Array], stack: str) -> jax.Array:
    """Mark the experts that a token of each row reached: 0 or 1 [rows, E]."""
    parts = [(x != 0).any(axis=2) for path, x in h.items() if path.startswith(f"{stack}/")]
    return functools.reduce(jnp.logical_or, parts).astype(jnp.float32)


def importance_of(sums: Mapping[str, Any], masks: Masks, score: Score = "taylor2") -> Masks:
    """The score s of every channel from `gradient_sums` over n rows: about the change of the mean
    loss without it.

    "taylor2": m * mean(-h + h^2 / 2), the Hessian being replaced by the mean of squared gradients.
      "taylor1":
    -m * mean(h). "taylor2-mean-loss": m * (-sum(g) + sum(g^2) / 2) with g = h / n, gradients of the
    mean loss: its square is too small by n. Where sums has "seen", an expert's means are over the
    rows that reached it.

    Returns: tree like masks, in units of the loss.
    Raises: ValueError for a score that is not one of these, or that needs squares where there are
    none.
    Example: h = (0.8, -0.4), m = 1: taylor2 0, taylor1 -0.2, taylor2-mean-loss -0.1.
    """
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}; got {score!r}")
    n = sums["rows"]
    if score == "taylor1":
        found = jax.tree.map(lambda m, h: -m * h / n, masks, sums["h"])
    elif not sums["squares"]:
        raise ValueError(f"{score} needs the sums of squares")
    else:
        scale = 2 * n if score == "taylor2" else 2 * n * n
        found = jax.tree.map(
            lambda m, h, h2: m * (h2 / scale - h / n), masks, sums["h"], sums["squares"]
        )
    if not (seen := trees.flatten(sums.get("seen", {}))):
        return found
    flat = trees.flatten(found)
    for stack, rows_E in seen.items():
        for path in [path for path in flat if path.startswith(f"{stack}/")]:
            flat[path] = flat[path] * (n / jnp.maximum(rows_E, 1))[:, None]
    return trees.unflatten(flat)


def pruning_step(
    importance: Masks, masks: Masks, r_step: float, scored: Mapping[str, np.ndarray] | None = None
) -> tuple[Masks, Masks]:
    """One pruning step over all layers together: the share `r_step` of the channels with the
    smallest |I| goes.

    Of the scored channels with |I| > 0, the K = ceil(number * r_step) smallest set a
    threshold; all up to it go, ties included, and so do channels whose importance is exactly 0,
    which do not count in K. What is pruned has importance 0 and stays pruned. A channel without
    which the loss would be much LOWER is kept, because of |.|.

    Args:
      importance: averaged scores, tree like masks. masks: 0 or 1.
      r_step: share in [0, 1].
      scored: by flat path ("layer_0/mixture/experts/up/in"), booleans that broadcast to the mask:
        True where a channel may go; without an entry, every channel may.
    Returns: (masks, importance), new float32 trees on the host.
    Source: section "selection" of the released `prune` step (SJTU-DMTai/Prune-then-Finetune).
    Example: I = [0.5, -0.02, 0, 0.3], [-0.02, 0.1, 0.9], [0.001, 0.7] and r_step 0.2: 8 are not 0,
      K = 2, the threshold is 0.02, and four go: the zero, 0.001 and the two ties.
    """
    flat_i = {path: np.asarray(x, np.float32) for path, x in trees.flatten(importance).items()}
    flat_m = {path: np.asarray(x, np.float32) for path, x in trees.flatten(masks).items()}
    free = {}
    for path, x in flat_i.items():
        free[path] = np.broadcast_to((scored or {}).get(path, True), x.shape)

    # The threshold is the K-th smallest size of all layers together. Zeros go in any case and do
    # not count in K; where K is all of the others, they alone go.
    sizes = np.concatenate([np.abs(x[free[p]]).ravel() for p, x in flat_i.items()])
    sizes = sizes[sizes > 0]
    k = math.ceil(len(sizes) * r_step)
    threshold = np.float32(0)
    if 0 < k < len(sizes):
        threshold = np.partition(sizes, k - 1)[k - 1]

    gone = {p: free[p] & (np.abs(x) <= threshold) for p, x in flat_i.items()}
    new_masks = {p: np.where(gone[p], np.float32(0), m) for p, m in flat_m.items()}
    new_importance = {p: np.where(gone[p], np.float32(0), x) for p, x in flat_i.items()}
    return trees.unflatten(new_masks), trees.unflatten(new_importance)


def cut(order: Masks, share: float) -> Masks:
    """Masks without the `share` of all channels that a pruning run would take first, or took first.

    One run gives masks for every share: those of a larger share are within those of a smaller one.

    Args:
      order: `PruneResult.order`: the rank of every channel, int32, 0 for the first to go.
      share: in [0, 1), of all channels.
    Raises: ValueError for a share outside.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    k = round(share * trees.count(order))
    return jax.tree.map(lambda rank: jnp.asarray(np.asarray(rank) >= k, jnp.float32), order)


def share_left(masks: Masks) -> float:
    """Share of the channels that are not pruned."""
    flat = [np.asarray(x) for x in jax.tree.leaves(masks)]
    left = sum(np.count_nonzero(x) for x in flat)
    return float(left / trees.count(flat))


def refuse_pruned(model: Model, params: Params) -> None:
    """Raises: ValueError where some channels of a linear are zeros and others are not, as pruning
    leaves them.
    """
    flat, zeros = trees.flatten(params), 0
    for path, (m_in, _) in layer_masks.masks_by_weight(params, full_masks(model)).items():
        kernel = np.asarray(sharding.on_host(flat[path])) if path in flat else None
        if kernel is None or not path.endswith("/kernel"):
            continue
        bias = flat.get(path.removesuffix("kernel") + "bias")
        inputs, outputs = tuple(range(m_in.ndim)), tuple(range(m_in.ndim, kernel.ndim))
        dead_in = ~kernel.any(axis=outputs)
        dead_out = ~kernel.any(axis=inputs)
        if bias is not None:
            dead_out &= np.asarray(sharding.on_host(bias)) == 0
        zeros += sum(int(dead.sum()) for dead in (dead_in, dead_out) if not dead.all())
    if zeros:
        raise ValueError(
            f"{zeros} channels of this model are zeros, as pruning leaves them, and training would "
            "bring them back: "
            "hand in the masks that prune or remove gave (masks=masks), or masks={} to train them "
            "all the same"
        )
