"""TimesFM 3.0: published sizes, worked examples, covariates, and what goes wrong in words."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_widths import narrowed

from converters import CheckpointError, import_checkpoint, tables
from converters import timesfm_3 as converter
from converters.torch_files import write_safetensors
from ltsm_jax import hub, trees
from ltsm_jax.models import folders
from ltsm_jax.models.timesfm_3 import (
    PRESETS,
    TimesFM3,
    TimesFM3Config,
    fit_trend,
    quantile_errors,
    refine,
    root,
    with_ends,
)

CONFIG = TimesFM3.small()
NAME = "google/timesfm-3.0-pytorch"
predict = jax.jit(
    lambda model, horizon, params, context, past, known: model.predict_with(
        params, context, horizon, past=past, known=known
    ),
    static_argnums=(0, 1),
)


@pytest.fixture(scope="module")
def params():
    """A fresh draw with uneven norms and scalings: with even ones, positions are relative."""
    drawn = jax.jit(TimesFM3(CONFIG).init)(jax.random.key(0))
    rng, flat = np.random.default_rng(0), trees.flatten(drawn)
    for path, leaf in flat.items():
        if path.endswith(("/scale", "/scaling")):
            flat[path] = jnp.asarray(leaf + rng.uniform(-0.5, 0.5, leaf.shape), jnp.float32)
    return trees.unflatten(flat)


def series(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def having(**options):
    return TimesFM3(dataclasses.replace(CONFIG, **options))


def test_published_parameter_count():
    assert trees.count(folders.param_shapes(TimesFM3(PRESETS[NAME]))) == 330_710_976


def test_the_licence_must_be_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path))
    monkeypatch.delenv(hub.ACCEPT, raising=False)
    assert hub.is_non_commercial(TimesFM3.licence)
    with pytest.raises(hub.LicenceError, match="timesfm-non-commercial-license-v1.0") as error:
        hub.require_licence(NAME, TimesFM3.licence)
    assert f"ltsm_jax.load('{NAME}', accept_license=True)" in str(error.value)
    hub.require_licence(NAME, TimesFM3.licence, accept=True)
    hub.require_licence(NAME, TimesFM3.licence)


# --- pieces


def test_the_scale_takes_in_the_medians():
    """By hand, one variate: two seen patches of two points, then three hidden ones.

    An output is two patches.
    """
    values = np.array([1.0, 3.0, 5.0, 7.0])
    stats = (np.array([2.0, 4.0]), np.array([2.0, 4.0]), np.array([1.0, values.std()]))
    stats = tuple(np.pad(x, (0, 3), mode="edge").reshape(1, 1, 5).astype(np.float32) for x in stats)
    median = np.random.default_rng(0).normal(size=(1, 1, 5, 4)).astype(np.float32)
    shown = np.array([[True, True, False, False, False]])
    mean, std = refine(stats, median, shown, 2, 1e20)
    np.testing.assert_array_equal(mean[0, 0, :2], [2, 4])
    np.testing.assert_array_equal(std[0, 0, :2], stats[2][0, 0, :2])

    # The last seen patch forecasts two patches; the second of them forecasts the third.
    first = median[0, 0, 1] * values.std() + 4
    seen = np.concatenate([values, first[:2]])
    np.testing.assert_allclose([mean[0, 0, 2], std[0, 0, 2]], [seen.mean(), seen.std()], rtol=1e-5)
    seen = np.concatenate([values, first])
    np.testing.assert_allclose([mean[0, 0, 3], std[0, 0, 3]], [seen.mean(), seen.std()], rtol=1e-5)
    seen = np.concatenate([seen, (median[0, 0, 3] * seen.std() + seen.mean())[:2]])
    np.testing.assert_allclose([mean[0, 0, 4], std[0, 0, 4]], [seen.mean(), seen.std()], rtol=1e-5)


def test_the_root_has_no_slope_at_zero():
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(root))(jnp.array([0.0, -1.0, 4.0])), [0, 0, 0.25]
    )


def test_lines_are_fitted_to_what_is_observed():
    """Against NumPy, in float64; large offsets and constants do not tip the choice."""
    time = (np.arange(30) - 29) / 30
    noise = series(30)
    rows = {"line": 20 * time + 0.1 * noise, "noise": noise, "constant": np.full(30, 3.7)}
    rows |= {
        "far": 1e6 + noise,
        "far line": 1e6 + 50 * time + noise,
        "one value": noise,
        "none": noise,
    }
    x = np.stack(list(rows.values())).astype(np.float32)[None]
    missing = np.random.default_rng(1).random(x.shape) < 0.2
    missing[0, -2], missing[0, -1] = True, True
    missing[0, -2, 7] = False
    found = jax.jit(lambda x, observed: fit_trend(x, observed, 0.5))(x, ~missing)
    used = dict(zip(rows, np.asarray(found.used)[0].tolist(), strict=True))
    assert used == dict.fromkeys(rows, False) | {"line": True, "far line": True}
    for i, name in enumerate(rows):
        seen = ~missing[0, i]
        if name in ("one value", "none"):
            want = 0.0, x[0, i, 7] if name == "one value" else 0.0
        else:
            want = np.polyfit(time[seen], x[0, i, seen].astype(np.float64), 1)
        got = found.slope[0, i], found.level[0, i]
        np.testing.assert_allclose(
            got, want, rtol=1e-4, atol=2e-5 + 1e-7 * abs(want[1]), err_msg=name
        )


def test_gaps_lie_between_their_neighbours():
    x = np.array([[np.nan, 2, np.nan, 4, np.nan], [np.nan] * 5], np.float32)
    np.testing.assert_array_equal(with_ends(x), [[2, 2, 3, 4, 4], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "stitching, horizon, want",
    [
        (True, 1, (1, 2)),
        (True, 16, (1, 2)),
        (True, 17, (2, 3)),
        (True, 33, (4, 5)),
        (False, 16, (1, 2)),
        (False, 17, (2, 4)),
    ],
)
def test_a_horizon_takes_as_many_patches_as_it_needs(stitching, horizon, want):
    assert having(stitching=stitching).outputs(horizon) == want


def test_overlapping_outputs_are_blended():
    """Patches of 8, outputs of 16: eight steps of the first, eight mixed, eight of the last."""
    y = np.stack([np.full(16, 1.0), np.full(16, 3.0)])[None, None, :, :, None].astype(np.float32)
    joined = TimesFM3(CONFIG)._joined(y)[0, 0, :, 0]
    np.testing.assert_allclose(joined, [*[1] * 8, *np.linspace(1, 3, 8), *[3] * 8], rtol=1e-6)


def test_errors_are_those_of_the_median_and_of_all_quantiles():
    y, target = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([3.0])
    np.testing.assert_allclose(
        quantile_errors(y, target, (0.1, 0.5, 0.9)), [4 + (0.3 + 1.0 + 0.9) / 3], rtol=1e-6
    )


# --- forecasts


def test_a_straight_line_goes_on(params):
    """Nothing is left of it, so the network has nothing to add: with a covariate beside it, too."""
    x = np.stack([0.5 * np.arange(30) - 3, np.full(30, 3.7)])[None].astype(np.float32)
    found = predict(TimesFM3(CONFIG), 20, params, x, None, None)
    np.testing.assert_allclose(found.point[0, 0], 0.5 * np.arange(30, 50) - 3, rtol=1e-4)
    np.testing.assert_allclose(found.quantiles[0, 1], 3.7, rtol=1e-6)


def test_quantiles_are_in_order_and_the_point_is_their_median(params):
    found = predict(TimesFM3(CONFIG), 40, params, series(2, 2, 32), None, None)
    assert (jnp.diff(found.quantiles, axis=-1) >= 0).all()
    np.testing.assert_array_equal(found.quantiles[..., 4], found.point)
    assert found.levels == CONFIG.quantiles


def test_the_forecast_of_the_turned_series_is_turned_if_asked_for(params):
    model, x = having(flip_average=True), series(1, 2, 32)
    up, down = (predict(model, 20, params, each, None, None) for each in (x, -x))
    np.testing.assert_allclose(down.quantiles, -up.quantiles[..., ::-1], atol=1e-5)


def test_forecasts_can_be_kept_from_falling_below_zero(params):
    x = 0.1 + np.abs(series(1, 2, 32))
    x[0, 1, 3] = -1
    free, kept = (
        predict(having(infer_is_positive=on), 40, params, x, None, None).quantiles
        for on in (False, True)
    )
    assert (free[0, 0] < 0).any()
    np.testing.assert_array_equal(kept[0, 0], jnp.maximum(free[0, 0], 0))
    np.testing.assert_array_equal(kept[0, 1], free[0, 1])


def test_what_is_in_front_of_the_first_value_does_not_count(params):
    """Neither missing values nor covariates from then; in the original the padding counts."""
    x, past, known = series(1, 2, 20), series(1, 1, 20, seed=1), series(1, 1, 36, seed=2)
    padded = np.pad(x, ((0, 0), (0, 0), (28, 0)), constant_values=np.nan)
    beside = [np.concatenate([series(1, 1, 28, seed=3), each], axis=-1) for each in (past, known)]
    for model, same in ((TimesFM3(CONFIG), True), (having(padding_counts=True), False)):
        alone = predict(model, 16, params, x, past, known)
        behind = predict(model, 16, params, padded, *beside)
        assert np.allclose(alone.quantiles, behind.quantiles, rtol=1e-4, atol=1e-4) == same


def test_variates_and_covariates_are_seen(params):
    """Each changes the forecast of the first target; so does what is known of the future."""
    x, past, known = series(1, 2, 32), series(1, 1, 32, seed=1), series(1, 1, 48, seed=2)
    model, changed = TimesFM3(CONFIG), {}
    first = predict(model, 16, params, x, past, known).point[0, 0]
    changed["target"] = predict(
        model, 16, params, x * np.array([[[1], [-2]]], np.float32), past, known
    )
    changed["past"] = predict(model, 16, params, x, -2 * past, known)
    changed["known"] = predict(
        model, 16, params, x, past, np.where(np.arange(48) < 32, known, 1 - 2 * known)
    )
    for name, found in changed.items():
        assert np.abs(found.point[0, 0] - first).max() > 1e-3, name
    alone = dataclasses.replace(CONFIG, variate_attention=False)
    assert TimesFM3(alone).variates == "independent" and model.variates == "joint"


def test_more_variates_than_see_each_other_are_forecast_in_chunks(params):
    model, x, known = having(max_variates=3), series(2, 5, 32), series(2, 1, 48, seed=1)
    found = predict(model, 16, params, x, None, known).quantiles
    assert found.shape == (2, 5, 16, 9)
    for chunk in ((0, 1), (2, 3), (4, 0)):
        part = predict(TimesFM3(CONFIG), 16, params, x[:, chunk], None, known).quantiles
        np.testing.assert_allclose(found[:, chunk[0]], part[:, 0], rtol=1e-4, atol=1e-5)

    # Of too many covariates so many are left that a target fits beside them.
    past, known = model._thinned(series(1, 4, 32), series(1, 4, 48), 2)
    assert past.shape == (1, 0, 32) and known.shape == (1, 2, 48)


# --- losses


def test_the_loss_does_not_know_the_unit(params):
    x, known = series(2, 2, 52), series(2, 1, 52, seed=1)
    batch = {"context": x[..., :32], "target": x[..., 32:], "known": known}
    loss = jax.jit(lambda batch: TimesFM3(CONFIG).loss(params, batch))
    other = batch | {"context": 100 * batch["context"] + 7, "target": 100 * batch["target"] + 7}
    np.testing.assert_allclose(loss(other), loss(batch), rtol=1e-4)

    # Of the targets alone, but from the covariates too.
    assert abs(loss(batch | {"known": known * np.float32(-2)}) - loss(batch)) > 1e-4
    point = jax.jit(lambda batch: TimesFM3(CONFIG).point_loss(params, batch))(batch)
    forecast = predict(
        having(sort_quantiles=False), 20, params, batch["context"], None, known
    ).point
    np.testing.assert_allclose(point, np.square(forecast - batch["target"]).mean(), rtol=1e-4)


# --- configs


def values(width):
    """Layers of which one has values of another width."""
    layer = CONFIG.layers[0]
    return (dataclasses.replace(layer, seq=dataclasses.replace(layer.seq, value=width)), layer)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": ()}, "at least one layer"),
        ({"head_dim": 7}, "even"),
        ({"output_len": 12}, "whole patches"),
        ({"patch_len": 0}, "positive"),
        ({"quantiles": (0.5, 1.0)}, "quantiles must rise within .0, 1."),
        ({"quantiles": (0.5, 0.1)}, "must rise"),
        ({"value_clip": 0.0}, "value_clip"),
        ({"detrend_threshold": -1.0}, "detrend_threshold"),
        ({"identity_skip": True}, "identity_skip needs"),
        ({"layers": values(9)}, "width from 0 to 8"),
        ({"value_norm": True, "layers": values(4)}, "whole values"),
    ],
)
def test_a_config_says_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_a_pruned_model_is_of_the_same_class():
    pruned = narrowed(CONFIG, 0, seq={"heads": 1}, var={"heads": 0}, ffn=5)
    model = TimesFM3(narrowed(pruned, 1, var={"heads": 1, "value": 3}))
    shapes = folders.param_shapes(model)
    assert shapes["layer_0"]["seq"]["q"]["kernel"].shape == (CONFIG.d_model, 1, CONFIG.head_dim)
    assert "q" not in shapes["layer_0"]["var"]
    assert shapes["layer_1"]["var"]["out"]["kernel"].shape == (1, 3, CONFIG.d_model)
    context = jax.ShapeDtypeStruct((2, 3, 50), jnp.float32)
    found = jax.eval_shape(lambda params, x: model.predict(params, x, 40), shapes, context)
    assert found.point.shape == (2, 3, 40) and found.quantiles.shape == (2, 3, 40, 9)
    with pytest.raises(ValueError, match="pruned model can't be exported"):
        converter.published(model.config)


# --- checkpoints


def checkpoint(folder, params, published=None, change=None):
    state, _ = tables.to_state(converter.keys(CONFIG), params)
    if change:
        change(state)
    write_safetensors(folder / "model.safetensors", state, overwrite=True)
    if published is not None:
        (folder / "config.json").write_text(json.dumps(published))
    return folder


def nested(fields, path, value):
    """A copy of nested fields with one of them changed, or without it."""
    (name, *rest), copy = path, dict(fields)
    if rest:
        copy[name] = nested(copy[name], rest, value)
    elif value is ...:
        del copy[name]
    else:
        copy[name] = value
    return copy


def test_the_published_config_gives_the_config_back(params, tmp_path):
    for config in (dataclasses.replace(CONFIG, context_len=1024), *PRESETS.values()):
        told = json.loads(json.dumps(converter.published(config)))
        assert TimesFM3Config.from_published(told) == config
    model, got, *_ = import_checkpoint(checkpoint(tmp_path, params, converter.published(CONFIG)))
    assert model.config == dataclasses.replace(CONFIG, context_len=1024)
    chex.assert_trees_all_equal(got, params)


def test_the_published_sizes_are_known_without_a_config():
    model = TimesFM3(PRESETS[NAME])
    state = {}
    for path, leaf in trees.flatten(folders.param_shapes(model)).items():
        # As they lie in the file, but for their order of axes, which only these need.
        key, _ = tables.key_of(converter.keys(model.config), path)
        shape = (
            leaf.shape[::-1]
            if key.endswith(("hidden_layer.weight", "ff0.weight", "head.weight"))
            else leaf.shape
        )
        state[key] = np.broadcast_to(np.float32(0), shape)
    assert len(state) == 445
    config, notes = converter.configure(state, None, "file")
    assert config == model.config and NAME in notes[0]


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("transformer_config num_layers", 10**9, "num_layers: not an integer from 1 to 128"),
        (
            "transformer_config transformer num_heads",
            4,
            "head_dim: 4 by the config, 8 in the weights",
        ),
        ("transformer_config transformer num_heads", 3, "num_heads: 3 do not divide model_dims"),
        ("transformer_config transformer use_bias", 1, "transformer.use_bias: not true or false"),
        ("transformer_config transformer ff_activation", "gelu", "ff_activation: not one of relu"),
        ("transformer_config transformer", 3, "transformer_config.transformer: not an object"),
        ("residual_block_config", ..., "residual_block_config: missing"),
        ("residual_block_config hidden_dims", "wide", "block_config.hidden_dims: not an integer"),
        (
            "residual_block_config output_dims",
            8,
            "model_dims: not residual_block_config.output_dims",
        ),
        ("input_patch_len", -8, "input_patch_len: not an integer"),
        ("output_patch_len", 24, "outputs: 216 by the config, 144 in the weights"),
        ("quantiles", [0.5, None], "quantiles: not all of them numbers"),
        ("input_transform", "log", "input_transform: not one of identity"),
        ("value_clip", "large", "value_clip: not a number"),
    ],
)
def test_contradictions_are_told(params, tmp_path, path, value, said):
    published = nested(converter.published(CONFIG), path.split(), value)
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(checkpoint(tmp_path, params, published))


def test_a_config_that_lacks_fields_is_told():
    with pytest.raises(ValueError, match="transformer_config.transformer.use_rope_var"):
        TimesFM3Config.from_published(
            nested(
                converter.published(CONFIG),
                ["transformer_config", "transformer", "use_rope_var"],
                ...,
            )
        )


def test_missing_and_strange_keys_are_listed(params, tmp_path):
    def change(state):
        del state["pre_transformer_resblock.hidden_layer.weight"]
        state["transformer_stack.layers.0.seq_attn.rotary"] = np.zeros(2, np.float32)

    with pytest.raises(CheckpointError) as error:
        import_checkpoint(checkpoint(tmp_path, params, converter.published(CONFIG), change))
    assert "embed/hidden/kernel: missing in the checkpoint" in str(error.value)
    assert "transformer_stack.layers.0.seq_attn.rotary': no rule matches" in str(error.value)
