"""The loop against one written out step by step, and its promises: same bits, frozen leaves, best
epoch, errors.
"""

import dataclasses
import itertools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import training, trees
from ltsm_jax.data import windows
from ltsm_jax.training import memory, step


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(a, b)


def written_out(params, source, config, penalty=None, weight=0.0):
    """Training as one would explain it: no jit of several steps, no weights, the last batch just
    shorter.
    """
    moments = jax.tree.map(lambda p: (np.zeros(p.shape), np.zeros(p.shape)), params)
    keys, t, losses = training.keys(config.seed), 0, []
    for epoch in range(config.epochs):
        order = np.asarray(windows.epoch_order(keys["data"], epoch, source.n))
        lr = config.lr * 0.5 ** max(epoch + 1 - 2, 0)
        for batch in (
            itertools.batched(order, config.batch_size)
            if hasattr(itertools, "batched")
            else _batched(order, config)
        ):
            rows = source.gather(jnp.asarray(batch))

            def mean_loss(p, rows=rows):
                mse = jnp.square(problem.predict(p, rows["context"]) - rows["target"]).mean()
                return mse + (0 if penalty is None else penalty(p))

            loss, grads = jax.value_and_grad(mean_loss)(params)
            losses.append(float(loss))
            t += 1

            def step(p, g, mv, t=t, lr=lr):
                m, v = (
                    0.9 * mv[0] + 0.1 * np.asarray(g),
                    0.999 * mv[1] + 0.001 * np.square(np.asarray(g)),
                )
                update = lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                return jnp.asarray(p - update, jnp.float32), (m, v)

            both = jax.tree.map(step, params, grads, moments)
            is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
            params = jax.tree.map(lambda x: x[0], both, is_leaf=is_pair)
            moments = jax.tree.map(lambda x: x[1], both, is_leaf=is_pair)
    return params, losses


def _batched(order, config):
    return [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]


def pull(strength, start, params):
    return (
        strength
        / 2
        * sum(
            jnp.square(p - s).sum() for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(start))
        )
    )


@pytest.mark.parametrize("pulled", [False, True])
def test_fit_is_the_loop_one_would_write(pulled):
    config = dataclasses.replace(problem.CONFIG, epochs=3)
    start, source = problem.init(), problem.train_windows()
    assert (
        source.n % config.batch_size
    )  # the last batch is partial: it must count as the plain mean of its rows
    penalty = jax.tree_util.Partial(pull, 0.1, start) if pulled else None
    expected, losses = written_out(start, source, config, penalty)
    result = problem.fit(
        start, source, loss_fn=problem.dry_loss, config=config, validate=None, penalty=penalty
    )
    chex.assert_trees_all_close(result.params, expected, rtol=1e-4, atol=1e-5)
    sizes = np.minimum(config.batch_size, source.n - config.batch_size * np.arange(7))
    means = (np.reshape(losses, (3, 7)) * sizes).sum(1) / source.n
    np.testing.assert_allclose([row["train_loss"] for row in result.history], means, rtol=1e-4)
    assert [(row["epoch"], row["step"], row["lr"]) for row in result.history] == [
        (1, 7, 3e-3),
        (2, 14, 3e-3),
        (3, 21, 1.5e-3),
    ]


def test_dispatch_size_does_not_change_a_bit():
    results = [
        problem.fit(config=dataclasses.replace(problem.CONFIG, steps_per_dispatch=k))
        for k in (1, 3, 7, 4096, None)
    ]
    for other in results[1:]:
        assert_same_bits(results[0].params, other.params)
        assert_same_bits(results[0].last_params, other.last_params)
        assert results[0].history == other.history


def test_seed_changes_data_order_and_dropout_and_nothing_else_does():
    same, other = problem.fit(), problem.fit(config=dataclasses.replace(problem.CONFIG, seed=1))
    assert_same_bits(problem.fit().params, same.params)
    assert not np.array_equal(same.params["head"]["kernel"], other.params["head"]["kernel"])
    named = training.keys(0)
    assert list(named) == ["init", "aux", "data", "dropout"]
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in named.values()}) == 4


def test_only_trainable_leaves_move_and_have_optimizer_state(tmp_path):
    start = problem.init()
    mask = trees.select(start, "^head/")
    result = problem.fit(start, trainable=mask, folder=tmp_path)
    assert_same_bits(result.params["body"], start["body"])
    assert_same_bits(result.last_params["body"], start["body"])
    for name in ("kernel", "bias"):
        assert not np.array_equal(result.params["head"][name], start["head"][name])
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    saved = (checkpoint / "state" / "digests.json").read_text()
    assert "optimizer/0/mu/head/kernel" in saved
    assert "body" not in saved


