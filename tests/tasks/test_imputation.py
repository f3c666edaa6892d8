import dataclasses
import functools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import training
from ltsm_jax.data import Series, Windows, prepare
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.methods import pruning
from ltsm_jax.methods.run import run
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models.family import Model
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import imputation

P, T = 24, 192


@dataclasses.dataclass(frozen=True)
class Sizes:
    patch_len: int = P


@dataclasses.dataclass(frozen=True)
class Constant(Model):
    """Answers `params["level"]` everywhere; when `params["peek"]` is 1, what it may see of the
    window.
    """

    config: Sizes = Sizes()
    family: ClassVar[str] = "constant"
    tasks: ClassVar[tuple] = ("imputation",)
    presets = small = config_from_dict = init = loss = predict = recipe = context_len = horizon = (
        None  # no part in the task
    )

    def impute(self, params, x, observed, key=None, train=False, ims=True):
        assert x.shape == observed.shape
        return params["level"] + params["peek"] * x


@functools.cache
def loss_of(model, rate):
    """The training loss as one program, the same for equal arguments."""
    return jax.jit(imputation.loss_fn(model, rate=rate), static_argnums=3)


def windows_of(values, starts=None):
    """Joint windows of length T from values [C, rows]."""
    starts = np.arange(values.shape[1] - T + 1) if starts is None else starts
    return Windows(jnp.asarray(values, jnp.float32), jnp.asarray(starts, jnp.int32), None, T, 0)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=(3, 400))


@pytest.mark.parametrize("rate", [0.125, 0.25, 0.375, 0.5])
def test_whole_patches_are_hidden_at_the_rate_and_never_the_first(rate):
    keys = jax.random.split(jax.random.key(1), 4000)
    visible = np.asarray(jax.vmap(lambda k: imputation.hole_mask(k, T, 3, P, rate))(keys))
    patches = visible.reshape(4000, 3, T // P, P)
    assert (patches == patches[..., :1]).all(), "a patch is hidden in part"
    assert patches[:, :, 0].all()
    assert 1 - visible.mean() == pytest.approx(rate * 7 / 8, rel=0.01)
    hidden = ~patches[..., 0]
    np.testing.assert_allclose(
        hidden[:, :, 1:].mean(0), rate, atol=0.03
    )  # every later patch of every variate alike
    assert (hidden[:, 0] != hidden[:, 1]).any(), "the variates share one mask"


def test_a_window_must_be_whole_patches():
    for steps in (P, T + 1):
        with pytest.raises(ValueError, match="whole patches"):
            imputation.hole_mask(jax.random.key(0), steps, 1, P, 0.5)


def test_loss_is_the_mean_over_hidden_points_only():
    """Truth 3 in the hidden patches (answer 1: error 4 each); anything at all in the visible ones
    changes nothing.
    """
    model, loss = Constant(), loss_of(Constant(), 0.5)
    params = {"level": jnp.float32(1), "peek": jnp.float32(0)}
    key = jax.random.key(3)
    visible = masks_of(model, key, 4, 2, 0.5)
    for other in (0.0, 3.0, 1e3):
        x = jnp.where(visible, other, 3.0)
        assert float(loss(params, {"context": x}, key, True)) == pytest.approx(4.0)


def masks_of(model, key, batch, variates, rate):
    """The masks that the loss draws from this key, seen from outside: where the error of a constant
    is scored.
    """
    return np.asarray(_probe(model, np.ones((batch, variates, T), np.float32), key, rate)) == 0


@functools.partial(jax.jit, static_argnums=(0, 3))
def _probe(model, x, key, rate):
    params = {"level": jnp.float32(0), "peek": jnp.float32(0)}
    return jax.grad(lambda x: loss_of(model, rate)(params, {"context": x}, key, True))(x)


def test_the_model_never_sees_a_hidden_value():
    """A model that repeats its input answers 0 at every hidden point, so its error is the truth
    itself.
    """
    loss = loss_of(Constant(), 0.5)
    params = {"level": jnp.float32(0), "peek": jnp.float32(1)}
    x = jnp.full((8, 2, T), 5.0)
    assert float(loss(params, {"context": x}, jax.random.key(0), True)) == pytest.approx(25.0)


def test_masks_are_drawn_anew_from_every_key():
    a, b = (masks_of(Constant(), jax.random.key(i), 4, 2, 0.5) for i in (0, 1))
    again = masks_of(Constant(), jax.random.key(0), 4, 2, 0.5)
    assert (a == again).all() and (a != b).any()
    assert (a[0] != a[1]).any(), "the windows of a batch share one mask"


def test_padding_rows_do_not_count(noise):
    loss = loss_of(Constant(), 0.5)
    params = {"level": jnp.float32(0.3), "peek": jnp.float32(0)}
    x = jnp.asarray(noise[:, :T], jnp.float32)[None].repeat(4, 0)
    key, weight = jax.random.key(0), jnp.array([1.0, 1.0, 0.0, 0.0])
    value = loss(params, {"context": x, "weight": weight}, key, True)
    garbage = loss(params, {"context": x.at[2:].set(1e6), "weight": weight}, key, True)
    assert float(value) == float(garbage)
    assert float(value) != pytest.approx(float(loss(params, {"context": x}, key, True)))


def test_missing_points_are_neither_shown_nor_scored():
    loss = loss_of(Constant(), 0.5)
    params = {"level": jnp.float32(1), "peek": jnp.float32(1)}
    x = jnp.full((6, 2, T), 3.0).at[:, 0, 60:130].set(jnp.nan)
    gradient = jax.jit(jax.grad(lambda p: loss(p, {"context": x}, jax.random.key(0), True)))(params)
    assert float(loss(params, {"context": x}, jax.random.key(0), True)) == pytest.approx(4.0)
    assert all(np.isfinite(g) for g in gradient.values())


def test_nothing_hidden_is_no_loss_and_a_clear_error_in_evaluation(noise):
    params = {"level": jnp.float32(1), "peek": jnp.float32(0)}
    x = jnp.zeros((2, 1, T))
    loss = loss_of(Constant(), 1e-9)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: loss(p, {"context": x}, jax.random.key(0), True))
    )(params)
    assert float(value) == 0 and float(gradient["level"]) == 0
    with pytest.raises(ValueError, match="higher rate"):
        imputation.evaluate(Constant(), params, windows_of(noise), rate=1e-9)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 2048])
