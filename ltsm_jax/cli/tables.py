"""Commands about a table: forecast, evaluate, compare, prune."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import pandas as pd

from ltsm_jax import flags, hosts, storage, trees
from ltsm_jax.cli import printing
from ltsm_jax.cli.options import MODEL, OnTable, of_model, of_table, quantile_levels
from ltsm_jax.data import Panel
from ltsm_jax.forecaster import LEVELS, Forecaster
from ltsm_jax.methods import estimates, pruning, verdict
from ltsm_jax.methods.pruning import PruneConfig
from ltsm_jax.methods.removal import remove
from ltsm_jax.models import folders
from ltsm_jax.tasks import forecasting
from ltsm_jax.training.memory import size_in_words
from ltsm_jax.training.timing import TimeEstimate
from ltsm_jax.training.timing import time_in_words as in_time

TABLES = (".csv", ".csv.gz", ".parquet", ".json")
PICTURES = (".png", ".svg", ".pdf")


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def file_of(kinds: tuple[str, ...]) -> flags.Check:
    """Take a file of one of these kinds."""

    def read(text: str) -> Path:
        path = Path(text).expanduser()
        if not path.name.lower().endswith(kinds):
            raise ValueError(f"{flags.FLAG} is a file of {', '.join(kinds)}; got {text!r}")
        return path

    return flags.check(read, "FILE")


# --------------------------------------------------------------------------------------------------
# forecast


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastCommand(OnTable):
    """Forecast what comes after the end of every item of a table, with intervals.

    Rows behind the last target, and those of --future, say what is known
    ahead. Quantiles are the model's own where it has them, else they come
    from the errors of its forecasts of the past; the notes say which. The
    result is long: id and time under their own names, target_name where
    there are several targets, predictions, and a column for each level.

    Example:  ltsm forecast sales.csv --model amazon/chronos-bolt-tiny \\
                  --horizon 24 --id store --target sold \\
                  --future prices.csv --out forecast.csv --plot forecast.png
              ltsm forecast ETTh1 --model timer-tiny --horizon 96
    Cost:     seconds to load and compile; then 1,000 items of a small model
              take a few seconds on 2 cores.
    """

    program: ClassVar[str] = "ltsm forecast"

    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    future: Annotated[str | None, flags.text("FILE")] = None
    """table of what is known ahead: id, time and covariates"""
    levels: Annotated[tuple[float, ...], quantile_levels()] = LEVELS
    """quantiles to give, or none"""
    out: Annotated[Path | None, file_of(TABLES)] = None
    """file to write (.csv, .parquet, .json); by default the table goes to stdout"""
    plot: Annotated[Path | None, file_of(PICTURES)] = None
    """picture to draw (.png, .svg, .pdf), of the first items"""
    seed: Annotated[int, flags.whole(0)] = 0
    """of the draws of models that sample"""

    def run(self) -> int:
        """Read, say the plan, forecast, write."""
        start = time.perf_counter()
        forecaster = self.load(self.model)
        panel = self.read(forecaster, self.future)
        length = min(forecaster.model.context_len, int(panel.lengths.max()))
        levels = flags.written(self.levels) or "none"
        plan = of_table(panel) | {
            "model": of_model(self.model, forecaster),
            "forecast": f"{self.horizon} steps from {length} rows at most; levels {levels}",
            "memory": self._memory(forecaster, panel, length),
            "time": forecaster.estimate(
                panel,
                self.horizon,
                quantile_levels=self.levels,
                work_follows=not self.plan,
            ),
            "result": str(self.out or "stdout") + (f", {self.plot}" if self.plot else ""),
        }
        if self.announce(plan, panel.notes):
            return 0
        for file in (self.out, self.plot):
            require_folder(file)

        found = forecaster.predict(panel, self.horizon, quantile_levels=self.levels, seed=self.seed)
        notes = [note for note in found.attrs.pop("notes", []) if note not in panel.notes]
        if notes:
            printing.say(printing.notes(notes))
        if self.plot is not None:
            forecaster.plot(panel, found, self.plot)
        if self.out is not None:
            write_table(found, self.out)
        took = time.perf_counter() - start
        if self.output.json:
            printing.show_json(self._facts(panel, found, [*panel.notes, *notes], took=took))
        elif self.out is None:
            printing.show(found.to_csv(index=False).rstrip("\n"))
        else:
            printing.show(
                f"{self.out}: {len(found):,} rows of {panel.n_items:,} items, {took:.1f} s"
            )
        return 0

    def _memory(self, forecaster: Forecaster, panel: Panel, length: int) -> str:
        rows = min(forecaster.model.eval_batch, panel.n_items * panel.n_variates)
        weights, contexts = _bytes(forecaster.params), rows * length * 4
        return (
            f"{size_in_words(weights)} of weights, {size_in_words(panel.values.nbytes)} of data, "
            f"{size_in_words(contexts)} for a batch of {rows} contexts; what the layers hold comes "
            "on top"
        )

    def _facts(
        self, panel: Panel, found: pd.DataFrame, notes: list[str], took: float
    ) -> dict[str, Any]:
        facts = {
            "out": None if self.out is None else str(self.out),
            "plot": None if self.plot is None else str(self.plot),
            "model": self.model,
            "items": panel.n_items,
            "rows": len(found),
            "columns": list(found.columns),
            "notes": notes,
            "seconds": took,
        }
        if self.out is None:
            facts["forecast"] = found.to_dict("records")
        return facts


def require_folder(file: Path | None) -> None:
    """Refuse a place that cannot be written to before the work that comes before it.

    Raises: FileNotFoundError.
    """
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}; make it first")


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a table in the format that the file's name says, one of `TABLES`."""
    if file.suffix == ".parquet":
        table.to_parquet(file, index=False)
    elif file.suffix == ".json":
        table.to_json(file, orient="records", date_format="iso")
    else:
        table.to_csv(file, index=False)


