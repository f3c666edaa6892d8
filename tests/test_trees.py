import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ltsm_jax import ema, interpolate, preset, shrink_and_perturb, soup, trees, wise_ft


def tree(seed, dtype=jnp.float32):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "layer_0": {
            "kernel": jax.random.normal(a, (3, 4), dtype),
            "bias": jax.random.normal(b, (4,), dtype),
        },
        "head": {"kernel": jax.random.normal(c, (4, 2), dtype)},
    }


def bits(params):
    return {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(params).items()}


def test_worked_example_of_smoothing():
    pre = {
        "weight": jnp.array([0.50]),
        "scale": jnp.array([1.40]),
        "shift": jnp.array([0.10]),
        "bias": jnp.array([-0.40]),
    }
    rand = {
        "weight": jnp.array([-0.20]),
        "scale": jnp.array([1.0]),
        "shift": jnp.array([0.0]),
        "bias": jnp.array([0.03]),
    }
    got = interpolate(pre, rand, 0.7)
    want = {"weight": [0.29], "scale": [1.28], "shift": [0.07], "bias": [-0.271]}
    chex.assert_trees_all_close(
        got, jax.tree.map(np.float32, want, is_leaf=lambda x: isinstance(x, list)), rtol=1e-6
    )


def test_ends_are_exact_even_for_signed_zeros_and_infinities():
    pre = {"a": jnp.array([-0.0, 0.0, 1e-45, jnp.inf])}
    rand = {"a": jnp.array([-3.0, 0.3, jnp.inf, -1.0])}
    assert bits(interpolate(pre, rand, 1.0)) == bits(pre)
    assert bits(interpolate(pre, rand, 0.0)) == bits(rand)


def test_touches_every_tensor_of_a_two_layer_timer():
    from ltsm_jax.models.timer import Timer, TimerConfig

    model = Timer(TimerConfig.of(8, 16, 32, 2, 4, context_len=32, horizon=8))
    pre = jax.tree.map(lambda x: x + 0.5, model.init(jax.random.key(0)))
    start = interpolate(pre, model.init(jax.random.key(1)), 0.7)
    touched = [
        p
        for p, leaf in trees.flatten(start).items()
        if not np.array_equal(leaf, trees.flatten(pre)[p])
    ]
    assert len(touched) == 37
    np.testing.assert_allclose(start["norm"]["scale"], 0.7 * 1.5 + 0.3, rtol=1e-6)


def test_alpha_as_prefix_tree_and_as_function_of_the_path():
    pre, rand = tree(0), tree(1)
    by_tree = interpolate(pre, rand, {"layer_0": 0.25, "head": {"kernel": 1.0}})
    by_path = interpolate(pre, rand, lambda path: 1.0 if path.startswith("head") else 0.25)
    assert bits(by_tree) == bits(by_path)
    np.testing.assert_array_equal(by_tree["head"]["kernel"], pre["head"]["kernel"])
    want = 0.25 * pre["layer_0"]["bias"] + 0.75 * rand["layer_0"]["bias"]
    np.testing.assert_allclose(by_tree["layer_0"]["bias"], want, rtol=1e-6)


def test_only_and_skip_choose_leaves_by_path():
    pre, rand = tree(0), tree(1)
    changed = lambda t: {p for p, b in bits(t).items() if b != bits(pre)[p]}  # noqa: E731
    assert changed(interpolate(pre, rand, 0.5, only="kernel$")) == {"layer_0/kernel", "head/kernel"}
    assert changed(interpolate(pre, rand, 0.5, skip=["^head/", "bias"])) == {"layer_0/kernel"}
    assert changed(interpolate(pre, rand, 0.5, only="kernel$", skip="^head/")) == {"layer_0/kernel"}


def test_pattern_without_a_match_is_an_error_with_near_names():
    with pytest.raises(ValueError, match=r"(?s)haed.*head/kernel"):
        interpolate(tree(0), tree(1), 0.5, skip="haed/kernel")


def test_differing_trees_list_every_path_and_shape():
    pre, rand = tree(0), tree(1)
    rand["layer_0"]["bias"] = jnp.zeros((5,))
    rand["tail"] = jnp.zeros((1,))
    del rand["head"]
    with pytest.raises(ValueError) as info:
        interpolate(pre, rand, 0.5)
    for part in (
        "layer_0/bias: params_pre (4,), params_rand (5,)",
        "tail: only in params_rand",
        "head/kernel: only in params_pre",
    ):
        assert part in str(info.value)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        interpolate(tree(0), tree(1), alpha)