def test_the_score_does_not_depend_on_the_batch_size(noise, batch_size):
    windows, params = windows_of(noise), {"level": jnp.float32(0.1), "peek": jnp.float32(0)}
    expected = imputation.evaluate(Constant(), params, windows, batch_size=100)
    found = imputation.evaluate(Constant(), params, windows, batch_size=batch_size)
    assert found["points"] == expected["points"] and found["windows"] == windows.n == 209
    assert found["mse"] == pytest.approx(expected["mse"], rel=1e-6)
    assert found["mae"] == pytest.approx(expected["mae"], rel=1e-6)


def test_the_score_pools_points_and_repeats(noise):
    """By hand, from the masks that a window of a split always has."""
    windows, params = (
        windows_of(noise, [0, 50, 208]),
        {"level": jnp.float32(0.1), "peek": jnp.float32(0)},
    )
    value = {
        split: imputation.evaluate(Constant(), params, windows, rate=0.4, split=split)
        for split in ("val", "test")
    }
    assert value["val"] == imputation.evaluate(Constant(), params, windows, rate=0.4, split="val")
    assert value["val"]["mse"] != value["test"]["mse"]
    alone = [
        imputation.evaluate(Constant(), params, windows_of(noise, [0, 50, 208][:n]), rate=0.4)
        for n in (1, 2, 3)
    ]
    squares = [a["mse"] * a["points"] for a in alone]
    assert alone[0]["points"] < alone[1]["points"] < alone[2]["points"] == value["test"]["points"]
    assert squares == sorted(squares)  # the masks of the first windows stay what they were
    assert value["test"]["mse"] == pytest.approx(squares[-1] / alone[-1]["points"])


