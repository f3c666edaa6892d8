"""Scores, selection, schedule, experts, and fine-tuning of what is left."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltsm_jax
from ltsm_jax import training, trees
from ltsm_jax.data import Series, prepare
from ltsm_jax.layers.dims import ExpertDims, HeadDims
from ltsm_jax.layers.linear import Linear
from ltsm_jax.methods import pruning
from ltsm_jax.methods.pruning import PruneConfig, schedule
from ltsm_jax.methods.run import run as run_strategy
from ltsm_jax.methods.run import without_dropout
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import FAMILIES, time_moe
from ltsm_jax.models.time_moe import TimeMoe, TimeMoeLayer
from ltsm_jax.tasks import forecasting


@pytest.fixture(scope="module")
def pre(model):
    return model.init(jax.random.key(7))


@pytest.fixture(scope="module")
def few(series):
    """130 training windows."""
    return prepare(
        dataclasses.replace(series, values=series.values[:, :200], timestamps=None),
        32,
        8,
        few_shot=0.43,
    )


def quietly(model, params, splits, **options):
    """A quiet run; fields of the config and arguments of `prune` side by side."""
    fields = {f.name for f in dataclasses.fields(PruneConfig)}
    rest = {name: options.pop(name) for name in [*options] if name not in fields}
    return pruning.prune(model, params, splits, PruneConfig(**options), show_progress=False, **rest)


def assert_equal_trees(a, b):
    trees.require_same(a, b)
    for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


# --- scores


def worked(score: Any):
    h = np.asarray([0.8, -0.4], np.float32)
    sums = {"rows": 2.0, "h": {"x": h.sum()}, "squares": {"x": np.square(h).sum()}}
    return float(pruning.importance_of(sums, {"x": np.float32(1)}, score)["x"])


def test_worked_scores():
    assert worked("taylor2") == pytest.approx(0.0, abs=1e-7)
    assert worked("taylor1") == pytest.approx(-0.2)
    assert worked("taylor2-mean-loss") == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="taylor2-mean-loss"):
        worked("taylor3")


def line_loss(params, batch, key, train):
    """Of the mean over rows of (y - sum over the channels of m_in * w * x)^2 / 2, as a model with
    one linear.
    """
    linear: Any = Linear((4,), (1,))
    y = linear.apply({"params": params}, batch["context"])[..., 0]
    row = 0.5 * jnp.square(y - batch["target"])
    weight = batch.get("weight", jnp.ones(len(row)))
    return (row * weight).sum() / weight.sum()


def line(rows=6):
    """A linear at the root of the tree, and rows that it fits but for noise: there the squared
    gradient is the curvature.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    w = np.asarray([[1.0], [-0.5], [0.01], [0.3]], np.float32)
    params = {"kernel": jnp.asarray(w), "bias": jnp.zeros(1)}
    target = (x @ w)[:, 0] + 0.1 * rng.normal(size=rows).astype(np.float32)
    return params, {"context": jnp.asarray(x), "target": jnp.asarray(target)}


@functools.partial(jax.jit, static_argnames=("chunk", "squares"))
def line_sums(params, masks, batch, chunk=None, squares=True):
    return pruning.gradient_sums(line_loss, params, masks, batch, chunk=chunk, squares=squares)


