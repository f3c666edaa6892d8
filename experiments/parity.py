"""Do the released programs of both papers and this library give the same numbers?

Trajectories that the released code left (Meteor-Stars/SFF 2dfb50b and
SJTU-DMTai/Prune-then-Finetune e5b924c) are made again, and compared.

Run:   python -m experiments.parity --recorded FOLDER
       python -m experiments.parity --recorded FOLDER --ttm ttm_r2_512_96
Cost:  about a minute on 2 CPU cores.
Gives: a table on the terminal and, with --out, results.csv: what was compared,
       the largest difference, and the most it may be. Exit code 1 where one
       is larger, or where nothing could be compared.
Parts: sff         four epochs of smoothed full fine-tuning of a tiny Timer on
                   ETTh1: windows, losses, validation, test, last weights
       pruning     four pruning steps of the published TTM r2 (--ttm) on ETTh1:
                   scores and masks of every linear, validation
       imputation  masked error of a tiny Timer, both losses
       anomaly     token scores and rank of one UCR series
       A part whose recordings, data or checkpoint are not at hand is left out,
       and said so.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

import ltsm_jax
from converters import import_checkpoint, tables, timer, ttm
from converters.torch_files import read_safetensors
from experiments import flags, launch
from ltsm_jax import trees
from ltsm_jax.data import Splits, prepare
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.layers.masks import apply_masks
from ltsm_jax.methods.pruning.channels import (
    full_masks,
    gradient_sums,
    importance_of,
    pruning_step,
    share_left,
)
from ltsm_jax.models import Model
from ltsm_jax.tasks import anomaly, forecasting, imputation
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.training import TrainConfig, schedule
from ltsm_jax.training.optimizers import Rule

# The most that a difference may be: some times the rounding in float32 that was measured on CPUs.
LIMITS = {
    "windows": 1e-6,
    "train loss": 5e-6,
    "validation MSE": 5e-6,
    "validation MAE": 5e-6,
    "test MSE": 5e-6,
    "test MAE": 5e-6,
    "last weights": 2e-4,
    "scores": 5e-8,
    "masks": 0.0,
    "share left": 1e-6,
    "pruned validation MSE": 5e-6,
    "masked MSE": 5e-6,
    "token scores": 1e-5,
    "rank": 0.0,
}
HEADS = 4
ALPHA, LR, EPOCHS, BATCH, EVERY = 0.7, 1e-3, 4, 128, 10  # of the recorded run of SFF
PRUNING = {
    "windows": 1024,
    "stride": 54,
    "batch": 64,
    "group": 4,
    "ratio": 0.5,
    "ema": 0.5,
    "every": 20,
}
FOLDER = "LTSM_PARITY"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the largest absolute difference, and the most it may be."""

    part: str
    quantity: str
    where: str
    difference: float
    limit: float

    @property
    def good(self) -> bool:
        """Whether it is within the limit; a difference that is not a number is not."""
        return self.difference <= self.limit


class NotAtHandError(ValueError):
    """Recordings, data or a checkpoint of a part are not there; the message says which."""