@pytest.mark.parametrize(
    "bad", [np.array([0.5, 1.5]), jnp.array([-0.1, 0.5]), np.array([0.2, np.nan])]
)
def test_an_array_of_alphas_outside_the_unit_interval_is_refused(bad):
    pre, rand = {"bias": jnp.ones(2)}, {"bias": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]; got .* for bias"):
        interpolate(pre, rand, {"bias": bad})
    with pytest.raises(ValueError, match="for bias"):
        interpolate(pre, rand, lambda path: bad)


def test_an_array_of_alphas_mixes_entry_by_entry_and_makes_no_leaf_wider():
    pre, rand = {"bias": jnp.ones(2)}, {"bias": jnp.zeros(2)}
    np.testing.assert_allclose(
        interpolate(pre, rand, {"bias": np.array([0.25, 1.0])})["bias"], [0.25, 1.0]
    )
    for wider in ([[0.5]], np.full((3, 2), 0.5), np.full(3, 0.5)):
        with pytest.raises(ValueError, match=r"does not fit bias of shape \(2,\)"):
            interpolate(pre, rand, np.asarray(wider))


def test_alpha_tree_that_is_no_prefix_is_refused():
    with pytest.raises(ValueError, match="prefix"):
        interpolate(tree(0), tree(1), {"layer_0": 0.5})


def test_keeps_dtypes_and_leaves_integers_alone():
    pre = {"w": jnp.ones((3,), jnp.bfloat16), "steps": jnp.array([7])}
    got = interpolate(pre, {"w": jnp.zeros((3,), jnp.bfloat16), "steps": jnp.array([1])}, 0.7)
    want = {"w": jnp.full((3,), 0.7, jnp.bfloat16), "steps": jnp.array([7])}
    chex.assert_trees_all_equal(got, want, strict=True)


def test_keeps_shardings():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    pre = jax.device_put(tree(0), NamedSharding(mesh, PartitionSpec("data")))
    got = interpolate(pre, tree(1), 0.7)
    assert all(
        a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(pre), strict=True)
    )


def test_under_jit_vmap_and_grad():
    pre, rand = tree(0), tree(1)
    jitted = jax.jit(interpolate)(pre, rand, 0.7)
    chex.assert_trees_all_close(jitted, interpolate(pre, rand, 0.7), rtol=1e-6)
    sweep = jax.vmap(lambda a: interpolate(pre, rand, a))(jnp.array([0.0, 0.5, 1.0]))
    first, _, last = (jax.tree.map(lambda leaf, i=i: leaf[i], sweep) for i in range(3))
    chex.assert_trees_all_equal(first, rand)
    chex.assert_trees_all_equal(last, pre)
    slope = jax.grad(
        lambda a: sum(leaf.sum() for leaf in jax.tree.leaves(interpolate(pre, rand, a)))
    )(0.3)
    want = sum(
        (p - r).sum() for p, r in zip(jax.tree.leaves(pre), jax.tree.leaves(rand), strict=True)
    )
    np.testing.assert_allclose(slope, want, rtol=1e-5)


@given(st.floats(0, 1), st.integers(0, 100))
def test_lies_between_its_ends(alpha, seed):
    pre, rand = tree(seed), tree(seed + 1)
    for p, r, got in zip(
        *map(jax.tree.leaves, (pre, rand, interpolate(pre, rand, alpha))), strict=True
    ):
        slack = 1e-6 * (abs(p) + abs(r))
        assert (got >= jnp.minimum(p, r) - slack).all() and (got <= jnp.maximum(p, r) + slack).all()


def test_siblings():
    a, b = tree(0), tree(1)

    def check(got, of_a, of_b):
        want = jax.tree.map(lambda x, y: of_a * x + of_b * y, a, b)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)

    check(shrink_and_perturb(a, b, 0.4, 0.1), 0.4, 0.1)
    check(wise_ft(a, b, 0.2), 0.8, 0.2)
    check(soup([a, b, b]), 1 / 3, 2 / 3)
    check(ema(a, b, 0.9), 0.9, 0.1)
    with pytest.raises(ValueError, match="at least one"):
        soup([])


def test_flatten_and_partition_round_trip():
    params = tree(0)
    assert list(trees.flatten(params)) == ["head/kernel", "layer_0/bias", "layer_0/kernel"]
    assert bits(trees.unflatten(trees.flatten(params))) == bits(params)
    chosen, rest = trees.partition(params, trees.select(params, "^head/"))
    assert list(trees.flatten(chosen)) == ["head/kernel"] and "head/kernel" not in trees.flatten(
        rest
    )
    assert bits(trees.combine(chosen, rest)) == bits(params)
    assert trees.count(params) == 12 + 4 + 8