def hand_over(
    found: Any, facts: dict[str, Any], *, out: Path | None, plot: Path | None, as_json: bool
) -> None:
    """Draw and write what fills or marks a table, and print it.

    found: of `detect` or `impute`: `table`, `plot(file)`, and a summary as its text. facts: of the
    JSON object, beside `out` and `plot`. Without `out` the table goes to stdout, and the summary to
    stderr.
    """
    if plot is not None:
        found.plot(plot)
    if out is not None:
        write_table(found.table, out)
    if as_json:
        files = {
            name: None if file is None else str(file)
            for name, file in (("out", out), ("plot", plot))
        }
        printing.show_json(files | facts)
    elif out is None:
        printing.say(str(found))
        printing.show(found.table.to_csv(index=False).rstrip("\n"))
    else:
        printing.show(str(found))


# --------------------------------------------------------------------------------------------------
# evaluate, compare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(OnTable):
    """Score a model on the last fifth of every item, beside the naive forecasts.

    MSE and MAE of every window, in units standardised by the training rows
    of each item; the difference to the best naive forecast has an interval.
    Nothing is tuned. A model that `ltsm fit` wrote has not seen the last
    fifth of the table and horizon that it was fitted on.

    Example:  ltsm evaluate sales.csv --model runs/sales/model --horizon 24
    Cost:     seconds for a small model, minutes for a large one.
    """

    program: ClassVar[str] = "ltsm evaluate"

    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    context: Annotated[int | None, flags.whole(1, unset="the model's")] = None
    """rows that the model sees"""

    def run(self) -> int:
        """Read, say the plan, score, print."""
        forecaster = self.load(self.model)
        panel = self.read(forecaster)
        prepared = _prepared(forecaster, panel, self.horizon, context=self.context)
        plan = of_table(panel) | {
            "model": of_model(self.model, forecaster),
            "score": _scoring(self.horizon),
            "time": _time(prepared, self.plan),
        }
        if self.announce(plan, panel.notes):
            return 0
        found = _scored(forecaster, panel, self.horizon, prepared=prepared).verdict
        if self.output.json:
            printing.show_json(found.to_json() | {"source": self.model})
        else:
            printing.show(flags.in_flags(str(found)))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(OnTable):
    """Rank several models on one table as they are, beside the naive forecasts.

    Each is scored as by `ltsm evaluate`: mean errors over the windows of the
    last fifth of every item, and the difference in MSE to the best naive
    forecast with about 95 % around it. Below zero is better than naive.

    Example:  ltsm compare sales.csv --horizon 24 --id store --target sold \\
                  --models timer-tiny,amazon/chronos-bolt-tiny
    Cost:     as `ltsm evaluate` for each of the models, one after the other.
    """

    program: ClassVar[str] = "ltsm compare"

    models: Annotated[
        tuple[str, ...], flags.words(), flags.described(f"what to compare, each: {MODEL}")
    ]
    context: Annotated[int | None, flags.whole(1, unset="each model's")] = None
    """rows that the models see"""

    def run(self) -> int:
        """Read, say the plan, score one model after the other, print them in their order."""
        first = self.load(self.models[0])
        panel = self.read(first)
        prepared, takes = None, "unknown: the first model does not fit the table"
        with contextlib.suppress(
            ValueError
        ):  # it is said in its turn, and does not stop the others
            prepared = _prepared(first, panel, self.horizon, context=self.context)
            takes = str(_time(prepared, self.plan))
            if len(self.models) > 1:
                takes += f" for {self.models[0]}; the others in proportion to their size"
        plan = of_table(panel) | {
            "models": ", ".join(self.models),
            "score": _scoring(self.horizon),
            "time": takes,
        }
        if self.announce(plan, panel.notes):
            return 0
        started = time.perf_counter()
        rows, failed, naive = [], {}, {}
        for number, name in enumerate(self.models, 1):
            hosts.stop_if_asked(f"before {name}")
            began = time.perf_counter()
            try:
                forecaster = first if number == 1 else self.load(name)
                if number > 1 or prepared is None:
                    prepared = _prepared(forecaster, panel, self.horizon, context=self.context)
                compared = _scored(forecaster, panel, self.horizon, prepared=prepared)
            except (ValueError, OSError) as error:  # one that does not fit does not stop the others
                failed[name] = str(error)
                printing.say(f"[{number}/{len(self.models)}] {name}: {error}")
                continue
            took = time.perf_counter() - began
            rows.append(_row(name, forecaster, compared, took=took))
            naive = naive or _naive_rows(compared)
            said = (
                f"[{number}/{len(self.models)}] {name}: test MSE {rows[-1]['mse']:.4f}, {took:.1f} "
                "s"
            )
            if left := len(self.models) - number:
                said += f"; about {in_time((time.perf_counter() - started) / number * left)} left"
            printing.say(said)
        if not rows:
            raise ValueError("none of the models could be scored")
        rows = sorted([*rows, *naive], key=lambda row: row["mse"])
        if self.output.json:
            printing.show_json(
                {"data": panel.name, "horizon": self.horizon, "ranking": rows, "failed": failed}
            )
        else:
            printing.show(_ranking(rows))
        return 0


