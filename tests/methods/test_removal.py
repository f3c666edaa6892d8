"""Removal of what is dead: smaller matrices, the same numbers. Every family that has parts to lose
runs through it.
"""

import dataclasses
import functools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import widths

import converters
from ltsm_jax import sharding, trees
from ltsm_jax.layers.dims import HeadDims, LayerDims, equal_layers
from ltsm_jax.methods import binding, removal, run, strategies
from ltsm_jax.methods.pruning import apply_masks, full_masks, keep_experts
from ltsm_jax.models import FAMILIES, folders, parts
from ltsm_jax.models.time_moe import TimeMoe
from ltsm_jax.models.timer import Timer, TimerConfig

QUICK = (
    "timer",
    "chronos_bolt",
)  # biases; columns of a bias table. All of them are in the slow part
families = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)

merge_in_one = jax.jit(apply_masks)  # one program, where outside jit each shape is one


@dataclasses.dataclass(frozen=True)
class Case:
    model: Any
    params: Any
    masks: Any
    x: jax.Array
    target: jax.Array

    def numbers(self, model, params):
        """Forecast and loss, as far as they are the same function of the parameters."""
        return numbers(model, params, self.x, self.target)


@functools.partial(jax.jit, static_argnums=0)
def numbers(model, params, x, target):
    key = jax.random.key(3)
    return model.predict(params, x, 11, key).point, model.loss(
        params, {"context": x, "target": target}, key
    )


def settings(name):
    """The small model; Time-MoE with key heads that heads share."""
    config = FAMILIES[name].small()
    if name == "time_moe":
        attention = HeadDims.of(4, config.head_dim, kv_heads=2)
        layers = [dataclasses.replace(layer, attn=attention) for layer in config.layers]
        config = dataclasses.replace(config, d_model=32, layers=tuple(layers))
    return FAMILIES[name](config)


@functools.cache
def case_of(name):
    model = settings(name)
    params = jax.jit(model.init)(jax.random.key(1))
    model, params = model.for_series(params, n_variates=2, freq="h", key=jax.random.key(2))
    rng = np.random.default_rng(0)
    # fresh biases are 0 in some families, fresh kernels tiny in others: both would hide what a mask
    # forgets
    flat = {
        path: leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
        or path.endswith(("position_table", "centroid", "mean", "var"))
        else np.asarray(leaf) + np.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in trees.flatten(params).items()
    }
    masks = doomed(model, params, rng)
    c = 2 if model.variates == "joint" else 1
    t = np.arange(model.context_len + model.horizon)
    series = np.sin(2 * np.pi * t / 24 + np.arange(3 * c).reshape(3, c, 1)) + 0.1 * rng.normal(
        size=(3, c, len(t))
    )
    x, target = np.split(series.astype(np.float32), [model.context_len], axis=-1)
    return Case(model, trees.unflatten(flat), masks, jnp.asarray(x), jnp.asarray(target))