def test_published_presets_have_the_published_size():
    sizes = {
        "Timer_forecast_1.0": 67_397_728,
        "Timer_imputation_1.0": 2_121_240,
        "Timer_anomaly_detection_1.0": 2_158_176,
    }
    for name, size in sizes.items():
        assert trees.count(jax.eval_shape(preset(name).init, jax.random.key(0))) == size
    with pytest.raises(ValueError, match="Timer_forecast_1.0"):
        preset("Timer_forecast_2.0")


def test_a_message_on_many_differences_can_be_read():
    a = {f"layer_{i}": {"a_rather_long_name_of_a_module" * 6: np.zeros(i)} for i in range(1, 200)}
    with pytest.raises(
        ValueError, match=r"layer_10/.*: only in first\n(.*\n)*.*and 387 more$"
    ) as error:
        trees.require_same(
            a, {f"other_{i}": x for i, x in enumerate(a.values(), 1)} | {"layer_1": a["layer_1"]}
        )
    assert len(str(error.value)) < 2000


def lengths(params):
    return {
        path: float(np.linalg.norm(np.asarray(leaf)))
        for path, leaf in trees.flatten(params).items()
    }


def test_a_mix_keeps_the_norm_of_every_tensor():
    pre, rand = tree(0), tree(1)
    kept, plain = interpolate(pre, rand, 0.7, norm="tensor"), interpolate(pre, rand, 0.7)
    for path, length in lengths(pre).items():
        np.testing.assert_allclose(lengths(kept)[path], length, rtol=1e-6, err_msg=path)
        a, b = trees.flatten(kept)[path], trees.flatten(plain)[path]
        np.testing.assert_allclose(a, b * (length / lengths(plain)[path]), rtol=1e-6, err_msg=path)
    assert bits(interpolate(pre, rand, 1.0, norm="tensor")) == bits(pre)


def test_a_mix_keeps_the_norm_of_every_channel():
    pre, rand = tree(0), tree(1)
    kept = interpolate(pre, rand, 0.7, norm="channel")
    mean = 0.7 * pre["layer_0"]["kernel"] + 0.3 * rand["layer_0"]["kernel"]
    share = np.linalg.norm(pre["layer_0"]["kernel"], axis=0) / np.linalg.norm(mean, axis=0)
    np.testing.assert_allclose(kept["layer_0"]["kernel"], mean * share[None], rtol=1e-6)
    # A leaf of one axis has no channels: its entries keep their signs.
    whole = interpolate(pre, rand, 0.7, norm="tensor")["layer_0"]["bias"]
    np.testing.assert_allclose(kept["layer_0"]["bias"], whole, rtol=1e-6)


def test_a_mix_on_the_sphere_turns_by_its_share_of_the_angle():
    pre, rand = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 5.0])}
    angle = 0.3 * np.pi / 2
    direction = np.array([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(
        interpolate(pre, rand, 0.7, norm="sphere")["w"], 2 * direction, rtol=1e-6
    )
    between = 0.7 * 2 + 0.3 * 5
    np.testing.assert_allclose(
        interpolate(pre, rand, 0.7, norm="slerp")["w"], between * direction, rtol=1e-6
    )
    assert bits(interpolate(pre, rand, 0.0, norm="slerp")) == bits(rand)
    assert bits(interpolate(pre, rand, 1.0, norm="sphere")) == bits(pre)


@pytest.mark.parametrize("norm", ["tensor", "channel", "sphere", "slerp"])
def test_leaves_without_a_direction_mix_to_finite_numbers(norm):
    ones, zeros = jnp.ones((3, 2)), jnp.zeros((3, 2))
    pre = {"both": zeros, "one": ones, "same": ones, "back": ones, "scalar": jnp.ones(())}
    rand = {"both": zeros, "one": zeros, "same": ones, "back": -ones, "scalar": -jnp.ones(())}
    mixed, slope = jax.jvp(lambda a: interpolate(pre, rand, a, norm=norm), (0.5,), (1.0,))
    for path, leaf in (trees.flatten(mixed) | trees.flatten(slope)).items():
        assert np.isfinite(leaf).all(), path
    np.testing.assert_array_equal(mixed["both"], 0)
    np.testing.assert_allclose(mixed["one"], 0.5 if norm == "slerp" else 1.0, rtol=1e-6)
    np.testing.assert_allclose(mixed["same"], 1.0, rtol=1e-6)


def test_wrong_norms_of_a_mix_are_refused():
    with pytest.raises(
        ValueError, match="norm must be one of none, tensor, channel, sphere, slerp; got 'sphre'"
    ):
        interpolate(tree(0), tree(1), 0.5, norm="sphre")
    with pytest.raises(ValueError, match="each leaf has one alpha; that of head/kernel is"):
        interpolate(
            tree(0), tree(1), {"layer_0": 0.5, "head": np.array([[0.2, 0.5]])}, norm="sphere"
        )
