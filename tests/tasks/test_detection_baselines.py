import numpy as np
import pytest

from ltsm_jax.tasks import detection_baselines as baselines


def test_last_value_is_the_squared_step():
    np.testing.assert_array_equal(baselines.last_value(np.array([1.0, 3, 2])), [0, 4, 1])


def test_moving_z_score_is_its_definition():
    x = np.random.default_rng(0).normal(5, 2, size=60)
    found = baselines.moving_z_score(x, 10)
    for row in (1, 2, 5, 10, 33, 59):
        before = x[max(row - 10, 0) : row]
        if row > 1:  # one row has no deviation
            assert found[row] == pytest.approx(abs(x[row] - before.mean()) / before.std())
    assert found[0] == 0 and np.isfinite(baselines.moving_z_score(np.ones(9), 3)).all()


def by_hand_profile(x, length):
    n = len(x) - length + 1
    z = np.stack([x[i : i + length] for i in range(n)])
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    nearest = []
    for i in range(n):
        far = [np.linalg.norm(z[i] - z[j]) for j in range(n) if abs(i - j) > length // 2]
        nearest.append(min(far))
    return np.array(nearest)


def test_discord_is_the_matrix_profile_by_brute_force():
    x = np.random.default_rng(1).normal(size=104).cumsum()
    found = baselines.discord(x, 8)
    np.testing.assert_allclose(found[3 : 3 + 97], by_hand_profile(x, 8), atol=1e-6)
    assert found.shape == x.shape and found[0] == found[3] and found[-1] == found[99]


def test_discord_finds_the_beat_that_differs():
    t = np.arange(1200)
    x = np.sin(2 * np.pi * t / 50)
    x[700:725] *= -0.3
    assert abs(int(baselines.discord(x, 50).argmax()) - 712) < 40


def test_constant_stretches_are_alike():
    x = np.concatenate([np.ones(30), np.random.default_rng(0).normal(size=30), np.ones(30)])
    found = baselines.discord(x, 8)
    assert np.isfinite(found).all() and found[5] == 0 and found[80] == 0 and found[45] > 0


def test_discord_refuses_what_is_too_short():
    with pytest.raises(ValueError, match="two subsequences"):
        baselines.discord(np.ones(10), 8)


@pytest.mark.parametrize("length", [24, 50, 144])
def test_period_of_a_sine(length):
    noise = np.random.default_rng(0).normal(size=2000)
    x = np.sin(2 * np.pi * np.arange(2000) / length) + 0.1 * noise
    assert abs(baselines.period(x) - length) <= 1


def test_period_of_nothing():
    assert baselines.period(np.arange(500.0)) == 96
    assert baselines.period(np.ones(20)) == 96


def test_every_baseline_scores_every_row():
    x = np.random.default_rng(0).normal(size=400)
    for name, score in baselines.scorers(x[:100]).items():
        found = score(x)
        assert found.shape == x.shape and np.isfinite(found).all(), name