def test_windows_are_counted_as_in_the_original():
    series = Series(
        "ETTh1",
        np.random.default_rng(0).normal(size=(7, 17420)),
        tuple("abcdefg"),
        benchmark="ETTh1",
    )
    splits = prepare(series, T, T, joint=True)
    assert (splits.train.n, splits.val.n, splits.test.n) == (8257, 2689, 2689)
    few = prepare(series, T, T, joint=True, few_shot=0.05).train
    assert few.n == 412 and (np.asarray(few.starts) == np.arange(412) * 8257 // 412).all()


def test_refusals():
    for rate in (0, 1, -0.5):
        with pytest.raises(ValueError, match="rate"):
            imputation.loss_fn(Constant(), rate=rate)
    with pytest.raises(ValueError, match="key"):
        imputation.loss_fn(Constant())({}, {"context": jnp.zeros((1, 1, T))}, None, False)


@dataclasses.dataclass(frozen=True)
class Says(Constant):
    """Answers `params["y"]` [B, C, T], whatever it sees."""

    def impute(self, params, x, observed, key=None, train=False, ims=True):
        return params["y"]


def test_pooled_metrics_are_those_of_the_originals_code(golden_dir):
    recorded = json.loads((golden_dir / "imputation" / "metrics.json").read_text())
    patch, shape = recorded["patch_len"], (6, 192, 3)
    draws = [np.random.default_rng(i) for i in range(3)]
    x, y = (np.float32(draws[i].normal(size=shape)).swapaxes(1, 2) for i in (0, 2))
    u = np.float32(draws[1].random((6, 192 // patch, 3))).swapaxes(1, 2)
    assert [value["rate"] for value in recorded["values"][::2]] == [0.125, 0.25, 0.375, 0.5]
    for value in recorded["values"]:
        visible = np.repeat(u > value["rate"], patch, axis=2)
        visible[..., :patch] = True
        # The original compares a token with the patch after it, or with its own.
        said = np.roll(y, patch, axis=2) if value["ims"] else y
        error, scored = imputation.hidden_error(
            Says(), {"y": said}, x, visible, None, False, value["ims"]
        )
        error, scored = np.asarray(error, np.float64), np.asarray(scored)
        assert scored.sum() == value["points"] and (~visible).mean() == pytest.approx(
            value["masked_share"]
        )
        assert np.square(error).sum() / scored.sum() == pytest.approx(value["mse"], rel=1e-6)
        assert np.abs(error).sum() / scored.sum() == pytest.approx(value["mae"], rel=1e-6)


@pytest.mark.parametrize("holes", imputation.HOLES)
def test_every_kind_hides_the_same_share_and_spares_the_first_patch(holes):
    keys = jax.random.split(jax.random.key(2), 4000)
    for rate in (0.125, 0.5, 0.75):
        draw = jax.jit(jax.vmap(lambda k, rate=rate: imputation.hole_mask(k, T, 3, P, rate, holes)))
        hidden = ~np.asarray(draw(keys))
        assert not hidden[..., :P].any()
        assert hidden.mean() == pytest.approx(rate * 7 / 8, rel=0.05)
        assert (hidden[:, 0] != hidden[:, 1]).any(), "the variates share one mask"
    begins = np.diff(hidden.astype(int), axis=-1) == 1
    if holes == "blocks":
        assert begins.sum(-1).max() == 1, "one run at most"
        lengths = hidden.sum(-1)
        assert lengths.min() >= (T - P) // 2 and lengths.max() == T - P  # of rate 0.75
    if holes == "outages":
        assert set(hidden.sum(-1).ravel()) == {0, T - P}


def test_a_window_draws_one_of_several_kinds():
    task = imputation.Imputation(rate=0.5, holes=("patches", "outages"))
    assert task.options["holes"] == ("patches", "outages")
    windows, params = (
        windows_of(np.ones((1, 400))),
        {"level": jnp.float32(0), "peek": jnp.float32(0)},
    )
    _, visible, _ = imputation.examples(Constant(), params, windows, np.arange(200), **task.options)
    hidden = (~visible[:, 0]).sum(-1)
    assert 20 < (hidden == T - P).sum() < 80 and len(set(hidden)) > 4
    again = imputation.window_sums(Constant(), params, windows, **task.options)["points"]
    np.testing.assert_array_equal(again[:200], hidden, "the masks of the score")
    with pytest.raises(ValueError, match="holes are of"):
        imputation.loss_fn(Constant(), holes="gaps")


def test_rates_share_a_compilation():
    model, params = Constant(), {"level": jnp.float32(1), "peek": jnp.float32(0)}
    losses = [imputation.loss_fn(model, rate=rate) for rate in (0.125, 0.5)]
    assert jax.tree.structure(losses[0]) == jax.tree.structure(losses[1])
    value = jax.jit(lambda f, x: f(params, {"context": x}, jax.random.key(0), True))
    assert [float(value(f, jnp.full((8, 2, T), 3.0))) for f in losses] == [
        4.0,
        4.0,
    ] and value._cache_size() == 1


def test_an_anchored_fill_meets_its_neighbours():
    nan = np.nan
    x = jnp.array([nan, 1.0, nan, nan, 4.0, nan])
    constant = imputation.anchored(jnp.full(6, 9.0), x)
    np.testing.assert_allclose(
        constant, [1, 1, 2, 3, 4, 4], rtol=1e-6
    )  # the straight line, its ends repeated
    shape = jnp.array([0.0, 1.0, 3.0, 2.0, 1.0, 5.0])
    np.testing.assert_allclose(imputation.anchored(shape, x), [0, 1, 4, 4, 4, 8], rtol=1e-6)


def test_fillers_without_a_model():
    nan = np.nan
    x = jnp.array([nan, 1.0, 2.0, nan, nan, 6.0, nan, nan])
    np.testing.assert_allclose(imputation.linear(x), [1, 1, 2, 10 / 3, 14 / 3, 6, 6, 6], rtol=1e-6)
    # season 3: 0 from 3 or 6, unknown: linear; 3 from 0 or 6: linear; 4 from 1; 6: linear; 7 from
    # 4, then 1
    np.testing.assert_allclose(imputation.seasonal(x, 3), [1, 1, 2, 10 / 3, 1, 6, 6, 1], rtol=1e-6)


class TestTimer:
    model = Timer(
        TimerConfig.of(P, 16, 32, 1, 2, context_len=T, horizon=P, task="imputation", dropout=0.1)
    )

    @pytest.mark.parametrize("ims", [True, False])
    def test_it_follows_the_original_formula(self, ims, noise):
        """The mean over hidden points of patches 2 to 8: token j - 1 predicts patch j, or token j
        itself.
        """
        params = jax.jit(self.model.init)(jax.random.key(0))
        x = jnp.asarray(noise[:, :T], jnp.float32)[None]
        visible = np.asarray(imputation.hole_mask(jax.random.key(5), T, 3, P, 0.5))[None]
        score = jax.jit(
            lambda params: imputation.hidden_error(self.model, params, x, visible, None, False, ims)
        )
        error, scored = score(params)
        tokens, _ = jax.jit(self.model.apply)(
            params, jnp.where(visible, x, 0), jnp.asarray(visible, jnp.float32)
        )
        prediction = tokens[..., :-P] if ims else tokens[..., P:]
        by_hand = np.asarray(prediction - x[..., P:])[~visible[..., P:]]
        assert scored.sum() == by_hand.size > 0
        np.testing.assert_allclose(
            np.asarray(error)[np.asarray(scored)], by_hand, rtol=1e-5, atol=1e-5
        )

    @pytest.mark.slow
    def test_it_learns(self, noise):
        """A few gradient steps on sines lower the score on windows that were not seen."""
        t = np.arange(1000)
        values = np.stack([np.sin(t / 7), np.cos(t / 11)])
        train, test = windows_of(values[:, :800]), windows_of(values, np.arange(800, 809))
        loss = imputation.loss_fn(self.model, rate=0.25)
        params = jax.jit(self.model.init)(jax.random.key(0))
        before = imputation.evaluate(self.model, params, test)["mse"]

        @jax.jit
        def step(params, key):
            batch = train.gather(jax.random.randint(key, (16,), 0, train.n))
            gradient = jax.grad(loss)(params, batch, key, True)
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

        for i in range(60):
            params = step(params, jax.random.key(i))
        assert imputation.evaluate(self.model, params, test)["mse"] < 0.8 * before


@pytest.mark.slow
def test_the_runner_tunes_an_imputer():
    """Fine-tuning by a strategy, and pruning, know no task by name."""
    t, rng = np.arange(400), np.random.default_rng(0)
    values = np.sin(2 * np.pi * t / 16 + np.arange(2)[:, None]) + 0.1 * rng.normal(size=(2, 400))
    model = Timer(
        TimerConfig(
            8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8, task="imputation"
        )
    )
    params = jax.jit(model.init)(jax.random.key(0))
    splits = prepare(Series("waves", values, ("a", "b")), 32, 32, joint=True)
    task = imputation.Imputation(rate=0.5)
    config = training.TrainConfig(epochs=3, batch_size=32, lr=3e-3, schedule="constant")
    result = run(
        model, params, strategy("ff"), splits, task=task, config=config, show_progress=False
    )
    before = imputation.evaluate(model, params, splits.test, rate=0.5, split="test")
    assert result.test["mse"] < 0.8 * before["mse"]
    assert result.val["mse"] == min(h["val_mse"] for h in result.history)
    assert set(task.row(result.test)) == {"mse", "mae", "points"}
    line = task.baselines(model, splits, "test")["linear"]
    assert line["points"] == before["points"], "scored on the same hidden points"
    assert task.loss(model) is task.loss(Timer(model.config)), "equal models share a compilation"

    found = pruning.prune(
        model,
        params,
        splits,
        pruning.PruneConfig(ratio=0.3, ema=0.5, epochs=1, batch_size=32),
        task=task,
        show_progress=False,
    )
    assert 0 < pruning.share_left(found.masks) < 1
    assert found.history[1]["val_mse"] == task.evaluate(model, found.pruned, splits)["mse"]
