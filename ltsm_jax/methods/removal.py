"""Physical removal of what masks have made dead: the same function on smaller matrices.

Masks alone define a pruned model; removal makes it fast and must not change what it computes.
What is dead is a union over partners, as in section "Structured pruning" of "Less is More"
(NeurIPS 2025, arXiv 2505.23195):

| part | dead where | removed |
| --- | --- | --- |
| feed-forward unit | masked in the output of `up` or `gate`, or the input of `down` | all |
| value channel | masked in the output of v, or the input of `out` | down to the widest head |
| channel of queries and keys | masked in the output of q or of k | likewise; not if normalised |
| rotary pair | both members masked in q, or both in k | likewise; each head keeps its own pairs |
| head | all its value channels are dead | all; heads that share a key head together |
| head whose values are normalised | masked in all its inputs of `out` | all |
| unit of an expert | as a feed-forward unit | down to the widest expert |

A feed-forward unit that is masked at its output is dead because act(0) = 0.

All heads of a layer keep one width, so some dead channels stay, and so do the channels of the
residual stream (the inputs of q, k, v, gate, up; the outputs of out and down): they stay as zeros
in the matrices. To read and add to the live ones alone, `x.at[:, out].add(f(x[:, in]))`, was
measured on a feed-forward layer of Timer (D 1024, F 2048, CPU, time of all cores,
`experiments.benchmarks.pruned_speed`): where a tenth of the channels is dead it is 11% slower than
the zeros, at a quarter 5% faster, at half 39% faster. It needs lists of channels in every layer's
config, for a gain at high shares only, and is not done.

Whole experts are removed by `pruning.keep_experts`, before channels are scored. Experts whose units
are all dead stay: the router would choose others in their place.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, trees
from ltsm_jax.layers.dims import HeadDims
from ltsm_jax.layers.masks import apply_masks, masks_by_weight
from ltsm_jax.models import Model
from ltsm_jax.models.parts import Kept, Place, pad, places, without
from ltsm_jax.sharding import Placement
from ltsm_jax.trees import Params, Tree

__all__ = ["pad", "remove"]


def remove(model: Model, params: Params, masks: Tree) -> tuple[Model, Params, Tree]:
    """Remove the parts of a model that masks have made dead.

    Args:
      model, params: whole; the parameters need not be merged with the masks.
      masks: of 0 and 1, see `pruning.full_masks`; linears without a mask count as whole.
    Returns: (model, params, masks): a model of the same class with a smaller config, its merged
      parameters, which compute what `apply_masks(params, masks)` computes in `model`, and the masks
      of what is left, with which `methods.run.run(..., masks=masks)` keeps the remaining zeros at
      zero. Nothing dead: the model itself, merged. The parameters lie where they lay, over a mesh
      by the family's rules.
    Raises: ValueError for masks that do not fit the parameters, or hold anything but 0 and 1.

    Example:
      small, params, masks = remove(model, params, pruned.masks)
    """
    mask_of = {path: np.array(mask, np.float32) for path, mask in trees.flatten(masks).items()}
    odd = [path for path, mask in mask_of.items() if not np.isin(mask, (0.0, 1.0)).all()]
    if odd:
        paths = ", ".join(odd)
        raise ValueError(f"masks to remove by hold 0 and 1; these hold other values: {paths}")
    masks_by_weight(params, masks)  # refuses masks of another model before they are used

    flat, mesh = trees.flatten(params), Placement.of(params).mesh
    kept = []
    for place in places(model, flat):
        # Also spreads each mask of `mask_of` to its partners: a unit that is dead in one linear
        # becomes dead in all of them.
        stays = _KEEP[place.group.kind](model.config, place, flat, mask_of)
        if stays is not None:
            kept.append((place, stays))
    spread = trees.unflatten({path: jnp.asarray(mask) for path, mask in mask_of.items()})

    # A mesh splits axes of certain lengths only; on the host any length can be cut.
    whole = params if mesh is None else jax.tree.map(sharding.on_host, params)
    small, fewer, rest = without(model, apply_masks(whole, spread), kept, masks=spread)
    return small, sharding.shard(fewer, small.shard_rules, mesh)[0], rest


# -------------------------------------------------------------------------------------------------
# What stays of a module. Each function returns None for a module that has nothing left, and turns
# the masks of partners in `mask_of` into their union, in place.


def _keep_units(
    config: Any, place: Place, flat: Mapping[str, Any], mask_of: dict[str, np.ndarray]
) -> Kept | None:
    kernels = [f"{place.path}/{name}/kernel" for name in place.group.takes]
    kernels = [path for path in kernels if path in flat]
    if not kernels:
        return None
    live_F = np.ones(flat[kernels[0]].shape[0], bool)
    _spread(live_F, _partners(place, mask_of))
    return Kept(np.flatnonzero(live_F))


def _keep_experts(
    config: Any, place: Place, flat: Mapping[str, Any], mask_of: dict[str, np.ndarray]
) -> Kept | None:
    down = f"{place.path}/{place.group.takes[0]}"
    if down not in flat:
        return None
    live_EF = np.ones(flat[down].shape[:2], bool)
    _spread(live_EF, _partners(place, mask_of))
    return Kept(np.arange(len(live_EF)), units=_widest(live_EF))


def _partners(place: Place, mask_of: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """List the masks on the outputs that make the parts and on the inputs that take them."""
    paths = [f"{place.path}/{name}/out" for name in place.group.makes]
    paths += [f"{place.path}/{name}/in" for name in place.group.takes]
    return [mask_of[path] for path in paths if path in mask_of]


def _spread(live: np.ndarray, masks: list[np.ndarray]) -> None:
    """Leave alive, in place, what is alive in `live` and in all masks."""
    for mask in masks:
        live &= mask > 0
    for mask in masks:
        mask *= live


def _keep_heads(
    config: Any, place: Place, flat: Mapping[str, Any], mask_of: dict[str, np.ndarray]
) -> Kept | None:
    group, dims = place.group, place.dims(config)
    out = f"{place.path}/{group.takes[0]}"
    if f"{out}/kernel" not in flat:
        return None
    names = [name for name in group.makes if f"{place.path}/{name}/kernel" in flat]
    widths = [flat[f"{place.path}/{name}/kernel"].shape[-2:] for name in names]

    def mask(path: str, shape: tuple[int, ...]) -> np.ndarray:
        found = mask_of.get(f"{place.path}/{path}")
        return np.ones(shape, np.float32) if found is None else found

    # Values: a channel lives where neither v nor the output projection masks it. With G key heads
    # for H query heads, a value channel lives while any of the H/G heads that share it uses it.
    # Behind a norm that mixes the channels of a head, those that v lacks are not 0.
    v_GV: Any = (
        np.ones(widths[-1], np.float32)
        if group.normed
        else mask(f"{group.makes[-1]}/out", widths[-1])
    )
    v_GV = v_GV.reshape(-1, *v_GV.shape[-2:])[-1]  # of a fused linear the last part is v
    o_HV = mask(f"{group.takes[0]}/in", flat[f"{out}/kernel"].shape[:2])
    h, g = len(o_HV), len(v_GV)
    o_HV *= np.repeat(v_GV, h // g, axis=0)
    v_GV *= _any_of(o_HV, g)

    # Heads: those that share a key head go only together, so that H' stays a multiple of G'.
    live_H, live_G = o_HV.max(axis=1) > 0, v_GV.max(axis=1) > 0
    stay_G = np.flatnonzero(live_G)
    stay_H = np.flatnonzero(np.repeat(live_G, h // g))
    values = _widest(v_GV[stay_G] > 0) if isinstance(dims, HeadDims) else None

    if group.axis:  # fused: queries and keys come out beside the values
        fused = mask_of.get(f"{place.path}/{group.makes[0]}/out")
        if fused is not None:
            fused *= live_H[:, None]
        return Kept(stay_H)

    # Queries and keys: of dead heads nothing is left; channels go where the family allows it.
    scores = None
    if len(names) == len(group.makes) == 3:
        q_HK = mask(f"{group.makes[0]}/out", widths[0])
        k_GK = mask(f"{group.makes[1]}/out", widths[1])
        q_HK *= live_H[:, None]
        k_GK *= live_G[:, None]
        if group.scores == "channels":
            q_HK *= np.repeat(k_GK, h // g, axis=0)
            k_GK *= _any_of(q_HK, g)
            scores = _widest(k_GK[stay_G] > 0)
        elif group.scores == "pairs":
            scores = _live_pairs(q_HK, k_GK, stay_G)
    is_shared = isinstance(dims, HeadDims) and dims.kv_heads is not None
    return Kept(stay_H, stay_G if is_shared else None, values, scores=scores)


_KEEP = {"heads": _keep_heads, "ffn units": _keep_units, "experts": _keep_experts}


def _live_pairs(q_HK: np.ndarray, k_GK: np.ndarray, stay_G: np.ndarray) -> np.ndarray:
    """Find the channels [G', K'] of the rotary pairs that stay; zero dead pairs in the masks.

    The pair j of a head is its channels j and j + K/2, which the rotation mixes: it is dead only
    where both are.
    """
    (h, k), g = q_HK.shape, len(k_GK)
    q_HJ = q_HK[:, : k // 2] + q_HK[:, k // 2 :] > 0
    k_GJ = k_GK[:, : k // 2] + k_GK[:, k // 2 :] > 0
    q_HJ &= np.repeat(k_GJ, h // g, axis=0)
    k_GJ = _any_of(q_HJ, g) > 0
    q_HK *= np.tile(q_HJ, 2)
    k_GK *= np.tile(k_GJ, 2)
    first = _widest(k_GJ[stay_G])
    return np.concatenate([first, first + k // 2], axis=1)


def _any_of(x_HK: np.ndarray, g: int) -> np.ndarray:
    """Reduce [H, K] to [G, K]: whether any of the heads that share a key head has the channel."""
    return x_HK.reshape(g, -1, x_HK.shape[-1]).max(axis=1)


def _widest(live_GK: np.ndarray) -> np.ndarray:
    """Choose as many channels [G, n] of each head as the widest has live: live ones, then dead."""
    n = int(live_GK.sum(axis=1).max(initial=0))
    order = np.argsort(~live_GK, axis=1, kind="stable")[:, :n]
    return np.sort(order, axis=1)
