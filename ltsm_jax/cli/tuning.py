"""`ltsm fit`: tune on a table, and find out whether that pays."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax

from ltsm_jax import flags, storage, trees
from ltsm_jax.cli import printing
from ltsm_jax.cli.options import MODEL, OnTable, of_model, of_table
from ltsm_jax.forecaster import Forecaster
from ltsm_jax.methods import verdict
from ltsm_jax.methods.strategies import STRATEGIES
from ltsm_jax.models import folders
from ltsm_jax.sharding import Placement
from ltsm_jax.training import TrainConfig, memory, parts, step

METHODS = ("auto", *STRATEGIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit(OnTable):
    """Tune a model on a table, and see whether that, or a model at all, pays.

    The checkpoint, what each method makes of it, and the naive forecasts are
    compared: validation picks, the untouched last fifth of every item decides,
    and one sentence says what to deploy. FOLDER gets model/ (which forecasts
    with that, for --model of the other commands), verdict.json, report.md and
    report.html. The same command goes on where a stopped one was.

    Example:  ltsm fit sales.csv --model amazon/chronos-bolt-tiny \\
                  --horizon 24 --id store --target sold \\
                  --methods zero_shot,ff,sff --out runs/sales
    Cost:     400 steps a method: minutes for a small model on 2 cores, hours
              for a large one.
    """

    program: ClassVar[str] = "ltsm fit"

    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    out: Annotated[Path, flags.path("FOLDER")]
    """folder of the results"""
    methods: Annotated[
        tuple[str, ...],
        flags.names(METHODS),
        flags.described(
            f"what to try, of {', '.join(METHODS)}; auto is ff,sff, or the model's own recipe"
        ),
    ] = ("auto",)
    alpha: Annotated[Any, flags.number_or("auto", 0, 1, unset="0.7")] = None
    """weight of the pretrained side, for methods that mix; auto: several of them, of which
    validation picks
    """
    masks: Annotated[Path | None, flags.path("FOLDER")] = None
    """masks of `ltsm prune`; what they prune stays out"""
    budget: Annotated[int, flags.whole(1)] = verdict.BUDGET
    """optimiser steps of each method"""
    seed: Annotated[int, flags.whole(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = 0
    """of the order of the windows, of dropout and of the intervals"""
    overwrite: bool = False
    """replace an earlier result in FOLDER"""
    training: flags.Tuning = dataclasses.field(default_factory=flags.Tuning)
    devices: flags.Compute = dataclasses.field(default_factory=flags.Compute)

    def run(self) -> int:
        """Read, say the plan, tune, write, print the verdict."""
        forecaster = self.load(self.model)
        panel = self.read(forecaster)
        masks = None if self.masks is None else storage.load_tree(self.masks)
        prepared = forecaster.prepared(
            panel,
            self.horizon,
            masks=masks,
            mode=self.training.mode,
            seed=self.seed,
        )
        config = self._config()
        strategies = verdict.named(list(self.methods), forecaster.model, self.alpha)
        work = verdict.tuning(prepared, strategies, config, budget=self.budget)
        methods = list(strategies)
        plan = of_table(panel) | {
            "model": of_model(self.model, forecaster),
            "windows": f"{prepared.train_context} -> {self.horizon} to train; "
            f"{prepared.splits.test.context_len} -> {self.horizon}: {prepared.splits.val.n:,} to "
            f"validate, {prepared.splits.test.n:,} to test",
            "methods": ", ".join(["zero_shot", *methods]) + " and the naive forecasts",
            "training": f"{self.budget} steps of each method; loss {prepared.task.mode}",
            "memory": _memory(prepared, config) if methods else "that of a forecast",
            "time": forecaster.estimate_fit(
                prepared, work, seed=self.seed, work_follows=not self.plan
            ),
            "result": str(self.out),
        }
        if self.announce(plan, prepared.notes):
            return 0
        folders.require_writable(self.out / "model", self.overwrite)
        if (self.out / "model").exists():
            # Checkpoints of a run that is finished are those of what is replaced.
            shutil.rmtree(self.out / "training", ignore_errors=True)

        fitted = forecaster.fit(
            panel,
            self.horizon,
            methods=list(self.methods),
            alpha=self.alpha,
            masks=masks,
            config=config,
            budget=self.budget,
            mode=self.training.mode,
            seed=self.seed,
            prepared=prepared,
            folder=self.out,
        )
        self._show(fitted)
        return 0

    def _config(self) -> TrainConfig:
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        asked = vars(self.training) | vars(self.devices)
        return TrainConfig(**{k: v for k, v in asked.items() if k in names and v is not None})

    def _show(self, fitted: Forecaster) -> None:
        found = fitted.verdict
        assert found is not None, "fit has made one"
        if self.output.json:
            printing.show_json(found.to_json() | {"out": str(self.out), "source": self.model})
            return
        printing.show(flags.in_flags(str(found)))
        printing.show(f"\nmodel:  {self.out / 'model'}\nreport: {self.out / 'report.html'}")


def _memory(prepared: verdict.BoundPanel, config: TrainConfig) -> str:
    """Say what full fine-tuning takes, in a line.

    Raises: ValueError naming what fits, where this does not.
    """
    model, params = prepared.model, prepared.params
    source = prepared.task.windows(model, prepared.splits)
    recipe = model.recipe()
    filled = config.filled(recipe)
    batch = config.batch_size or min(recipe.batch_size, verdict.LARGEST_BATCH)
    filled = dataclasses.replace(filled, batch_size=batch)
    placement = Placement.of(params)

    moving, frozen = trees.partition(params, trees.select(params, None))
    loss, key = step.as_pytree(prepared.task.loss(model)), jax.random.key(0)
    filled = parts.settled(
        filled, moving, frozen, source=source, loss_fn=loss, key=key, placement=placement
    )
    found = memory.estimate_before(
        filled,
        moving,
        frozen,
        source=source,
        loss_fn=loss,
        key=key,
        placement=placement,
        writes=True,
    )
    return found.check(memory.available())