def test_scores_of_a_line_equal_finite_differences_and_its_formula():
    params, batch = line()
    masks = {"in": jnp.ones(4), "out": jnp.ones(1)}
    sums = line_sums(params, masks, batch)
    x, w = np.asarray(batch["context"], np.float64), np.asarray(params["kernel"], np.float64)[:, 0]
    residual = x @ w - np.asarray(batch["target"], np.float64)
    h = residual[:, None] * w * x  # of every row, with respect to m_in
    np.testing.assert_allclose(sums["h"]["in"], h.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sums["squares"]["in"], np.square(h).sum(0), rtol=1e-4, atol=1e-7)
    assert float(sums["rows"]) == 6

    def loss(m):  # float64, by hand
        return float(
            np.mean(0.5 * np.square(x @ (m * w) - np.asarray(batch["target"], np.float64)))
        )

    step = 1e-5
    for i in range(4):
        e = np.eye(4)[i]
        slope = (loss(1 + step * e) - loss(1 - step * e)) / (2 * step)
        np.testing.assert_allclose(sums["h"]["in"][i] / 6, slope, rtol=1e-3, atol=1e-6)
        # a quadratic loss: with its true curvature the second order is the whole change
        change = loss(1 - e) - loss(np.ones(4))
        assert change == pytest.approx(
            -slope + 0.5 * np.mean(np.square(w[i] * x[:, i])), rel=1e-4, abs=1e-7
        )
    score = pruning.importance_of(sums, masks, "taylor2")["in"]
    np.testing.assert_allclose(score, (-h + np.square(h) / 2).mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_rows_of_weight_0_and_the_size_of_chunks_change_nothing(chunk):
    params, batch = line()
    masks = {"in": jnp.ones(4), "out": jnp.ones(1)}
    whole = line_sums(params, masks, batch, chunk=6)
    more = {k: np.concatenate([v, 7 * np.asarray(v)[:3]]) for k, v in batch.items()}
    more["weight"] = np.asarray([1.0] * 6 + [0] * 3, np.float32)
    for squares in (True, False):
        found = line_sums(params, masks, more, chunk=chunk, squares=squares)
        expected = whole if squares else whole | {"squares": {}}
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def scored(model, pre, few):
    """Batch, masks with some at 0, and sums of the small model."""
    batch = few.train.gather(jnp.arange(5))
    masks = pruning.full_masks(model)
    rng = np.random.default_rng(3)
    masks = jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) > 0.2, jnp.float32), masks)
    sums = jax.jit(lambda p, m, b: pruning.gradient_sums(model.loss, p, m, b, chunk=2))(
        pre, masks, batch
    )
    return batch, masks, sums


def test_gradients_of_rows_are_those_of_rows_alone(model, pre, scored):
    batch, masks, sums = scored

    @jax.jit
    def alone(masks, row):
        def loss(m):
            with pruning.masked(m):
                return model.loss(pre, row)

        return jax.grad(loss)(masks)

    rows = [alone(masks, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(5)]
    h = jax.tree.map(lambda *x: np.stack(x), *rows)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)  # noqa: E731
    jax.tree.map(close, sums["h"], jax.tree.map(lambda x: x.sum(0), h))
    jax.tree.map(close, sums["squares"], jax.tree.map(lambda x: np.square(x).sum(0), h))


def test_gradients_of_a_small_model_equal_finite_differences(model, pre, scored):
    batch, masks, sums = scored

    @jax.jit
    def loss(masks):
        with pruning.masked(masks):
            return model.loss(pre, batch)

    flat, slopes, rng = trees.flatten(masks), trees.flatten(sums["h"]), np.random.default_rng(0)
    for path in ("layer_0/attn/q/out", "layer_0/attn/out/in", "layer_0/up/in", "layer_0/down/out"):
        place = tuple(rng.integers(0, n) for n in flat[path].shape)
        moved = [trees.unflatten(flat | {path: flat[path].at[place].add(d)}) for d in (0.05, -0.05)]
        slope = (loss(moved[0]) - loss(moved[1])) / 0.1
        np.testing.assert_allclose(
            slopes[path][place] / 5, slope, rtol=0.03, atol=1e-4, err_msg=path
        )


# --- selection


def test_worked_step():
    importance = {
        "a": {
            "in": np.asarray([0.5, -0.02, 0.0, 0.3], np.float32),
            "out": np.asarray([-0.02, 0.1, 0.9], np.float32),
        },
        "b": {"in": np.asarray([0.001, 0.7], np.float32)},
    }
    masks, after = pruning.pruning_step(importance, jax.tree.map(np.ones_like, importance), 0.2)
    np.testing.assert_array_equal(masks["a"]["in"], [1, 0, 0, 1])
    np.testing.assert_array_equal(masks["a"]["out"], [0, 1, 1])
    np.testing.assert_array_equal(masks["b"]["in"], [0, 1])
    np.testing.assert_array_equal(after["a"]["out"], np.asarray([0, 0.1, 0.9], np.float32))
    # what is not scored neither goes nor sets the threshold: 6 of 7 count then, and K = 2 takes 0.1
    # instead of 0.001
    masks, _ = pruning.pruning_step(
        importance, jax.tree.map(np.ones_like, importance), 0.2, {"b/in": np.asarray(False)}
    )
    np.testing.assert_array_equal(masks["b"]["in"], [1, 1])
    np.testing.assert_array_equal(masks["a"]["in"], [1, 0, 0, 1])


