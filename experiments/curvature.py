"""Is the Hessian of a mixed model the mix of the Hessians?

The theory of Smoothed Full Fine-tuning takes it for that: mixing a sharp
pretrained model with a flat random one then gives something in between.
Measured along alpha from the random model (0) to the pretrained one (1).

Run:   python -m experiments.curvature --data ETTh1 \\
           --models timer-tiny,moment,chronos_bolt,ttm
       python -m experiments.curvature --data ETTh1 --models timer-tiny \\
           --alpha 0,0.5,1 --windows 64
Cost:  about two minutes a model on 2 CPU cores, most of it compiling.
Gives: in the folder of --out: results.csv (for each model and alpha the loss,
       top eigenvalue and trace of the Hessian of the mixed model and of the
       mix of the two Hessians, and how far the two matrices are apart),
       report.md and a picture. The same command again goes on where the last
       one stopped.

A name of a family (moment, chronos_bolt, ...) stands for its small size,
trained from scratch on the training part for --epochs: that is what is called
pretrained then. Published models go by their own names or folders.
"""

import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments import around, flags, folder, launch, report
from experiments.around import Subject
from ltsm_jax import curvature, hosts, storage, trees
from ltsm_jax.plotting import new_figure
from ltsm_jax.trees import Tree

PROBES = 6  # random vectors for the distance of two Hessians
ALPHAS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
COLUMNS = 2  # panels of the picture in a row


@dataclasses.dataclass(frozen=True)
class Options(around.Options):
    """Options of the command."""

    program: ClassVar[str] = "experiments.curvature"
    models: Annotated[tuple[str, ...], flags.words()] = (
        "timer-tiny",
        "moment",
        "chronos_bolt",
        "ttm",
    )
    """shipped names, model folders, hub names, or families"""
    alpha: Annotated[
        tuple[float, ...],
        flags.numbers(0, 1, says="between 0 and 1, the weight of the pretrained side"),
    ] = ALPHAS
    """weights of the pretrained side"""
    epochs: Annotated[int, flags.whole(1)] = 3
    """of the training of a family's small size"""
    samples: Annotated[int, flags.whole(6)] = 30
    """products with the Hessian for each trace"""

    @property
    def names(self) -> tuple[str, ...]:
        """The models."""
        return self.models

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        places = [cell_name(name, 1.0) for name in self.models]
        twice = sorted({place for place in places if places.count(place) > 1})
        same = [
            f"--models: two of them would be called {place.removesuffix('-1')}" for place in twice
        ]
        return super().problems(given) + same


