import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import training, trees
from ltsm_jax.methods import strategies
from ltsm_jax.methods.starts import equal_norm_noise, start_params
from ltsm_jax.methods.strategies import STRATEGIES, strategy
from ltsm_jax.models.timer import Timer, TimerConfig


@pytest.fixture(scope="module")
def model():
    """Two layers, for tests that compile nothing."""
    return Timer(TimerConfig(8, 16, 8, (2, 2), (24, 24), context_len=32, horizon=8))


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
        path for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values(), strict=True) if (x != y).any()
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
    assert_same(start_params(strategy("sff", alpha=1), model, pre, AUX), start_params(strategy("ff"), model, pre, AUX))
    assert_same(start_params(strategy("sff", alpha=0), model, pre, AUX), start_params(strategy("tfs"), model, pre, AUX))


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
    assert strategies.l2_sp_penalty(reference, 0.1, params) == pytest.approx(0.5 * 0.1 * (0.25 + 4.0))


def test_params_of_another_model_are_refused_by_path(model, pre):
    other = {k: v for k, v in pre.items() if k != "norm"}
    for name in ("ff", "sff", "lp"):
        with pytest.raises(ValueError, match=r"norm/scale: only in model"):
            start_params(strategy(name), model, other, AUX)


def test_the_checkpoint_is_not_modified(model, pre):
    before = jax.tree.map(np.array, pre)
    for name in STRATEGIES:
        start_params(strategy(name), model, pre, AUX)
    assert_same(before, pre)
