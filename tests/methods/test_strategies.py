import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import training, trees
from ltsm_jax.data import Series, prepare
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.methods import alpha, phases, strategies
from ltsm_jax.methods.run import Running
from ltsm_jax.methods.starts import (
    GROUPS,
    Interpolated,
    body_layer_of,
    equal_norm_noise,
    groups_of,
    start_params,
)
from ltsm_jax.methods.strategies import STRATEGIES, strategy
from ltsm_jax.models import FAMILIES
from ltsm_jax.models.timer import Timer, TimerConfig


@pytest.fixture(scope="module")
def model():
    """Two layers, for tests that compile nothing."""
    return Timer(TimerConfig(8, 16, 8, equal_layers(2, 2, 8, 24), context_len=32, horizon=8))


@pytest.fixture(scope="module")
def pre(model):
    params = model.init(jax.random.key(7))
    return jax.tree.map(lambda p: p + 0.1, params)  # norms and biases off their initial 1 and 0


AUX = training.keys(0)["aux"]


def assert_same(a, b):
    for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def differing(a, b):
    return {
        path
        for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values(), strict=True)
        if (x != y).any()
    }


def test_names_agree_with_the_registry():
    assert {name: strategy(name).name for name in STRATEGIES} == {name: name for name in STRATEGIES}
    assert strategy("sff", alpha=0.3).alpha == 0.3
    assert strategy("ff", alpha=0.3).alpha is None
    assert strategy("l2sp", l2_sp=2.0).phases[0].l2_sp == 2.0


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("sfff", {}, "did you mean sff.*known: zero_shot, ff"),
        ("sff", {"alpha": 1.2}, "between 0 and 1"),
        ("noise", {"alpha": float("nan")}, "between 0 and 1"),
        ("l2sp", {"l2_sp": 0.0}, "must be positive"),
    ],
)
def test_wrong_strategies_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        strategy(name, **kwargs)


def test_smoothed_start_is_the_mixture_of_every_tensor(model, pre):
    random = start_params(strategy("tfs"), model, pre, AUX)
    start = start_params(strategy("sff", alpha=0.7), model, pre, AUX)
    assert_same(random, model.init(AUX))
    for path, leaf in trees.flatten(start).items():
        expected = 0.7 * trees.flatten(pre)[path] + 0.3 * trees.flatten(random)[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg=path)
    # 1 embedding, 16 per layer, 2 of the last norm, 2 of the head: all of them moved
    assert len(differing(start, pre)) == len(trees.flatten(pre)) == 37


def test_ends_of_alpha_are_the_checkpoint_and_the_random_model(model, pre):
    assert_same(
        start_params(strategy("sff", alpha=1), model, pre, AUX),
        start_params(strategy("ff"), model, pre, AUX),
    )
    assert_same(
        start_params(strategy("sff", alpha=0), model, pre, AUX),
        start_params(strategy("tfs"), model, pre, AUX),
    )


def test_linear_probing_has_a_new_head_on_the_old_body(model, pre):
    start = start_params(strategy("lp"), model, pre, AUX)
    assert differing(start, pre) == {"head/kernel", "head/bias"}
    assert_same(start["head"], model.init(AUX)["head"])
    assert_same(start, start_params(strategy("lpff"), model, pre, AUX))


def test_noise_is_as_large_as_the_random_model_and_is_not_it(model, pre):
    aux = model.init(AUX)
    noise = equal_norm_noise(jax.random.key(3), aux)
    for path, leaf in trees.flatten(noise).items():
        size = np.linalg.norm(np.ravel(trees.flatten(aux)[path]))
        np.testing.assert_allclose(np.linalg.norm(np.ravel(leaf)), size, rtol=1e-5, err_msg=path)
    start = start_params(strategy("noise", alpha=0.7), model, pre, AUX)
    assert differing(start, start_params(strategy("sff", alpha=0.7), model, pre, AUX)) >= {
        "embed/kernel",
        "head/kernel",
    }
    assert_same(start_params(strategy("noise", alpha=1), model, pre, AUX), pre)


def test_noise_draws_differ_between_tensors_of_one_shape(model):
    noise = equal_norm_noise(jax.random.key(3), model.init(AUX))
    a, b = noise["layer_0"]["up"]["kernel"], noise["layer_1"]["up"]["kernel"]
    assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.2