def test_the_callers_params_live_on():
    start = problem.init()
    copy = jax.tree.map(np.array, start)
    problem.fit(start)
    assert_same_bits(start, copy)


def scripted(values, seen=None):
    values = iter(values)

    def validate(params):
        if seen is not None:
            seen.append(jax.tree.map(np.array, params))
        return {"mse": next(values), "mae": 1.0}

    return validate


def test_best_validation_weights_come_back_and_a_tie_keeps_the_earlier():
    seen = []
    result = problem.fit(validate=scripted([3.0, 1.0, 2.0, 1.0], seen))
    assert result.best_epoch == 2
    assert_same_bits(result.params, seen[1])
    assert_same_bits(result.last_params, seen[3])
    assert [row["val_mse"] for row in result.history] == [3.0, 1.0, 2.0, 1.0]
    assert result.history[0]["val_mae"] == 1.0


def test_without_validation_the_last_weights_come_back():
    result = problem.fit(validate=None)
    assert result.best_epoch is None
    assert_same_bits(result.params, result.last_params)


def test_patience_counts_epochs_without_a_better_one():
    config = dataclasses.replace(problem.CONFIG, epochs=9, patience=2)
    result = problem.fit(config=config, validate=scripted([3.0, 4.0, 2.0, 2.0, 2.5, 0.0]))
    assert len(result.history) == 5
    assert result.steps == 35
    assert result.best_epoch == 3
    with pytest.raises(ValueError, match="patience"):
        problem.fit(config=config, validate=None)


def test_one_compilation_serves_every_epoch_count_rate_and_dispatch():
    traces = []

    def counted(params, batch, key, train):
        traces.append(1)
        return problem.loss(params, batch, key, train)

    problem.fit(loss_fn=counted, config=dataclasses.replace(problem.CONFIG, epochs=1))
    first = len(traces)
    problem.fit(
        loss_fn=counted,
        config=dataclasses.replace(problem.CONFIG, epochs=5, lr=1e-4, schedule="cosine", seed=3),
    )
    problem.fit(
        loss_fn=counted, config=dataclasses.replace(problem.CONFIG, epochs=2, steps_per_dispatch=2)
    )
    assert len(traces) == first


def test_weights_that_are_put_somewhere_only_in_part_are_no_second_compilation():
    params = problem.init()
    params["head"] = jax.device_put(
        params["head"], jax.devices()[0]
    )  # as what is loaded; the rest as what is drawn
    assert {leaf.committed for leaf in jax.tree.leaves(params)} == {True, False}

    def fresh(params, batch, key, train):  # nobody has compiled for it yet
        return problem.loss(params, batch, key, train)

    each = dataclasses.replace(problem.CONFIG, steps_per_dispatch=1)
    for trainable in (None, trees.select(params, "^body")):
        before = step.advance._cache_size()
        result = problem.fit(params=params, loss_fn=fresh, trainable=trainable, config=each)
        assert result.steps > 2 and step.advance._cache_size() - before == 1


def test_a_batch_larger_than_the_data_is_the_data():
    small = problem.train_windows().take(np.arange(10))
    result = problem.fit(source=small)
    assert result.steps == 4
    assert_same_bits(
        result.params,
        problem.fit(source=small, config=dataclasses.replace(problem.CONFIG, batch_size=10)).params,
    )


def test_a_bad_window_stops_the_run_and_is_named(tmp_path):
    values = problem.series()
    values[1, 150] = np.nan
    with pytest.raises(training.NonFiniteError) as caught:
        problem.fit(source=problem.train_windows(values), folder=tmp_path)
    text = str(caught.value)
    assert "at step 1 (epoch 1, batch 1 of 7)" in text
    assert "parameters: all finite" in text
    assert "gradients: not finite in 4 of 4: body/bias, body/kernel, head/bias, head/kernel" in text
    assert "context is not finite: window " in text
    assert "column OT" in text
    assert "no checkpoint was made yet" in text