def doomed(model, params, rng):
    """Masks with a bit of everything: channels at random, a dead unit everywhere, a dead head and a
    layer of dead heads, value channels and (rotary pairs of) queries and keys that every head has
    lost.
    """
    masks = {path: np.array(leaf) for path, leaf in trees.flatten(full_masks(model)).items()}
    for path, mask in masks.items():
        inside = path.endswith(
            ("q/out", "k/out", "v/out", "up/out", "gate/out", "down/in", "out/in", "qkv/out")
        )
        mask *= rng.random(mask.shape) > (0.1 if inside else 0.05)
    found = parts.places(model, trees.flatten(params))
    heads = [p for p in found if p.group.kind == "heads"]
    for i, place in enumerate(heads):
        v, out = (
            masks[f"{place.path}/{name}"] for name in (f"{place.group.makes[-1]}/out", "out/in")
        )
        v = v if v.ndim == 2 else v[-1]
        if len(heads) > 1 and i == len(heads) - 1:
            out[...] = 0
            continue
        out[: len(out) // len(v)] = 0  # the first head, or those that share the first key head
        v[:, 1] = 0
        out[:, 2] = 0
        if len(place.group.makes) == 3:
            k = masks[f"{place.path}/k/out"]
            k[:, [0, k.shape[1] // 2]] = 0  # with rotary positions, a pair
            masks[f"{place.path}/q/out"][:, [1, 1 + k.shape[1] // 2]] = 0
    for place in found:
        if place.group.kind == "ffn units":
            masks[f"{place.path}/down/in"][0] = 0
        elif place.group.kind == "experts":
            masks[f"{place.path}/down/in"][:, 0] = 0
            masks[f"{place.path}/up/out"][:, 1] = 0
    return trees.unflatten({path: jnp.asarray(mask) for path, mask in masks.items()})


def live_units(place, masks):
    """How many units of a module none of its masks has made dead; of experts, those of the expert
    with most.
    """
    own = [masks[p] for n in place.group.makes if (p := f"{place.path}/{n}/out") in masks]
    own += [masks[f"{place.path}/{n}/in"] for n in place.group.takes]
    return int(np.asarray(own).all(0).sum(-1).max())


def live_heads(place, masks):
    """How many heads, or groups of heads, have a value channel left."""
    v, out = masks[f"{place.path}/{place.group.makes[-1]}/out"], masks[f"{place.path}/out/in"]
    v = v if v.ndim == 2 else v[-1]
    return int((v[:, None] * out.reshape(len(v), -1, out.shape[-1])).any((1, 2)).sum()) * (
        len(out) // len(v)
    )


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@families
def test_the_smaller_model_computes_the_same(name, tmp_path):
    case = case_of(name)
    merged = merge_in_one(case.params, case.masks)
    model, params, masks = removal.remove(case.model, case.params, case.masks)
    trees.require_same(folders.param_shapes(model), params)
    mesh: Any = sharding.make_mesh("data=1", jax.devices()[:1])
    sharding.specs(params, model.shard_rules, mesh)  # has a rule for each
    wanted = case.numbers(case.model, merged)
    same(case.numbers(model, params), wanted)
    assert np.abs(case.numbers(case.model, case.params)[0] - wanted[0]).max() > 1e-2, (
        "the masks must matter"
    )

    own = trees.flatten(case.masks)
    for place in parts.places(case.model, trees.flatten(case.params)):
        expected = live_heads if place.group.kind == "heads" else live_units
        before, after = (place.count(m.config) for m in (case.model, model))
        assert after == expected(place, own) < before, place.path

    assert (
        type(model).config_from_dict(json.loads(json.dumps(model.config_to_dict()))) == model.config
    )
    folders.save(tmp_path / "model", model, params)
    again, read = folders.load_folder(tmp_path / "model")
    assert again == model
    chex.assert_trees_all_equal(read, params)

    chex.assert_trees_all_equal(merge_in_one(params, masks), params)
    padded = removal.pad(model, params, case.model)
    trees.require_same(case.params, padded)
    same(case.numbers(case.model, padded), wanted)


@pytest.mark.parametrize("name", ["timer", pytest.param("time_moe", marks=pytest.mark.slow)])
def test_removing_again_removes_nothing(name):
    case = case_of(name)
    first = removal.remove(case.model, case.params, case.masks)
    again = removal.remove(*first)
    assert again[0] == first[0]
    chex.assert_trees_all_equal(again[1:], first[1:])


def narrow(masks, path, index):
    flat = dict(trees.flatten(masks))
    mask = np.array(flat[path])
    mask[index] = 0
    return trees.unflatten(flat | {path: jnp.asarray(mask)})


def test_widths_by_hand():
    """Two heads of width 8; head 0 has lost value channels 1, 2 and 3, head 1 only channel 5."""
    model = Timer(TimerConfig(8, 16, 8, equal_layers(1, 2, 8, 6), context_len=32, horizon=8))
    params, masks = jax.tree.map(np.asarray, model.init(jax.random.key(0))), full_masks(model)
    for path, index in (
        ("layer_0/attn/v/out", (0, [1, 2])),
        ("layer_0/attn/out/in", (0, 3)),
        ("layer_0/attn/out/in", (1, 5)),
        ("layer_0/attn/q/out", (slice(None), 7)),
        ("layer_0/up/out", 4),
        ("layer_0/down/in", 0),
    ):
        masks = narrow(masks, path, index)
    small, new, left = removal.remove(model, params, masks)
    assert small.config.layers == (LayerDims(HeadDims(heads=2, qk=7, value=7), ffn=4),)
    np.testing.assert_array_equal(
        left["layer_0"]["attn"]["v"]["out"], [[1, 0, 0, 1, 1, 1, 1], [1] * 7]
    )
    np.testing.assert_array_equal(
        left["layer_0"]["attn"]["out"]["in"], left["layer_0"]["attn"]["v"]["out"]
    )
    kernel = params["layer_0"]["attn"]["v"]["kernel"]
    np.testing.assert_array_equal(
        new["layer_0"]["attn"]["v"]["kernel"][:, 1, 4:], kernel[:, 1, [4, 6, 7]]
    )
    np.testing.assert_array_equal(
        new["layer_0"]["up"]["kernel"], params["layer_0"]["up"]["kernel"][:, [1, 2, 3, 5]]
    )


def test_nothing_dead_is_the_model_itself():
    model = Timer(Timer.small())
    params = model.init(jax.random.key(0))
    small, same_params, _ = removal.remove(model, params, full_masks(model))
    assert small == model
    chex.assert_trees_all_equal(same_params, params)


def test_what_the_bias_has_lost_stays_lost():
    """A layer without heads is the bias of its output, of which masks may have made a part 0."""
    model = Timer(Timer.small())
    params = jax.tree.map(lambda p: np.asarray(p) + np.float32(0.1), model.init(jax.random.key(0)))
    masks = narrow(full_masks(model), "layer_0/attn/v/out", ...)
    masks = narrow(masks, "layer_0/attn/out/out", 3)
    small, new, left = removal.remove(model, params, masks)
    assert widths(small.config, "attn.heads") == (0, 2) and set(new["layer_0"]["attn"]) == {"out"}
    kept = merge_in_one(jax.tree.map(np.ones_like, new), left)["layer_0"]["attn"]["out"]["bias"]
    np.testing.assert_array_equal(np.flatnonzero(kept == 0), [3])


@pytest.mark.slow
def test_experts_and_then_their_units():
    """Experts go first, by `keep_experts`; masks are of those that stay; an original can't hold the
    rest.
    """
    case = case_of("time_moe")
    few, fewer = keep_experts(
        case.model, case.params, {"layer_0/mixture/experts": (1, 3), "layer_1/mixture/experts": ()}
    )
    masks = doomed(few, fewer, np.random.default_rng(1))
    small, params, _ = removal.remove(few, fewer, masks)
    assert widths(small.config, "experts.ids") == ((1, 3), ())
    assert small.config.layers[0].experts.ffn < few.config.layers[0].experts.ffn
    same(case.numbers(small, params), case.numbers(few, merge_in_one(fewer, masks)))
    with pytest.raises(ValueError, match="router would go on choosing"):
        removal.pad(small, params, case.model)
    removal.pad(small, params, few)


def test_masks_that_do_not_fit_are_refused():
    model = Timer(Timer.small())
    params, masks = model.init(jax.random.key(0)), full_masks(model)
    with pytest.raises(ValueError, match="other values: layer_0/up/out"):
        removal.remove(
            model,
            params,
            trees.unflatten({**trees.flatten(masks), "layer_0/up/out": jnp.full(24, 0.5)}),
        )
    with pytest.raises(ValueError, match="do not fit"):
        removal.remove(
            model, params, trees.unflatten({**trees.flatten(masks), "layer_0/up/out": jnp.ones(23)})
        )
    with pytest.raises(ValueError, match="can't be padded"):
        removal.pad(model, params, Timer(TimerConfig.of(8, 8, 24, 2, 2, context_len=32, horizon=8)))
    with pytest.raises(ValueError, match="padded to a time_moe"):
        removal.pad(model, params, TimeMoe(TimeMoe.small()))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sff", "ff", "tfs", "lp", "lpff", "l2sp", "noise"])
def test_a_pruned_model_is_fine_tuned_by_every_strategy(strategy, splits, tmp_path):
    """All heads of a layer gone, the units of another; what the masks have left at 0
    stays there.
    """
    base = Timer(TimerConfig.of(8, 16, 24, 2, 2, context_len=32, horizon=8))
    params, masks = base.init(jax.random.key(0)), full_masks(base)
    for path, index in (
        ("layer_0/attn/out/in", ...),
        ("layer_1/up/out", ...),
        ("layer_1/attn/v/out", (0, 1)),
        ("layer_0/down/out", 5),
    ):
        masks = narrow(masks, path, index)
    model, params, masks = removal.remove(base, params, masks)
    assert widths(model.config, "attn.heads") == (0, 2)
    assert widths(model.config, "ffn") == (24, 0)
    config = binding.train_config(model, epochs=1, batch_size=64)
    chosen = getattr(strategies, strategy)()
    result = run.run(model, params, chosen, splits, config=config, masks=masks, show_progress=False)
    tuned = result.params
    chex.assert_trees_all_equal(apply_masks(tuned, masks), tuned)
    assert not np.array_equal(tuned["head"]["kernel"], params["head"]["kernel"])
    folders.save(tmp_path / "model", model, tuned)
    assert folders.load_folder(tmp_path / "model")[0] == model


@pytest.mark.parametrize(
    "name", ["timer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("time_moe", "moirai"))]
)
def test_gradients_are_those_of_the_masked_model(name):
    """A step of training: the live weights have the same gradient in both."""
    case = case_of(name)
    model, params, masks = removal.remove(case.model, case.params, case.masks)
    batch = {"context": case.x, "target": case.target}
    key = jax.random.key(3)
    small = jax.jit(jax.grad(lambda p: model.loss(apply_masks(p, masks), batch, key)))(params)
    whole = jax.jit(jax.grad(lambda p: case.model.loss(apply_masks(p, case.masks), batch, key)))(
        apply_masks(case.params, case.masks)
    )
    for path in ("embed/kernel", "embed_value/kernel", "norm/scale"):
        flat = trees.flatten(whole)
        if path in flat:
            np.testing.assert_allclose(trees.flatten(small)[path], flat[path], rtol=1e-4, atol=1e-6)
    for norm in (small, whole):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(norm))


# the originals of the others hold no model as small as theirs here, pruned or not
HELD = [name for name in FAMILIES if not name.startswith("moirai")]


@pytest.mark.parametrize(
    "name", [n if n == "timer" else pytest.param(n, marks=pytest.mark.slow) for n in HELD]
)
def test_the_original_gets_zeros_where_parts_are_missing(name, tmp_path):
    case = case_of(name)
    model, params, _ = removal.remove(case.model, case.params, case.masks)
    suffix = next(iter(getattr(converters.converter(name), "SUFFIXES", converters.SUFFIXES)))
    folders.save(tmp_path / "small", model, params)
    with pytest.raises(ValueError, match="pruned_from"):
        converters.export_checkpoint(tmp_path / "small", tmp_path / f"original{suffix}")
    folders.save(
        tmp_path / "small",
        model,
        params,
        provenance={"pruned_from": case.model.config_to_dict()},
        overwrite=True,
    )
    notes = converters.export_checkpoint(tmp_path / "small", tmp_path / f"original{suffix}")
    assert "written at full size" in notes[0]
    _, read, *_ = converters.import_checkpoint(tmp_path / f"original{suffix}")
    padded = removal.pad(model, params, case.model)
    chex.assert_trees_all_equal(read, padded)
    assert trees.count(read) == trees.count(case.params)