def compare(part: str, quantity: str, where: str, ours: Any, theirs: Any) -> Row:
    """Compare two arrays of one shape.

    Raises: ValueError where the shapes differ.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"{part}, {quantity} {where}: ours has the shape {a.shape}, theirs {b.shape}"
        )
    return Row(
        part=part,
        quantity=quantity,
        where=where,
        difference=float(np.abs(a - b).max()),
        limit=LIMITS[quantity],
    )


def file_of(folder: Path, stem: str, *suffixes: str) -> Path:
    """Find a recorded file.

    Raises: NotAtHandError where it is not there.
    """
    for suffix in suffixes:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise NotAtHandError(f"{folder} has no {stem}{suffixes[0]}")


def tiny_timer(
    folder: Path, stem: str, task: str, patch_len: int, context_len: int
) -> tuple[Model, Any]:
    """Read a recorded tiny Timer: the original's .pth, or a .safetensors without its large table of
    sinusoids.
    """
    sizes = {"patch_len": patch_len, "d_model": 32, "d_ff": 64, "e_layers": 2, "n_heads": HEADS}
    config = {
        **sizes,
        "dropout": 0.0,
        "task_name": task,
        "seq_len": context_len,
        "pred_len": patch_len,
    }
    file = file_of(folder, stem, ".pth", ".safetensors")
    if file.suffix == ".pth":
        return import_checkpoint(file, config=config)[:2]
    model = timer.Timer(timer.TimerConfig.from_published(config))
    state = read_safetensors(file) | {
        timer.TABLE: timer.sinusoids(timer.TABLE_LEN, model.config.d_model)[None]
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    converted = tables.to_params(timer.keys(model.config), state, shapes, what=str(file))
    return model, jax.device_put(converted.params)


def etth1(context_len: int, **more: Any) -> Splits:
    """Read ETTh1 and cut its windows for a horizon of 96.

    Raises: NotAtHandError where the file is nowhere.
    """
    try:
        return prepare(load_series("ETTh1"), context_len, 96, **more)
    except (ValueError, OSError) as err:
        raise NotAtHandError(f"ETTh1: {str(err).splitlines()[0]}") from None


# --------------------------------------------------------------------------------------------------
# the parts


def sff(folder: Path, _checkpoint: Path | None) -> Iterator[Row]:
    """Make four epochs of smoothed full fine-tuning again, from the recorded weights and the
    recorded random model.
    """
    record = _json(file_of(folder, "sff", ".json"))["direct"]
    model, pretrained = tiny_timer(folder, "pre", "forecast", patch_len=96, context_len=672)
    drawn = tiny_timer(folder, "aux_False", "forecast", patch_len=96, context_len=672)[1]
    last = tiny_timer(folder, "last_False", "forecast", patch_len=96, context_len=672)[1]
    splits = etth1(672, few_shot=0.01, quirks=("few_shot_stride",))

    shown = np.load(file_of(folder, "first_False", ".npz"))
    for name in ("train", "val", "test"):
        part = getattr(splits, name)
        if part.n != shown[f"{name}_n"]:
            raise ValueError(f"sff: {part.n} windows to {name}, theirs has {shown[f'{name}_n']}")
        batch = part.gather(jnp.asarray([0, 1, part.n - 1]))
        yield compare(
            "sff",
            "windows",
            name,
            ours=np.asarray(batch["context"])[:, 0],
            theirs=shown[f"{name}_x"][..., 0],
        )
        targets = np.asarray(batch["target"])[:, 0]
        yield compare(
            "sff", "windows", f"{name} targets", ours=targets, theirs=shown[f"{name}_y"][..., 0]
        )

    # No shuffling was recorded, so the steps are taken here in the order of the windows; all else
    # is the library's.
    loss = Forecasting("direct").loss(model)
    rule = Rule.of(TrainConfig())
    tx = rule.transformation()
    steps = -(-splits.train.n // BATCH)
    rates = schedule("halving", LR, EPOCHS, steps_per_epoch=steps)(np.arange(EPOCHS * steps))

    @jax.jit
    def step(params, state, indices, rate):
        batch = splits.train.gather(indices) | {"weight": jnp.ones(len(indices))}
        value, grads = jax.value_and_grad(loss)(params, batch, jax.random.key(0), True)
        directions, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, directions), state, value

    params = trees.interpolate(pretrained, drawn, ALPHA)
    state = tx.init(params)
    for epoch in range(EPOCHS):
        losses = []
        for i in range(steps):
            indices = np.arange(i * BATCH, min((i + 1) * BATCH, splits.train.n), dtype=np.int32)
            params, state, value = step(
                params, state, indices, rate=np.float32(rates[epoch * steps + i])
            )
            losses.append(float(value))
        where = f"epoch {epoch + 1}"
        yield compare(
            "sff", "train loss", where, ours=np.mean(losses), theirs=record["train"][epoch]
        )
        for name, key in (("validation", "val"), ("test", "test")):
            part = getattr(splits, key)
            found = forecasting.evaluate(model, params, part.take(np.arange(0, part.n, EVERY)))
            for metric in ("mse", "mae"):
                theirs = record[key][epoch][metric]
                yield compare(
                    "sff", f"{name} {metric.upper()}", where, ours=found[metric], theirs=theirs
                )

    ours, theirs = trees.flatten(params), trees.flatten(last)
    gaps = [
        compare("sff", "last weights", "", ours=ours[path], theirs=theirs[path]).difference
        for path in theirs
    ]
    yield Row(
        part="sff",
        quantity="last weights",
        where=f"{len(gaps)} tensors",
        difference=max(gaps),
        limit=LIMITS["last weights"],
    )


def pruning(folder: Path, checkpoint: Path | None) -> Iterator[Row]:
    """Make four pruning steps of the published TTM r2 again."""
    record = _json(file_of(folder, "prune", ".json"))["second_order_every_linear"]
    stored = np.load(file_of(folder, "prune_second_order_every_linear", ".npz"))
    if checkpoint is None:
        raise NotAtHandError("give --ttm, the folder of the published TTM r2 (512 -> 96)")
    model, params = ltsm_jax.load(checkpoint)
    splits = etth1(512)
    names = {}
    rules = ttm.keys(model.config)
    masks = full_masks(model, quirks=("every-linear",))
    for path in trees.flatten(masks):
        linear, side = path.rsplit("/", 1)
        found = tables.key_of(rules, f"{linear}/kernel")
        assert found is not None, "every linear has a kernel in the table"
        names[path] = "model." + found[0].removesuffix(".weight") + f".mask_{side}"
    layers = {name.rsplit(".", 1)[0] for name in names.values()}
    recorded = {key.split("/", 1)[1] for key in stored.files}
    if set(names.values()) != recorded or len(layers) != record["layers"]:
        odd = sorted(set(names.values()) ^ recorded)
        raise ValueError(f"pruning: the linears are not the same: {', '.join(odd[:5])}")

    loss = Forecasting().loss(model)
    p = PRUNING
    order = np.arange(p["windows"], dtype=np.int32) * p["stride"]
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    sums_of = jax.jit(
        lambda masks, batch: gradient_sums(loss, params, masks, batch=batch, key=jax.random.key(0))
    )
    importance = None
    batches = order.reshape(-1, p["batch"])
    r_step = p["ratio"] / len(batches) * p["group"]
    for number in range(record["steps"]):
        total = None
        for indices in batches[number * p["group"] : (number + 1) * p["group"]]:
            batch = splits.train.gather(jnp.asarray(indices)) | {"weight": jnp.ones(len(indices))}
            found = sums_of(masks, batch)
            total = found if total is None else add(total, found)
        assert total is not None, "a group has batches"
        scores = importance_of(total, masks, "taylor2-mean-loss")
        if importance is not None:
            scores = jax.tree.map(
                lambda s, old: p["ema"] * s + (1 - p["ema"]) * old, scores, importance
            )
        flat = trees.flatten(scores)
        gaps = [
            np.abs(np.ravel(flat[path]) - stored[f"score{number}/{name}"]).max()
            for path, name in names.items()
        ]
        yield Row(
            part="pruning",
            quantity="scores",
            where=f"step {number + 1}",
            difference=float(max(gaps)),
            limit=LIMITS["scores"],
        )
        masks, importance = pruning_step(scores, masks, r_step)
    flat = trees.flatten(masks)
    differ = sum(
        int((np.ravel(flat[path]) != stored[f"mask/{name}"]).sum()) for path, name in names.items()
    )
    entries = sum(flat[path].size for path in names)
    yield Row(
        part="pruning",
        quantity="masks",
        where=f"entries of {entries:,} that differ",
        difference=float(differ),
        limit=LIMITS["masks"],
    )
    yield compare(
        "pruning",
        "share left",
        "",
        ours=round(share_left(masks), 12),
        theirs=round(record["left"], 12),
    )
    val = splits.val.take(np.arange(0, splits.val.n, p["every"]))
    merged = apply_masks(params, jax.tree.map(jnp.asarray, masks))
    found = forecasting.evaluate(model, merged, val)["mse"]
    yield compare("pruning", "pruned validation MSE", "", ours=found, theirs=record["best_val"])


def imputing(folder: Path, _checkpoint: Path | None) -> Iterator[Row]:
    """Fill in the recorded windows, with both losses."""
    with np.load(file_of(folder, "imp", ".npz")) as file:
        stored = dict(file)
    model, params = tiny_timer(folder, "imp", "imputation", patch_len=24, context_len=192)
    x_BCT, visible_BCT = (jnp.asarray(np.moveaxis(stored[name], 1, 2)) for name in ("x", "mask"))
    for mode in ("ims", "direct"):
        error, scored = imputation.hidden_error(
            model, params, x_BCT, visible=visible_BCT > 0, key=None, train=False, ims=mode == "ims"
        )
        found = float(jnp.square(error).sum() / scored.sum())
        yield compare("imputation", "masked MSE", mode, ours=found, theirs=stored[mode])


def detecting(folder: Path, _checkpoint: Path | None) -> Iterator[Row]:
    """Score the tokens of the recorded series, and rank its anomaly, with the released quirks."""
    with np.load(file_of(folder, "ano", ".npz")) as file:
        stored = dict(file)
    model, params = tiny_timer(folder, "ano", "anomaly_detection", patch_len=96, context_len=768)
    found = sorted(folder.glob("*_UCR_Anomaly_*.txt*"))
    if not found:
        raise NotAtHandError(f"{folder} has no series of the UCR archive")
    series = anomaly.read_ucr(found[0])
    prepared = anomaly.scale_series(series, quirks=("touching_is_hit", "uncovered_is_hit"))
    rows = (series.train_end, prepared.values.shape[-1])
    scores = anomaly.token_scores(
        anomaly.row_errors(model, params, prepared.values, rows=rows, tail=False)
    )
    yield compare(
        "anomaly", "token scores", f"{len(scores)} tokens", ours=scores, theirs=stored["scores"]
    )
    result = anomaly.evaluate(model, params, prepared)
    yield compare(
        "anomaly", "rank", f"of {int(stored['n'])}", ours=result.rank, theirs=stored["rank"]
    )


PARTS: dict[str, Callable[[Path, Path | None], Iterator[Row]]] = {
    "sff": sff,
    "pruning": pruning,
    "imputation": imputing,
    "anomaly": detecting,
}


def run(
    folder: Path, parts: Sequence[str], checkpoint: Path | None = None
) -> tuple[list[Row], dict[str, str]]:
    """Compare the parts whose recordings are at hand.

    Returns: the comparisons, and why a part was left out, by its name.
    """
    rows: list[Row] = []
    left_out = {}
    with jax.default_matmul_precision("highest"):  # the recordings are in full precision
        for name in parts:
            try:
                rows += list(PARTS[name](folder, checkpoint))
            except NotAtHandError as err:
                left_out[name] = str(err)
    return rows, left_out


# --------------------------------------------------------------------------------------------------
# the command


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    program: ClassVar[str] = "experiments.parity"
    recorded: Annotated[Path | None, flags.path("FOLDER")] = None
    """folder of the recordings; by default $LTSM_PARITY"""
    ttm: Annotated[Path | None, flags.path("FOLDER")] = None
    """folder or file of the published TTM r2 (512 -> 96)"""
    parts: Annotated[tuple[str, ...], flags.names(tuple(PARTS))] = tuple(PARTS)
    """what to compare"""
    out: Annotated[Path | None, flags.path("FOLDER")] = None
    """folder of results.csv; by default none is written"""


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    return json.loads(file.read_text(encoding="utf-8"))


def show(rows: Sequence[Row], left_out: dict[str, str], console: Console) -> None:
    """Print the comparisons as a table."""
    table = Table(
        box=None, title="largest absolute difference to the released code", title_justify="left"
    )
    for column in ("part", "quantity", "where"):
        table.add_column(column)
    for column in ("difference", "at most"):
        table.add_column(column, justify="right")
    for row in rows:
        style = None if row.good else "red"
        table.add_row(
            row.part,
            row.quantity,
            row.where,
            f"{row.difference:.1e}",
            f"{row.limit:.0e}",
            style=style,
        )
    console.print(table)
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}", highlight=False, markup=False)


def _command(argv: Sequence[str]) -> int:
    options = flags.parse(Options, argv, __doc__)
    folder = options.recorded or (Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None)
    if folder is None:
        raise flags.UsageError(f"give --recorded, the folder of the recordings, or set {FOLDER}")
    rows, left_out = run(folder, options.parts, options.ttm)
    show(rows, left_out, Console())
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        table = [dataclasses.asdict(row) | {"good": row.good} for row in rows]
        pd.DataFrame(table).to_csv(options.out / "results.csv", index=False)
    bad = [row for row in rows if not row.good]
    print(f"{len(rows) - len(bad)} of {len(rows)} comparisons within what rounding explains")
    return 1 if bad or not rows else 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.parity`; returns the exit code."""
    return launch.guarded(lambda: _command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    launch.leave(main())
