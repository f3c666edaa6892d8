import dataclasses
import gzip
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.models.family import Model
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.tasks import anomaly
from ltsm_jax.tasks.anomaly import Labelled

P = 96


@dataclasses.dataclass(frozen=True)
class Zero(Model):
    """Expects 0 everywhere, plus `params["peek"]` times what is there: the error of a row is its
    own value squared.
    """

    config: int = 0
    family: ClassVar[str] = "zero"
    tasks: ClassVar[tuple] = ("anomaly",)
    presets = small = config_from_dict = init = loss = predict = recipe = context_len = horizon = (
        None  # no part in the task
    )

    def reconstruct(self, params, x, key=None, train=False, ims=True):
        return params["peek"] * (x[..., P:] if ims else x)


ZERO = {"peek": jnp.float32(0)}


def series(n_rows=5000, b=1200, first=2000, last=2010, values=None):
    values = np.random.default_rng(0).normal(size=n_rows) if values is None else values
    return Labelled("a", values, b, (first, last))


def spike(n_rows, b, row):
    """Alternating +-1 (mean 0, std 1 in any even number of rows), and 9 at one row."""
    values = np.where(np.arange(n_rows) % 2, 1.0, -1.0)
    values[row] = 9.0
    return series(n_rows, b, row, row, values)


@pytest.mark.parametrize("ims", [True, False])
@pytest.mark.parametrize("n_rows", [1300, 1871, 1872, 1873, 2448, 5000])
def test_every_test_row_is_scored_once_and_by_its_own_error(n_rows, ims):
    prepared = anomaly.scale_series(series(n_rows, 1200, 1250, 1260))
    errors = anomaly.row_errors(
        Zero(), ZERO, prepared.values, (1200, n_rows), ims=ims, batch_size=2
    )
    np.testing.assert_allclose(errors, np.square(np.asarray(prepared.values)[0, 1200:]), rtol=1e-6)


def test_token_t_covers_rows_b_plus_96_t_to_b_plus_96_t_plus_96():
    """The worked example of the protocol: 5000 rows, b = 1200: 6 windows, 36 tokens, rows 1200 to
    4655, not 344.
    """
    prepared = anomaly.scale_series(series())
    assert len(anomaly.window_starts(1200, 5000)) == 6
    released = anomaly.token_scores(
        anomaly.row_errors(Zero(), ZERO, prepared.values, (1200, 5000), tail=False)
    )
    assert released.shape == (36,)
    squares = np.square(np.asarray(prepared.values, np.float64)[0])
    by_hand = [squares[1200 + 96 * t : 1200 + 96 * (t + 1)].mean() for t in range(36)]
    np.testing.assert_allclose(released, by_hand, rtol=1e-6)
    whole = anomaly.token_scores(anomaly.row_errors(Zero(), ZERO, prepared.values, (1200, 5000)))
    np.testing.assert_array_equal(whole[:36], released)
    assert len(whole) == 40 and whole[-1] == pytest.approx(squares[1200 + 96 * 39 :].mean())


@pytest.mark.parametrize(
    ("row", "token"),
    [(1200, 0), (1295, 0), (1296, 1), (3000, 18), (4655, 35), (4656, 36), (4999, 39)],
)
def test_a_spike_is_found_in_its_token(row, token):
    prepared = anomaly.scale_series(spike(5000, 1200, row))
    scores = anomaly.token_scores(anomaly.row_errors(Zero(), ZERO, prepared.values, (1200, 5000)))
    assert scores.argmax() == token
    result = anomaly.evaluate(Zero(), ZERO, prepared)
    assert (result.rank, result.n_tokens) == (1, 40) and result.share == 1 / 40


def test_rank_and_share_count_the_tokens_above():
    """Two louder tokens stand before the labelled one."""
    values = np.where(np.arange(5000) % 2, 1.0, -1.0)
    values[[1400, 3000, 4000]] = 20.0, 9.0, 30.0
    result = anomaly.evaluate(
        Zero(), ZERO, anomaly.scale_series(series(5000, 1200, 3000, 3000, values))
    )
    assert (result.rank, result.n_tokens, result.share) == (3, 40, 3 / 40)


def test_an_anomaly_after_the_last_whole_window():
    """Rows 4656 on: scored by default, a miss when they are left out, and rank 1 in the released
    code.
    """
    labelled = spike(5000, 1200, 4800)
    assert anomaly.evaluate(Zero(), ZERO, anomaly.scale_series(labelled)).rank == 1
    missed = anomaly.evaluate(Zero(), ZERO, anomaly.scale_series(labelled), tail=False)
    assert (missed.rank, missed.n_tokens, missed.share) == (None, 36, 1.0)
    released = anomaly.evaluate(
        Zero(), ZERO, anomaly.scale_series(labelled, quirks={"uncovered_is_hit"})
    )
    assert (released.rank, released.n_tokens) == (1, 36)
    quiet = series(5000, 1200, 4800, 4800, np.where(np.arange(5000) % 2, 1.0, -1.0))
    assert anomaly.evaluate(Zero(), ZERO, anomaly.scale_series(quiet)).rank > 1


