"""Chronos-Bolt's own properties, at a small random size."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from layer_widths import narrowed

from converters import CheckpointError, tables
from converters import chronos_bolt as converter
from ltsm_jax import trees
from ltsm_jax.models import folders
from ltsm_jax.models.chronos_bolt import PRESETS, ChronosBolt, ChronosBoltConfig

SMALL = ChronosBolt.small()
COUNTS = {"tiny": 8_652_672, "mini": 21_236_096, "small": 47_718_016, "base": 205_292_928}


@pytest.fixture(scope="module")
def small():
    """(model, params) with weights of order one: the original's own draw is nearly constant in its
    input.
    """
    model = ChronosBolt(SMALL)
    flat = trees.flatten(jax.device_get(jax.jit(model.init)(jax.random.key(0))))
    factor = lambda path: 1.0 if path.endswith("bias") else 20.0  # noqa: E731
    return model, trees.unflatten(
        {path: leaf * np.float32(factor(path)) for path, leaf in flat.items()}
    )


def waves(b, t):
    return jnp.asarray(
        np.sin(np.arange(t) / 3.0 + np.arange(b)[:, None, None]) * 2 + 5, jnp.float32
    )


predict = jax.jit(lambda model, *args: model.predict(*args), static_argnums=(0, 3))
apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)


@pytest.mark.parametrize("size", list(COUNTS))
def test_published_parameter_counts(size):
    assert (
        trees.count(folders.param_shapes(ChronosBolt(PRESETS[f"amazon/chronos-bolt-{size}"])))
        == COUNTS[size]
    )


@pytest.mark.slow
def test_rolled_out_as_one_would_by_hand(small):
    """Paths of growing length, one forward pass after the other."""
    model, params = small
    x, h, q = waves(2, 21), model.horizon, len(SMALL.levels)
    found = predict(model, params, x, 2 * h + 3)
    y, _ = apply(model, params, x)  # [2, 1, h, q]
    blocks, paths = [y], jnp.repeat(x, q, axis=1)
    for _ in range(2):
        paths = jnp.concatenate([paths, jnp.swapaxes(y[:, 0], 1, 2)], axis=-1)[
            ..., -model.context_len :
        ]
        all_BZH = jnp.swapaxes(apply(model, params, paths)[0], 2, 3).reshape(2, q * q, h)
        y = jnp.moveaxis(jnp.quantile(all_BZH, jnp.asarray(SMALL.levels), axis=1), 0, -1)[:, None]
        blocks.append(y)
    want = jnp.concatenate(blocks, axis=2)[..., : 2 * h + 3, :]
    np.testing.assert_allclose(found.quantiles, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.point, found.quantiles[..., SMALL.levels.index(0.5)])


def test_missing_points_on_the_left_change_nothing(small):
    model, params = small
    x = waves(2, 21)
    padded = jnp.pad(x, ((0, 0), (0, 0), (model.context_len - 21, 0)), constant_values=jnp.nan)
    np.testing.assert_allclose(
        predict(model, params, x, 5).point, predict(model, params, padded, 5).point, rtol=1e-5
    )


def test_mask_hides_points_from_the_network_and_not_from_the_scale(small):
    model, params = small
    x = waves(1, 32)
    mask = jnp.ones_like(x).at[..., 8:16].set(0)
    hidden, taps = apply(model, params, x, mask)
    whole, all_taps = apply(model, params, x, jnp.ones_like(mask))
    np.testing.assert_array_equal(taps["scale"], all_taps["scale"])
    assert not np.allclose(hidden, whole)
    np.testing.assert_array_equal(taps["seen"][0], [True, False, True, True, True])
    at_nan = apply(model, params, x.at[..., 3].set(jnp.nan), jnp.ones_like(x))[0]
    assert np.isfinite(np.asarray(at_nan)).all(), "a mask can't show what is missing"


def test_overlapping_patches_and_no_reg_token(small):
    model = ChronosBolt(dataclasses.replace(SMALL, stride=5, reg_token=False))
    params = jax.jit(model.init)(jax.random.key(0))
    found = predict(model, params, waves(2, 30), 2 * model.horizon)
    assert (
        found.point.shape == (2, 1, 2 * model.horizon)
        and np.isfinite(np.asarray(found.point)).all()
    )
    p, *_ = model.patches(waves(1, 30)[:, 0])
    np.testing.assert_array_equal(p[0, :, 0][1:], p[0, :, 5][:-1], "5 steps further")


def test_quantiles_at_any_level(small):
    model, params = small
    x = waves(1, 30)
    y = predict(model, params, x, 6).quantiles
    own = jax.jit(lambda p, x: model.predict_quantiles(p, x, 6, (0.9, 0.1)))(params, x)
    np.testing.assert_allclose(own, y[..., np.array([2, 0])], rtol=1e-5)
    between = model.quantiles_at(y, (0.05, 0.3, 0.99))
    low, mid, high = (jnp.sort(y, axis=-1)[..., i] for i in range(3))
    np.testing.assert_allclose(between, jnp.stack([low, (low + mid) / 2, high], axis=-1), rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        model.quantiles_at(y, (0.5, 1.5))


def test_point_between_levels_where_no_level_is_the_median():
    model = ChronosBolt(dataclasses.replace(SMALL, levels=(0.1, 0.4, 0.8)))
    np.testing.assert_allclose(
        model._point(jnp.asarray([[[[0.0, 1.0, 5.0]]]])), [[[2.0]]], rtol=1e-6
    )


@pytest.mark.slow
def test_losses_of_a_forecast_worked_out_by_hand(small):
    model, params = small
    x, target = waves(2, 40), np.array(waves(2, 4))
    target[1, 0, 2] = np.nan
    y, taps = jax.device_get(apply(model, params, x))
    error = np.zeros(2)
    for b in range(2):
        scale, loc = float(taps["scale"][b, 0]), float(taps["loc"][b, 0])
        for h in range(4):
            for i, level in enumerate(SMALL.levels):
                miss = (float(target[b, 0, h]) - loc) / scale - float(taps["quantiles"][b, i, h])
                error[b] += (
                    0
                    if np.isnan(miss)
                    else 2 * max(level * miss, (level - 1) * miss) / len(SMALL.levels)
                )
    batch = {"context": x, "target": target}
    np.testing.assert_allclose(jax.jit(model.loss)(params, batch), error.mean(), rtol=1e-4)
    square = np.square(np.asarray(y[:, :, :4, 1] - target))
    np.testing.assert_allclose(
        jax.jit(model.point_loss)(params, batch), np.nanmean(square), rtol=1e-4
    )
    with pytest.raises(ValueError, match="one forward pass reaches 16 steps, the target has 17"):
        model.loss(params, {"context": x, "target": waves(2, 17)})


def test_eval_batch_shrinks_with_the_model():
    sizes = [ChronosBolt(PRESETS[f"amazon/chronos-bolt-{size}"]).eval_batch for size in COUNTS]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= 32


def test_config_errors_are_all_told():
    with pytest.raises(
        ValueError,
        match=r"patch_len must be positive, got 0; .*leave points out; levels must.*start_token",
    ):
        dataclasses.replace(SMALL, patch_len=0, levels=(0.5, 0.1), start_token=2)
    with pytest.raises(ValueError, match=r"lacks num_heads, .*chronos_config\.quantiles"):
        ChronosBoltConfig.from_published({"d_model": 8})


# --- the converter


def checkpoint():
    """(state dict, config.json) of a small model."""
    model = ChronosBolt(dataclasses.replace(SMALL, levels=(0.1, 0.5, 0.9)))
    state, _ = tables.to_state(converter.keys(model.config), jax.jit(model.init)(jax.random.key(0)))
    return state, json.loads(json.dumps(converter.published(model.config)))


STATE, PUBLISHED = checkpoint()


def test_published_config_is_read_back():
    assert converter.configure(STATE, PUBLISHED, "x")[0] == SMALL
    gated = dataclasses.replace(SMALL.encoder, activation="gelu_new", gated=True)
    told = converter.published(
        dataclasses.replace(
            SMALL, encoder=gated, decoder=dataclasses.replace(gated, **cross(SMALL))
        )
    )
    del told["dense_act_fn"], told["is_gated_act"]
    assert ChronosBoltConfig.from_published(told).decoder.gated
    assert ChronosBoltConfig.from_published(told).encoder == gated


def cross(config):
    return {"layers": config.decoder.layers}


def test_copies_and_stray_tensors_of_the_original_are_known():
    extra = {
        "encoder.embed_tokens.weight": STATE["shared.weight"],
        "lm_head.weight": np.zeros((3, 16), np.float32),
        "quantiles": np.asarray(SMALL.levels, np.float32),
    }
    read = tables.to_params(
        converter.keys(SMALL), STATE | extra, folders.param_shapes(ChronosBolt(SMALL)), what="x"
    )
    assert set(read.dropped) == set(extra)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"num_heads": 4}, r"num_heads: the config says 4, the weights 2"),
        ({"d_kv": 4}, r"num_heads \* d_kv: 2 \* 4 in the config, 10 in the weights"),
        ({"num_layers": 10**12, "d_ff": None}, r"(?s)d_ff.*num_layers|num_layers.*d_ff"),
        ({"num_decoder_layers": True}, "num_decoder_layers"),
        ({"dropout_rate": float("nan")}, "dropout_rate"),
        ({"dropout_rate": 1.0}, "dropout"),
        ({"dense_act_fn": "silu"}, "dense_act_fn: not one of relu"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj"),
        ({"relative_attention_max_distance": 1}, "max_distance"),
        ({"relative_attention_num_buckets": 8}, "the weights 32"),
        ({"chronos_config": None}, "chronos_config: not an object"),
        ({"chronos_config": {}}, r"chronos_config\.context_length: missing"),
        ({"chronos_config": {"use_arcsinh": True}}, r"chronos_config\.'use_arcsinh': not known"),
        ({"chronos_config": {"quantiles": [0.5, 0.1, 0.9]}}, "levels must rise"),
        (
            {"chronos_config": {"quantiles": [0.5]}},
            "1 of 16 steps in the config, together 48 in the weights",
        ),
        ({"chronos_config": {"quantiles": "0.5"}}, "not a list of 1 to 999 numbers"),
        (
            {"chronos_config": {"context_length": -5, "input_patch_stride": 2**70}},
            "context_length.*input_patch_stride",
        ),
        (
            {"chronos_config": {"input_patch_size": 16}},
            "input_patch_size: the config says 16, the weights 8",
        ),
        ({"decoder_start_token_id": 7}, "decoder_start_token_id"),
    ],
)
def test_configs_that_do_not_go_with_the_weights(change, told):
    inside = change.get("chronos_config")
    wrong = PUBLISHED | change
    if inside:
        wrong["chronos_config"] = PUBLISHED["chronos_config"] | inside
    with pytest.raises(CheckpointError) as error:
        converter.configure(STATE, wrong, "made.safetensors")
    assert re.search(told, str(error.value), re.DOTALL), str(error.value)


def test_without_a_config_the_sizes_must_be_published_ones():
    with pytest.raises(CheckpointError, match=r"Put the original's config\.json beside the file"):
        converter.configure(STATE, None, "x")
    tiny = PRESETS["amazon/chronos-bolt-tiny"]
    shapes = trees.flatten(folders.param_shapes(ChronosBolt(tiny)))
    empty = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in shapes.items()}
    state, _ = tables.to_state(converter.keys(tiny), trees.unflatten(empty))
    config, notes = converter.configure(state, None, "x")
    assert config == tiny and "chronos-bolt-tiny" in notes[0]


def test_only_its_own_checkpoints_are_recognised(golden_dir):
    layout = converter.recognise({f"model.{key}": value for key, value in STATE.items()})
    assert layout is not None and layout.prefix == "model."
    for file in sorted(golden_dir.glob("*/*")):
        if file.suffix in (".safetensors", ".bin", ".pth", ".ckpt"):
            found = converter.recognise(parity.tensors(file))
            assert (found is not None) == (file.parent.name == "chronos_bolt"), file


def test_a_pruned_model_can_not_be_exported():
    encoder = narrowed(SMALL.encoder, 1, ffn=20)
    with pytest.raises(ValueError, match="pruned"):
        converter.published(dataclasses.replace(SMALL, encoder=encoder))
    decoder = dataclasses.replace(SMALL.decoder, max_distance=64)
    with pytest.raises(ValueError, match="differ"):
        converter.published(dataclasses.replace(SMALL, decoder=decoder))
