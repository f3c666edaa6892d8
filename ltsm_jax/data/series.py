"""`Series`: C variates on one grid of T rows, as the rest of the library sees data."""

import dataclasses

import numpy as np
import pandas as pd

from ltsm_jax.frequency import following, season_of

LONGEST_MESSAGE = 2000


def clip(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Shorten a text that quotes data to `longest` characters, the end cut off."""
    return text if len(text) <= longest else text[: longest - 4] + " ..."


class DataError(ValueError):
    """Data that cannot be used as they are; the message lists every problem found and what to do
    about each.

    However wide the data, it has at most `LONGEST_MESSAGE` characters.
    """

    def __init__(self, message: str):
        super().__init__(clip(message))


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """C variates on one grid of T rows.

    Attributes:
      name: what reports call it.
      values: [C, T] float64, data units.
      columns: name of each variate.
      timestamps: [T] datetime64[us], or None when the source has none.
      freq: canonical step ("15min", "h", "D", "W", "M", ...), or None where it is not known.
      tz: name of the zone that the stamps came in (`timestamps` are UTC then), or None.
      model_freq: frequency that a model is told where it is another than `freq`: "oov", out of its
        vocabulary.
      time_name: name of the column that the stamps came in, or None.
      benchmark: name of the benchmark whose borders and reading rules hold for it, or None.
      notes: what was done to the data or found about them on the way in, one line each, for
        reports.
    """

    name: str
    values: np.ndarray
    columns: tuple[str, ...]
    timestamps: np.ndarray | None = None
    freq: str | None = None
    benchmark: str | None = None
    notes: tuple[str, ...] = ()
    tz: str | None = None
    model_freq: str | None = None
    time_name: str | None = None

    def __post_init__(self):
        if self.values.ndim != 2 or len(self.columns) != self.values.shape[0]:
            raise DataError(
                f"values of shape {self.values.shape} need [C, T] and {len(self.columns)} column "
                "names"
            )
        if self.timestamps is not None and self.timestamps.shape != (self.values.shape[1],):
            raise DataError(
                f"{self.values.shape[1]} rows but timestamps of shape {self.timestamps.shape}"
            )

    @property
    def n_rows(self) -> int:
        """T."""
        return self.values.shape[1]

    @property
    def n_variates(self) -> int:
        """C."""
        return self.values.shape[0]

    @property
    def season(self) -> int:
        """Rows in the main season (`season_of`); 1 where the step is not known."""
        return season_of(self.freq) if self.freq else 1

    def stamps_after(self, n: int) -> np.ndarray | None:
        """The `n` stamps [n] that follow the last one, like `timestamps`; None where stamps or step
        are not known."""
        if self.timestamps is None or self.freq is None:
            return None
        return following(self.timestamps, n, self.freq, tz=self.tz)

    def in_zone(self, stamps: np.ndarray) -> pd.DatetimeIndex:
        """Stamps [T] of this series, or after it, as they came in: with the zone where they had
        one."""
        index = pd.DatetimeIndex(stamps)
        return index if self.tz is None else index.tz_localize("UTC").tz_convert(self.tz)