@pytest.mark.parametrize(
    ("span", "overlapping"),
    [
        ((96, 96), [1]),
        ((95, 95), [0]),
        ((95, 96), [0, 1]),
        ((100, 110), [1]),
        ((0, 287), [0, 1, 2]),
        ((192, 200), [2]),
    ],
)
def test_overlap_is_that_of_half_open_ranges(span, overlapping):
    for token in range(3):
        scores = np.array([1.0, 1.0, 1.0])
        scores[token] = 2.0
        result = anomaly.rank_anomaly(scores, span, 0)
        assert (result.rank == 1) == (token in overlapping), (span, token)


def test_a_touching_token_counts_only_in_the_released_way():
    """The token of rows [0, 96) ends exactly where an anomaly at row 96 begins."""
    scores = np.array([3.0, 1.0, 2.0])
    assert anomaly.rank_anomaly(scores, (96, 99), 0).rank == 3
    assert anomaly.rank_anomaly(scores, (96, 99), 0, quirks={"touching_is_hit"}).rank == 1
    assert anomaly.rank_anomaly(scores, (97, 99), 0, quirks={"touching_is_hit"}).rank == 3


def test_scores_that_are_not_finite_are_refused():
    for scores in ([], [1.0, np.nan], [np.inf]):
        with pytest.raises(ValueError, match="scores"):
            anomaly.rank_anomaly(np.array(scores), (0, 1), 0)


def test_training_sees_no_held_out_row():
    prepared = anomaly.scale_series(series(5000, 1200))
    assert prepared.validate_rows == (1080, 1200)
    assert prepared.train.n == 1080 - 768 + 1
    last = prepared.train.gather(jnp.array([prepared.train.n - 1]))
    window = np.concatenate([last["context"], last["target"]], -1)[0, 0]
    np.testing.assert_array_equal(window, np.asarray(prepared.values)[0, 1080 - 768 : 1080])
    # scaled with all training rows
    np.testing.assert_allclose(np.asarray(prepared.values)[0, :1200].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(prepared.values)[0, :1200].std(), 1, rtol=1e-6)
    squares = np.square(np.asarray(prepared.values, np.float64)[0])
    assert anomaly.validation_error(Zero(), ZERO, prepared) == pytest.approx(
        squares[1080:1200].mean()
    )


def test_released_validation_looks_at_the_test_rows():
    prepared = anomaly.scale_series(series(), quirks={"select_on_test"})
    assert prepared.train.n == 1200 - 768 + 1 and prepared.validate_rows == (1200, 5000)
    squares = np.square(np.asarray(prepared.values, np.float64)[0])
    starts = 1104 + 576 * np.arange(6)
    by_hand = np.mean([squares[s + 96 : s + 768] for s in starts])
    assert anomaly.validation_error(Zero(), ZERO, prepared) == pytest.approx(by_hand)
    direct = np.mean([squares[s : s + 768] for s in starts])
    assert anomaly.validation_error(Zero(), ZERO, prepared, ims=False) == pytest.approx(direct)


