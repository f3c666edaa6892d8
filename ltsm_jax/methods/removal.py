"""Physical removal of what masks have made dead: the same function on smaller matrices.

Masks alone define a pruned model; removal makes it fast and must not change what it computes. What is dead is a union
over partners, as in section "Structured pruning" of "Less is More" (NeurIPS 2025, arXiv 2505.23195):

| what | dead where | removed |
| --- | --- | --- |
| feed-forward unit | the output of `up` or `gate`, or the input of `down`, is masked (act(0) = 0) | all |
| value channel | the output of v, or the input of `out`, is masked | as many as the head with fewest has |
| channel of queries and keys | the output of q or of k is masked | likewise; not where q and k are normalised |
| rotary pair | both members are masked in q, or both in k | likewise; each head keeps its own pairs |
| head | all its value channels are dead | all; heads that share a key head only together |
| unit of an expert | as a feed-forward unit | as many as the expert with fewest has |

All heads of a layer keep one width, so some dead channels stay, and so do the channels of the residual stream (the
inputs of q, k, v, gate, up; the outputs of out and down): they stay as zeros in the matrices. To read and add to the
live ones alone, `x.at[:, out].add(f(x[:, in]))`, was measured on a feed-forward layer of Timer (D 1024, F 2048, CPU,
`experiments.benchmarks.pruned_speed`, time of all cores): where a tenth of the channels is dead it is 11% slower than
the zeros, at a quarter 5% faster, at half 39% faster. It needs lists of channels in every layer's config, for a gain at
high shares only, and is not done.

Whole experts are removed by `pruning.keep_experts`, before channels are scored. Experts whose units are all dead stay:
the router would choose others in their place.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, trees
from ltsm_jax.layers.masks import merge, weights
from ltsm_jax.models import Model
from ltsm_jax.models.parts import Kept, Place, pad, places, without
from ltsm_jax.sharding import Placement

__all__ = ["pad", "remove"]

Params = Any
Masks = Any


def remove(model: Model, params: Params, masks: Masks) -> tuple[Model, Params, Masks]:
    """The model without the parts that the masks have made dead.

    Args:
      model, params: whole; the parameters need not be merged.
      masks: of 0 and 1, see `pruning.full_masks`; linears that are not in it count as whole.
    Returns: (model, params, masks): a model of the same class with a smaller config, its merged parameters, which
      compute what `merge(params, masks)` computes in `model`, and the masks of what is left, with which
      `methods.run.run(..., masks=masks)` keeps the remaining zeros at zero. Nothing dead: the model itself, merged.
      The parameters lie where they lay, over a mesh by the family's rules.
    Raises: ValueError for masks that do not fit the parameters, or hold anything but 0 and 1.
    """
    own = {path: np.array(mask, np.float32) for path, mask in trees.flatten(masks).items()}
    odd = [path for path, mask in own.items() if not np.isin(mask, (0.0, 1.0)).all()]
    if odd:
        raise ValueError(f"masks to remove by hold 0 and 1; these hold other values: {', '.join(odd)}")
    weights(params, masks)  # refuses masks of another model, before they are looked into
    flat, mesh = trees.flatten(params), Placement.of(params).mesh
    kept = [(place, _kept(place, flat, own)) for place in places(model, flat)]
    settled = trees.unflatten({path: jnp.asarray(mask) for path, mask in own.items()})
    # of a mesh on the host, where axes of any length can be cut
    whole = params if mesh is None else jax.tree.map(sharding.on_host, params)
    merged = merge(whole, settled)
    small, fewer, rest = without(model, merged, [(place, stays) for place, stays in kept if stays], settled)
    return small, sharding.shard(fewer, small.shard_rules, mesh)[0], rest


def _kept(place: Place, flat: Mapping[str, Any], own: dict[str, np.ndarray]) -> Kept | None:
    """What stays of a module; masks of partners in `own` become their union. None: the module has nothing left."""
    kind = {"heads": _heads, "ffn units": _units, "experts": _experts}[place.group.kind]
    return kind(place, flat, own)


def _masks_of(place: Place, own: Mapping[str, np.ndarray], sides: Mapping[str, tuple[str, ...]]) -> list[np.ndarray]:
    """The masks of the linears that the module has, of their side."""
    paths = [f"{place.path}/{name}/{side}" for side, names in sides.items() for name in names]
    return [own[path] for path in paths if path in own]


def _units(place: Place, flat: Mapping[str, Any], own: dict[str, np.ndarray]) -> Kept | None:
    kernels = [path for name in place.group.takes if (path := f"{place.path}/{name}/kernel") in flat]
    if not kernels:
        return None
    live_F = np.ones(flat[kernels[0]].shape[0], bool)
    found = _masks_of(place, own, {"out": place.group.makes, "in": place.group.takes})
    for mask in found:
        live_F &= mask > 0
    for mask in found:
        mask *= live_F
    return Kept(np.flatnonzero(live_F))


def _experts(place: Place, flat: Mapping[str, Any], own: dict[str, np.ndarray]) -> Kept | None:
    down = f"{place.path}/{place.group.takes[0]}"
    if down not in flat:
        return None
    live_EF = np.ones(flat[down].shape[:2], bool)
    found = _masks_of(place, own, {"out": place.group.makes, "in": place.group.takes})
    for mask in found:
        live_EF &= mask > 0
    for mask in found:
        mask *= live_EF
    return Kept(np.arange(len(live_EF)), units=_widest(live_EF))


def _heads(place: Place, flat: Mapping[str, Any], own: dict[str, np.ndarray]) -> Kept | None:
    group = place.group
    out = f"{place.path}/{group.takes[0]}"
    if f"{out}/kernel" not in flat:
        return None
    made = [
        flat[f"{place.path}/{name}/kernel"].shape[-2:] for name in group.makes if f"{place.path}/{name}/kernel" in flat
    ]
    v_GV = _mask(own, f"{place.path}/{group.makes[-1]}/out", made[-1])
    v_GV: Any = v_GV.reshape(-1, *v_GV.shape[-2:])[-1]  # of a fused linear the last part
    o_HV = _mask(own, f"{out}/in", flat[f"{out}/kernel"].shape[:2])
    (h, _), g = o_HV.shape, v_GV.shape[0]
    o_HV *= np.repeat(v_GV, h // g, axis=0)
    v_GV *= _any_of(o_HV, g)
    lives_H, lives_G = o_HV.max(1) > 0, v_GV.max(1) > 0
    stay_G = np.flatnonzero(lives_G)
    stay_H = np.flatnonzero(np.repeat(lives_G, h // g))
    values = _widest(v_GV[stay_G] > 0) if group.values else None
    if group.axis:  # fused: queries and keys come out beside the values
        fused = own.get(f"{place.path}/{group.makes[0]}/out")
        if fused is not None:
            fused *= lives_H[:, None]
        return Kept(stay_H)
    scores = None
    if len(made) == len(group.makes) == 3:
        q_HK, k_GK = (_mask(own, f"{place.path}/{n}/out", made[i]) for i, n in enumerate(group.makes[:2]))
        q_HK *= lives_H[:, None]
        k_GK *= lives_G[:, None]
        if group.scores:
            q_HK *= np.repeat(k_GK, h // g, axis=0)
            k_GK *= _any_of(q_HK, g)
            scores = _widest(k_GK[stay_G] > 0)
        elif group.pairs:
            scores = _live_pairs(q_HK, k_GK, stay_G)
    return Kept(stay_H, stay_G if group.shared else None, values, scores)


def _live_pairs(q_HK: np.ndarray, k_GK: np.ndarray, stay_G: np.ndarray) -> np.ndarray:
    """Channels [G', K'] of the rotary pairs that stay; dead pairs become 0 in the masks."""
    (h, k), g = q_HK.shape, len(k_GK)
    pair = lambda m: m[:, : k // 2] + m[:, k // 2 :] > 0  # noqa: E731
    q_HJ = pair(q_HK) & np.repeat(pair(k_GK), h // g, axis=0)
    k_GJ = _any_of(q_HJ, g) > 0
    q_HK *= np.tile(q_HJ, 2)
    k_GK *= np.tile(k_GJ, 2)
    first = _widest(k_GJ[stay_G])
    return np.concatenate([first, first + k // 2], axis=1)


def _any_of(x_HK: np.ndarray, g: int) -> np.ndarray:
    """[G, K]: whether any of the heads that share a key head has it."""
    return x_HK.reshape(g, -1, x_HK.shape[-1]).max(1)


def _widest(live: np.ndarray) -> np.ndarray:
    """Channels [G, n] of each head, n those of the head with most: its live ones and the first dead ones."""
    n = int(live.sum(1).max(initial=0))
    order = np.argsort(~live, axis=1, kind="stable")[:, :n]
    return np.sort(order, axis=1)


def _mask(own: dict[str, np.ndarray], path: str, shape: tuple[int, ...]) -> np.ndarray:
    return own[path] if path in own else np.ones(shape, np.float32)
