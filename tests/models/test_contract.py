"""What every registered family promises, run through all of them at a small random size."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.layers.context import LARGEST
from ltsm_jax.models import FAMILIES, family, folders

slow = lambda x: pytest.param(x, marks=pytest.mark.slow)  # noqa: E731
HORIZONS, LENGTHS = (1, slow(200)), (3, slow(50))


@dataclasses.dataclass(frozen=True)
class Case:
    """A family at its small size: the model, a random draw, its variates in one window, and
    forecasts compiled once.
    """

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
        return np.asarray(np.sin(2 * np.pi * np.arange(t) / 24 + phase) + 0.1 * noise, np.float32)


TRACES = []


def _predict(model, params, context, horizon):
    TRACES.append((model, context.shape, horizon))
    return model.predict(params, context, horizon)


PREDICT = jax.jit(_predict, static_argnums=(0, 3))
INIT = jax.jit(lambda model, key: model.init(key), static_argnums=0)

# Rows of the batches that several tests forecast with one program.
ROWS = 13


# A decoder, a mixer, an encoder with covariates, and experts; what takes long of the others is in
# the slow part.
QUICK = ("timer", "ttm", "chronos_2", "time_moe")


@functools.cache
def case_of(name):
    cls = FAMILIES[name]
    model = cls(cls.small())
    params = INIT(model, jax.random.key(1))
    model, params = model.for_series(params, n_variates=2, freq="h", key=jax.random.key(2))
    return Case(model, params, 2 if model.variates == "joint" else 1)


@pytest.fixture(scope="module", params=[name if name in QUICK else slow(name) for name in FAMILIES])
def case(request):
    """For what compiles forecasts or losses."""
    return case_of(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def any_case(request):
    """For what takes no time: every family in every run."""
    return case_of(request.param)


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


def with_value(x, where, value):
    """A copy with `value` at an index: what `.at[where].set(value)` is for, without a program per
    shape.
    """
    x = x.copy()
    x[where] = value
    return x


def hostile(x_CT):
    """Rows of one batch, each with another trouble; the batch is as long as the context."""
    rows = {}
    rows["missing inside"] = with_value(x_CT, np.s_[..., 5:9], np.nan)
    rows["missing at the start"] = with_value(x_CT, np.s_[..., : x_CT.shape[-1] // 2], np.nan)
    rows["missing at the end"] = with_value(x_CT, np.s_[..., -3:], np.nan)
    rows["nothing observed"] = np.full_like(x_CT, np.nan)
    rows["constant"] = np.full_like(x_CT, 3.7)
    rows["zero"] = np.zeros_like(x_CT)
    rows["1e-8"] = x_CT * np.float32(1e-8)
    rows["1e8"] = x_CT * np.float32(1e8)
    rows["offset 1e6"] = x_CT + np.float32(1e6)
    rows["1e-30"] = x_CT * np.float32(1e-30)
    rows["as large as allowed"] = x_CT / np.abs(x_CT).max() * np.float32(LARGEST)
    rows["constant 1e-30"] = np.full_like(x_CT, 1e-30)
    rows["constant, as large as allowed"] = np.full_like(x_CT, LARGEST)
    assert len(rows) == ROWS
    return rows


def test_troubled_series_give_finite_forecasts(case):
    rows = hostile(case.series(1, case.model.context_len)[0])
    found = case.predict(np.stack(list(rows.values())), case.model.horizon)
    bad = [name for i, name in enumerate(rows) if not np.isfinite(np.asarray(found.point[i])).all()]
    assert not bad
    check_finite(found, len(rows), case.c, case.model.horizon)


def test_a_series_without_any_value_is_refused_where_values_can_be_seen(case):
    x = case.series(2, case.model.context_len)
    messages = {
        np.nan: "no observed value",
        np.inf: "infinite",
        1e17: r"values beyond 1e\+16 in \(batch, variate\) \[\[1, 0\]",
    }
    for value, message in messages.items():
        with pytest.raises(ValueError, match=message):
            case.model.predict(case.params, jnp.asarray(with_value(x, 1, value)), 4)


def test_missing_values_are_not_seen(case):
    """What stands in place of NaN in the caller's array cannot matter: there is nothing but NaN to
    see.
    """
    x = case.series(ROWS, case.model.context_len)
    gap = with_value(x, np.s_[..., 3:6], np.nan)
    whole, broken = (case.predict(each, case.model.horizon).point for each in (x, gap))
    assert np.isfinite(np.asarray(broken)).all()
    for row, (one, other) in enumerate(zip(np.asarray(whole), np.asarray(broken), strict=True)):
        assert not np.array_equal(one, other), f"the gap of row {row} must matter"


def test_missing_values_in_front_change_nothing_where_the_family_says_so(case):
    # Shape and horizon of test_any_context, whose program it is.
    x = case.series(2, 3)
    short = case.predict(x, 7)
    if not case.model.missing_in_front or short.samples is not None:
        # draws follow the bits of the context; what they are drawn from is tested with the family
        return
    filled = with_value(
        np.full((2, case.c, case.model.context_len), np.nan, np.float32), np.s_[..., -3:], x
    )
    long = case.predict(filled, 7)
    np.testing.assert_allclose(short.point, long.point, rtol=2e-4, atol=2e-5)


def test_rows_do_not_see_each_other(case):
    x = case.series(ROWS, case.model.context_len)
    together = np.asarray(case.predict(x, case.model.horizon).point)

    # Two rows among others, which are as different as can be: a batch of the same shape is the same
    # program.
    others = with_value(-7 * x + 3, [0, 3], x[[0, 3]])
    among = np.asarray(case.predict(others, case.model.horizon).point)
    np.testing.assert_allclose(together[[0, 3]], among[[0, 3]], rtol=2e-4, atol=2e-5)
    assert not np.allclose(together[1], among[1], rtol=1e-3)


def test_equal_shapes_are_traced_once(case):
    x = case.series(ROWS, case.model.context_len)
    case.predict(x, case.model.horizon)
    before = len(TRACES)
    again = type(case.model)(case.model.config)
    halves = jax.tree.map(lambda leaf: (np.asarray(leaf) * 0.5).astype(leaf.dtype), case.params)
    PREDICT(again, halves, x + 1, case.model.horizon)
    assert len(TRACES) == before


# Families whose point loss is that of a taught path: each step is given the true values before it.
TAUGHT = ("chronos_t5", "moirai_moe")
# Families whose own loss is not defined by the target alone, with the reason.
OTHER_TARGETS = {
    "timer": "the target must be a whole patch",
    "moment": "patches of the whole window are hidden at random",
}


def _losses(params, model, batch, key):
    own = model.loss(params, batch, key, False)
    steps = min(model.horizon, model.recipe().horizon)
    point = model.point_loss(params, dict(batch) | {"target": batch["target"][..., :steps]}, key)
    return own + point, (own, point)


LOSSES = jax.jit(_losses, static_argnums=1)
GRADIENTS = jax.jit(jax.grad(_losses, has_aux=True), static_argnums=1)
KEY = jax.random.key(3)


def batch_of(case):
    """Four rows, context and target of the model's own lengths, each of weight 1."""
    t = case.model.context_len
    x = case.series(4, t + case.model.horizon)
    return {"context": x[..., :t], "target": x[..., t:], "weight": np.ones(4, np.float32)}