@pytest.mark.parametrize(("ims", "first"), [(True, 96), (False, 0)])
def test_loss_covers_the_points_of_its_mode(ims, first):
    x = np.random.default_rng(0).normal(size=(3, 1, 768)).astype(np.float32)
    batch = {"context": jnp.asarray(x[..., :672]), "target": jnp.asarray(x[..., 672:])}
    loss = anomaly.loss_fn(Zero(), ims=ims)
    assert float(loss(ZERO, batch, None, False)) == pytest.approx(
        np.square(x[..., first:]).mean(), rel=1e-6
    )
    weighted = batch | {"weight": jnp.array([1.0, 0.0, 1.0])}
    assert float(loss(ZERO, weighted, None, False)) == pytest.approx(
        np.square(x[[0, 2], :, first:]).mean(), rel=1e-6
    )


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
@pytest.mark.parametrize("separator", ["\n", "  "])
def test_files_of_the_archive(tmp_path, suffix, separator):
    path = tmp_path / f"042_UCR_Anomaly_NOISE_a_b2_40_50_59.{suffix}"
    text = separator.join(f"   {v:.7e}" for v in range(100)).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    read = anomaly.read_ucr(path)
    assert (read.name, read.train_end, read.anomaly) == (
        "042_UCR_Anomaly_NOISE_a_b2_40_50_59",
        40,
        (50, 59),
    )
    np.testing.assert_array_equal(read.values, np.arange(100.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("series.txt", b"1 2 3", "not named"),
        ("1_UCR_Anomaly_x_2_3.txt", b"1 2 3", "not named"),
        ("1_UCR_Anomaly_x_2_3_3.txt", b"1 2 three 4", "numbers"),
        ("1_UCR_Anomaly_x_2_3_3.txt", b"1 2 3 nan", "finite"),
        ("1_UCR_Anomaly_x_2_3_4.txt", b"1 2 3 4", "4 rows"),
        ("1_UCR_Anomaly_x_3_2_2.txt", b"1 2 3 4", "follow"),
        ("1_UCR_Anomaly_x_2_3_3.txt", b"", "0 rows"),
        ("1_UCR_Anomaly_x_2_3_3.txt", b"\xff\xfe", "numbers"),
        ("1_UCR_Anomaly_x_2_3_3.txt.gz", b"1 2 3 4", "numbers"),
        ("1_UCR_Anomaly_x_2_3_3.txt.gz", gzip.compress(b"1 2 3 4" * 99, mtime=0)[:-20], "numbers"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        anomaly.read_ucr(tmp_path / name)


def test_refusals():
    with pytest.raises(ValueError, match="too few"):
        anomaly.scale_series(series(2000, 800, 1500, 1501))
    with pytest.raises(ValueError, match="unknown quirks"):
        anomaly.scale_series(series(), quirks={"touching"})
    with pytest.raises(ValueError, match="holdout"):
        anomaly.scale_series(series(), holdout=0.0)
    with pytest.raises(ValueError, match="no whole window"):
        anomaly.evaluate(
            Zero(), ZERO, anomaly.scale_series(series(1500, 1200, 1300, 1301)), tail=False
        )
    with pytest.raises(ValueError, match="no results"):
        anomaly.count_found([])


def test_summary():
    results = [
        anomaly.AnomalyOutcome("a", 1, 100),
        anomaly.AnomalyOutcome("b", 5, 100),
        anomaly.AnomalyOutcome("c", None, 50),
    ]
    assert anomaly.count_found(results) == {
        "files": 3,
        "missed": 1,
        "mean_share": pytest.approx((0.01 + 0.05 + 1) / 3),
        "found": {0.01: 1, 0.03: 1, 0.05: 2, 0.1: 2},
    }


class TestTimer:
    model = Timer(
        TimerConfig.of(P, 16, 32, 1, 2, context_len=768, horizon=P, task="anomaly", dropout=0.1)
    )

    def test_it_follows_the_original_formula(self):
        """Windows fed without their last patch; the tokens 0 to 5 are compared with points 96 to
        671.
        """
        params = jax.jit(self.model.init)(jax.random.key(0))
        prepared = anomaly.scale_series(series(2600, 1200, 2000, 2010))
        found = anomaly.token_scores(
            anomaly.row_errors(self.model, params, prepared.values, (1200, 2600), tail=False)
        )
        x = np.asarray(prepared.values)[0]
        windows = np.stack([x[s : s + 768] for s in (1104, 1680)])[:, None]
        outputs = np.asarray(jax.jit(self.model.apply)(params, jnp.asarray(windows[..., :-P]))[0])
        by_hand = (
            np.square(outputs[..., :-P] - windows[..., P:-P]).reshape(2, 6, P).mean(-1).ravel()
        )
        np.testing.assert_allclose(found, by_hand, rtol=1e-5)

    def test_missing_points_do_not_count(self):
        params = jax.jit(self.model.init)(jax.random.key(0))
        x = np.random.default_rng(0).normal(size=(2, 1, 768)).astype(np.float32)
        x[0, :, 90:130], x[1, :, 700:] = np.nan, np.nan
        expected = np.asarray(jax.jit(self.model.reconstruct)(params, jnp.asarray(x)))
        batch = {"context": jnp.asarray(x[..., :672]), "target": jnp.asarray(x[..., 672:])}
        found = jax.jit(anomaly.loss_fn(self.model), static_argnums=3)(params, batch, None, False)
        np.testing.assert_allclose(found, np.nanmean(np.square(expected - x[..., P:])), rtol=1e-5)

    def test_it_finds_a_break_after_a_little_training(self):
        """A sine whose period changes for 100 rows: after training on clean rows the break scores
        highest.
        """
        t = np.arange(3300)
        values = np.sin(2 * np.pi * t / 48)
        values[2500:2600] = np.sin(2 * np.pi * t[2500:2600] / 17)
        prepared = anomaly.scale_series(series(3300, 1500, 2500, 2599, values))
        loss, params = anomaly.loss_fn(self.model), jax.jit(self.model.init)(jax.random.key(0))
        before = anomaly.validation_error(self.model, params, prepared)

        @jax.jit
        def step(params, key):
            batch = prepared.train.gather(jax.random.randint(key, (16,), 0, prepared.train.n))
            gradient = jax.grad(loss)(params, batch, key, True)
            return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient)

        for i in range(80):
            params = step(params, jax.random.key(i))
        assert anomaly.validation_error(self.model, params, prepared) < 0.5 * before
        assert anomaly.evaluate(self.model, params, prepared).rank == 1
