"""What every registered family promises, run through all of them at a small random size."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.models import FAMILIES, family, folders

slow = lambda x: pytest.param(x, marks=pytest.mark.slow)  # noqa: E731
HORIZONS, LENGTHS = (1, slow(200)), (3, slow(50))


@dataclasses.dataclass(frozen=True)
class Case:
    """A family at its small size: the model, a random draw, its variates in one window, and forecasts compiled once."""

    model: family.Model
    params: trees.Tree
    c: int

    def predict(self, context, horizon):
        """Forecast as the library makes it: under jit."""
        return PREDICT(self.model, self.params, context, horizon)

    def series(self, b, t, seed=0):
        """[b, C, t]: a wave with noise, another in every row."""
        noise = np.random.default_rng(seed).normal(size=(b, self.c, t))
        phase = np.arange(b * self.c).reshape(b, self.c, 1)
        return jnp.asarray(np.sin(2 * np.pi * np.arange(t) / 24 + phase) + 0.1 * noise, jnp.float32)


TRACES = []


def _predict(model, params, context, horizon):
    TRACES.append((model, context.shape, horizon))
    return model.predict(params, context, horizon)


PREDICT = jax.jit(_predict, static_argnums=(0, 3))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    cls = FAMILIES[request.param]
    model = cls(cls.small())
    params = jax.jit(model.init)(jax.random.key(1))
    model, params = model.for_series(params, n_variates=2, freq="h", name="made up", key=jax.random.key(2))
    return Case(model, params, 2 if model.variates == "joint" else 1)


def check_finite(forecast, b, c, h):
    assert forecast.point.shape == (b, c, h)
    assert np.isfinite(np.asarray(forecast.point)).all()
    if forecast.quantiles is not None:
        assert forecast.quantiles.shape == (b, c, h, len(forecast.levels))
        assert np.isfinite(np.asarray(forecast.quantiles)).all()
    else:
        assert forecast.levels == ()
    if forecast.samples is not None:
        assert forecast.samples.shape[:3] == (b, c, h)
        assert np.isfinite(np.asarray(forecast.samples)).all()


@pytest.mark.parametrize("horizon", HORIZONS)
def test_any_horizon(case, horizon):
    check_finite(case.predict(case.series(2, case.model.context_len), horizon), 2, case.c, horizon)


@pytest.mark.parametrize("t", [*LENGTHS, slow("longer than the maximum")])
def test_any_context(case, t):
    t = case.model.context_len * 2 + 3 if isinstance(t, str) else t
    check_finite(case.predict(case.series(2, t), 7), 2, case.c, 7)


def hostile(x_BCT):
    """Rows of one batch, each with another trouble; the batch is as long as the context."""
    rows = {}
    rows["missing inside"] = x_BCT[0].at[..., 5:9].set(jnp.nan)
    rows["missing at the start"] = x_BCT[0].at[..., : x_BCT.shape[-1] // 2].set(jnp.nan)
    rows["missing at the end"] = x_BCT[0].at[..., -3:].set(jnp.nan)
    rows["nothing observed"] = jnp.full_like(x_BCT[0], jnp.nan)
    rows["constant"] = jnp.full_like(x_BCT[0], 3.7)
    rows["zero"] = jnp.zeros_like(x_BCT[0])
    rows["1e-8"] = x_BCT[0] * 1e-8
    rows["1e8"] = x_BCT[0] * 1e8
    rows["offset 1e6"] = x_BCT[0] + 1e6
    return rows


def test_troubled_series_give_finite_forecasts(case):
    rows = hostile(case.series(1, case.model.context_len))
    found = case.predict(jnp.stack(list(rows.values())), case.model.horizon)
    for i, name in enumerate(rows):
        assert np.isfinite(np.asarray(found.point[i])).all(), name
    check_finite(found, len(rows), case.c, case.model.horizon)


def test_a_series_without_any_value_is_refused_where_values_can_be_seen(case):
    x = case.series(2, case.model.context_len).at[1].set(jnp.nan)
    with pytest.raises(ValueError, match="no observed value"):
        case.model.predict(case.params, x, 4)
    with pytest.raises(ValueError, match="infinite"):
        case.model.predict(case.params, x.at[1].set(jnp.inf), 4)


def test_missing_values_are_not_seen(case):
    """What stands in place of NaN in the caller's array cannot matter: there is nothing but NaN to see."""
    x = case.series(1, case.model.context_len)
    gap = x.at[..., 3:6].set(jnp.nan)
    whole, broken = case.predict(x, 5).point, case.predict(gap, 5).point
    assert np.isfinite(np.asarray(broken)).all()
    assert not np.array_equal(np.asarray(whole), np.asarray(broken)), "the gap must matter"