def finite_losses(case, batch):
    """(own loss, point loss) of a batch, both finite."""
    # In the slow part the gradients are compiled in any case, and give the losses too.
    program = LOSSES if case.model.family in QUICK else GRADIENTS
    _, found = program(case.params, case.model, batch, KEY)
    for name, value in zip(("own", "point"), found, strict=True):
        assert value.shape == (), name
        assert np.isfinite(value), name
    return found


def with_holes(case, batch):
    """The batch with missing values: here and there, whole stretches, and one variate that is
    nowhere observed.
    """
    t = batch["context"].shape[-1]
    holes = np.random.default_rng(5).random((4, case.c, t + batch["target"].shape[-1])) < 0.3
    context = with_value(batch["context"], holes[..., :t], np.nan)
    target = with_value(batch["target"], holes[..., t:], np.nan)
    context[0, :, : t // 2] = np.nan
    context[1, :, -3:] = np.nan
    context[2, 0] = np.nan
    return batch | {"context": context, "target": target}


def standing_still(batch):
    """The batch with contexts that do not move: a constant, zeros, a constant whose target moves,
    and a step.
    """
    context, target = batch["context"].copy(), batch["target"].copy()
    for row, value in enumerate((3.7, 0.0, -1e4, 0.0)):
        context[row] = value
    context[3, ..., -1] = 1.0
    target[0], target[1] = 3.7, 0.0
    return batch | {"context": context, "target": target}


@pytest.mark.slow
def test_gradients_of_the_losses_are_finite(case):
    batch = batch_of(case)
    broken = with_holes(case, batch)
    nothing = broken | {"target": np.full_like(batch["target"], np.nan)}
    cases = {
        "whole": batch,
        "with holes": broken,
        "without a target": nothing,
        "still": standing_still(batch),
    }
    for name, each in cases.items():
        gradients, _ = GRADIENTS(case.params, case.model, each, KEY)
        for path, leaf in trees.flatten(gradients).items():
            assert np.isfinite(np.asarray(leaf)).all(), f"{name}: {path}"


def test_rows_of_weight_0_are_as_good_as_absent(case):
    batch = batch_of(case)

    # Whatever stands in them.
    batch["weight"] = with_value(batch["weight"], 3, 0.0)
    other = {
        name: x if name == "weight" else with_value(x, 3, x[3] * -2 + 5)
        for name, x in batch.items()
    }
    np.testing.assert_allclose(finite_losses(case, batch), finite_losses(case, other), rtol=1e-5)


def test_training_takes_missing_values(case):
    batch = with_holes(case, batch_of(case))
    finite_losses(case, batch)

    # A row without any target counts as absent in the mean over what is observed.
    batch["target"] = with_value(batch["target"], 1, np.nan)
    _, with_it = finite_losses(case, batch)
    _, without_it = finite_losses(case, batch | {"weight": with_value(batch["weight"], 1, 0.0)})
    np.testing.assert_allclose(with_it, without_it, rtol=1e-5)

    # No target at all: nothing to learn from, and no NaN.
    _, nothing = finite_losses(case, batch | {"target": np.full_like(batch["target"], np.nan)})
    assert nothing == 0


def test_series_that_stand_still_give_finite_losses(case):
    finite_losses(case, standing_still(batch_of(case)))


def test_a_missing_target_does_not_count(case):
    batch = batch_of(case)
    odd = np.arange(batch["target"].shape[-1]) % 2 == 1
    halves = [
        finite_losses(
            case, batch | {"target": np.where(gone, np.float32(np.nan), batch["target"])}
        )[1]
        for gone in (odd[None, None], ~odd[None, None])
    ]
    if case.model.family not in TAUGHT:
        # Each half is a mean over as many steps as the other, so the mean of both is that of the
        # whole.
        np.testing.assert_allclose(sum(halves) / 2, finite_losses(case, batch)[1], rtol=1e-4)


@pytest.mark.slow
def test_a_target_missing_at_its_end_is_a_shorter_one(case):
    if case.model.family in OTHER_TARGETS:
        pytest.skip(OTHER_TARGETS[case.model.family])
    batch = batch_of(case)
    own = jax.jit(lambda batch: case.model.loss(case.params, batch, KEY))
    shorter = own(batch | {"target": batch["target"][..., :-2]})
    missing, _ = finite_losses(
        case, batch | {"target": with_value(batch["target"], np.s_[..., -2:], np.nan)}
    )
    np.testing.assert_allclose(shorter, missing, rtol=1e-4)


def test_training_noise_follows_the_key(case):
    x = case.series(2, case.model.context_len + case.model.horizon)
    batch = {
        "context": x[..., : case.model.context_len],
        "target": x[..., case.model.context_len :],
    }
    loss = jax.jit(lambda k: case.model.loss(case.params, batch, k, True))
    first, again = loss(jax.random.key(0)), loss(jax.random.key(0))
    assert np.isfinite(first) and first == again


def test_init_is_a_function_of_the_key(any_case):
    model = type(any_case.model)(type(any_case.model).small())
    one, same, other = (INIT(model, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_config_survives_json(any_case):
    told = json.loads(json.dumps(any_case.model.config_to_dict()))
    assert type(any_case.model).config_from_dict(told) == any_case.model.config
    assert hash(any_case.model) == hash(
        type(any_case.model)(type(any_case.model).config_from_dict(told))
    )


def test_a_folder_gives_the_model_back(any_case, tmp_path):
    folders.save(tmp_path / "model", any_case.model, any_case.params)
    model, params = folders.load_folder(tmp_path / "model")
    assert model == any_case.model
    chex.assert_trees_all_equal(params, any_case.params)


def test_declared_facts_fit_the_parameters(any_case):
    model, flat = any_case.model, trees.flatten(any_case.params)
    assert any(jax.tree.leaves(trees.select(any_case.params, model.head_leaves))), (
        "linear probing would train nothing"
    )
    if model.fixed:
        trees.select(any_case.params, model.fixed)
    if model.recipe().trainable:
        trees.select(any_case.params, model.recipe().trainable)
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


def test_the_first_published_preset_has_its_shapes(any_case):
    """The others are the same network at other sizes, and are all counted in
    `test_all_the_listed_sizes` of tests/test_cli.py.
    """
    name, config = next(iter(type(any_case.model).presets().items()))
    assert trees.count(folders.param_shapes(type(any_case.model)(config))) > 0, name


def test_published_presets_survive_json(any_case):
    for name, config in type(any_case.model).presets().items():
        told = json.loads(json.dumps(type(any_case.model)(config).config_to_dict()))
        assert type(any_case.model).config_from_dict(told) == config, name