@pytest.mark.slow
def test_a_huge_value_is_named_and_the_last_good_checkpoint_kept(tmp_path):
    values = problem.series()
    config = dataclasses.replace(
        problem.CONFIG, batch_size=4, checkpoint_seconds=0, steps_per_dispatch=1
    )
    values[0, 199] = 1e30  # the target of one window alone
    with pytest.raises(training.NonFiniteError) as caught:
        problem.fit(source=problem.train_windows(values), folder=tmp_path, config=config)
    text = str(caught.value)
    assert "target reaches 1e+30: window 160, variate 0, column HUFL, start 160" in text
    assert "suspect windows of this batch (1 of 4)" in text
    kept = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert f"last good checkpoint, kept: {kept}" in text
    with pytest.raises(training.NonFiniteError) as again:  # it goes on from there, to the same end
        problem.fit(source=problem.train_windows(values), folder=tmp_path, config=config)
    assert str(again.value).split("\n")[0] == text.split("\n")[0]


def test_a_gradient_that_is_not_finite_is_caught_before_it_reaches_the_weights():
    def kink(params, batch, key, train):  # finite loss, gradient 0 * inf
        return problem.loss(params, batch, key, train) + jnp.sqrt(
            jnp.square(params["head"]["bias"] * 0).sum()
        )

    with pytest.raises(training.NonFiniteError) as caught:
        problem.fit(loss_fn=kink)
    assert "gradients: not finite in 1 of 4: head/bias" in str(caught.value)
    assert "a smaller lr, or clip, may help" in str(caught.value)


def test_bad_weights_are_named():
    start = problem.init()
    start["body"]["kernel"] = start["body"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(
        training.NonFiniteError, match="parameters: not finite in 1 of 4: body/kernel"
    ):
        problem.fit(start)


def test_a_validation_error_that_is_not_finite_stops_the_run():
    with pytest.raises(
        training.NonFiniteError, match=r"validation after epoch 2 \(step 14\) gives mse nan"
    ):
        problem.fit(validate=scripted([1.0, float("nan")]))


def test_what_cannot_be_trained_is_refused_at_once():
    with pytest.raises(ValueError, match="no training window"):
        problem.fit(source=problem.train_windows().take(np.arange(0)))
    with pytest.raises(ValueError, match="nothing to train"):
        problem.fit(trainable=jax.tree.map(lambda _: False, problem.init()))


def test_a_run_that_does_not_fit_names_the_batch_that_does(monkeypatch):
    big = dataclasses.replace(problem.CONFIG, batch_size=300)
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    with pytest.raises(ValueError, match=r"only 0\.10 MB is available: batch_size=") as caught:
        problem.fit(config=big)
    fits = int(str(caught.value).rsplit("batch_size=")[1].split()[0])
    assert 1 <= fits < 300
    problem.fit(config=dataclasses.replace(big, batch_size=fits, epochs=1))
    with pytest.raises(ValueError, match="is available"):
        problem.fit(config=dataclasses.replace(big, batch_size=fits + max(2, fits // 10)))
    parts = int(str(caught.value).rsplit("accumulate=")[1].split()[0])
    assert parts == next(n for n in range(2, 301) if 300 % n == 0 and 300 // n <= fits)
    problem.fit(config=dataclasses.replace(big, accumulate=parts, epochs=1))
    with pytest.raises(ValueError, match="is available"):
        problem.fit(
            config=dataclasses.replace(
                big, accumulate=max(n for n in range(1, parts) if 300 % n == 0)
            )
        )


def test_where_no_batch_fits_the_advice_names_none(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(
        ValueError,
        match=r"is available: train fewer parameters \(trainable\), or take a smaller model",
    ):
        problem.fit()


def test_compilation_is_counted_apart_and_once():
    def fresh(params, batch, key, train):
        return problem.loss(params, batch, key, train)

    began = time.monotonic()
    first = problem.fit(loss_fn=fresh)
    wall = time.monotonic() - began
    second = problem.fit(loss_fn=fresh)
    assert first.compile_seconds > 0 and first.seconds + first.compile_seconds <= wall
    assert second.compile_seconds < first.compile_seconds / 4
    assert_same_bits(first.params, second.params)


def test_a_run_of_more_steps_than_can_be_counted_is_refused():
    with pytest.raises(
        ValueError, match="2147483648 epochs of 7 steps are more than 2147483647 steps"
    ):
        problem.fit(config=dataclasses.replace(problem.CONFIG, epochs=2**31))


def test_progress_speaks_on_stderr_and_only_when_asked(capsys, monkeypatch):
    monkeypatch.setattr("ltsm_jax.training.progress.PLAIN_SECONDS", 0.0)
    problem.fit()
    assert capsys.readouterr() == ("", "")
    problem.fit(label="mlp", show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "mlp: about" in err
    assert "mlp: step 28/28  epoch 4/4  loss " in err
    assert "windows/s" in err
