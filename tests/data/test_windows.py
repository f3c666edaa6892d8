"""Windows on the device against numpy slices, and the order in which training sees them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltsm_jax.data.windows import Windows, batch_at, epoch_order, steps_per_epoch, windows_between


@st.composite
def layouts(draw):
    """(C, T, lo, hi, L, H) with room for at least one window."""
    context_len, horizon = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    length = context_len + horizon + draw(st.integers(0, 8))
    lo, after = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return draw(st.integers(1, 3)), lo + length + after, lo, lo + length, context_len, horizon


@jax.jit
def gathered(windows, indices):
    return windows.gather(indices)


def everything(windows):
    """All windows as numpy arrays."""
    return jax.device_get(gathered(windows, np.arange(windows.n)))


def numbered(n_variates, n_rows):
    """[C, T] float32 in which every cell is another whole number."""
    return np.arange(n_variates * n_rows, dtype=np.float32).reshape(n_variates, n_rows)


@settings(max_examples=25)
@given(layouts())
def test_every_window_is_the_numpy_slice_once_and_variate_by_variate(layout):
    n_variates, n_rows, lo, hi, context_len, horizon = layout
    values = numbered(n_variates, n_rows)
    windows = windows_between(values, lo, hi, context_len, horizon)
    batch = everything(windows)
    want = [
        values[c, t : t + context_len + horizon]
        for c in range(n_variates)
        for t in range(lo, hi - context_len - horizon + 1)
    ]
    got = np.concatenate([batch["context"], batch["target"]], axis=-1)
    np.testing.assert_array_equal(got[:, 0], want)
    assert batch["context"].shape == (windows.n, 1, context_len)
    assert batch["target"].shape == (windows.n, 1, horizon)
    target_rows = batch["target"][:, 0] % n_rows
    assert target_rows.min() == lo + context_len
    assert target_rows.max() == hi - 1


@settings(max_examples=15)
@given(layouts())
def test_joint_windows_hold_all_variates(layout):
    n_variates, n_rows, lo, hi, context_len, horizon = layout
    values = numbered(n_variates, n_rows)
    windows = windows_between(values, lo, hi, context_len, horizon, joint=True)
    batch = everything(windows)
    want = [
        values[:, t : t + context_len + horizon] for t in range(lo, hi - context_len - horizon + 1)
    ]
    np.testing.assert_array_equal(
        np.concatenate([batch["context"], batch["target"]], axis=-1), want
    )


def test_windows_are_an_argument_of_a_jitted_function_compiled_once():
    traces = []

    @jax.jit
    def gather(windows: Windows, indices):
        traces.append(windows.columns)
        return windows.gather(indices)

    first = windows_between(numbered(2, 30), 0, 30, 5, 3, columns=("a", "b"))
    other = windows_between(numbered(2, 30) + 1, 0, 30, 5, 3, columns=("c", "d"))
    a, b = gather(first, jnp.array([0, 40])), gather(other, jnp.array([1, 2]))
    assert traces == [()]  # one compilation: names are no part of the key
    np.testing.assert_array_equal(a["context"][0, 0], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(b["context"][0, 0], [2, 3, 4, 5, 6])
    assert (first.starts.dtype, first.rows.dtype, first.values.dtype) == (
        jnp.int32,
        jnp.int32,
        jnp.float32,
    )


def test_take_keeps_the_series_and_the_order_asked_for():
    windows = windows_between(numbered(2, 20), 0, 20, 4, 2)
    some = windows.take(np.array([20, 3]))
    assert some.n == 2
    assert some.values is windows.values
    np.testing.assert_array_equal(
        some.gather(jnp.arange(2))["context"], windows.gather(jnp.array([20, 3]))["context"]
    )


def test_few_windows_are_cut_apart_for_training_and_give_the_same_batches():
    values = np.arange(3 * 500, dtype=np.float32).reshape(3, 500)
    many = windows_between(values, 0, 500, 20, 4)
    few = many.take(np.array([7, 400, 900, 1200]))
    apart = few.over(None)
    assert apart.values.shape == (4, 24) and apart.n == 4
    numbers = jnp.array([3, 0, 2, 2])
    for name, value in few.gather(numbers).items():
        np.testing.assert_array_equal(apart.gather(numbers)[name], value)
    # more points in windows than in the series, and windows of all variates: as they are
    assert many.over(None).values.shape == (3, 500)
    joint = dataclasses.replace(few, rows=None)
    assert joint.over(None).values.shape == (3, 500)


def test_describe_says_where_a_window_lies():
    stamps = np.datetime64("2024-01-01", "us") + np.arange(20) * np.timedelta64(1, "h")
    windows = windows_between(
        numbered(2, 20), 5, 20, 4, 2, columns=("load", "OT"), timestamps=stamps
    )
    assert windows.describe(11) == {
        "window": 11,
        "variate": 1,
        "column": "OT",
        "start": 6,
        "target_start": 10,
        "stop": 12,
        "first": "2024-01-01 06:00:00",
        "target_first": "2024-01-01 10:00:00",
        "last": "2024-01-01 11:00:00",
    }
    with pytest.raises(ValueError, match="window 20 does not exist"):
        windows.describe(20)
    joint = windows_between(numbered(2, 20), 0, 20, 4, 2, joint=True).describe(0)
    assert (joint["variate"], joint["column"], "first" in joint) == (None, None, False)


@pytest.mark.parametrize(
    "lo, hi, context_len, horizon, says",
    [
        (0, 5, 4, 2, "5 rows are too few for one window of 4 \\+ 2"),
        (-1, 10, 4, 2, "not inside the series of 20 rows"),
        (0, 21, 4, 2, "not inside the series of 20 rows"),
        (0, 20, 0, 2, "at least 1"),
        (0, 20, 4, 0, "at least 1"),
    ],
)
def test_ranges_without_a_window_are_refused(lo, hi, context_len, horizon, says):
    with pytest.raises(ValueError, match=says):
        windows_between(numbered(1, 20), lo, hi, context_len, horizon)


order_of = jax.jit(epoch_order, static_argnums=2)
batch_of = jax.jit(batch_at, static_argnums=2)


@pytest.mark.parametrize("n, batch_size", [(1, 1), (1, 8), (7, 3), (64, 64), (65, 64), (100, 1)])
@pytest.mark.parametrize("epoch", [0, 5])
def test_an_epoch_shows_every_window_exactly_once(n, batch_size, epoch):
    order = order_of(jax.random.key(3), epoch, n)
    assert order.dtype == jnp.int32
    seen = []
    for b in range(steps_per_epoch(n, batch_size)):
        indices, weight = jax.device_get(batch_of(order, b, batch_size))
        assert indices.shape == weight.shape == (batch_size,)
        assert indices.dtype == jnp.int32
        assert set(np.unique(weight)) <= {0.0, 1.0}
        assert not np.any(indices[weight == 0])  # filled up with window 0
        seen += indices[weight == 1].tolist()
    assert sorted(seen) == list(range(n))
    assert seen == order.tolist()


def test_the_order_is_a_pure_function_of_key_and_epoch():
    n, key = 500, jax.random.key(0)
    np.testing.assert_array_equal(epoch_order(key, 7, n), order_of(key, jnp.int32(7), n))
    orders = jax.device_get(
        [order_of(key, 0, n), order_of(key, 1, n), order_of(jax.random.key(1), 0, n)]
    )
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert (a == b).mean() < 0.05


def test_orders_are_uniform():
    """Each of the 24 orders of 4 windows about equally often: chi-square over 4800 epochs, 23
    degrees of freedom.
    """
    orders = jax.vmap(lambda epoch: epoch_order(jax.random.key(11), epoch, 4))(jnp.arange(4800))
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # exceeded once in a thousand keys


def test_a_partial_batch_is_filled_up_with_weight_0():
    order = jnp.array([3, 1, 4, 0, 2], jnp.int32)
    indices, weight = batch_at(order, 1, 3)
    assert indices.tolist() == [0, 2, 0]
    assert weight.tolist() == [1, 1, 0]


@pytest.mark.slow
def test_a_series_in_parts_over_the_devices_gives_the_same_windows(tmp_path):
    script = Path(__file__).with_name("spread_gathers.py")
    words = [sys.executable, str(script), str(tmp_path / "series.npy")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for what, one in found.items():
        assert all(one["same"]) and one["scaled"], what
        assert one["held"] == [[1, 3, 13 + 11]] * 8, (
            what
        )  # an eighth of 101 rows, and the rest of the last window
        assert ("data" in one["lies"]) == ("data" in what) and "fsdp" in one["lies"], what
