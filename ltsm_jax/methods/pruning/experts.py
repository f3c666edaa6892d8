"""Experts: which a data set uses, and the model without the others."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, trees
from ltsm_jax.layers.runtime import Runtime
from ltsm_jax.models import Model
from ltsm_jax.models.parts import place_of
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.batches import in_batches
from ltsm_jax.trees import Params


def expert_usage(
    model: Model,
    params: Params,
    parts: Sequence[Any],
    *,
    horizon: int = 96,
    batch_size: int | None = None,
    placement: Placement | None = None,
) -> dict[str, np.ndarray]:
    """Share of the tokens that the router sends to each expert, over all windows of all `parts`
    together, in forecasting.

    Args:
      parts: windows; their targets are not looked at.
      horizon: steps forecast after each context; what is forecast and fed back counts as well.
      batch_size: windows of one forward pass; None: the model's `eval_batch` (for each device that
        has rows).
      placement: of the parameters; None: ask them.
    Returns: by the path of a layer's experts, tokens that chose an expert / tokens [E]; the sum is
    a token's k.
    Raises: ValueError for a model without experts that can be pruned so.
    """
    totals: dict[str, np.ndarray] = {}
    placement = placement or Placement.of(params)
    for windows in parts:
        placed = windows.over(placement.mesh)
        counts = in_batches(
            lambda indices, placed=placed: _routed(
                model, params, placed, indices=indices, horizon=horizon, placement=placement
            ),
            windows.n,
            batch_size or model.eval_batch * placement.row_parts,
            placement=placement,
        )
        for path, count_NE in counts.items():
            totals[path] = totals.get(path, 0) + count_NE.sum(0)
    return {path: total[:-1] / total[-1] for path, total in totals.items()}


@functools.partial(jax.jit, static_argnames=("model", "horizon", "placement"))
def _routed(
    model: Model,
    params: Params,
    windows: Any,
    indices: jax.Array,
    horizon: int,
    placement: Placement,
) -> dict[str, jax.Array]:
    """By path, [B, E + 1]: how many tokens chose each expert, and how many there are."""
    context = placement.rows(windows.gather(indices)["context"])
    runtime = Runtime(placement=placement)
    chosen, n_experts = runtime.call(model.routed, params, context, horizon)
    found = {}
    for path, chosen_BNK in chosen.items():
        count_BE = jax.nn.one_hot(chosen_BNK, n_experts).sum((1, 2))
        tokens_B1 = (chosen_BNK[..., 0] >= 0).sum(1, keepdims=True)
        found[path] = jnp.concatenate([count_BE, tokens_B1.astype(count_BE.dtype)], axis=1)
    return placement.everywhere(found)


def kept_experts(
    usage: Mapping[str, np.ndarray], threshold: float, top_k: int
) -> dict[str, tuple[int, ...]]:
    """The experts of each layer that are used by more than `threshold` of its tokens; below 0: the
    top_k most used.
    """
    if threshold < 0:
        return {
            path: tuple(sorted(map(int, np.argsort(-f_E, kind="stable")[:top_k])))
            for path, f_E in usage.items()
        }
    return {path: tuple(map(int, np.flatnonzero(f_E > threshold))) for path, f_E in usage.items()}


def keep_experts(
    model: Model, params: Params, kept: Mapping[str, Sequence[int]]
) -> tuple[Model, Params]:
    """The model with fewer experts: (model, params).

    The router still chooses among all experts, and gives those that are gone weight 0; the others'
    weights stay what they were, so a token that chose one that is gone has less in all.

    Args:
      kept: by the path of a layer's experts ("layer_0/mixture/experts"), the ids of those that
        stay, in order.
    Returns: the parameters lie where they lay, over a mesh by the family's rules.
    Raises: ValueError for paths that are no experts and ids that are not there.
    """
    flat, config, problems = dict(trees.flatten(params)), model.config, []
    for path, ids in kept.items():
        place = place_of(model, path, "experts")
        if place is None:
            problems.append(f"  {path}: no experts of {model.family}")
            continue
        dims = place.dims(config)
        there = dims.ids
        if not set(ids) <= set(there):
            problems.append(f"  {path}: has experts {there}, not {sorted(set(ids) - set(there))}")
            continue
        places = np.asarray([there.index(i) for i in ids], np.int32)
        for name in (*place.group.makes, *place.group.takes):
            leaf = flat.pop(f"{path}/{name}")
            if len(places):
                flat[f"{path}/{name}"] = leaf[places]
        config = place.put(config, dataclasses.replace(dims, ids=tuple(ids)))
    if problems:
        raise ValueError("experts cannot be pruned:\n" + "\n".join(problems))
    fewer = dataclasses.replace(model, config=config)
    return fewer, sharding.shard(
        trees.unflatten(flat), fewer.shard_rules, Placement.of(params).mesh
    )[0]
