"""Chronos-T5: what it promises beyond the recorded vectors and the contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.models import chronos_t5, folders
from ltsm_jax.models.chronos_t5 import PRESETS, ChronosT5, ChronosT5Config

SIZES = {
    "tiny": 8.394,
    "mini": 20.456,
    "small": 46.154,
    "base": 201.375,
    "large": 708.963,
}  # millions


@pytest.fixture(scope="module")
def small():
    model = ChronosT5(ChronosT5.small())
    return model, jax.jit(model.init)(jax.random.key(0))


def wave(rows, t, seed=0):
    noise = np.random.default_rng(seed).normal(size=(rows, t))
    return jnp.asarray(3 + np.sin(np.arange(t) / 3) + 0.1 * noise, jnp.float32)


@pytest.mark.slow
def test_published_parameter_counts():
    assert {f"amazon/chronos-t5-{name}" for name in SIZES} == PRESETS.keys()
    for name, millions in SIZES.items():
        model = ChronosT5(PRESETS[f"amazon/chronos-t5-{name}"])
        assert round(trees.count(folders.param_shapes(model)) / 1e6, 3) == millions, name


def test_evaluation_batches_shrink_with_the_model():
    sizes = [ChronosT5(config).eval_batch for config in PRESETS.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 1


@pytest.mark.parametrize("k", [1, 7, 50, 64])
def test_kth_largest_is_exact(k):
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(5, 3, 64)) * 10.0 ** rng.integers(-30, 30, (5, 3, 64))).astype(np.float32)
    x[0, 0, :20] = -np.inf
    x[1, 1, :] = x[1, 1, 0]
    x[2, 2, ::2] = 0
    np.testing.assert_array_equal(
        chronos_t5.kth_largest(jnp.asarray(x), k), np.sort(x, -1)[..., -k]
    )


def scored(logits, **sampling):
    """Scores of [V] logits; EOS is the last token, which is not looked at."""
    cfg = dataclasses.replace(
        ChronosT5.small(),
        vocab_size=len(logits) + 1,
        n_tokens=len(logits) + 1,
        eos=len(logits),
        **sampling,
    )
    y = np.asarray(chronos_t5.scores(cfg, jnp.asarray([*logits, 9.0])))
    assert y[-1] == -np.inf, "EOS is removed"
    return y[:-1]


def test_scores_of_a_worked_example():
    logits, gone = [1.0, 3.0, 2.0, 2.0, 0.0], -np.inf
    np.testing.assert_array_equal(scored(logits, top_k=None), logits)
    np.testing.assert_array_equal(scored(logits, top_k=None, temperature=2.0), np.array(logits) / 2)
    np.testing.assert_array_equal(
        scored(logits, top_k=2), [gone, 3, 2, 2, gone]
    )  # the two 2.0 are equal
    np.testing.assert_array_equal(scored(logits, top_k=50), logits)
    # probabilities .07 .51 .19 .19 .03: the tail of at most 1 - top_p goes, the likeliest token
    # never
    np.testing.assert_array_equal(scored(logits, top_k=None, top_p=0.95), [1, 3, 2, 2, gone])
    np.testing.assert_array_equal(scored(logits, top_k=None, top_p=0.89), [gone, 3, 2, 2, gone])
    np.testing.assert_array_equal(
        scored(logits, top_k=None, top_p=0.0), [gone, 3, gone, gone, gone]
    )


def test_draws_have_the_scores_probabilities():
    p = np.array([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    n = 20_000
    y = jnp.broadcast_to(jnp.log(jnp.asarray(p)), (n, len(p)))
    drawn = chronos_t5.pick(y, jax.random.uniform(jax.random.key(0), (n,)))
    found = np.bincount(drawn, minlength=len(p)) / n
    assert (found[p == 0] == 0).all()
    np.testing.assert_allclose(found, p, atol=5 * 0.5 / np.sqrt(n))
    ends = jnp.asarray([0.0, 1 - 2**-24])  # the least and the largest number that can come
    np.testing.assert_array_equal(chronos_t5.pick(y[:2], ends), [1, 4])


def test_token_ids_of_a_worked_example():
    """Bins at -2, -1, ..., 2 after two special tokens; id 2 is left for what lies below
    every bin.
    """
    cfg = dataclasses.replace(ChronosT5.small(), n_tokens=8, low=-2.0, high=2.0)
    x = jnp.asarray([[-9.0, -2.0, -1.5, -1.4, 0.0, 1.6, 9.0, jnp.nan]])
    ids, observed = chronos_t5.tokenize(cfg, x, jnp.ones(1))
    np.testing.assert_array_equal(ids, [[3, 3, 4, 4, 5, 7, 7, cfg.pad, cfg.eos]])
    np.testing.assert_array_equal(observed, [[1, 1, 1, 1, 1, 1, 1, 0, 1]])
    np.testing.assert_array_equal(chronos_t5.token_values(cfg)[:8], [-2, -2, -2, -2, -1, 0, 1, 2])
    np.testing.assert_array_equal(
        chronos_t5.mean_scale(jnp.asarray([[1, -3, jnp.nan], [0, 0, 0], [jnp.nan] * 3])), [2, 1, 1]
    )


@pytest.mark.slow
def test_samples_follow_the_key_and_not_the_horizon(small):
    model, params = small
    x = wave(2, 20)[:, None]
    predict = jax.jit(lambda h, key: model.predict(params, x, h, key), static_argnums=0)
    one, same, other = (
        predict(8, key).samples for key in (None, jax.random.key(0), jax.random.key(1))
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    longer = predict(19, None)
    np.testing.assert_allclose(longer.samples[:, :, :8], one, rtol=1e-5)
    assert longer.samples.shape == (2, 1, 19, model.config.n_samples)
    np.testing.assert_allclose(longer.point, longer.samples.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(longer.quantiles[..., 4], np.median(longer.samples, -1), rtol=1e-5)


@pytest.mark.slow
def test_a_roll_out_feeds_the_lower_median_back(small):
    """The second block is a forecast from the context with the first block's lower median behind
    it.
    """
    model, params = small
    cfg = model.config
    x = wave(1, cfg.context_len, seed=1)
    noise = jax.random.gumbel(jax.random.key(5), (2 * cfg.horizon, cfg.n_samples, cfg.vocab_size))
    sample = jax.jit(lambda x, h, noise: model.sample(params, x, h, gumbel=noise), static_argnums=1)
    whole = sample(x, 2 * cfg.horizon, noise)
    first = np.asarray(whole[:, : cfg.horizon])
    lower = np.sort(first, -1)[..., (cfg.n_samples - 1) // 2]
    assert (lower < np.median(first, -1)).any(), "the two medians must differ here"
    extended = jnp.concatenate([x, lower], axis=1)[:, -cfg.context_len :]
    np.testing.assert_allclose(
        sample(extended, cfg.horizon, noise[cfg.horizon :]), whole[:, cfg.horizon :], rtol=1e-5
    )


def test_missing_at_the_start_is_as_good_as_shorter(small):
    model, params = small
    x = wave(2, 11)
    padded = jnp.pad(x, ((0, 0), (9, 0)), constant_values=jnp.nan)
    embed = jax.jit(model.embed)
    short, long = embed(params, x[:, None]), embed(params, padded[:, None])
    np.testing.assert_allclose(long[:, :, 9:], short, rtol=1e-4, atol=1e-5)
    assert short.shape == (2, 1, 12, model.config.d_model)


@pytest.mark.slow
def test_a_short_target_is_missing_at_its_end(small):
    model, params = small
    x = wave(3, 28)[:, None]
    context, target = x[..., :20], x[..., 20:]
    loss, point = jax.jit(model.loss), jax.jit(model.point_loss)
    gap = target.at[..., 5:].set(jnp.nan)
    short, missing = ({"context": context, "target": y} for y in (target[..., :5], gap))
    np.testing.assert_allclose(loss(params, short), loss(params, missing), rtol=1e-6)
    np.testing.assert_allclose(point(params, short), point(params, missing), rtol=1e-6)
    with pytest.raises(ValueError, match="8 steps at a time, not 9"):
        model.loss(params, {"context": context, "target": jnp.zeros((3, 1, 9))})


@pytest.mark.slow
def test_training_leaves_values_out(small):
    """Without dropout the noise of training is the values that each series loses."""
    model, params = small
    still = [
        dataclasses.replace(stack, dropout=0.0)
        for stack in (model.config.encoder, model.config.decoder)
    ]
    config = dataclasses.replace(model.config, encoder=still[0], decoder=still[1])
    x = wave(3, 28)[:, None]
    batch = {"context": x[..., :20], "target": x[..., 20:]}
    key = jax.random.key(2)
    plain = jax.jit(model.loss)(params, batch)
    for share in (0.0, 0.5):
        one = ChronosT5(dataclasses.replace(config, missing_prob=share))
        assert bool(jax.jit(lambda k, one=one: one.loss(params, batch, k, True))(key) == plain) == (
            share == 0
        )


def test_configs_that_cannot_be():
    small = ChronosT5.small()
    for change, what in (
        ({"encoder": small.decoder}, "what they are called"),
        ({"n_tokens": 4}, "two bins"),
        ({"vocab_size": 10}, "fit into 10 embeddings"),
        ({"eos": 64}, "token ids"),
        ({"low": 15.0}, "below high"),
        ({"n_samples": 0}, "at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"missing_prob": 1.0}, "missing_prob"),
    ):
        with pytest.raises(ValueError, match=what):
            dataclasses.replace(small, **change)
    with pytest.raises(
        ValueError, match=r"Chronos-T5 checkpoint lacks vocab_size, .*chronos_config.n_tokens"
    ):
        ChronosT5Config.from_published({})
