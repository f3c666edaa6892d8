"""The T5 stacks by themselves; the families' tests compare them with recorded vectors."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.layers import t5, taps
from ltsm_jax.layers.dims import HeadDims

TWO, ONE = HeadDims.of(2, 3), HeadDims.of(1, 3)
ENCODER = t5.StackConfig(8, 3, (t5.T5Layer(TWO, 12), t5.T5Layer(TWO, 10)), dropout=0.0)
DECODER = t5.StackConfig(
    8,
    3,
    (t5.T5Layer(TWO, 12, TWO), t5.T5Layer(TWO, 10, ONE)),
    activation="gelu_new",
    gated=True,
    dropout=0.2,
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(cfg, **inputs):
    shapes = jax.eval_shape(
        t5.Stack(cfg).init, jax.random.key(0), normal(0, 1, 2, cfg.d_model), **inputs
    )["params"]
    flat = trees.flatten(shapes)
    return trees.unflatten(
        {path: normal(i, *leaf.shape) * 0.4 for i, (path, leaf) in enumerate(flat.items())}
    )


@pytest.mark.parametrize("family", ["chronos_bolt", "chronos_t5"])
def test_golden_buckets(golden, family):
    io = golden(family).arrays("io.npz")
    relative = io["util/buckets/in/relative_position"]
    found = 0
    for key, want in io.items():
        if named := re.fullmatch(r"util/buckets/out/(bi|uni)directional_(\d+)_(\d+)", key):
            found += 1
            got = t5.relative_buckets(
                relative,
                bidirectional=named[1] == "bi",
                n_buckets=int(named[2]),
                max_distance=int(named[3]),
            )
            np.testing.assert_array_equal(got, want, err_msg=key)
    assert found


@pytest.mark.parametrize(
    "n, s, start", [(1, 1, None), (5, 5, None), (2, 7, None), (1, 6, 0), (1, 6, 5), (3, 9, 4)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_position_bias_is_the_table_at_each_distance(n, s, start, bidirectional):
    table, kind = normal(0, 8, 3), {"bidirectional": bidirectional, "max_distance": 6}
    got = jax.jit(lambda t: t5.position_bias(table, n, s, start=t, **kind))(start)
    distance = np.arange(s)[None] - np.arange(n)[:, None] - (start or 0)
    want = table[t5.relative_buckets(distance, n_buckets=8, **kind)]
    np.testing.assert_array_equal(got, jnp.moveaxis(want, -1, 0))


def test_encoder_does_not_see_hidden_tokens():
    params = drawn(ENCODER)
    x, mask = normal(1, 2, 5, 8), jnp.asarray([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    run = jax.jit(lambda y: t5.Stack(ENCODER).apply({"params": params}, y, mask)[0])
    y, other = run(x), run(x.at[0, 2].add(1.0))
    np.testing.assert_array_equal(y[0, [0, 1, 3, 4]], other[0, [0, 1, 3, 4]])
    assert not np.array_equal(y[0, 2], other[0, 2])
    assert np.isfinite(np.asarray(y)).all(), "all keys of the second row are hidden"


@pytest.mark.slow
def test_decoder_step_by_step_is_the_decoder_at_once():
    """Two samples of each series share one memory."""
    memory, memory_mask = normal(2, 2, 6, 8), jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1]])
    params = drawn(DECODER, memory=memory[:1, :2])
    x, stack = normal(3, 4, 5, 8), t5.Stack(DECODER)
    want, taps, _ = jax.jit(
        lambda y: stack.apply({"params": params}, y, memory=memory, memory_mask=memory_mask)
    )(x)
    np.testing.assert_array_equal(taps["norm"], want)

    def run(x):
        cache, found = t5.empty_decoder_cache(DECODER, 4, 7), []
        y, _, cache = stack.apply(
            {"params": params},
            x[:, :2],
            memory=memory,
            memory_mask=memory_mask,
            cache=cache,
            start=0,
        )
        found = [y]

        def step(cache, i):
            x_B1D = jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
            y, _, cache = stack.apply(
                {"params": params}, x_B1D, memory_mask=memory_mask, cache=cache, start=i
            )
            return cache, y[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(2, 5))
        return jnp.concatenate([*found, jnp.swapaxes(rest, 0, 1)], axis=1)

    np.testing.assert_allclose(jax.jit(run)(x), want, atol=2e-5)
    for row in range(4):  # rows 0, 1 belong to series 0, rows 2, 3 to series 1
        own = slice(row // 2, row // 2 + 1)
        alone = stack.apply(
            {"params": params}, x[row : row + 1], memory=memory[own], memory_mask=memory_mask[own]
        )[0]
        np.testing.assert_allclose(alone[0], want[row], atol=2e-5)


def test_few_queries_need_no_keys_unless_somebody_watches_the_layers():
    """One query of many keys goes another way; whoever intercepts linears sees all of them."""
    memory, x = normal(2, 2, 9, 8), normal(3, 2, 1, 8)
    params = drawn(DECODER, memory=memory[:1, :2])
    paths = [f"layer_{i}/cross/{name}" for i in (0, 1) for name in ("q", "k", "v", "out")]

    def short(y):
        return t5.Stack(DECODER).apply({"params": params}, y, memory=memory)[0]

    def watched(y):
        with taps.arguments_of(paths) as seen:
            return short(y), seen

    want, seen = jax.jit(watched)(x)
    assert all(len(seen[path]) == 1 for path in paths)
    np.testing.assert_allclose(jax.jit(short)(x), want, atol=1e-5)
    way, other = (str(jax.make_jaxpr(f)(x)) for f in (short, lambda y: watched(y)[0]))
    assert way != other, "the short way was not taken"


def test_a_pruned_stack_equals_one_with_dead_heads():
    second = dataclasses.replace(ONE, ids=(1,))
    cut = t5.StackConfig(8, 3, (t5.T5Layer(TWO, 12), t5.T5Layer(second, 10)), dropout=0.0)
    whole = trees.flatten(drawn(ENCODER))
    dead = whole | {"layer_1/attn/out/kernel": whole["layer_1/attn/out/kernel"].at[0].set(0.0)}
    small = dict(dead)
    for name in "qkv":
        small[f"layer_1/attn/{name}/kernel"] = dead[f"layer_1/attn/{name}/kernel"][:, 1:]
    small["layer_1/attn/out/kernel"] = dead["layer_1/attn/out/kernel"][1:]
    x = normal(4, 2, 5, 8)
    want = t5.Stack(ENCODER).apply({"params": trees.unflatten(dead)}, x)[0]
    np.testing.assert_allclose(
        t5.Stack(cut).apply({"params": trees.unflatten(small)}, x)[0], want, atol=1e-5
    )


def test_a_stack_without_any_head_is_its_feed_forward_layers():
    """Removal may take all heads of all layers, and with them the table of the bias."""
    none = dataclasses.replace(TWO, heads=0, ids=())
    bare = t5.StackConfig(8, 3, (t5.T5Layer(none, 12),), dropout=0.0)
    whole = drawn(t5.StackConfig(8, 3, (t5.T5Layer(TWO, 12),), dropout=0.0))
    x, flat = normal(4, 2, 5, 8), trees.flatten(whole)
    left = {path: leaf for path, leaf in flat.items() if "attn" not in path}
    del left["relative_bias"]
    trees.require_same(trees.unflatten(left), drawn(bare))
    dead = flat | {"layer_0/attn/out/kernel": 0 * flat["layer_0/attn/out/kernel"]}
    want = t5.Stack(dataclasses.replace(bare, layers=(t5.T5Layer(TWO, 12),)))
    want = want.apply({"params": trees.unflatten(dead)}, x)[0]
    found = t5.Stack(bare).apply({"params": trees.unflatten(left)}, x)[0]
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_and_dropout():
    memory = normal(2, 1, 6, 8)
    params, x, stack = drawn(DECODER, memory=memory[:, :2]), normal(5, 1, 4, 8), t5.Stack(DECODER)
    run = lambda y, m, **how: stack.apply({"params": params}, y, memory=m, **how)[0]  # noqa: E731
    want, half = run(x, memory), run(x.astype(jnp.bfloat16), memory.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.15)
    noisy = [run(x, memory, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2]) and not np.array_equal(noisy[0], want)


def test_wrong_sizes_are_all_told():
    with pytest.raises(
        ValueError, match=r"each of 1 heads.*output, or none.*positive.*max_distance"
    ):
        odd = (t5.T5Layer(TWO, 8), t5.T5Layer(dataclasses.replace(ONE, ids=(0, 1)), 8, TWO))
        t5.StackConfig(0, 3, odd, n_buckets=8, max_distance=2)
    with pytest.raises(ValueError, match="needs the encoder's output"):
        t5.Stack(DECODER).init(jax.random.key(0), normal(0, 1, 2, 8))


def test_every_parameter_has_its_distribution_and_its_sharding():
    cfg = t5.StackConfig(8, 3, (t5.T5Layer(TWO, 12, HeadDims.of(5, 3)),), gated=True)
    inputs = normal(0, 1, 2, 8)
    shapes = jax.eval_shape(t5.Stack(cfg).init, jax.random.key(0), inputs, memory=inputs)["params"]
    std = {"q": (8 * 3) ** -0.5, "down": 12**-0.5}
    for path, leaf in trees.flatten({"decoder": shapes}).items():
        axes = next(rule for pattern, rule in t5.SHARD_RULES if re.search(pattern, path))
        assert len(axes) in (0, leaf.ndim)
        kind = t5.initial(path, leaf.shape, cfg.d_model, 2.0)
        if path.endswith("/scale"):
            assert kind == t5.Constant(2.0)
            continue
        want = std.get(path.split("/")[-2], 8**-0.5)
        want = {"attn/out": (2 * 3) ** -0.5, "cross/out": (5 * 3) ** -0.5}.get(
            "/".join(path.split("/")[-3:-1]), want
        )
        assert kind == t5.Normal(2.0 * want), path