def test_l2_sp_penalty_is_half_the_weighted_squared_distance():
    reference = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    params = {"a": jnp.array([1.5, 2.0]), "b": jnp.array([[1.0]])}
    assert phases.l2_sp_penalty(reference, 0.1, params) == pytest.approx(0.5 * 0.1 * (0.25 + 4.0))


def test_params_of_another_model_are_refused_by_path(model, pre):
    other = {k: v for k, v in pre.items() if k != "norm"}
    for name in ("ff", "sff", "lp"):
        with pytest.raises(ValueError, match=r"norm/scale: only in model"):
            start_params(strategy(name), model, other, AUX)


def test_the_checkpoint_is_not_modified(model, pre):
    before = jax.tree.map(np.array, pre)
    for name in ("ff", "tfs", "lp", "sff", "noise", "perturb"):
        start_params(strategy(name), model, pre, AUX)
    assert_same(before, pre)


def start_of(model, pre, *args, **kwargs):
    return trees.flatten(start_params(strategies.sff(*args, **kwargs), model, pre, AUX))


def test_groups_of_a_timer(model, pre):
    found = groups_of(model, pre)
    of = {group: {path for path, own in found.items() if own == group} for group in GROUPS}
    assert found.keys() == trees.flatten(pre).keys()
    assert of["head"] == {"head/kernel", "head/bias"}
    assert of["embedding"] == {"embed/kernel"}
    assert of["norms"] == {
        f"{place}/{name}"
        for place in ("layer_0/norm1", "layer_0/norm2", "layer_1/norm1", "layer_1/norm2", "norm")
        for name in ("scale", "bias")
    }
    assert {path.rsplit("/", 1)[1] for path in of["biases"]} == {"bias"} and len(of["biases"]) == 12
    assert {path.rsplit("/", 1)[1] for path in of["body"]} == {"kernel"} and len(of["body"]) == 12
    assert body_layer_of(model, "layer_1/attn/q/kernel") == "layer_1"
    assert body_layer_of(model, "norm/scale") is None


QUICK = ("timer", "ttm", "chronos_2", "time_moe")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_every_family_has_groups_and_layers(family):
    model = FAMILIES[family](FAMILIES[family].small())
    params = jax.eval_shape(model.init, jax.random.key(0))
    found = groups_of(model, params)
    # The embedding of Chronos (T5) is its head, too: one table of tokens.
    expected = {"head", "norms", "body"} | ({"embedding"} if family != "chronos_t5" else set())
    assert expected <= set(found.values())
    assert all(
        path.rsplit("/", 1)[-1] != "kernel"
        for path, group in found.items()
        if group in ("norms", "biases")
    )
    layers = {body_layer_of(model, path) for path in found} - {None}
    assert len(layers) >= 2
    fixed = {path for path in trees.flatten(params) if path not in found}
    assert fixed == {
        path for path in trees.flatten(params) if model.fixed and re.search(model.fixed, path)
    }
    assert bool(fixed) == (model.fixed is not None)


