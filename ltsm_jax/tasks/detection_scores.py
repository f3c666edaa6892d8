"""Measures of anomaly detection: how well a score per row tells labelled rows from others.

Of a threshold, precision, recall and F1 of rows, of whole ranges, and, for comparison with papers
that do so, after point adjustment; of all thresholds at once, AUC-PR and VUS-PR. Everything is
NumPy over a score per row [T], higher is more anomalous, and the labelled ranges.

Sources: range precision and recall, Tatbul et al., "Precision and Recall for Time Series" (NeurIPS
2018), with flat bias, overlap cardinality 1/x and no reward for existence alone; VUS-PR, Paparrizos
et al., "Volume Under the Surface" (VLDB 2022); against point adjustment, Kim et al., "Towards a
Rigorous Evaluation of Time-Series Anomaly Detection" (AAAI 2022).
"""

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]  # first and last row, both inclusive
BUFFERS = 21  # widths of the buffer that a volume is averaged over, at most


def label_rows(spans: Sequence[Span], n_rows: int) -> np.ndarray:
    """Mark the rows inside any of the spans, bool [n_rows]; what lies outside the rows is cut
    off."""
    labels = np.zeros(n_rows, bool)
    for first, last in spans:
        labels[max(first, 0) : max(last + 1, 0)] = True
    return labels


