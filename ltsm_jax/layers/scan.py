"""Equal layers as one loop: a forecast compiles one layer, whatever the depth.

Compiling is most of the time to a first forecast, and it grows with the number of layers. For
forecasts alone: a training step is faster with its layers side by side, and whoever asks for the
steps inside a layer, masks it or draws dropout for it must meet every layer by its own name.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ltsm_jax.trees import Tree


def loops(network: nn.Module, lean: bool, train: bool, whole: bool) -> bool:
    """Tell whether a network may take its equal layers in one loop.

    lean: only its result is asked for, as in a forecast, and not the steps inside its layers.
    whole: see `layers.shortcuts`.
    """
    return lean and not train and not whole and not network.is_initializing()


def equal_runs(layers: Sequence[Any]) -> list[range]:
    """Split layers into runs of neighbours with equal widths.

    layers: a record of each, see `layers.dims`.

        equal_runs((wide, wide, wide, narrow))  # [range(0, 3), range(3, 4)]
    """
    runs = []
    for _, run in itertools.groupby(range(len(layers)), key=layers.__getitem__):
        places = list(run)
        runs.append(range(places[0], places[-1] + 1))
    return runs


def through_layers(
    apply: Callable[[int, Tree, jax.Array], jax.Array],
    params: Mapping[str, Tree],
    x: jax.Array,
    runs: Sequence[range],
) -> jax.Array:
    """Take x through all layers in order, each run of equal ones as one `lax.scan`.

    The numbers are those of the layers one after another. The parameters of a layer are copied in
    its turn, so that a forecast needs memory for one layer more, where stacked parameters would
    need a second copy of the model.

    Args:
      apply: (index of a layer, its parameters, x) -> x of the same shape and dtype. For a whole run
        it is called with the index of the first layer.
      params: trees by the names "layer_0", "layer_1", ....
      runs: from `equal_runs`.
    """
    for run in runs:
        own = [params[f"layer_{i}"] for i in run]

        if len(run) == 1:
            x = apply(run[0], own[0], x)
            continue

        def step(x, place, own=own, first=run[0]):
            # A choice among the layers' parameters. Stacked ones would be copied as well, all of
            # them at once.
            layer = jax.lax.switch(place, [lambda layer=layer: layer for layer in own])
            return apply(first, layer, x), None

        x, _ = jax.lax.scan(step, x, jnp.arange(len(run)))
    return x
