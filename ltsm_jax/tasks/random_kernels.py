"""A classifier without training of a network: random convolutions and a ridge on top.

The baseline of time series classification: strong, and a matter of seconds.

Source: Dempster et al., "ROCKET" (DMKD 2020), for the distribution of kernels and the two features
of each; the ridge takes the penalty of the lowest leave-one-out error.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

KERNELS = 500
LENGTHS = (7, 9, 11)
PENALTIES = np.logspace(-3, 3, 10)


@dataclasses.dataclass(frozen=True)
class RandomConvolution:
    """One random convolution: weights [channels, length] on some channels, bias,
    dilation, padding.
    """

    channels: np.ndarray
    weights: np.ndarray
    bias: float
    dilation: int
    padding: int


def draw_kernels(
    seed: int, n_channels: int, n_steps: int, count: int = KERNELS
) -> list[RandomConvolution]:
    """Draw kernels for series [n_channels, n_steps].

    Length 7, 9 or 11 (as far as the series has room); weights N(0, 1) less their mean; bias
    U(-1, 1); dilation 2 ** U(0, log2 of the largest that fits); padded every second time; a random
    subset of the channels, whose size is 2 ** U(0, log2(n_channels + 1)).
    """
    rng = np.random.default_rng(seed)
    lengths = [length for length in LENGTHS if length <= n_steps] or [n_steps]
    kernels = []
    for _ in range(count):
        length = int(rng.choice(lengths))
        most = max((n_steps - 1) / max(length - 1, 1), 1)
        dilation = int(2 ** rng.uniform(0, np.log2(most)))
        padding = (length - 1) * dilation // 2 if rng.integers(2) else 0
        size = int(2 ** rng.uniform(0, np.log2(n_channels + 1)))
        channels = rng.choice(n_channels, size=min(size, n_channels), replace=False)
        weights = rng.normal(size=(len(channels), length))
        weights -= weights.mean(axis=1, keepdims=True)
        kernels.append(
            RandomConvolution(
                channels=channels,
                weights=weights,
                bias=float(rng.uniform(-1, 1)),
                dilation=dilation,
                padding=padding,
            )
        )
    return kernels


def features(values: np.ndarray, kernels: Sequence[RandomConvolution]) -> np.ndarray:
    """Give two features of every kernel, its largest response and the share of positive ones.

    values: [N, C, T]; every example and channel is scaled to mean 0 and std 1, and missing values
    count 0. Returns: [N, 2 * kernels].
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
    mean = np.where(known, values, 0).sum(axis=-1, keepdims=True) / count
    centred = np.where(known, values - mean, 0)
    std = np.sqrt(np.square(centred).sum(axis=-1, keepdims=True) / count)
    scaled = centred / np.where(std > 0, std, 1)
    found = np.empty((len(values), 2 * len(kernels)))
    for k, kernel in enumerate(kernels):
        response = _response(scaled[:, kernel.channels], kernel)
        found[:, 2 * k] = response.max(axis=1)
        found[:, 2 * k + 1] = (response > 0).mean(axis=1)
    return found


def _response(x: np.ndarray, kernel: RandomConvolution) -> np.ndarray:
    """Convolve x [N, channels, T] with a kernel, [N, T']."""
    x = np.pad(x, ((0, 0), (0, 0), (kernel.padding, kernel.padding)))
    length = kernel.weights.shape[1]
    n = x.shape[-1] - (length - 1) * kernel.dilation
    total = np.full((len(x), n), kernel.bias)
    for j in range(length):
        start = j * kernel.dilation
        total += np.einsum("ncT,c->nT", x[..., start : start + n], kernel.weights[:, j])
    return total


def ridge(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classify test rows by ridge regression on a +-1 target for each class.

    train [N, F], labels [N], test [M, F]. Features are standardised with the training rows. The
    penalty is the one of `PENALTIES` with the lowest squared leave-one-out error.
    """
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 0, std, 1)
    x, x_test = (train - mean) / std, (test - mean) / std
    classes = np.unique(labels)
    y = np.where(labels[:, None] == classes, 1.0, -1.0)
    offset = y.mean(axis=0)

    # One decomposition serves every penalty: of a row that is left out the residual is
    # residual / (1 - leverage).
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    projected = u.T @ (y - offset)
    best, weights = np.inf, np.zeros((x.shape[1], len(classes)))
    for penalty in PENALTIES:
        shrink = s**2 / (s**2 + penalty)
        residual = y - offset - u @ (shrink[:, None] * projected)
        leverage = np.square(u) @ shrink + 1 / len(x)
        error = np.square(residual / np.maximum(1 - leverage, 1e-9)[:, None]).mean()
        if error < best:
            best = error
            weights = vt.T @ ((s / (s**2 + penalty))[:, None] * projected)
    return classes[(x_test @ weights + offset).argmax(axis=1)]


def classify(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int = 0, count: int = KERNELS
) -> np.ndarray:
    """Classify test examples [M, C, T] after training ones [N, C, T] with labels [N]; returns [M].

    Raises: ValueError where there is one class alone.
    """
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        raise ValueError("a classifier needs at least two classes among the training examples")
    kernels = draw_kernels(seed, train.shape[1], train.shape[2], count=count)
    return ridge(features(train, kernels), labels, features(test, kernels))