def spans_of(labels: np.ndarray) -> list[Span]:
    """List the runs of True rows as (first, last), both inclusive."""
    padded = np.concatenate([[False], np.asarray(labels, bool), [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return [(int(first), int(stop) - 1) for first, stop in edges.reshape(-1, 2)]


def point_scores(flags: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute precision, recall and F1 of rows, each row counting alike; 0 where one is not
    defined.

    Args:
      flags, labels: bool [T].
    """
    flags, labels = _checked_rows(flags, labels)
    hits = int((flags & labels).sum())
    precision = _ratio(hits, int(flags.sum()))
    recall = _ratio(hits, int(labels.sum()))
    return {"precision": precision, "recall": recall, "f1": _f1(precision, recall)}


def range_scores(flags: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute precision, recall and F1 of ranges, each range counting alike whatever its length.

    A range is credited with the share of it that ranges of the other kind cover, divided by how
    many they are, so that one anomaly found in three pieces counts a third.
    Args:
      flags, labels: bool [T].
    """
    flags, labels = _checked_rows(flags, labels)
    precision = _mean_overlap(spans_of(flags), labels)
    recall = _mean_overlap(spans_of(labels), flags)
    return {"precision": precision, "recall": recall, "f1": _f1(precision, recall)}


def _mean_overlap(spans: Sequence[Span], others: np.ndarray) -> float:
    credits = []
    for first, last in spans:
        inside = others[first : last + 1]
        pieces = len(spans_of(inside))
        credits.append(inside.mean() / pieces if pieces else 0.0)
    return float(np.mean(credits)) if credits else 0.0


def point_adjust(flags: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Flag all of a labelled range of which one row is flagged, bool [T].

    It inflates: random flags reach high scores on long ranges. For comparison with papers only.
    """
    flags, labels = _checked_rows(flags, labels)
    adjusted = flags.copy()
    for first, last in spans_of(labels):
        if flags[first : last + 1].any():
            adjusted[first : last + 1] = True
    return adjusted


def auc_pr(scores: np.ndarray, labels: np.ndarray) -> float:
    """Compute the area under precision and recall as average precision.

    The sum over thresholds of precision times the recall gained; rows of equal score are taken at
    once.
    Returns: NaN where no row is labelled.
    Example: `auc_pr(np.array([3.0, 2, 1]), np.array([True, False, True]))` is 1/2 + 1/2 * 2/3.
    """
    scores, labels = _checked(scores, labels)
    if not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = _ends_of_ties(scores[order])
    hits = np.cumsum(labels[order])[ends]
    precision = hits / (ends + 1)
    gained = np.diff(hits, prepend=0) / labels.sum()
    return float((precision * gained).sum())


def vus_pr(scores: np.ndarray, labels: np.ndarray, buffer: int = 96) -> float:
    """Compute the volume under the surface of precision and recall over buffers of 0 to `buffer`
    rows.

    For a buffer of l rows, the l / 2 rows before and after an anomaly count as sqrt(1 - distance /
    l) of an anomalous row, which forgives scores that are a little early or late. Recall is that of
    the softened rows, over the mean of hard and softened rows (at most 1), times the share of
    anomalies that have a flagged row; precision is softened hits over flagged rows. The volume is
    the mean of the areas over at most 21 evenly spaced buffers.
    Args:
      scores [T], labels: bool [T]. buffer: the widest one, often the period of the series.
    Returns: NaN where no row is labelled.
    """
    scores, labels = _checked(scores, labels)
    if buffer < 0:
        raise ValueError(f"buffer must be at least 0 rows; got {buffer}")
    if not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = _ends_of_ties(scores[order])
    widths = np.unique(np.linspace(0, buffer, BUFFERS).round().astype(int))
    areas = [
        _area_with_buffer(scores, labels, order, ends=ends, width=int(width)) for width in widths
    ]
    return float(np.mean(areas))


def _area_with_buffer(
    scores: np.ndarray,
    labels: np.ndarray,
    order: np.ndarray,
    ends: np.ndarray,
    width: int,
) -> float:
    spans = spans_of(labels)
    soft = soften(labels, width)
    hits = np.cumsum(soft[order])[ends]
    precision = hits / (ends + 1)
    recall = np.minimum(hits / ((labels.sum() + soft.sum()) / 2), 1)

    # An anomaly exists for a threshold once its highest score, buffer included, reaches it.
    half = width // 2
    best = []
    for first, last in spans:
        best.append(scores[max(first - half, 0) : last + half + 1].max())
    thresholds = scores[order][ends]
    found = (np.asarray(best)[:, None] >= thresholds).mean(axis=0)
    gained = np.diff(recall * found, prepend=0)
    return float((precision * gained).sum())


def soften(labels: np.ndarray, width: int) -> np.ndarray:
    """Give rows near an anomaly a share of its label: sqrt(1 - distance / width) up to width // 2
    rows away."""
    soft = np.asarray(labels, np.float64).copy()
    for first, last in spans_of(labels):
        for distance in range(1, width // 2 + 1):
            share = np.sqrt(1 - distance / width)
            for row in (first - distance, last + distance):
                if 0 <= row < len(soft):
                    soft[row] = max(soft[row], share)
    return soft


def smooth_scores(scores: np.ndarray, width: int) -> np.ndarray:
    """Average each row's score with those around it, `width` rows centred; at the ends over
    fewer."""
    if width <= 1:
        return np.asarray(scores, np.float64)
    scores = np.asarray(scores, np.float64)
    total = np.concatenate([[0.0], np.cumsum(scores)])
    row = np.arange(len(scores))
    first = np.maximum(row - (width - 1) // 2, 0)
    stop = np.minimum(row + width // 2 + 1, len(scores))
    return (total[stop] - total[first]) / (stop - first)


def place_is_right(scores: np.ndarray, span: Span, tolerance: int = 100) -> bool:
    """Say whether the highest score lies in the anomaly, as the UCR archive counts.

    On either side `tolerance` rows are forgiven, or the length of the anomaly where that is more.
    """
    first, last = span
    forgiven = max(tolerance, last - first + 1)
    return first - forgiven <= int(np.argmax(scores)) <= last + forgiven


def _ends_of_ties(falling: np.ndarray) -> np.ndarray:
    """Number the last row of every group of equal scores."""
    return np.flatnonzero(np.append(falling[1:] != falling[:-1], True))


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if scores.ndim != 1 or scores.shape != labels.shape or not scores.size:
        shapes = f"scores {scores.shape} and labels {labels.shape}"
        raise ValueError(f"{shapes} must be one and the same row of entries")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.sum(~np.isfinite(scores))} of {scores.size} scores are not finite")
    return scores, labels


def _checked_rows(flags: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flags, labels = np.asarray(flags, bool), np.asarray(labels, bool)
    if flags.ndim != 1 or flags.shape != labels.shape:
        shapes = f"flags {flags.shape} and labels {labels.shape}"
        raise ValueError(f"{shapes} must be one and the same row of entries")
    return flags, labels


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0