def test_rows_do_not_see_each_other(case):
    x = case.series(5, case.model.context_len)
    together = case.predict(x, case.model.horizon).point
    alone = jnp.concatenate([case.predict(x[i : i + 1], case.model.horizon).point for i in (0, 3)])
    np.testing.assert_allclose(together[jnp.asarray([0, 3])], alone, rtol=2e-4, atol=2e-5)


def test_equal_shapes_are_traced_once(case):
    x = case.series(2, case.model.context_len)
    case.predict(x, case.model.horizon)
    before = len(TRACES)
    again = type(case.model)(case.model.config)
    PREDICT(again, jax.tree.map(lambda leaf: leaf * 0.5, case.params), x + 1, case.model.horizon)
    assert len(TRACES) == before


@pytest.mark.slow
def test_losses_and_their_gradients(case):
    model = case.model
    recipe = model.recipe()
    key = jax.random.key(3)
    horizon = min(model.horizon, recipe.horizon)
    x = case.series(4, model.context_len + model.horizon)
    batch = {"context": x[..., : model.context_len], "target": x[..., model.context_len :]}

    for loss, target in ((model.loss, model.horizon), (model.point_loss, horizon)):
        cut = batch | {"target": batch["target"][..., :target]}
        weighed = jax.jit(jax.value_and_grad(lambda p, w, loss=loss, cut=cut: loss(p, cut | {"weight": w}, key, False)))
        value, grads = weighed(case.params, jnp.ones(4))
        assert value.shape == () and np.isfinite(value)
        bad = [p for p, leaf in trees.flatten(grads).items() if not np.isfinite(np.asarray(leaf)).all()]
        assert not bad, bad
        # a row of weight 0 is as good as absent, whatever stands in it
        other = {name: leaf.at[3].mul(-2.0).at[3].add(5.0) for name, leaf in cut.items()}
        mask = jnp.asarray([1.0, 1, 1, 0])
        one, two = (jax.jit(lambda p, b, loss=loss: loss(p, b, key, False))(case.params, b | {"weight": mask})
                    for b in (cut, other))  # fmt: skip
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_training_noise_follows_the_key(case):
    x = case.series(2, case.model.context_len + case.model.horizon)
    batch = {"context": x[..., : case.model.context_len], "target": x[..., case.model.context_len :]}
    loss = jax.jit(lambda k: case.model.loss(case.params, batch, k, True))
    first, again = loss(jax.random.key(0)), loss(jax.random.key(0))
    assert np.isfinite(first) and first == again


def test_init_is_a_function_of_the_key(case):
    model = type(case.model)(type(case.model).small())
    init = jax.jit(model.init)
    one, same, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_config_survives_json(case):
    told = json.loads(json.dumps(case.model.config_to_dict()))
    assert type(case.model).config_from_dict(told) == case.model.config
    assert hash(case.model) == hash(type(case.model)(type(case.model).config_from_dict(told)))


def test_a_folder_gives_the_model_back(case, tmp_path):
    folders.save(tmp_path / "model", case.model, case.params)
    model, params = folders.load_folder(tmp_path / "model")
    assert model == case.model
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_declared_facts_fit_the_parameters(case):
    model, flat = case.model, trees.flatten(case.params)
    assert any(jax.tree.leaves(trees.select(case.params, model.head))), "linear probing would train nothing"
    if model.fixed:
        trees.select(case.params, model.fixed)
    if model.recipe().trainable:
        trees.select(case.params, model.recipe().trainable)
    for path, leaf in flat.items():
        rule = next((axes for pattern, axes in model.shard_rules if _matches(pattern, path)), None)
        assert rule is not None, f"no shard rule for {path}"
        assert len(rule) <= leaf.ndim, f"{path}: {rule} for {leaf.shape}"
        assert set(rule) <= {None, "data", "fsdp", "tensor"}
    assert "forecasting" in model.tasks
    assert model.licence
    recipe = model.recipe()
    assert recipe.lr > 0 and recipe.batch_size > 0 and recipe.epochs > 0 and recipe.source


def _matches(pattern, path):
    return re.search(pattern, path) is not None


def test_published_presets_have_their_shapes(case):
    for name, config in type(case.model).presets().items():
        model = type(case.model)(config)
        shapes = folders.shapes(model)
        assert trees.count(shapes) > 0, name
        assert type(model).config_from_dict(json.loads(json.dumps(model.config_to_dict()))) == config, name
