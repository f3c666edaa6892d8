"""Layers of a config as tests write and read them."""

import dataclasses

from ltsm_jax.layers.dims import HeadDims, LayerDims


def layers_of(head_dim, heads, ffn):
    """Layers of one attention: the heads and the feed-forward units of each."""
    pairs = zip(heads, ffn, strict=True)
    return tuple(LayerDims(HeadDims.of(count, head_dim), units) for count, units in pairs)


def widths(config, path):
    """One width of each layer: widths(config, "attn.heads")."""
    found = []
    for layer in config.layers:
        value = layer
        for name in path.split("."):
            value = getattr(value, name)
        found.append(value)
    return tuple(found)


def narrowed(config, layer, **changes):
    """The config with other widths in one layer: of an attention, a dict of them."""
    own = config.layers[layer]
    for name, change in changes.items():
        if isinstance(change, dict):
            change = dataclasses.replace(getattr(own, name), **change)
        own = dataclasses.replace(own, **{name: change})
    layers = (*config.layers[:layer], own, *config.layers[layer + 1 :])
    return dataclasses.replace(config, layers=layers)