def _scoring(horizon: int) -> str:
    return (
        f"{horizon} rows ahead, on the last 20 % of every item; where an item is short, on its "
        f"last {horizon} rows"
    )


def _prepared(
    forecaster: Forecaster, panel: Panel, horizon: int, context: int | None
) -> verdict.BoundPanel:
    return verdict.bind_panel(
        forecaster.model, forecaster.params, panel, horizon=horizon, context_len=context
    )


def _time(prepared: verdict.BoundPanel, plan: bool) -> TimeEstimate:
    """Estimate the time of scoring a model and the naive forecasts."""
    return estimates.of_comparison(prepared, verdict.tuning(prepared, {}), work_follows=not plan)


def _scored(
    forecaster: Forecaster, panel: Panel, horizon: int, prepared: verdict.BoundPanel
) -> verdict.Compared:
    """Score a model and the naive forecasts; nothing is tuned."""
    return verdict.compare(
        forecaster.model,
        forecaster.params,
        panel,
        horizon=horizon,
        methods=(),
        prepared=prepared,
        show_progress=False,
    )


def _row(
    name: str, forecaster: Forecaster, compared: verdict.Compared, took: float
) -> dict[str, Any]:
    scores = compared.verdict.candidate("zero_shot").test
    assert scores is not None, "it is scored in any case"
    difference = compared.verdict.differences["zero_shot_vs_naive"]
    return {
        "name": name,
        "kind": "model",
        "parameters": trees.count(forecaster.params),
        "mse": scores["mse"],
        "mae": scores["mae"],
        "windows": scores["windows"],
        "naive": compared.verdict.naive,
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "seconds": took,
    }


def _naive_rows(compared: verdict.Compared) -> list[dict[str, Any]]:
    """All the naive forecasts on the test span; AutoETS, which takes long, only where it was the
    best of them.
    """
    rows = []
    season = (
        compared.splits.season if compared.splits.season <= compared.splits.test.context_len else 1
    )
    for name, predictor in forecasting.naive_forecasts(season).items():
        rows.append(
            {"name": name, "kind": "naive"}
            | forecasting.evaluate(predictor, {}, compared.splits.test)
        )
    known = {row["name"] for row in rows}
    best = compared.verdict.naive
    if best is not None and best not in known:
        rows.append(
            {"name": best, "kind": "naive"} | dict(compared.verdict.candidate(best).test or {})
        )
    shown = []
    for row in rows:
        shown.append({key: row[key] for key in ("name", "kind", "mse", "mae", "windows")})
    return shown


