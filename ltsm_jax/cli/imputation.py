"""`ltsm impute`: a table without holes."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from ltsm_jax import flags
from ltsm_jax.cli import printing
from ltsm_jax.cli.options import MODEL, Columns, Command, Licence, of_model, of_table
from ltsm_jax.cli.tables import PICTURES, TABLES, file_of, hand_over, require_folder
from ltsm_jax.data import DataError
from ltsm_jax.forecaster import Forecaster
from ltsm_jax.imputation import FILLS, impute, read_for_imputation
from ltsm_jax.methods.strategies import STRATEGIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impute(Command):
    """Fill the empty cells of a table, and flag the cells that were filled.

    The model reconstructs what is missing from the rows around it. Known cells
    of the same table, hidden in holes of the same form, tell whether that beats
    a straight line; a column where it does not is filled by the line. The
    result has ids, stamps, targets and, for each target, NAME_filled. Rows
    behind the last value of an item are the future and are left away.

    Example:  ltsm impute sensors.csv --model timer-tiny-imputation \\
                  --out whole.csv --plot whole.png
    Cost:     seconds; with --method ff or sff a minute more for a small model.
    """

    program: ClassVar[str] = "ltsm impute"

    data: Annotated[tyro.conf.Positional[str], flags.text("DATA")]
    """table: .csv, .parquet or .xlsx, or the name of a benchmark"""
    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    fill: Annotated[str, flags.one_of(("auto", *FILLS))] = "auto"
    """what fills a column: the model, the model anchored at the values beside a hole, the straight
    line, or the best of them on known cells that were hidden"""
    method: Annotated[
        str, flags.one_of(tuple(STRATEGIES)), flags.described("how to tune on the table before")
    ] = "zero_shot"
    seed: Annotated[int, flags.whole(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = 0
    """of tuning"""
    out: Annotated[Path | None, file_of(TABLES)] = None
    """file to write (.csv, .parquet, .json); by default the table goes to stdout"""
    plot: Annotated[Path | None, file_of(PICTURES)] = None
    """picture to draw (.png, .svg, .pdf)"""
    plan: bool = False
    """say what would be done, and stop"""
    columns: Columns = dataclasses.field(default_factory=Columns)
    licence: Licence = dataclasses.field(default_factory=Licence)

    def run(self) -> int:
        """Read, say the plan, fill, write."""
        start = time.perf_counter()
        forecaster = Forecaster.load(self.model, accept_license=self.licence.accept_license)
        try:
            panel = read_for_imputation(self.data, **self.columns.asked())
        except FileNotFoundError as error:
            raise DataError(str(error)) from error
        plan = of_table(panel) | {
            "model": of_model(self.model, forecaster),
            "filled by": self.fill,
            "tuning": self.method,
            "result": str(self.out or "stdout") + (f", {self.plot}" if self.plot else ""),
        }
        if self.plan and self.output.json:
            printing.show_json({"plan": plan, "notes": list(panel.notes)})
        else:
            printing.say(printing.facts(plan))
        if self.plan:
            return 0
        for file in (self.out, self.plot):
            require_folder(file)
        found = impute(
            forecaster.model,
            forecaster.params,
            panel,
            fill=self.fill,  # pyright: ignore[reportArgumentType]
            method=self.method,
            seed=self.seed,
        )
        facts = {
            "model": self.model,
            "rows": len(found.table),
            "filled": found.n_filled,
            "check": found.check.to_dict("records"),
            "notes": list(found.notes),
            "seconds": time.perf_counter() - start,
        }
        hand_over(found, facts, out=self.out, plot=self.plot, as_json=self.output.json)
        return 0
