"""Pools of series: no window crosses a series, what is left out is counted, parts are apart in
time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from ltsm_jax.data import DataError
from ltsm_jax.data.corpus import Pool, ScaledWindows, _map, _write, pool, read_folder, shared

L, H = 8, 4


def ramp(n, first=0.0):
    return first + np.arange(n, dtype=np.float32)


def whole(batch):
    return np.concatenate([batch["context"], batch["target"]], axis=-1)[:, 0]


def test_no_window_crosses_from_one_series_into_the_next():
    series = [ramp(20, 0), ramp(12, 1000), ramp(31, 2000)]
    windows = pool(series, L, H, stride=1).train
    assert windows.n == 9 + 1 + 20
    x = whole(windows.gather(jnp.arange(windows.n)))
    np.testing.assert_array_equal(np.diff(x, axis=1), 1)  # a crossing would jump by hundreds
    assert x.min() == 0 and x[:, -1].max() == 2030


def test_stride_counts_back_from_the_last_row():
    windows = pool([ramp(30)], L, H, stride=5).train
    np.testing.assert_array_equal(windows.starts, [3, 8, 13, 18])


def test_short_series_are_left_out_and_counted():
    found = pool([ramp(11), ramp(12), ramp(3)], L, H, stride=1)
    assert found.train.n == 1
    assert any("2 series shorter than one window (12 rows)" in note for note in found.notes)


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(DataError, match="1 series shorter than one window"):
        pool([ramp(11)], L, H)
    with pytest.raises(DataError, match="1 series without any value"):
        pool([np.full(40, np.nan)], L, H)
    with pytest.raises(DataError, match="windows with a constant context"):
        pool([np.ones(40)], L, H, stride=1)
    with pytest.raises(DataError, match="no training window"):
        pool([], L, H)


def test_constant_context_is_left_out_but_not_a_constant_target():
    x = np.concatenate([np.zeros(8), ramp(8), np.full(8, 7.0)]).astype(np.float32)
    windows = pool([x], L, H, stride=1).train
    contexts = np.asarray(windows.gather(jnp.arange(windows.n))["context"])[:, 0]
    assert (contexts.std(1) > 0).all()
    assert 0 not in np.asarray(windows.starts) and 12 in np.asarray(windows.starts)


def test_holes_are_filled_from_before_or_left_out_when_too_many():
    x = ramp(40)
    x[[0, 20]] = np.nan
    found = pool([x], L, H, stride=1, max_missing=0.2)
    starts = np.asarray(found.train.starts)
    # 1 of 8 is within a fifth of a context, 1 of 4 is not of a target
    bad = [s for s in range(29) if s + L <= 20 < s + L + H]
    np.testing.assert_array_equal(starts, [s for s in range(29) if s not in bad])
    assert any(f"{len(bad)} windows with too many missing values" in note for note in found.notes)
    values = np.asarray(found.train.values[0])
    assert values[20] == 19 and values[0] == 1  # the value before; at the head the first there is


def test_validation_lies_after_training_in_each_series():
    series = [ramp(100), ramp(50, 1000), ramp(13, 2000)]
    found = pool(series, L, H, stride=1, val_share=0.2)
    train, val = (whole(w.gather(jnp.arange(w.n))) for w in (found.train, found.val))
    for first, border in ((0, 80), (1000, 1040)):
        own = lambda x, first=first: x[(x[:, 0] >= first) & (x[:, 0] < first + 500)]  # noqa: E731
        assert own(train).max() == border - 1
        assert own(val)[:, L:].min() == border and own(val)[:, 0].min() == border - L
    assert not any(x[0] >= 2000 for x in val), (
        "a series of 13 rows has no room for a target after its border"
    )
    assert any("across the border" in note for note in found.notes)


def test_no_validation_part_unless_asked():
    assert pool([ramp(40)], L, H).val is None


def test_bad_arguments_and_series():
    with pytest.raises(ValueError, match="stride"):
        pool([ramp(40)], L, H, stride=0)
    with pytest.raises(ValueError, match="val_share"):
        pool([ramp(40)], L, H, val_share=1.0)
    with pytest.raises(ValueError, match=r"series 1: .*1 infinite"):
        pool([ramp(40), np.array([1, np.inf, 2])], L, H)
    with pytest.raises(ValueError, match=r"series 0: shape \(2, 40\)"):
        pool([np.zeros((2, 40))], L, H)


def test_scaled_windows_have_the_scale_of_their_context():
    rng = np.random.default_rng(0)
    series = [1e4 + 1e3 * rng.normal(size=60), 1e-4 * rng.normal(size=60)]
    source = ScaledWindows(pool(series, L, H, stride=7).train)
    batch = jax.jit(lambda s, i: s.gather(i))(source, jnp.arange(source.n))
    np.testing.assert_allclose(batch["context"].mean(-1), 0, atol=2e-3)
    np.testing.assert_allclose(batch["context"].std(-1), 1, atol=2e-3)
    plain = source.windows.gather(jnp.arange(source.n))
    mean, std = plain["context"].mean(-1, keepdims=True), plain["context"].std(-1, keepdims=True)
    np.testing.assert_allclose(
        batch["target"], np.clip((plain["target"] - mean) / std, -10, 10), rtol=1e-3, atol=1e-3
    )


def test_scaled_windows_stay_finite_where_the_target_bursts():
    quiet = np.where(np.arange(12) < L, 1e-3 * (np.arange(12) % 2), 1e6)
    batch = ScaledWindows(pool([quiet], L, H).train).gather(jnp.arange(1))
    assert np.abs(batch["context"]).max() <= 10 and np.abs(batch["target"]).max() <= 10


# ---- folders ----


def write_npz(path, series, names=None):
    lengths = [len(x) for x in series]
    content = {
        "values": np.concatenate(series).astype(np.float32),
        "offsets": np.cumsum([0, *lengths]),
    }
    np.savez_compressed(
        path,
        **content | ({} if names is None else {"names": np.array(names)}),
        freq="H",
        period=np.int32(24),
    )


def test_folder_of_every_format(tmp_path):
    write_npz(tmp_path / "a.npz", [ramp(15), ramp(20, 100)], names=["x", "y"])
    write_npz(tmp_path / "b.npz", [ramp(9)])
    frame = pd.DataFrame(
        {"date": pd.date_range("2020", periods=30, freq="h"), "u": ramp(30), "v": np.arange(30)}
    )
    frame.loc[3, "u"] = np.nan
    frame.to_csv(tmp_path / "c.csv", index=False)
    frame.to_csv(tmp_path / "d.csv.gz", index=False)
    frame.to_parquet(tmp_path / "e.parquet")
    (tmp_path / "notes.txt").write_text("not a series")
    found = read_folder(tmp_path)
    assert sorted(found) == ["a/0:x", "a/1:y", "b/0:0", "c/u", "c/v", "d/u", "d/v", "e/u", "e/v"]
    assert all(x.dtype == np.float32 and x.ndim == 1 for x in found.values())
    np.testing.assert_array_equal(found["a/1:y"], ramp(20, 100))
    for name in ("c/u", "d/u", "e/u"):
        assert np.isnan(found[name][3])
        np.testing.assert_array_equal(found[name][4:], ramp(26, 4))


def test_two_series_of_one_name_are_both_kept(tmp_path):
    write_npz(tmp_path / "a.npz", [ramp(15), ramp(20)], names=["x", "x"])
    assert sorted(len(x) for x in read_folder(tmp_path).values()) == [15, 20]


def test_unreadable_files_are_all_named(tmp_path):
    write_npz(tmp_path / "good.npz", [ramp(15)])
    np.savez(tmp_path / "keys.npz", data=ramp(3))
    np.savez(tmp_path / "offsets.npz", values=ramp(9), offsets=np.array([0, 5]))
    np.savez(tmp_path / "pickle.npz", values=np.array([{}], dtype=object), offsets=np.array([0, 1]))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "text.csv").write_text("date,name\n2020-01-01,a\n")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError) as err:
        read_folder(tmp_path)
    for name in ("keys.npz", "offsets.npz", "pickle.npz", "cut.npz", "text.csv", "empty.csv"):
        assert name in str(err.value)
    assert "good.npz" not in str(err.value)
    assert "lacks offsets, values" in str(err.value) and "no numeric column" in str(err.value)


def test_no_folder_or_nothing_in_it(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="folder with"):
            read_folder(folder)


def test_a_pool_written_for_other_hosts_is_the_same_pool(tmp_path):
    real = pool([ramp(90, 0), ramp(60, 1000), ramp(3)], L, H, stride=3, val_share=0.3)
    other = pool([ramp(40, 5000)], L, H, stride=5).train
    for i, made in enumerate(
        (real, Pool(real.train, other, ("a", "b")), Pool(real.train, None, ()))
    ):
        (tmp_path / "windows").mkdir(exist_ok=True)
        (tmp_path / "windows" / "older").touch()
        _write(lambda made=made: made, tmp_path / "windows")
        n_files = (4, 5, 3)[i]  # a series of both parts is kept once; nothing older is left
        assert len(list((tmp_path / "windows").iterdir())) == n_files
        found = _map(tmp_path / "windows")
        assert found.notes == made.notes
        for got, want in ((found.train, made.train), (found.val, made.val)):
            assert (got is None) == (want is None)
            if want is not None:
                assert isinstance(got.values, np.memmap) and not got.values.flags.writeable
                n = jnp.arange(want.n)
                np.testing.assert_array_equal(
                    whole(got.over(None).gather(n)), whole(want.gather(n))
                )


def test_one_host_shares_its_pool_with_nobody(tmp_path):
    made = pool([ramp(90)], L, H)
    assert shared(lambda: made, tmp_path / "windows") is made
    assert not (tmp_path / "windows").exists()
