"""`ltsm detect`: which rows of a table are out of the ordinary."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from ltsm_jax import flags
from ltsm_jax.cli import printing
from ltsm_jax.cli.options import MODEL, Command, Licence, of_model
from ltsm_jax.cli.tables import PICTURES, TABLES, file_of, hand_over, require_folder
from ltsm_jax.data import DataError, Series, load_series
from ltsm_jax.detection import Detected, detect
from ltsm_jax.forecaster import Forecaster
from ltsm_jax.methods.strategies import STRATEGIES

SHARE = flags.number(flags.TINY, flags.BELOW_1, says="between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detect(Command):
    """Give every row of a table an anomaly score, and flag those above a threshold.

    The model says what it expects at each row; the squared error, over what is
    usual in the first part of the table, is the score. The threshold is a
    quantile of the scores of that first part, which should hold nothing
    unusual; no labels are needed. The result has the stamps, the targets,
    score and anomalous, and with several targets the column that stands out.

    Example:  ltsm detect machine.csv --model timer-tiny --first 0.5 \\
                  --out scores.csv --plot scores.png
    Cost:     seconds; with --method ff or sff a minute more for a small model.
    """

    program: ClassVar[str] = "ltsm detect"

    data: Annotated[tyro.conf.Positional[str], flags.text("DATA")]
    """table: .csv, .parquet or .xlsx, or the name of a benchmark"""
    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    first: Annotated[float, SHARE] = 0.3
    """share of the rows, from the first on, that are ordinary"""
    quantile: Annotated[float, SHARE] = 0.995
    """of the scores of that first part: the threshold"""
    method: Annotated[
        str,
        flags.one_of(tuple(STRATEGIES)),
        flags.described("how to tune on the first part before"),
    ] = "zero_shot"
    seed: Annotated[int, flags.whole(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = 0
    """of tuning"""
    out: Annotated[Path | None, file_of(TABLES)] = None
    """file to write (.csv, .parquet, .json); by default the table goes to stdout"""
    plot: Annotated[Path | None, file_of(PICTURES)] = None
    """picture to draw (.png, .svg, .pdf)"""
    plan: bool = False
    """say what would be done, and stop"""
    reading: flags.Reading = dataclasses.field(default_factory=flags.Reading)
    licence: Licence = dataclasses.field(default_factory=Licence)

    def run(self) -> int:
        """Read, say the plan, score, write."""
        start = time.perf_counter()
        forecaster = Forecaster.load(self.model, accept_license=self.licence.accept_license)
        series = self._read()
        plan = {
            "data": f"{series.name}: {series.n_rows:,} rows, targets "
            f"{', '.join(map(str, series.columns[:6]))}",
            "model": of_model(self.model, forecaster),
            "score": f"threshold: quantile {self.quantile:g} of the first {self.first:g} of the "
            "rows",
            "tuning": self.method,
            "result": str(self.out or "stdout") + (f", {self.plot}" if self.plot else ""),
        }
        if self.plan and self.output.json:
            printing.show_json({"plan": plan, "notes": list(series.notes)})
        else:
            printing.say(printing.facts(plan))
        if self.plan:
            return 0
        for file in (self.out, self.plot):
            require_folder(file)
        found = detect(
            forecaster.model,
            forecaster.params,
            series,
            first=self.first,
            quantile=self.quantile,
            method=self.method,
            seed=self.seed,
        )
        facts = self._facts(found, time.perf_counter() - start)
        hand_over(found, facts, out=self.out, plot=self.plot, as_json=self.output.json)
        return 0

    def _read(self) -> Series:
        try:
            return load_series(self.data, **self.reading.asked())
        except FileNotFoundError as error:
            raise DataError(str(error)) from error

    def _facts(self, found: Detected, took: float) -> dict[str, Any]:
        ranges = found.ranges().astype({"from": str, "to": str})
        return {
            "model": self.model,
            "rows": len(found.table),
            "first_rows": found.first_rows,
            "threshold": found.threshold,
            "anomalous": found.n_anomalous,
            "ranges": ranges.to_dict("records"),
            "notes": list(found.notes),
            "seconds": took,
        }
