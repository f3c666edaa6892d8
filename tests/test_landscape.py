"""Surfaces of losses that are known in every point, directions, and the loss of a split."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltsm_jax
from ltsm_jax import landscape, trees
from ltsm_jax.data import Series, prepare
from ltsm_jax.landscape import directions as ways
from ltsm_jax.landscape import grid
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import forecasting

PARAMS = {"w": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}
RIGHT = {"w": jnp.array([1.0, 0.0]), "b": jnp.array(0.0)}
UP = {"w": jnp.array([0.0, 1.0]), "b": jnp.array(0.0)}


def bowl(params):
    """3 (w0 - 0.5)^2 + (w1 + 1)^2 + b: lowest, 2, at PARAMS."""
    return 3 * (params["w"][0] - 0.5) ** 2 + (params["w"][1] + 1) ** 2 + params["b"]


@pytest.fixture(scope="module")
def timer():
    """A model of one layer, its parameters, and splits of three noisy waves."""
    model = Timer(TimerConfig(8, 8, 8, equal_layers(1, 1, 8, 8), context_len=32, horizon=8))
    t, rng = np.arange(200), np.random.default_rng(0)
    values = np.sin(t / 3 + np.arange(3)[:, None]) + 0.3 * rng.normal(size=(3, 200))
    return (
        model,
        model.init(jax.random.key(0)),
        prepare(Series("waves", values, ("a", "b", "c"), None, "h"), 32, 8),
    )


# --------------------------------------------------------------------------------------------------
# surfaces


def test_a_plane_has_the_loss_at_every_point():
    found = landscape.surface(bowl, PARAMS, (RIGHT, UP), radius=2.0, points=5)
    np.testing.assert_array_equal(found.x, [-2, -1, 0, 1, 2])
    np.testing.assert_array_equal(found.y, found.x)
    wide, high = np.meshgrid(found.x, found.y)  # row = y, column = x
    np.testing.assert_allclose(found.loss, 3 * wide**2 + high**2 + 2, rtol=1e-6)
    assert found.centre == 2.0
    assert found.range == pytest.approx(16)
    assert found.mean_abs_laplacian == pytest.approx(8)
    # 3 x^2 passes 2 between x = 0 (2) and x = 1 (5): a line between them meets 4 at 2/3.
    assert found.doubling_radius == pytest.approx(2 / 3)
    fine = landscape.surface(bowl, PARAMS, (RIGHT, UP), radius=2.0, points=81)
    assert fine.doubling_radius == pytest.approx(math.sqrt(2 / 3), rel=2e-3)


def test_a_line_needs_one_direction():
    for one in (UP, (UP,), [UP]):
        found = landscape.surface(bowl, PARAMS, one, radius=2.0, points=9)
        assert found.y is None
        np.testing.assert_allclose(found.loss, found.x**2 + 2, rtol=1e-6)
    assert found.mean_abs_laplacian == pytest.approx(2)
    assert found.smoothness() == {
        "centre": 2.0,
        "range": pytest.approx(4),
        "mean_abs_laplacian": pytest.approx(2),
        "doubling_radius": pytest.approx(1.4, abs=0.01),
    }


def test_axes_may_be_given_and_a_tree_may_be_an_array():
    found = landscape.surface(
        lambda w: (w**2).sum(),
        jnp.zeros(2),
        (jnp.array([1.0, 0]), jnp.array([0, 2.0])),
        x=np.array([0.0, 3.0]),
        y=np.array([1.0]),
    )
    np.testing.assert_allclose(found.loss, [[4.0, 13.0]])


@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_points_at_once_change_nothing_but_the_time(at_once):
    found = landscape.surface(bowl, PARAMS, (RIGHT, UP), points=5, at_once=at_once)
    want = landscape.surface(bowl, PARAMS, (RIGHT, UP), points=5)
    np.testing.assert_allclose(found.loss, want.loss, rtol=1e-6)


def test_a_call_takes_about_half_a_second():
    assert [grid._paced(8, seconds, 32) for seconds in (0.01, 0.24, 0.3, 0.6, 9.0)] == [
        16,
        16,
        8,
        4,
        4,
    ]
    assert grid._paced(32, 0.1, 32) == 32 and grid._paced(1, 60.0, 32) == 1


def test_no_point_is_computed_twice():
    computed = []

    def counted(params):
        jax.debug.callback(lambda: computed.append(1))
        return bowl(params)

    found = landscape.surface(counted, PARAMS, (RIGHT, UP), points=3)
    jax.effects_barrier()
    assert len(computed) == found.loss.size == 9  # in parts of 1, 2 and so on


def test_leaves_keep_their_dtype_and_integers_stay():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(3)}

    def loss(params):
        assert params["w"].dtype == jnp.bfloat16 and params["n"].dtype == jnp.int32
        return params["w"].sum() + params["n"].sum()

    way = landscape.random_directions(params, 0, 1)
    assert way[0]["w"].dtype == jnp.bfloat16 and not way[0]["n"].any()
    assert landscape.surface(loss, params, way, points=3).loss[1] == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"directions": (RIGHT, UP, UP)}, "one or two directions"),
        ({"directions": {"w": jnp.ones(2)}}, "b: only in params"),
        ({"directions": (RIGHT, UP | {"b": jnp.ones(2)})}, "b: params"),
        ({"points": 1}, "at least 2 points"),
        ({"radius": 0.0}, "radius must be a positive number"),
        ({"directions": UP, "y": np.zeros(3)}, "y is for a plane"),
        ({"x": np.array([0.0, np.nan])}, "x must be a vector of finite numbers"),
        ({"loss": lambda p: p["w"]}, "must return a scalar"),
    ],
)
def test_what_is_no_surface_is_refused(change, message):
    asked = {"loss": bowl, "directions": (RIGHT, UP)} | change
    with pytest.raises(ValueError, match=message):
        landscape.surface(asked.pop("loss"), PARAMS, asked.pop("directions"), **asked)


def test_a_loss_that_is_not_finite_is_kept_and_left_out_of_the_numbers():
    found = landscape.surface(
        lambda p: 2 + jnp.where(p["w"][0] > 1, jnp.inf, p["w"][0]), PARAMS, RIGHT, points=5
    )
    np.testing.assert_array_equal(found.loss, [1.5, 2, 2.5, 3, np.inf])
    assert found.range == 1.5 and found.mean_abs_laplacian == pytest.approx(0, abs=1e-6)
    assert found.doubling_radius == pytest.approx(0.5, abs=1e-6)  # beyond the last finite point
    assert math.isnan(
        landscape.surface(lambda p: p["w"][1], PARAMS, RIGHT, points=3).doubling_radius
    )
    assert landscape.surface(lambda p: p["b"], PARAMS, RIGHT, points=3).doubling_radius == math.inf


def test_a_surface_is_saved(tmp_path):
    for ways_ in (RIGHT, (RIGHT, UP)):
        found = landscape.surface(bowl, PARAMS, ways_, points=5)
        back = landscape.Surface.load(found.save(tmp_path / "new" / "surface"))
        for a, b in zip(dataclasses.astuple(found), dataclasses.astuple(back), strict=True):
            np.testing.assert_array_equal(a, b)


# --------------------------------------------------------------------------------------------------
# a folder


def test_a_stopped_surface_goes_on_to_the_same_bits(tmp_path, timer, monkeypatch):
    model, params, splits = timer
    loss = landscape.split_loss(model, splits.test, sample=16)
    plane = landscape.random_directions(params, seed=3)
    whole = landscape.surface(loss, params, plane, points=5)

    stopped = []

    def stop(done, of):
        assert of == 25
        if done >= 4:
            stopped.append(done)
            raise KeyboardInterrupt

    monkeypatch.setattr(grid, "SAVE_EVERY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        landscape.surface(loss, params, plane, points=5, folder=tmp_path, progress=stop)
    kept = json.loads((tmp_path / "points.json").read_text())["losses"]
    assert 0 < len(kept) < stopped[0]  # the last part was computed, and not written

    computed = []
    found = landscape.surface(
        loss,
        params,
        plane,
        points=5,
        folder=tmp_path,
        progress=lambda done, _: computed.append(done),
    )
    assert computed[0] > len(kept) and computed[-1] == 25
    np.testing.assert_array_equal(found.loss, whole.loss)

    computed.clear()
    again = landscape.surface(
        loss,
        params,
        plane,
        points=5,
        folder=tmp_path,
        progress=lambda done, _: computed.append(done),
    )
    assert not computed
    np.testing.assert_array_equal(again.loss, whole.loss)


def test_a_folder_of_another_surface_is_refused(tmp_path, timer):
    landscape.surface(bowl, PARAMS, RIGHT, points=5, folder=tmp_path, facts={"data": "a"})
    asked = [
        ({"points": 7}, "other x"),
        ({"facts": {"data": "b"}}, "other facts"),
        ({"params": PARAMS | {"b": jnp.array(3.0)}}, "other params"),
        ({"directions": UP}, "other directions"),
        ({"loss": lambda p: 1.1 * bowl(p)}, "another loss"),
    ]
    for change, message in asked:
        options = {"points": 5, "facts": {"data": "a"}} | change
        loss, params, way = (
            options.pop(k, v)
            for k, v in (("loss", bowl), ("params", PARAMS), ("directions", RIGHT))
        )
        with pytest.raises(ValueError, match=message):
            landscape.surface(loss, params, way, folder=tmp_path, **options)

    model, params, splits = timer
    (way,) = landscape.random_directions(params, 0, 1)
    for part, message in (("val", None), ("test", "other data")):
        loss = landscape.split_loss(model, getattr(splits, part), sample=4)
        if message is None:
            landscape.surface(loss, params, way, points=3, folder=tmp_path / "timer")
        else:
            with pytest.raises(ValueError, match=message):
                landscape.surface(loss, params, way, points=3, folder=tmp_path / "timer")


# --------------------------------------------------------------------------------------------------
# directions


def test_filters_are_as_long_as_those_of_the_weights(timer):
    """Spec: row norms of directions equal row norms of weights, also in the released form."""
    _, params, _ = timer
    norms = {
        "layer_0/attn/q/kernel": 0,  # D H K: a unit of a head
        "layer_0/attn/out/kernel": (0, 1),  # H K D
        "layer_0/up/kernel": 0,  # in, out
        "head/kernel": 0,
        "layer_0/norm1/scale": (),
        "head/bias": (),
    }
    for released in (False, True):
        for direction in landscape.random_directions(params, seed=1, sff_directions=released):
            flat, weights = trees.flatten(direction), trees.flatten(params)
            assert flat.keys() == weights.keys()
            for path, axes in norms.items():
                d, w = np.asarray(flat[path]), np.asarray(weights[path])
                np.testing.assert_allclose(
                    np.sqrt(np.square(d).sum(axes)),
                    np.sqrt(np.square(w).sum(axes)),
                    rtol=1e-5,
                    atol=1e-7,
                )


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        ("layer_0/attn/qkv/kernel", (16, 3, 2, 8), (1, 2, 3)),
        ("layer_0/attn/k/kernel", (16, 2, 8), (1, 2)),
        ("out/kernel", (2, 8, 16), (2,)),
        ("layer_1/moe/experts/up", (4, 16, 8), (0, 2)),
        ("embed/kernel", (2, 8, 16), (0, 2)),
        ("head/kernel", (8, 4), (1,)),
        ("tokens", (32, 8), (0,)),
        ("scale", (8,), (0,)),
        ("temperature", (), ()),
    ],
)
def test_filters_of_every_kind_of_leaf(path, shape, axes):
    assert ways.filter_axes(path, len(shape)) == axes


def test_directions_depend_on_the_seed_alone(timer):
    model, params, _ = timer
    other = model.init(jax.random.key(9))
    raw = landscape.random_directions(params, seed=2, normalise=False)
    same = landscape.random_directions(other, seed=jax.random.key(2), normalise=False)
    chex.assert_trees_all_equal(raw, same)
    cosine = ways._dot(*raw) / ways._norm(raw[0]) / ways._norm(raw[1])
    assert abs(cosine) < 0.1
    different = landscape.random_directions(params, seed=3, normalise=False)
    assert not np.array_equal(
        trees.flatten(raw[0])["head/kernel"], trees.flatten(different[0])["head/kernel"]
    )


def test_the_released_form_has_mean_1_and_variance_8():
    params = {"kernel": jnp.ones((200, 200))}
    (drawn,) = landscape.random_directions(params, 0, 1, normalise=False, sff_directions=True)
    (plain,) = landscape.random_directions(params, 0, 1, normalise=False)
    np.testing.assert_allclose(
        drawn["kernel"], np.sqrt(8) * plain["kernel"] + 1, rtol=1e-5, atol=1e-6
    )
    assert np.mean(drawn["kernel"]) == pytest.approx(1, abs=0.05)
    assert np.var(drawn["kernel"]) == pytest.approx(8, abs=0.2)


def test_leaves_may_be_left_where_they_are(timer):
    _, params, _ = timer
    (way,) = landscape.random_directions(params, 0, 1, zero_vectors=True, skip="^embed/")
    still = {path for path, leaf in trees.flatten(way).items() if not np.any(leaf)}
    want = {
        path
        for path, leaf in trees.flatten(params).items()
        if leaf.ndim <= 1 or path.startswith("embed/")
    }
    assert still == want
    with pytest.raises(ValueError, match="no path"):
        landscape.random_directions(params, skip="^nothing/")
    with pytest.raises(ValueError, match="at least 1 direction"):
        landscape.random_directions(params, n=0)


def test_a_plane_goes_through_three_models():
    draw = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    models = {
        name: {"w": jnp.asarray(w)} for name, w in zip(("pretrained", "random", "tuned"), draw)
    }
    plane = landscape.plane_through(models)
    u, v = plane.directions
    np.testing.assert_allclose(
        [ways._norm(u), ways._norm(v), ways._dot(u, v)], [1, 1, 0], atol=1e-6
    )
    for name, (x, y) in plane.places.items():
        there = grid.moved(plane.origin, plane.directions, jnp.array([x, y]))
        np.testing.assert_allclose(there["w"], models[name]["w"], atol=1e-5)
    x, y = plane.axes(points=5)
    assert (
        x[0] < 0 < plane.places["random"][0] < x[-1] and y[0] < 0 < plane.places["tuned"][1] < y[-1]
    )

    with pytest.raises(ValueError, match="three models, got 2"):
        landscape.plane_through({"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(2)}})
    with pytest.raises(ValueError, match="on one line"):
        landscape.plane_through({name: {"w": i * jnp.ones(2)} for i, name in enumerate("abc")})
    with pytest.raises(ValueError, match="the same model"):
        landscape.plane_through({name: {"w": jnp.ones(2)} for name in "abc"})


def test_the_plane_of_a_trajectory_holds_its_components():
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(6, 2)))[0].T
    spots = np.array([[4, 0], [3, 1], [1, -1], [0.5, 0.2], [0, 0]])
    run = [
        {"w": jnp.asarray(a * u + b * v + 0.001 * rng.normal(size=6), jnp.float32)}
        for a, b in spots
    ]
    plane = landscape.trajectory_plane(run)
    assert list(plane.places) == ["0", "1", "2", "3", "4"] and plane.places["4"] == (0.0, 0.0)
    assert (
        sum(plane.explained) == pytest.approx(1, abs=1e-4)
        and plane.explained[0] > plane.explained[1]
    )
    # In the plane all distances are as they were.
    found = np.array(list(plane.places.values()))
    np.testing.assert_allclose(np.hypot(*found.T), np.hypot(*spots.T), atol=0.01)
    with pytest.raises(ValueError, match="at least 3 checkpoints"):
        landscape.trajectory_plane(run[:2])
    with pytest.raises(ValueError, match="on one line"):
        landscape.trajectory_plane([{"w": float(i) * jnp.ones(2)} for i in range(4)])


# --------------------------------------------------------------------------------------------------
# the loss of a split


def test_the_centre_is_the_test_mse(timer):
    """Spec: the value at (0, 0) equals the test MSE."""
    model, params, splits = timer
    want = forecasting.evaluate(model, params, splits.test)["mse"]
    assert splits.test.n % 16  # the last batch is not full
    for batch_size in (None, 16):
        loss = landscape.split_loss(model, splits.test, batch_size=batch_size)
        np.testing.assert_allclose(jax.jit(loss)(params), want, rtol=1e-6)
    found = landscape.surface(loss, params, landscape.random_directions(params), points=3)
    np.testing.assert_allclose(found.loss[1, 1], want, rtol=1e-6)
    assert found.loss[0, 0] != found.loss[1, 1]


@pytest.mark.slow
def test_the_own_loss_is_that_of_training(timer):
    model, params, splits = timer
    windows = splits.training(model.horizon)
    batch = windows.gather(np.arange(windows.n))
    want, slope = jax.jit(jax.value_and_grad(model.loss))(params, batch)
    for batch_size in (None, 64):
        loss = landscape.split_loss(model, windows, kind="own", batch_size=batch_size)
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-5)


def test_missing_targets_do_not_count(timer):
    model, params, splits = timer
    values = np.array(splits.test.values)
    values[:, -5:] = np.nan
    windows = dataclasses.replace(splits.test, values=jnp.asarray(values))
    want = forecasting.evaluate(model, params, windows)["mse"]
    loss = landscape.split_loss(model, windows)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_sample_is_fixed_and_spread(timer):
    model, _, splits = timer
    loss = landscape.split_loss(model, splits.test, sample=5)
    n = splits.test.n
    assert loss.windows.n == 5
    found = loss.windows.gather(np.arange(5))
    want = splits.test.gather(np.linspace(0, n - 1, 5).astype(int))
    chex.assert_trees_all_equal(found, want)
    assert landscape.split_loss(model, splits.test, sample=10**9).windows.n == n


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "mae"}, "kind must be one of"),
        ({"sample": 0}, "at least 1 window"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_losses_that_are_none_are_refused(timer, options, message):
    model, _, splits = timer
    with pytest.raises(ValueError, match=message):
        landscape.split_loss(model, splits.test, **options)


# --------------------------------------------------------------------------------------------------
# pictures


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plane = landscape.surface(bowl, PARAMS, (RIGHT, UP), points=5)
    steep = dataclasses.replace(plane, loss=np.where(plane.loss > 4, np.inf, plane.loss))
    line = landscape.surface(bowl, PARAMS, RIGHT, points=5)
    for draw, shown in (
        (landscape.draw_contours, {"a": plane, "b": steep}),
        (landscape.draw_hills, {"a": plane, "b": steep}),
        (landscape.draw_lines, {"a": plane, "b": line}),
    ):
        file = draw(
            shown, tmp_path / "new" / f"{draw.__name__}.png", notes={"a": "top eigenvalue 6"}
        )
        assert file.read_bytes()[:4] == b"\x89PNG"
    landscape.draw_contours(
        {"a": plane}, tmp_path / "places.png", places={"here": (0, 0), "there": (0.5, 0.5)}
    )
    with pytest.raises(ValueError, match="draw_lines"):
        landscape.draw_contours({"a": line}, tmp_path / "no.png")
    with pytest.raises(ValueError, match="no surface"):
        landscape.draw_lines({}, tmp_path / "no.png")


def test_both_rooms_are_there_after_one_import():
    assert ltsm_jax.landscape.surface is landscape.surface
    assert callable(ltsm_jax.curvature.top_eigenvalues) and callable(ltsm_jax.curvature.trace)