def _ranking(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        against = ""
        if row["kind"] == "model":
            low, high = row["interval"]
            against = f"{row['difference']:+.4f} ({low:+.4f} .. {high:+.4f})"
        cells.append((row["name"], f"{row['mse']:.4f}", f"{row['mae']:.4f}", against))
    return printing.table(("", "test MSE", "test MAE", "MSE against naive, 95 %"), cells)


# --------------------------------------------------------------------------------------------------
# prune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(OnTable):
    """Find what of a pretrained model a table does not need, and leave it out.

    Channels of linear layers are scored by the loss on the training rows
    (second-order Taylor), and pruned in steps; validation picks the epoch.
    No weight is trained. FOLDER gets the pruned model (model/, zeros where it
    was pruned; with --remove a smaller one), its masks (masks/) and the
    history (prune.json). Fine-tune with `ltsm fit --masks FOLDER/masks`.

    Example:  ltsm prune sales.csv --model timer-tiny --horizon 96 \\
                  --ratio 0.3 --out runs/pruned --remove
    Cost:     about that of as many epochs of fine-tuning.
    """

    program: ClassVar[str] = "ltsm prune"

    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    out: Annotated[Path, flags.path("FOLDER")]
    """folder of the results"""
    ratio: Annotated[float, flags.number(flags.TINY, flags.BELOW_1, says="between 0 and 1")] = 0.2
    """share of the channels that an epoch prunes"""
    ema: Annotated[float, flags.number(flags.TINY, 1, says="above 0 and at most 1")] = 0.5
    """weight of the new score in the average importance"""
    epochs: Annotated[int, flags.whole(1)] = 1
    """passes over the training windows at most"""
    batch_size: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """windows of a batch"""
    remove: bool = False
    """take what is pruned out of the model, which makes it smaller and faster"""
    context: Annotated[int | None, flags.whole(1, unset="the model's")] = None
    """rows that the model sees"""
    seed: Annotated[int, flags.whole(0)] = 0
    """of the order of the windows"""
    overwrite: bool = False
    """replace an earlier result in FOLDER"""

    def run(self) -> int:
        """Read, say the plan, prune, write."""
        forecaster = self.load(self.model)
        panel = self.read(forecaster)
        prepared = verdict.bind_panel(
            forecaster.model,
            forecaster.params,
            panel,
            horizon=self.horizon,
            context_len=self.context,
            seed=self.seed,
        )
        config = PruneConfig(
            ratio=self.ratio, ema=self.ema, epochs=self.epochs, batch_size=self.batch_size
        )
        windows = prepared.task.windows(prepared.model, prepared.splits).n
        plan = of_table(panel) | {
            "model": of_model(self.model, forecaster),
            "windows": f"{windows:,} to score channels on, {prepared.splits.val.n:,} to validate; "
            f"{prepared.train_context} -> {self.horizon}",
            "pruning": f"{self.ratio:g} of the channels an epoch, {self.epochs} at most",
            "memory": f"{size_in_words(2 * _bytes(prepared.params))} of weights and gradients; "
            "what the layers hold comes on top",
            "time": estimates.of_pruning(prepared, self.epochs, work_follows=not self.plan),
            "result": str(self.out),
        }
        if self.announce(plan, prepared.notes):
            return 0
        folders.require_writable(self.out / "model", self.overwrite)
        result = pruning.prune(
            prepared.model,
            prepared.params,
            prepared.splits,
            config=config,
            task=prepared.task,
            seed=self.seed,
        )
        model, params, masks = result.model, result.pruned, result.masks
        if self.remove:
            model, params, masks = remove(result.model, result.params, result.masks)
        made = {
            **forecaster.provenance,
            "source": self.model,
            "licence": forecaster.licence,
            "command": "ltsm prune",
        }
        if model != forecaster.model:
            made["pruned_from"] = forecaster.model.config_to_dict()
        folders.save(self.out / "model", model, params, provenance=made, overwrite=self.overwrite)
        storage.save_tree(self.out / "masks", masks, overwrite=self.overwrite)
        facts = {
            "out": str(self.out),
            "left": result.history[result.best_epoch]["left"],
            "parameters": trees.count(params),
            "parameters_before": trees.count(forecaster.params),
            "val_mse": result.history[result.best_epoch]["val_mse"],
            "val_mse_before": result.history[0]["val_mse"],
            "best_epoch": result.best_epoch,
            "stopped": result.stopped,
            "history": result.history,
            "notes": list(prepared.notes),
        }
        storage.write_record(self.out / "prune.json", facts)
        if self.output.json:
            printing.show_json(facts)
        else:
            printing.show(
                f"{self.out}: {facts['left']:.1%} of the channels are left, "
                f"{facts['parameters']:,} of "
                f"{facts['parameters_before']:,} parameters;\nvalidation MSE "
                f"{facts['val_mse_before']:.4f} before, {facts['val_mse']:.4f} now"
            )
        return 0