def record(options: Options, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Contents of run.json."""
    own = around.settings(options, "models", "epochs", "samples")
    for s in subjects:
        own |= {
            f"{s.name} {name}": value
            for name, value in s.facts.items()
            if name in ("sha256", "context", "horizon")
        }
    own |= {"data_sha256": subjects[0].facts["data_sha256"]}
    model = {"family": ", ".join(dict.fromkeys(s.model.family for s in subjects))}
    return {
        "experiment": options.program,
        "settings": own,
        "model": model,
        "command": options.command("models"),
        "notes": [],
    }


def mix_of_losses(
    loss: curvature.Loss, pretrained: Tree, random: Tree, alpha: jax.Array, step: Tree
) -> jax.Array:
    """`alpha * loss(pretrained + step) + (1 - alpha) * loss(random + step)`.

    Its Hessian at step 0 is the mix of the two Hessians.
    """

    def there(params: Tree) -> jax.Array:
        return loss(jax.tree.map(lambda leaf, move: leaf + move.astype(leaf.dtype), params, step))

    return alpha * there(pretrained) + (1 - alpha) * there(random)


_product = jax.jit(curvature.hvp)


@jax.jit
def _value(loss: curvature.Loss, params: Tree) -> jax.Array:
    return loss(params)


def distance(
    one: curvature.Loss,
    at_one: Tree,
    other: curvature.Loss,
    at_other: Tree,
    key: jax.Array,
    moves: Any,
) -> float:
    """Relative distance of two Hessians, `|H1 - H2| / |H2|` in the Frobenius norm, by random
    vectors of signs.
    """
    above = below = 0.0
    chosen = trees.select(at_one, moves)
    for probe in jax.random.split(key, PROBES):
        keys = jax.random.split(probe, len(jax.tree.leaves(at_one)))
        keys = jax.tree.unflatten(jax.tree.structure(at_one), list(keys))

        def draw(leaf: jax.Array, key: jax.Array, moving: bool) -> jax.Array:
            signs = jax.random.rademacher(key, leaf.shape, jnp.float32)
            return jnp.where(moving, signs, 0.0).astype(leaf.dtype)

        vector = jax.tree.map(draw, at_one, keys, chosen)
        a, b = _product(one, at_one, vector), _product(other, at_other, vector)
        # Rows of leaves that do not move are no part of either Hessian.
        for x, y, moving in zip(*map(jax.tree.leaves, (a, b, chosen)), strict=True):
            if moving:
                above += float(jnp.sum(jnp.square(x - y)))
                below += float(jnp.sum(jnp.square(y)))
    return math.sqrt(above / below) if below else 0.0


def cell_name(model: str, alpha: float) -> str:
    """Folder of a result."""
    return f"{Path(model).name.replace('@', '-')}-{flags.exact(alpha)}"


def measure(options: Options, s: Subject, alpha: float) -> dict[str, Any]:
    """Measure one mixed model. Returns: its row of results.csv."""
    began = time.monotonic()
    loss, key = s.loss(options, rows=True), jax.random.key(options.seed)
    params = s.mixed(alpha, options.seed)
    mixed = jax.tree_util.Partial(mix_of_losses, loss, s.params, s.random, jnp.float32(alpha))
    still = jax.tree.map(jnp.zeros_like, s.params)

    (top,) = curvature.top_eigenvalues(loss, params, 1, key=key, only=s.moves)
    trace, error = curvature.trace_estimate(
        loss, params, key, samples=options.samples, only=s.moves
    )
    (mixed_top,) = curvature.top_eigenvalues(mixed, still, 1, key=key, only=s.moves)
    mixed_trace, mixed_error = curvature.trace_estimate(
        mixed, still, key, samples=options.samples, only=s.moves
    )
    return {
        "model": s.name,
        "alpha": alpha,
        "loss": float(_value(loss, params)),
        "top_eigenvalue": float(top),
        "mixed_top_eigenvalue": float(mixed_top),
        "trace": trace,
        "trace_error": error,
        "mixed_trace": mixed_trace,
        "mixed_trace_error": mixed_error,
        "distance": distance(loss, params, mixed, at_other=still, key=key, moves=s.moves),
        "seconds": round(time.monotonic() - began, 1),
        **around.origin(),
    }


def compute(options: Options, subjects: Sequence[Subject], of: str) -> None:
    """Measure what has no result yet; after each, results.csv is whole."""
    place = options.folder
    for s in subjects:
        for alpha in options.alpha:
            name = cell_name(s.name, alpha)
            hosts.stop_if_asked(f"before {name}")
            if hosts.on_first(folder.finished, place, name):
                launch.say(f"{name}: finished before")
                continue
            row = measure(options, s, alpha)
            hosts.on_first((place / "cells" / name).mkdir, parents=True, exist_ok=True)
            hosts.on_first(
                folder.write_json, place / "cells" / name / folder.RESULT, {"row": row, "of": of}
            )
            hosts.on_first(folder.write_csv, place, rank)
            launch.say(
                f"{name}: loss {row['loss']:.4f}, top eigenvalue {row['top_eigenvalue']:.3f}, of "
                f"the mix {row['mixed_top_eigenvalue']:.3f}, {row['seconds']} s"
            )
        jax.clear_caches()  # nothing that was compiled serves the next model


# --------------------------------------------------------------------------------------------------
# report


def rank(row: dict[str, Any]) -> Any:
    """Order of the rows."""
    return row["model"], row["alpha"]


def write_report(place: Path) -> Path:
    """Write report.md, and its picture where matplotlib is installed."""
    run = storage.read_record(place / folder.RUN)
    records, damaged = folder.results(place)
    rows = sorted((record["row"] for record in records.values()), key=rank)
    pictures = []
    if importlib.util.find_spec("matplotlib"):
        _draw(rows, place / "plots" / "alpha.png")
        pictures.append(
            (
                "alpha",
                "Top eigenvalue along alpha: of the mixed model, and of the mix of the Hessians.",
            )
        )
    header = [
        "model",
        "alpha",
        "loss",
        "top eigenvalue",
        "of the mix",
        "trace",
        "of the mix",
        "distance",
    ]
    body = []
    for row in rows:
        body.append(
            [
                Path(row["model"]).name,
                flags.exact(row["alpha"]),
                f"{row['loss']:.4f}",
                f"{row['top_eigenvalue']:.3f}",
                f"{row['mixed_top_eigenvalue']:.3f}",
                f"{row['trace']:.1f} ± {row['trace_error']:.1f}",
                f"{row['mixed_trace']:.1f} ± {row['mixed_trace_error']:.1f}",
                f"{row['distance']:.2f}",
            ]
        )
    lines = [
        f"# Curvature between a random and a pretrained model, {run['settings']['data']}",
        "",
        *[f"- {line}" for line in verdicts(rows)],
        "",
        report.markdown_table(header, body),
        "",
        "`top eigenvalue` and `trace` (± standard error) are those of the Hessian at alpha * "
        "pretrained + (1 - alpha) * random; `of the mix` those of alpha * H(pretrained) + (1 - "
        "alpha) * H(random), which the theory takes for it; `distance` is |H - mix| / |mix| in "
        "the Frobenius norm: 0 where the theory is exact.",
    ]
    if damaged:
        lines += [
            "",
            "## Look at this",
            "",
            *[f"- not believed, and left out: {text}" for text in damaged],
        ]
    lines += report.picture_lines(pictures, run["command"])
    lines += report.made_lines(run, pd.DataFrame(rows))
    return report.write_text(place / "report.md", lines)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say for each model how well the mix of the Hessians predicts the Hessian of the mix, between
    the ends.
    """
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        inner = [row for row in rows if row["model"] == model and 0 < row["alpha"] < 1]
        if not inner:
            continue
        ratios = [row["top_eigenvalue"] / row["mixed_top_eigenvalue"] for row in inner]
        far = np.mean([row["distance"] for row in inner])
        found.append(
            f"{Path(model).name}: the top eigenvalue of the mixed model is {min(ratios):.2f} to "
            f"{max(ratios):.2f} times that of the mix of the Hessians; mean distance of the "
            f"matrices {far:.2f}"
        )
    return found


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = min(COLUMNS, len(models))
    lines = -(-len(models) // columns)
    figure, axes = new_figure(4.6 * columns, 3.2 * lines, nrows=lines, ncols=columns, squeeze=False)
    for ax in axes.ravel()[len(models) :]:
        ax.set_visible(False)
    for ax, model in zip(axes.ravel(), models, strict=False):
        own = [row for row in rows if row["model"] == model]
        alphas = [row["alpha"] for row in own]
        ax.plot(
            alphas,
            [row["top_eigenvalue"] for row in own],
            marker="o",
            label="Hessian of the mixed model",
        )
        ax.plot(
            alphas,
            [row["mixed_top_eigenvalue"] for row in own],
            marker="s",
            linestyle="--",
            label="mix of the Hessians",
        )
        ax.set_title(Path(model).name, fontsize=10, loc="left")
        ax.set_xlabel("alpha, weight of the pretrained side", fontsize=9)
        ax.set_ylabel("top eigenvalue", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=2, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plan(options: Options) -> str:
    """Describe the computations that will follow."""
    alphas = ", ".join(map(flags.exact, options.alpha))
    return f"models   {', '.join(options.models)}\nalpha    {alphas}\nfolder   {options.folder}"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.curvature`; returns the exit code."""

    def work() -> int:
        options = flags.parse(Options, sys.argv[1:] if argv is None else argv, __doc__)
        with launch.started(options.hosts):
            launch.say(plan(options))
            if options.plan:
                return 0
            with folder.held(options.folder):
                subjects = [
                    around.subject(options, name, train=options.epochs) for name in options.models
                ]
                found = record(options, subjects)
                hosts.on_first(folder.check, options.folder, found)
                hosts.on_first(folder.write_json, options.folder / folder.RUN, found)
                compute(options, subjects, folder.identity(found))
                launch.say(f"report: {hosts.on_first(lambda: str(write_report(options.folder)))}")
        return 0

    return launch.guarded(work)


if __name__ == "__main__":
    launch.leave(main())
