import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltsm_jax.tasks import detection_scores as scores_of

LABELS = np.array([0, 0, 1, 1, 1, 0, 0, 0, 1, 0], bool)


def by_hand_auc_pr(scores, labels):
    """Average precision threshold by threshold, each distinct score once."""
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        flags = scores >= threshold
        recall = (flags & labels).sum() / labels.sum()
        area += (flags & labels).sum() / flags.sum() * (recall - recall_before)
        recall_before = recall
    return area


def by_hand_vus_pr(scores, labels, widths):
    """The definition of the volume, with a loop for each thing that is summed."""
    n, areas = len(scores), []
    runs = scores_of.spans_of(labels)
    for width in widths:
        soft = [float(label) for label in labels]
        for row in range(n):
            for first, last in runs:
                distance = max(first - row, row - last, 0)
                if 0 < distance <= width // 2:
                    soft[row] = max(soft[row], (1 - distance / width) ** 0.5)
        area, before = 0.0, 0.0
        for threshold in sorted(set(scores.tolist()), reverse=True):
            flagged = [row for row in range(n) if scores[row] >= threshold]
            hits = sum(soft[row] for row in flagged)
            recall = min(hits / ((labels.sum() + sum(soft)) / 2), 1)
            exist = 0
            for first, last in runs:
                near = range(first - width // 2, last + width // 2 + 1)
                exist += any(row in near for row in flagged)
            reached = recall * exist / len(runs)
            area += hits / len(flagged) * (reached - before)
            before = reached
        areas.append(area)
    return sum(areas) / len(areas)


def test_spans_and_labels_are_one_another():
    assert scores_of.spans_of(LABELS) == [(2, 4), (8, 8)]
    np.testing.assert_array_equal(scores_of.label_rows([(2, 4), (8, 8)], 10), LABELS)
    np.testing.assert_array_equal(
        scores_of.label_rows([(-5, 0), (9, 20)], 10), np.arange(10) % 9 == 0
    )
    assert not scores_of.label_rows([(-5, -2)], 10).any() and scores_of.spans_of(np.zeros(3)) == []


def test_point_scores_of_a_worked_example():
    flags = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 0], bool)
    found = scores_of.point_scores(flags, LABELS)
    assert found == {"precision": 2 / 3, "recall": 2 / 4, "f1": pytest.approx(4 / 7)}
    assert scores_of.point_scores(np.zeros(10, bool), LABELS) == {
        "precision": 0,
        "recall": 0,
        "f1": 0,
    }


def test_range_scores_of_a_worked_example():
    """Of the range 2-4 two pieces, 2 and 4, are flagged: 2/3 halved; 8 is not. Of three flags two
    are right.
    """
    flags = np.array([1, 0, 1, 0, 1, 0, 0, 0, 0, 0], bool)
    found = scores_of.range_scores(flags, LABELS)
    assert found["recall"] == pytest.approx((2 / 3 / 2 + 0) / 2)
    assert found["precision"] == pytest.approx(2 / 3)
    assert scores_of.range_scores(LABELS, LABELS) == {"precision": 1, "recall": 1, "f1": 1}


def test_point_adjustment_inflates():
    flags = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    adjusted = scores_of.point_adjust(flags, LABELS)
    np.testing.assert_array_equal(adjusted, scores_of.label_rows([(2, 4)], 10))
    assert (
        scores_of.point_scores(adjusted, LABELS)["f1"] > scores_of.point_scores(flags, LABELS)["f1"]
    )


def test_auc_pr_of_worked_examples():
    labels = np.array([True, False, True])
    assert scores_of.auc_pr(np.array([3.0, 2, 1]), labels) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert scores_of.auc_pr(np.array([1.0, 1, 1]), labels) == pytest.approx(2 / 3)  # all at once
    assert np.isnan(scores_of.auc_pr(np.ones(3), np.zeros(3)))
    assert np.isnan(scores_of.vus_pr(np.ones(3), np.zeros(3)))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(4, 24), st.integers(0, 9))
def test_areas_and_volumes_are_their_definitions(data, n, buffer):
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    scores = np.array(data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)), float)
    labels[data.draw(st.integers(0, n - 1))] = True
    assert scores_of.auc_pr(scores, labels) == pytest.approx(by_hand_auc_pr(scores, labels))
    assert scores_of.vus_pr(scores, labels, 0) == pytest.approx(by_hand_vus_pr(scores, labels, [0]))
    expected = by_hand_vus_pr(scores, labels, range(buffer + 1))
    assert scores_of.vus_pr(scores, labels, buffer) == pytest.approx(expected)


def test_a_near_miss_counts_within_the_buffer_only():
    scores = np.zeros(50)
    scores[22] = 1.0
    labels = scores_of.label_rows([(24, 26)], 50)
    assert scores_of.vus_pr(scores, labels, 12) > scores_of.vus_pr(scores, labels, 0)
    perfect = labels.astype(float)
    assert scores_of.vus_pr(perfect, labels, 0) == pytest.approx(1)


def test_smoothing_is_the_mean_of_the_rows_around():
    x = np.array([0.0, 0, 9, 0, 0, 0])
    np.testing.assert_allclose(scores_of.smooth_scores(x, 3), [0, 3, 3, 3, 0, 0])
    np.testing.assert_allclose(scores_of.smooth_scores(x, 4), [3, 9 / 4, 9 / 4, 9 / 4, 0, 0])
    np.testing.assert_array_equal(scores_of.smooth_scores(x, 1), x)


def test_the_archive_forgives_a_hundred_rows_or_the_length():
    scores = np.zeros(1000)
    scores[299] = 1
    assert not scores_of.place_is_right(scores, (400, 405))
    assert scores_of.place_is_right(scores, (399, 405))
    assert scores_of.place_is_right(scores, (450, 600))


def test_refusals():
    for call in (scores_of.auc_pr, scores_of.vus_pr):
        with pytest.raises(ValueError, match="one and the same"):
            call(np.ones(3), np.ones(4))
        with pytest.raises(ValueError, match="not finite"):
            call(np.array([1.0, np.nan]), np.ones(2))
    with pytest.raises(ValueError, match="at least 0"):
        scores_of.vus_pr(np.ones(2), np.ones(2), -1)
    with pytest.raises(ValueError, match="one and the same"):
        scores_of.point_scores(np.ones(2), np.ones(3))
