"""Find the parts of a pretrained model that do little on a data set, measured on the model as it
is; and those that a pruning left out.

A head that adds little to the stream it writes to, a feed-forward unit that is never active:
reasons why a model can be pruned, and where. (How often experts are used: `pruning.expert_usage`.)
Letters: T tokens, H heads, K head width, D model width, F feed-forward units.

Source: the statistics of SJTU-DMTai/Prune-then-Finetune (commit e5b924c), "Less is More" (arXiv
2505.23195).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, trees
from ltsm_jax.data import Windows
from ltsm_jax.layers import taps
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.models import Batch, Model
from ltsm_jax.models.groups import Group
from ltsm_jax.models.parts import places
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks import forecasting
from ltsm_jax.training import progress
from ltsm_jax.trees import Params

SPARSE = 0.05  # a head whose share of the stream is not larger does nothing for that token
LAYER = re.compile(r"(.*?(?:(?:block_\d+_)?layer|block)_\d+)/(.+)")
MATRICES = ("q", "k", "v", "qkv", "out", "gate", "up", "down")  # in the order of the heat map


@dataclasses.dataclass(frozen=True)
class Heads:
    """Statistics of the heads of one attention, means over tokens.

    linear: path of the output projection.
    contribution: [H] of ||W_out^h y_h|| / ||x||, y_h the head's output before the output
      projection, W_out^h its rows of that, without bias, x the layer's input: the stream before the
      layer's first norm, whichever sub-layer the attention is.
    attention: of ||out(y)|| / ||x||, all heads together, with bias.
    sparse: [H] share of tokens whose contribution is at most 0.05.
    """

    linear: str
    contribution: np.ndarray
    attention: float
    sparse: np.ndarray


@dataclasses.dataclass(frozen=True)
class UnitActivity:
    """Activity of the units of one feed-forward network: means over tokens of a, the input of its
    last linear, whose path is `linear`.

    active: [F] share of tokens with a > 0. That is sparsity where the activation is ReLU; under
      GELU and gated activations only the share of positive values. size: [F] of |a|.
    """

    linear: str
    active: np.ndarray
    size: np.ndarray


@dataclasses.dataclass(frozen=True)
class Redundancy:
    """Statistics by the path of the module, "layer_0/attn", "layer_0"; tokens: how many each is the
    mean of.
    """

    heads: dict[str, Heads]
    units: dict[str, UnitActivity]
    tokens: dict[str, int]


@hosts.interruptible()
def measure(
    model: Model,
    params: Params,
    *parts: Windows,
    mode: forecasting.Mode = "ims",
    batch_size: int = 64,
    show_progress: bool = True,
) -> Redundancy:
    """Statistics of all heads and feed-forward units that `Model.prunable` names, over every token
    of every window.

    The tokens are those of the training loss, without dropout; padding that a family adds counts
    like the rest. Units inside experts are not measured, and modules that no token reaches are
    left out. Where the parameters lie over a mesh, its devices share the windows of every batch
    that they divide; of several hosts all call.

    Args:
      parts: windows, such as `tasks.forecasting.training_windows(...)` and `splits.val`.
      mode: the loss whose forward pass is looked at, as in `methods.run.run`.
      batch_size: windows per forward pass.
    Raises: ValueError without windows, and for windows that the loss cannot take.
    """
    if not parts:
        raise ValueError("measure needs at least one part of the data")
    # the last batch of a part is a shorter one, and not filled up: padding must not count
    placement = Placement.of(params)
    placed = [part.over(placement.mesh) for part in parts]
    batches = []
    for part in placed:
        batches += [(part, start) for start in range(0, part.n, batch_size)]
    total: dict[str, Any] = {}
    with progress.Bar(len(batches), 1, "redundancy", show=show_progress and hosts.first()) as bar:
        for i, (part, start) in enumerate(batches):
            indices = np.arange(start, min(start + batch_size, part.n), dtype=np.int32)
            found = _sums(model, mode, params, batch=_gather(part, indices), placement=placement)
            sums = jax.tree.map(lambda x: sharding.on_host(x).astype(np.float64), found)
            total = jax.tree.map(np.add, total, sums) if i else sums
            bar.update(i + 1, 1, len(indices))
            hosts.pause()
    heads, units, tokens = {}, {}, {}
    for path, group in _groups(model, params):
        if path not in total:
            continue
        mean = {name: value / total[path]["tokens"] for name, value in total[path].items()}
        tokens[path], linear = int(total[path]["tokens"]), f"{path}/{group.takes[0]}"
        if group.kind == "heads":
            heads[path] = Heads(
                linear=linear,
                contribution=mean["contribution"],
                attention=float(mean["attention"]),
                sparse=mean["sparse"],
            )
        else:
            units[path] = UnitActivity(linear, mean["active"], mean["size"])
    return Redundancy(heads, units, tokens)


def _groups(model: Model, params: Params) -> list[tuple[str, Group]]:
    """The modules of `params` that the model's groups of heads and units name, by path, layer by
    layer.
    """
    flat = trees.flatten(params)
    found = [
        (place.path, place.group)
        for place in places(model, flat)
        if place.group.kind != "experts" and f"{place.path}/{place.group.takes[0]}/kernel" in flat
    ]
    return sorted(found, key=lambda pair: _natural(pair[0]))


def _natural(path: str) -> list[Any]:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path)]


_gather = jax.jit(
    Windows.gather
)  # apart from the rest: parts of other sizes need not compile that again


@functools.partial(jax.jit, static_argnames=("model", "mode", "placement"))
def _sums(
    model: Model, mode: forecasting.Mode, params: Params, batch: Batch, placement: Placement
) -> dict[str, Any]:
    """Sums over the tokens of a batch, by module."""
    split = placement if len(batch["context"]) % placement.row_parts == 0 else Placement()
    batch = split.rows(batch)
    groups = _groups(model, params)
    inside = {path: f"{path}/{group.takes[0]}" for path, group in groups}
    layers = {path: path.rpartition("/")[0] for path, group in groups if group.kind == "heads"}
    loss = forecasting.loss_fn(model, mode)
    with taps.arguments_of({*inside.values(), *layers.values()}) as seen:
        Runtime(placement=split).call(loss, params, batch, None, False)
    flat, found = trees.flatten(params), {}
    for path, group in groups:
        calls = [args[0] for args in seen[inside[path]]]
        if not calls:  # such as an exchange between variates where there is but one
            continue
        if group.kind == "heads":
            kernel, bias = (flat.get(f"{inside[path]}/{name}") for name in ("kernel", "bias"))
            streams = [_stream(args[0], group.swapped) for args in seen[layers[path]]]
            sums = [
                _of_heads(y, x_TD, kernel, bias_D=bias)
                for y, x_TD in zip(calls, streams, strict=True)
            ]
        else:
            sums = [_of_units(a) for a in calls]
        found[path] = jax.tree.map(lambda *values: sum(values), *sums)
    return placement.everywhere(found)


def _stream(x: jax.Array, swapped: bool) -> jax.Array:
    """The stream [..., D] as [T, D], in the order in which the attention has its tokens."""
    x = jnp.swapaxes(x, -3, -2) if swapped else x
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _of_heads(y: jax.Array, x_TD: jax.Array, kernel_HKD: Any, bias_D: Any) -> dict[str, jax.Array]:
    y_THK = y.reshape(-1, *kernel_HKD.shape[:2]).astype(jnp.float32)
    z_THD = jnp.einsum("THK,HKD->THD", y_THK, kernel_HKD.astype(jnp.float32))
    whole_TD = z_THD.sum(1) + (0.0 if bias_D is None else bias_D.astype(jnp.float32)[None])
    stream_T1 = jnp.linalg.norm(x_TD, axis=-1, keepdims=True)
    there_T1 = stream_T1 > 0  # nothing is a share of nothing: such tokens are left out

    def share(z):
        of_stream = jnp.linalg.norm(z, axis=-1) / jnp.where(there_T1, stream_T1, 1.0)
        return jnp.where(there_T1, of_stream, 0.0)

    share_TH = share(z_THD)
    return {
        "tokens": there_T1.sum(),
        "contribution": share_TH.sum(0),
        "attention": share(whole_TD[:, None]).sum(),
        "sparse": ((share_TH <= SPARSE) & there_T1).sum(0),
    }


def _of_units(a: jax.Array) -> dict[str, jax.Array]:
    a_TF = a.reshape(-1, a.shape[-1]).astype(jnp.float32)
    return {
        "tokens": jnp.asarray(a_TF.shape[0]),
        "active": (a_TF > 0).sum(0),
        "size": jnp.abs(a_TF).sum(0),
    }


# --------------------------------------------------------------------------------------------------
# pruning by these statistics, and what a pruning took


def mask_idle(
    masks: Params,
    found: Redundancy,
    *,
    contribution: float | None = None,
    active: float | None = None,
) -> Params:
    """Masks without the heads and the units that do little, by the statistics alone.

    Args:
      masks: to start from, such as `pruning.full_masks(model)`; not modified.
      contribution: heads with a mean contribution of at most this go; None: none.
      active: units active on at most this share of the tokens go, 0 for those that never are; None:
        none.
    Returns: masks that differ in the inputs of output projections and of last feed-forward linears
    alone.
    Raises: ValueError where the masks do not cover what was measured.
    """
    flat = {path: np.array(leaf) for path, leaf in trees.flatten(masks).items()}
    idle = {}
    if contribution is not None:
        idle |= {
            f"{heads.linear}/in": heads.contribution <= contribution
            for heads in found.heads.values()
        }
    if active is not None:
        idle |= {f"{units.linear}/in": units.active <= active for units in found.units.values()}
    if missing := sorted(idle.keys() - flat.keys()):
        raise ValueError(f"there are statistics, but no masks, of {', '.join(missing)}")
    for path, gone in idle.items():
        flat[path][gone] = 0.0
    return trees.unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def sparsity(masks: Params) -> list[dict[str, Any]]:
    """Share of each weight matrix that its masks take away, one dict a matrix.

    Args:
      masks: see `pruning.full_masks`.
    Returns: dicts with layer ("encoder/layer_0"; "" outside the layers), matrix ("attn/q", "up"),
      inputs and outputs, the pruned shares of the two masks alone, and weights, 1 - kept inputs *
      kept outputs / (inputs * outputs). Of stacked experts, means over the experts.
    """
    flat, rows = trees.flatten(masks), []
    for path in sorted({path.rpartition("/")[0] for path in flat}, key=_natural):
        into, out = (np.asarray(flat[f"{path}/{side}"]) for side in ("in", "out"))
        match = LAYER.fullmatch(path)
        stacked = path.rpartition("/")[0].endswith("experts")
        split = (into.shape[0], -1) if stacked else (1, -1)
        kept_in, kept_out = ((x.reshape(split) != 0).mean(1) for x in (into, out))
        row = {"layer": match[1] if match else "", "matrix": match[2] if match else path}
        row |= {
            "inputs": 1 - kept_in.mean(),
            "outputs": 1 - kept_out.mean(),
            "weights": 1 - (kept_in * kept_out).mean(),
        }
        rows.append(row | {k: float(row[k]) for k in ("inputs", "outputs", "weights")})
    return rows


def heat_map(
    rows: Sequence[Mapping[str, Any]], share: str = "weights"
) -> tuple[list[str], list[str], np.ndarray]:
    """A `sparsity` table as an image: (layers, matrices, shares [layers, matrices]), NaN where a
    layer has no such one.

    Matrices stand in the order q, k, v, out, gate, up, down inside each part of a layer. share:
    "weights", "inputs" or "outputs".
    """

    def place(matrix: str) -> tuple[Any, ...]:
        part, _, name = matrix.rpartition("/")
        first = min(i for i, row in enumerate(rows) if row["matrix"].rpartition("/")[0] == part)
        return (
            part == "",
            first,
            MATRICES.index(name) if name in MATRICES else len(MATRICES),
            name,
        )

    layers = sorted({row["layer"] for row in rows}, key=_natural)
    matrices = sorted({row["matrix"] for row in rows}, key=place)
    values = np.full((len(layers), len(matrices)), np.nan)
    for row in rows:
        values[layers.index(row["layer"]), matrices.index(row["matrix"])] = row[share]
    return layers, matrices, values
