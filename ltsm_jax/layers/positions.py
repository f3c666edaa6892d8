"""Position tables that several families share."""

import math

import numpy as np

MAX_TABLE = (
    1 << 23
)  # entries; the largest published table has 5.1 million, and a larger one would fill the memory


def require_table(n: int, d_model: int) -> None:
    """Refuse a position table [n, D] that no model has, before it is computed.

    Raises: ValueError.
    """
    if n * d_model > MAX_TABLE:
        raise ValueError(
            f"a position table of {n:,} rows and {d_model:,} columns; the largest has "
            f"{MAX_TABLE:,} entries"
        )


def sinusoids(n: int, d_model: int) -> np.ndarray:
    """The original's position table [n, D], float32: sines in even columns, cosines in odd ones,
    base 10000.

    Frequencies and angles are rounded to float32 as in the original; sine and cosine are then
    exact, which leaves the published tables at most one unit in the last place away.
    """
    require_table(n, d_model)
    exponent = np.arange(0, d_model, 2).astype(np.float32) * np.float32(
        -(math.log(10000.0) / d_model)
    )
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = (np.arange(n, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(n, d_model).astype(np.float32)