def test_what_is_pruned_never_returns_and_a_large_negative_score_stays():
    masks, importance = (
        {"x": np.asarray([0, 1, 1], np.float32)},
        {"x": np.asarray([0, -5, 0.1], np.float32)},
    )
    for _ in range(2):
        masks, importance = pruning.pruning_step(importance, masks, 0.4)
    np.testing.assert_array_equal(masks["x"], [0, 1, 0])


@pytest.mark.parametrize("ratio, left", [(0.2, 0.819), (0.5, 0.607), (0.9, 0.407)])
def test_share_left_after_an_epoch(ratio, left):
    n, importance = 100, {"x": np.random.default_rng(0).normal(size=20000).astype(np.float32)}
    masks = {"x": np.ones(20000, np.float32)}
    for _ in range(n):
        masks, importance = pruning.pruning_step(importance, masks, ratio / n)
    found = pruning.share_left(masks)
    assert found == pytest.approx((1 - ratio / n) ** n, abs=5e-3)  # K is rounded up a hundred times
    assert found == pytest.approx(left, abs=6e-3)


# --- which channels


def test_what_can_be_pruned(model):
    def flat(**options):
        masks = trees.flatten(pruning.full_masks(model, **options))
        return {path.rpartition("/")[0] for path in masks}

    blocks = {
        f"layer_0/{name}" for name in ("attn/q", "attn/k", "attn/v", "attn/out", "up", "down")
    }
    assert flat() == blocks
    assert flat(include_head=True) == blocks | {"head"}
    assert flat(include_embed=True) == blocks | {"embed"}
    assert flat(quirks=["every-linear"]) == blocks | {"head", "embed"}
    assert flat(quirks="head-only") == {"head"}
    assert pruning.full_masks(model)["layer_0"]["attn"]["out"]["in"].shape == (2, 8)
    moe = TimeMoe(TimeMoe.small())
    assert not any(
        "router" in p or "shared_gate" in p for p in trees.flatten(pruning.full_masks(moe))
    )
    assert any(
        "router" in p for p in trees.flatten(pruning.full_masks(moe, quirks=["every-linear"]))
    )
    for quirk, why in (("all-experts", "Q6"), ("no-such", "unknown"), ("raw-labels", "Q3")):
        with pytest.raises(ValueError, match=why):
            pruning.full_masks(model, quirks=[quirk])
    ttm = FAMILIES["ttm"](FAMILIES["ttm"].small())
    assert set(pruning.full_masks(ttm, quirks=["head-only"])) == {"head"}
    assert "head" not in pruning.full_masks(ttm)


# --- the schedule


@pytest.fixture(scope="module")
def prune(model, pre, few):
    """A quiet run; equal ones are kept."""
    kept = {}

    def prune(**options):
        key = repr(sorted(options.items()))
        if key not in kept:
            kept[key] = quietly(
                model, pre, few, **{"ratio": 0.3, "ema": 0.5, "batch_size": 16} | options
            )
        return kept[key]

    return prune


@pytest.mark.slow
def test_data_of_a_name_or_a_series_is_split_as_fit_does(prune, model, pre, series):
    config = PruneConfig(epochs=1, ratio=0.3, ema=0.5, batch_size=16)
    found = ltsm_jax.prune(
        model, pre, series, config, few_shot=0.2, mode="ims", show_progress=False
    )
    assert found.splits.few_shot == 0.2 and found.splits.test.horizon == model.horizon
    assert found.pruned.keys() == pre.keys() and 0 < pruning.share_left(found.masks) < 1


def test_a_run_follows_its_schedule(prune, model, pre, few):
    n = math.ceil(few.train.n / 16)
    found = prune(epochs=2, patience=5)
    assert [h["epoch"] for h in found.history] == [0, 1, 2]
    assert [h["steps"] for h in found.history] == [0, n, 2 * n]
    left = [h["left"] for h in found.history]
    assert (
        left[1] == pytest.approx((1 - 0.3 / n) ** n, abs=0.03) and left[2] < left[1] < left[0] == 1
    )
    best = min(found.history[1:], key=lambda h: (h["val_mse"], -h["epoch"]))
    assert found.best_epoch == best["epoch"]
    assert pruning.share_left(found.masks) == best["left"]
    assert forecasting.evaluate(model, found.pruned, few.val)["mse"] == best["val_mse"]
    assert found.history[0]["val_mse"] == forecasting.evaluate(model, pre, few.val)["mse"]
    assert_equal_trees(found.params, pre)
    scores, masks = trees.flatten(found.scores), trees.flatten(found.masks)
    assert all((np.asarray(scores[p])[np.asarray(m) == 0] == 0).all() for p, m in masks.items())