def test_kept_groups_stay_pretrained_and_the_rest_is_mixed(model, pre):
    flat, plain = trees.flatten(pre), start_of(model, pre, 0.7)
    groups = groups_of(model, pre)
    for path, leaf in start_of(model, pre, 0.7, keep=("head", "norms")).items():
        expected = flat[path] if groups[path] in ("head", "norms") else plain[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
    kept = differing(start_params(strategy("sff_keep", alpha=0.7), model, pre, AUX), pre)
    assert kept == {path for path, group in groups.items() if group not in ("head", "embedding")}


def test_an_alpha_of_a_layer_goes_before_that_of_a_group(model, pre):
    mixed = start_of(model, pre, 0.7, alphas={"norms": 1.0, "layer_0": 0.5, "biases": 0.0})
    half, whole = start_of(model, pre, 0.5), start_of(model, pre, 0.7)
    random = trees.flatten(model.init(AUX))
    for path, expected in {
        "layer_0/norm1/scale": half,
        "layer_0/up/kernel": half,
        "layer_0/up/bias": half,
        "layer_1/norm1/scale": trees.flatten(pre),
        "norm/bias": trees.flatten(pre),
        "layer_1/up/bias": random,
        "layer_1/up/kernel": whole,
        "head/bias": whole,
    }.items():
        np.testing.assert_array_equal(mixed[path], expected[path], err_msg=path)


def test_controls_are_either_half_of_the_mix(model, pre):
    random, flat = trees.flatten(model.init(AUX)), trees.flatten(pre)
    shrunk = trees.flatten(start_params(strategy("shrink", alpha=0.7), model, pre, AUX))
    shaken = trees.flatten(start_params(strategy("perturb", alpha=0.7), model, pre, AUX))
    for path, leaf in flat.items():
        np.testing.assert_allclose(shrunk[path], 0.7 * leaf, rtol=1e-6, err_msg=path)
        np.testing.assert_allclose(
            shaken[path], leaf + 0.3 * random[path], rtol=1e-5, atol=1e-7, err_msg=path
        )


@pytest.mark.parametrize(
    "name, norm", [("sff_norm", "tensor"), ("sff_channel", "channel"), ("sff_sphere", "sphere")]
)
def test_mixes_that_keep_norms(model, pre, name, norm):
    start = start_params(strategy(name, alpha=0.7), model, pre, AUX)
    assert_same(start, trees.interpolate(pre, model.init(AUX), 0.7, norm=norm))
    assert_same(start_params(strategy(name, alpha=1), model, pre, AUX), pre)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"keep": ("heads",)},
            "groups of leaves, of head, norms, embedding, biases, body; got heads",
        ),
        ({"norm": "l2"}, "norm must be one of none, tensor"),
        ({"other": "ones"}, "other must be one of random, noise, zeros, sum; got 'ones'"),
        (
            {"alphas": {"head": 1.5}},
            "head is the weight of the pretrained side, between 0 and 1; got 1.5",
        ),
    ],
)
def test_wrong_options_of_a_mix_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Interpolated(0.7, **options)


def test_alphas_of_layers_that_the_model_lacks_are_refused(model, pre):
    with pytest.raises(
        ValueError, match="timer has no layer_2 to give an alpha; .*: head, .*, layer_0, layer_1"
    ):
        start_of(model, pre, 0.7, alphas={"layer_2": 0.5})


def test_a_warmed_up_run_trains_the_head_first(model, pre):
    head, rest = strategy("sff_warm", alpha=0.7).phases
    assert (head.trainable, head.epochs, rest.trainable, rest.epochs) == ("head", 1, "all", None)
    assert_same(
        start_params(strategy("sff_warm"), model, pre, AUX),
        start_params(strategy("sff"), model, pre, AUX),
    )


@pytest.mark.parametrize("whole, staged", [("sff", "sff_stages"), ("noise", "noise_stages")])
def test_two_stages_leave_as_much_of_the_checkpoint_as_one(model, pre, whole, staged):
    method = strategy(staged, alpha=0.49)
    first, second = method.phases
    assert (first.epochs, second.epochs, first.mix, second.mix) == (1, None, None, method.start)
    half = start_params(method, model, pre, AUX)
    both = start_params(strategies.Strategy("again", second.mix), model, half, AUX)
    once = start_params(strategy(whole, alpha=0.49), model, pre, AUX)
    for path, leaf in trees.flatten(both).items():
        # 0.7 * (0.7 p + 0.3 r) + 0.3 r = 0.49 p + 0.51 r
        np.testing.assert_allclose(
            leaf, trees.flatten(once)[path], rtol=1e-5, atol=1e-6, err_msg=path
        )


def test_a_run_mixes_again_between_its_stages(model, pre):
    class Fitted:
        params, history, best_epoch, seconds, compile_seconds = (
            pre,
            [{"epoch": 1, "val_mse": 1.0}],
            1,
            0.0,
            0.0,
        )

    splits = prepare(Series("days", np.arange(200.0)[None] % 7, ("y",)), 32, 8)
    running = Running(model, pre, strategy("sff_stages", alpha=0.49), splits, seed=0)
    assert_same(running.current, start_params(strategy("sff", alpha=0.7), model, pre, AUX))
    running.take(Fitted)  # a stage that ends with the checkpoint's weights
    assert_same(running.current, start_params(strategy("sff", alpha=0.7), model, pre, AUX))
    running.take(Fitted)
    assert_same(running.current, pre)


def test_alphas_of_several_mixes_are_not_searched():
    with pytest.raises(ValueError, match="sff_stages mixes more than once"):
        alpha.require_mixing("sff_stages")