def test_importance_is_the_average_of_scores(prune, model, pre, few):
    """Two groups by hand: I = s1, then 0.5 * s2 + 0.5 * I of what is left."""
    n = math.ceil(few.train.n / 16)
    macro = 16 * (n // 2)
    found = prune(epochs=1, macro_batch=macro, batch_size=16, stride=1)
    order = schedule._order(training.keys(0)["data"], 0, few.train.n)
    masks, importance, steps = pruning.full_masks(model), None, 0
    r_step = 0.3 / n * (n // 2)

    @jax.jit
    def group(masks, rows, importance):
        sums = pruning.gradient_sums(model.loss, pre, masks, rows, chunk=len(rows["context"]))
        s = pruning.importance_of(sums, masks)
        return (
            s if importance is None else jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, s, importance)
        )

    for first in range(0, few.train.n, macro):
        rows = few.train.gather(order[first : min(first + macro, few.train.n)])
        masks, importance = pruning.pruning_step(group(masks, rows, importance), masks, r_step)
        steps += 1
    assert found.history[1]["steps"] == steps == (2 if n % 2 == 0 else 3)
    differ = sum(
        (np.asarray(a) != np.asarray(b)).sum()
        for a, b in zip(*map(jax.tree.leaves, (masks, found.masks)))
    )
    assert differ <= 2, "rounding may swap neighbours at a threshold"


def test_the_tail_of_several_epochs_goes_on_into_the_next(prune, few):
    n = math.ceil(few.train.n / 16)
    assert n % 2 == 1, "else there is no tail"
    one, two = prune(epochs=1, macro_batch=32), prune(epochs=2, macro_batch=32, patience=5)
    assert one.history[1]["steps"] == n // 2 + 1
    assert [h["steps"] for h in two.history] == [0, n // 2, n]


def test_runs_stop(prune, monkeypatch):
    mse = iter([5.0, 3.0, 3.0, 4.0, 1.0])
    monkeypatch.setattr(forecasting, "evaluate", lambda *_, **__: {"mse": next(mse)})
    found = prune(epochs=10, seed=11, batch_size=64)
    assert (found.best_epoch, len(found.history), found.stopped) == (
        2,
        4,
        "patience",
    )  # as low is as good


def test_zeros_can_be_limited(prune, model, pre):
    found = prune(epochs=3, max_prune_ratio=0.3, ratio=0.5, patience=9)
    assert found.stopped == "max_prune_ratio"
    zeros = sum(int((np.asarray(x) == 0).sum()) for x in jax.tree.leaves(found.pruned))
    assert zeros / trees.count(pre) <= 0.3


def test_one_run_gives_nested_masks(prune):
    found = prune(epochs=2, patience=5)
    total = trees.count(found.order)
    ranks = np.sort(np.concatenate([np.ravel(x) for x in jax.tree.leaves(found.order)]))
    np.testing.assert_array_equal(ranks, np.arange(total))
    share = 1 - pruning.share_left(found.masks)
    assert_equal_trees(pruning.cut(found.order, share), found.masks)
    before = None
    for part in (0.1, 0.3, 0.6, 0.9):
        masks = pruning.cut(found.order, part)
        assert pruning.share_left(masks) == pytest.approx(1 - part, abs=0.5 / total)
        if before is not None:
            assert all(
                (np.asarray(a) <= np.asarray(b)).all()
                for a, b in zip(*map(jax.tree.leaves, (masks, before)))
            )
        before = masks
    with pytest.raises(ValueError, match="share"):
        pruning.cut(found.order, 1.0)
    cuts = prune(epochs=1, ratios=(0.0, 0.5)).cuts
    assert cuts[0.0]["mse"] == found.history[0]["val_mse"] != cuts[0.5]["mse"]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["taylor2", "taylor1"])
def test_a_killed_run_goes_on_to_the_same_end(prune, tmp_path, monkeypatch, score):
    options = {"epochs": 2, "patience": 5, "score": score, "macro_batch": 32}
    whole = prune(**options)
    monkeypatch.setattr(schedule, "CHECKPOINT_SECONDS", 0.0)
    real, seen = schedule._batch_sums, []

    def killed(*args, **kwargs):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(schedule, "_batch_sums", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(**options, folder=tmp_path / "run")
    again = prune(**options, folder=tmp_path / "run", label="again")
    n = whole.history[1]["steps"] * 2 + 1
    assert len(seen) == 6 + 2 * n - 4, "the steps of the first launch are not done twice"
    assert again.history == whole.history and again.best_epoch == whole.best_epoch
    assert_equal_trees(again.masks, whole.masks)
    assert_equal_trees(again.scores, whole.scores)
    assert_equal_trees(again.order, whole.order)
    monkeypatch.setattr(schedule, "_batch_sums", None)
    assert prune(**options, folder=tmp_path / "run", label="read").history == whole.history
    with pytest.raises(ValueError, match="another configuration"):
        prune(**options | {"ratio": 0.2}, folder=tmp_path / "run")


def test_bad_arguments_are_all_named(prune):
    with pytest.raises(ValueError, match="ratio is a share") as error:
        prune(ratio=1.5, ema=0.0, epochs=-1)
    for part in ("ema", "epochs"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="Q14"):
        prune(quirks=["one-label"])


# --- experts


@pytest.fixture(scope="module")
def moe():
    config = dataclasses.replace(
        TimeMoe.small(),
        layers=(TimeMoeLayer(HeadDims.of(2, 8, kv_heads=1), ExpertDims((0, 1, 2, 3), 6), 8),),
        horizons=(1, 4),
        context_len=16,
    )
    model = TimeMoe(config)
    params = jax.tree.map(lambda x: np.asarray(x) * 4, model.init(jax.random.key(0)))
    t, rng = np.arange(120), np.random.default_rng(0)
    series = Series(
        "waves", np.sin(t / 3)[None] + 0.3 * rng.normal(size=(1, 120)), ("a",), None, "h"
    )
    return model, params, prepare(series, 16, 4)


def test_router_example():
    usage = {"m": np.asarray([0.05, 0.9, 0.6, 0.45])}
    assert pruning.kept_experts(usage, 0.05, 2) == {"m": (1, 2, 3)}
    assert pruning.kept_experts(usage, -1, 2) == {"m": (1, 2)}  # not none, as released
    assert pruning.kept_experts(usage, 1.0, 2) == {"m": ()}


@pytest.mark.slow
def test_weights_of_experts_that_stay_are_what_they_were(moe):
    """p = (.610, .224, .136, .030): without expert 0 the token goes to 1 and 2 with .224
    and .136.
    """
    model, params, _ = moe
    flat = trees.flatten(params)
    keep: Any = pruning.keep_experts
    flat["layer_0/mixture/router/kernel"] = jnp.zeros((16, 4))
    fewer, cut = keep(model, trees.unflatten(flat), {"layer_0/mixture/experts": (1, 2, 3)})
    assert fewer.config.layers[0].experts.ids == (1, 2, 3)
    assert cut["layer_0"]["mixture"]["experts"]["up"].shape == (3, 16, 6)
    # the residual stream after the norm is divided by a feature, so that the logits are what we
    # want them to be
    x = jnp.ones((1, 1, 5))
    forward = jax.jit(lambda params: fewer.apply(params, x))
    _, taps = forward(cut)
    norm = np.asarray(taps["layer_0/norm2"]).reshape(5, 16)
    kernel = np.zeros((16, 4), np.float32)
    kernel[0] = np.log([0.610, 0.224, 0.136, 0.030]) / norm[0, 0]
    flat["layer_0/mixture/router/kernel"] = jnp.asarray(kernel)
    again, cut = keep(model, trees.unflatten(flat), {"layer_0/mixture/experts": (1, 2, 3)})
    assert again == fewer
    found, taps = forward(cut)
    np.testing.assert_array_equal(taps["layer_0/router_experts"][0], [1, 2])
    np.testing.assert_allclose(taps["layer_0/router_weights"][0], [0.224, 0.136], rtol=1e-4)
    masked = jax.jit(
        lambda params: model.apply(params, x, expert_masks=[jnp.asarray([0.0, 1, 1, 1])])
    )
    whole, _ = masked(trees.unflatten(flat))
    chex.assert_trees_all_close(found, whole, rtol=1e-5, atol=1e-6)
    for ids, why in (((0, 9), r"not \[9\]"), ((0,), "no experts")):
        path = "layer_0/mixture/experts" if 9 in ids else "layer_0/mixture/shared"
        with pytest.raises(ValueError, match=why):
            pruning.keep_experts(model, params, {path: ids})


@pytest.mark.slow
def test_usage_counts_what_generation_routes(moe):
    """All tokens of context and of what is fed back, of all windows of both parts, each once."""
    model, params, splits = moe
    found = pruning.expert_usage(model, params, [splits.train, splits.val], horizon=6, batch_size=9)

    @jax.jit
    def chosen(context):
        whole = jnp.concatenate([context, model.predict(params, context, 6).point], axis=-1)
        mean, std = (
            context.mean(-1, keepdims=True),
            context.std(-1, keepdims=True, ddof=1) + time_moe.EPS,
        )
        # 6 = 4 + 1 + 1: the last point is not fed back
        return model.apply(params, ((whole - mean) / std)[..., :-1])[1]["layer_0/router_experts"]

    parts = (splits.train, splits.val)
    context = jnp.concatenate([part.gather(jnp.arange(part.n))["context"] for part in parts])
    count = np.bincount(np.asarray(chosen(context)).ravel(), minlength=4)
    f_E = found["layer_0/mixture/experts"]
    np.testing.assert_allclose(
        f_E, 2 * count / count.sum(), atol=2e-3
    )  # a tie may fall the other way
    assert f_E.sum() == pytest.approx(2)


def one_step(model, params, splits, **changes: Any):
    """A quiet run of a single pruning step."""
    options: dict[str, Any] = {
        "ratio": 0.2,
        "ema": 0.5,
        "batch_size": 16,
        "epochs": 1,
        "macro_batch": 10**6,
    }
    options.update(changes)
    return quietly(model, params, splits, **options)


@pytest.mark.slow
def test_experts_go_first(moe):
    model, params, splits = moe
    path = "layer_0/mixture/experts"
    found = one_step(model, params, splits, expert_threshold=0.1)
    usage = pruning.expert_usage(model, params, [splits.train, splits.val])[path]
    assert found.usage is not None
    np.testing.assert_array_equal(found.usage[path], usage)
    kept = found.model.config.layers[0].experts.ids
    assert kept == tuple(np.flatnonzero(usage > 0.1)) and 0 < len(kept) < 4
    assert found.masks["layer_0"]["mixture"]["experts"]["up"]["in"].shape == (len(kept), 16)
    assert (
        forecasting.evaluate(found.model, found.pruned, splits.val)["mse"]
        == found.history[1]["val_mse"]
    )
    alone = one_step(model, params, splits, expert_threshold=-1.0, epochs=0)
    assert (
        len(alone.model.config.layers[0].experts.ids) == 2 and pruning.share_left(alone.masks) == 1
    )


@pytest.mark.slow
def test_an_expert_without_tokens_keeps_its_channels(moe):
    model, params, splits = moe
    context = splits.train.gather(jnp.arange(splits.train.n))["context"]
    chosen = np.unique(jax.jit(model.apply)(params, context)[1]["layer_0/router_experts"])
    unseen = [i for i in range(4) if i not in chosen]
    assert unseen
    assert len(chosen)
    found = one_step(model, params, splits, ratio=0.9)
    pairs = found.masks["layer_0"]["mixture"]["experts"]
    for place, mask in trees.flatten(pairs).items():
        assert (np.asarray(mask)[unseen] == 1).all(), place
        assert (np.asarray(mask)[chosen] == 0).any(), place
    scores = np.asarray(found.scores["layer_0"]["mixture"]["experts"]["up"]["in"])
    assert np.isnan(scores[unseen]).all() and np.isfinite(scores[chosen]).all()
    order = np.asarray(found.order["layer_0"]["mixture"]["experts"]["up"]["in"])
    assert order[unseen].min() > order[chosen].max(), "the last to go"


@pytest.mark.slow
def test_an_expert_can_be_judged_by_the_windows_that_reach_it(moe, tmp_path, monkeypatch):
    """Beside the routing of every window, and with what a window alone gives."""
    model, params, splits = moe
    rows = splits.train.gather(jnp.arange(5, dtype=jnp.int32))
    stack, masks = "layer_0/mixture/experts", pruning.full_masks(model)
    loss = forecasting.loss_fn(model, "ims")
    sums = jax.jit(functools.partial(pruning.gradient_sums, loss, stacks=[stack]))(
        params, masks, rows
    )
    alone = jax.jit(functools.partial(pruning.gradient_sums, loss))
    each = [
        alone(params, masks, {name: x[i : i + 1] for name, x in rows.items()}) for i in range(5)
    ]
    pick = lambda s: s["h"]["layer_0"]["mixture"]["experts"]["down"]["out"]  # noqa: E731
    reached_RE = np.stack([np.asarray(pick(s) != 0).any(axis=1) for s in each])
    seen_E = trees.flatten(sums["seen"])[stack]
    np.testing.assert_array_equal(seen_E, reached_RE.sum(0))
    assert 0 < reached_RE.sum() < reached_RE.size, "some windows reach an expert, others do not"
    plain, own = (
        trees.flatten(pruning.importance_of(s, masks)) for s in (sums | {"seen": {}}, sums)
    )
    for path, s in plain.items():
        factor = (5 / np.maximum(seen_E, 1))[:, None] if path.startswith(stack) else 1.0
        np.testing.assert_allclose(own[path], s * factor, rtol=1e-6)
    with pytest.raises(ValueError, match="squares=False"):
        pruning.gradient_sums(loss, params, masks, rows, stacks=[stack], squares=False)

    used, real = [], schedule.importance_of
    monkeypatch.setattr(
        schedule, "importance_of", lambda sums, *rest: (used.append(sums), real(sums, *rest))[1]
    )
    found = one_step(model, params, splits, average_expert_score=True, folder=tmp_path / "run")
    again = one_step(model, params, splits, average_expert_score=True, folder=tmp_path / "run")
    assert_equal_trees(found.order, again.order)
    assert len(used) == 1 and trees.flatten(used[0]["seen"])[stack].max() > 0


def test_families_whose_experts_cannot_go_say_so(model, pre, few):
    with pytest.raises(ValueError, match="no experts"):
        quietly(model, pre, few, ratio=0.1, ema=0.5, expert_threshold=0.1)


# --- fine-tuning of what is left


@pytest.mark.parametrize("name", ["sff", pytest.param("ff", marks=pytest.mark.slow)])
def test_what_is_pruned_stays_0_through_fine_tuning(model, pre, few, prune, name):
    masks = prune(epochs=2, patience=5).masks
    config = training.TrainConfig(epochs=1, batch_size=32, lr=1e-2, weight_decay=0.1)
    run = lambda **rest: run_strategy(  # noqa: E731
        model, pre, strategy(name), few, config=config, show_progress=False, test=False, **rest
    )
    tuned = run(masks=masks).params
    merged = trees.flatten(jax.jit(pruning.apply_masks)(jax.tree.map(np.ones_like, pre), masks))
    moved = 0
    for path, leaf in trees.flatten(tuned).items():
        gone = np.asarray(merged[path]) == 0
        assert (np.asarray(leaf)[gone] == 0).all(), path
        moved += int((np.asarray(leaf)[~gone] != np.asarray(trees.flatten(pre)[path])[~gone]).sum())
    assert moved > 0.9 * sum(int((np.asarray(x) != 0).sum()) for x in merged.values())


@pytest.mark.slow
def test_masks_of_ones_are_fine_tuning_and_dropout_can_be_off(model, pre, few):
    config = training.TrainConfig(epochs=1, batch_size=32, lr=1e-3)
    run = lambda **rest: run_strategy(  # noqa: E731
        model, pre, strategy("ff"), few, config=config, show_progress=False, test=False, **rest
    )
    plain, ones = run(), run(masks=pruning.full_masks(model))
    assert plain.history == ones.history
    still = run(quirks=["no-dropout"])
    assert still.history != plain.history
    assert model.config.dropout and not without_dropout(model).config.dropout
    with pytest.raises(ValueError, match="no-dropout"):
        run(quirks=["dropout"])
    with pytest.raises(ValueError, match="do not fit"):
        run(masks=pruning.full_masks(FAMILIES["timer_hf"](FAMILIES["timer_hf"].small())))
