"""How smooth is the loss around a pretrained, a random and a mixed model?

One plane of random directions for each, filter-wise normalised, the same
draw for all three; and the curvature at their centres.

Run:   python -m experiments.landscape --data ETTh1 --model timer-tiny \\
           --alpha 0.7 --points 25
       python -m experiments.landscape --data ETTh1 --points 11 --windows 128
       python -m experiments.landscape --data my.csv --target sales \\
           --tuned runs/sff-my-timer-tiny/cells/sff-0.7-seed0/model
Cost:  the first command takes some minutes on 2 CPU cores: three times 625
       forecasts of 512 windows, then about 60 products with a Hessian for
       each model. The second takes half a minute.
Gives: in the folder of --out: surface.npz (x, y, loss_pretrained,
       loss_random, loss_sff, each [y, x]), results.csv (smoothness of each
       surface, top eigenvalues and trace of its Hessian), report.md, and
       pictures in plots/. With --tuned also plane.npz, the plane through the
       pretrained, the random and the tuned model. The same command again goes
       on where the last one stopped, to the same bits.

Differs from the released script (Meteor-Stars/SFF): entries are drawn from
N(0, 1) with one seed for the three models (--sff-directions: their
sqrt(8) * N(0, 1) + 1), and the loss is that of a fixed sample of test
windows (--windows 0: all of them).
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
import numpy as np
import pandas as pd

import ltsm_jax
from experiments import around, flags, folder, launch, report
from experiments.around import Subject
from ltsm_jax import curvature, hosts, landscape, storage, trees
from ltsm_jax.landscape import Surface
from ltsm_jax.trees import Tree

NAMES = ("pretrained", "random", "sff")
SURFACE, PLANE = "surface.npz", "plane.npz"


@dataclasses.dataclass(frozen=True)
class Options(around.Options):
    """Options of the command."""

    program: ClassVar[str] = "experiments.landscape"
    model: Annotated[str, flags.text("MODEL")] = "timer-tiny"
    """shipped name, model folder, original checkpoint, or hub name owner/name[@revision]"""
    alpha: Annotated[
        float, flags.number(0, 1, says="between 0 and 1, the weight of the pretrained side")
    ] = 0.7
    """weight of the pretrained side of the mixed model"""
    points: Annotated[int, flags.whole(2)] = 25
    """points on each axis; an odd number has the model itself among them"""
    radius: Annotated[float, flags.number(flags.TINY, flags.HUGE, says="positive")] = 1.0
    """end of each axis, in norms of the filters"""
    eigenvalues: Annotated[int, flags.whole(0)] = 1
    """top eigenvalues of each Hessian; 0: no curvature at all"""
    zero_vectors: bool = False
    """leave biases and scales of norms where they are"""
    sff_directions: bool = False
    """directions as the release draws them: sqrt(8) * N(0, 1) + 1"""
    tuned: Annotated[str | None, flags.text("FOLDER")] = None
    """folder of a fine-tuned model: draw the plane through the pretrained, the random and this one
    as well
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The one model."""
        return (self.model,)


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything that the command needs, resolved."""

    options: Options
    subject: Subject
    tuned: Tree | None

    @property
    def record(self) -> dict[str, Any]:
        """Contents of run.json."""
        o, s = self.options, self.subject
        own = around.settings(
            o, "model", "alpha", "points", "radius", "eigenvalues", "zero_vectors", "sff_directions"
        )
        if self.tuned is not None:
            own["tuned"] = storage.sha256_of(self.tuned)[:16]
        model = {"family": s.model.family, "config": s.model.config_to_dict()}
        return {
            "experiment": o.program,
            "settings": own | s.facts,
            "model": model,
            "command": o.command("model"),
            "notes": list(s.splits.notes),
        }


def resolve(options: Options) -> Work:
    """Load model and data. Raises: UsageError."""
    found = around.subject(options, options.model)
    tuned = None
    if options.tuned is not None:
        try:
            _, tuned = ltsm_jax.load(options.tuned)
            trees.require_same(found.params, tuned, ("--model", "--tuned"))
        except (ValueError, OSError) as err:
            raise flags.UsageError(f"--tuned {options.tuned}: {err}") from None
    return Work(options, found, tuned)


def plan(w: Work) -> str:
    """Describe the computations that will follow."""
    o, s = w.options, w.subject
    windows = s.loss(o, rows=True).windows.n
    lines = [
        f"model    {s.name}, {s.model.family}, {trees.count(s.params):,} parameters",
        f"loss     {o.loss} of {windows:,} of {s.windows.n:,} {o.part} windows, "
        f"{s.facts['context']} -> {s.facts['horizon']}",
        f"surfaces {', '.join(NAMES)} (alpha {flags.exact(o.alpha)}): {o.points} x {o.points} "
        f"points each, to {flags.exact(o.radius)} norms of the filters",
        f"folder   {o.folder}",
    ]
    return "\n".join(lines)


def centres(w: Work) -> dict[str, Tree]:
    """The models in the middle of the surfaces."""
    mixed = w.subject.mixed(w.options.alpha, w.options.seed)
    return dict(zip(NAMES, (w.subject.params, w.subject.random, mixed), strict=True))


def measure(w: Work, name: str, params: Tree) -> dict[str, Any]:
    """Compute the surface of one model and the curvature at its centre. Returns: its row of
    results.csv.
    """
    o, s = w.options, w.subject
    place = o.folder / "cells" / name
    began = time.monotonic()
    directions = landscape.random_directions(
        params,
        o.seed,
        zero_vectors=o.zero_vectors,
        skip=lambda path: not s.moves(path),
        sff_directions=o.sff_directions,
    )
    found = _surface(w, name, params, directions=directions, place=place)
    row: dict[str, Any] = {"name": name, **found.smoothness()}
    if o.eigenvalues:
        loss, key = s.loss(o, rows=True), jax.random.key(o.seed)
        launch.say(f"{name}: curvature at the centre")
        top = curvature.top_eigenvalues(loss, params, o.eigenvalues, key=key, only=s.moves)
        row |= {f"eigenvalue_{i}": float(value) for i, value in enumerate(top, 1)}
        row["trace"], row["trace_error"] = curvature.trace_estimate(loss, params, key, only=s.moves)
    row["seconds"] = round(time.monotonic() - began, 1)
    row |= around.origin()
    return row


def _surface(
    w: Work,
    name: str,
    params: Tree,
    directions: tuple[Tree, ...],
    place: Path,
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
) -> Surface:
    o = w.options
    last = [time.monotonic()]

    def progress(done: int, of: int) -> None:
        if done == of or time.monotonic() - last[0] > 10:
            launch.say(f"{name}: {done} of {of} points")
            last[0] = time.monotonic()

    loss = w.subject.loss(o, rows=False)
    return landscape.surface(
        loss,
        params,
        directions,
        radius=o.radius,
        points=o.points,
        x=x,
        y=y,
        folder=place,
        progress=progress,
    )


def compute(w: Work) -> None:
    """Compute what is not there yet, and write it all."""
    o, place = w.options, w.options.folder
    models = centres(w)
    for name, params in models.items():
        hosts.stop_if_asked(f"before {name}")
        if hosts.on_first(folder.finished, place, name):
            launch.say(f"{name}: finished before")
            continue
        row = measure(w, name, params)
        of = folder.identity(w.record)
        hosts.on_first(
            folder.write_json, place / "cells" / name / folder.RESULT, {"row": row, "of": of}
        )
    surfaces = stored(place, o.points)
    hosts.on_first(_write_surfaces, place / SURFACE, surfaces)
    hosts.on_first(folder.write_csv, place, rank)
    if w.tuned is not None:
        _compute_plane(w, models)


def _compute_plane(w: Work, models: dict[str, Tree]) -> None:
    """The loss in the plane through the pretrained, the random and the tuned model."""
    place = w.options.folder
    plane = landscape.plane_through(
        {"pretrained": models["pretrained"], "random": models["random"], "tuned": w.tuned}
    )
    x, y = plane.axes(w.options.points)
    found = _surface(
        w, "plane", plane.origin, directions=plane.directions, place=place / "plane", x=x, y=y
    )

    def write() -> None:
        with folder.replacing(place / PLANE) as temporary, temporary.open("wb") as stream:
            names, spots = list(plane.places), np.array(list(plane.places.values()))
            np.savez(
                stream, x=found.x, y=np.asarray(found.y), loss=found.loss, names=names, places=spots
            )

    hosts.on_first(write)


def stored(place: Path, points: int) -> dict[str, Surface]:
    """Read the surfaces that the cells of a folder hold."""
    found = {}
    for name in NAMES:
        record = storage.read_record(place / "cells" / name / "points.json")
        x, y = np.array(record["facts"]["x"]), np.array(record["facts"]["y"])
        losses = np.array([float(text) for text in record["losses"]], np.float32)
        found[name] = Surface(x, y, losses.reshape(len(y), len(x)))
    assert all(len(surface.x) == points for surface in found.values()), "the settings were checked"
    return found


def _write_surfaces(file: Path, surfaces: dict[str, Surface]) -> None:
    first = next(iter(surfaces.values()))
    arrays: dict[str, Any] = {"x": first.x, "y": first.y}
    arrays |= {f"loss_{name}": surface.loss for name, surface in surfaces.items()}
    with folder.replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


# --------------------------------------------------------------------------------------------------
# report


def rank(row: dict[str, Any]) -> Any:
    """Order of the rows."""
    return NAMES.index(row["name"])


def label(name: str, alpha: float) -> str:
    """A model in words."""
    return f"mixed (SFF, alpha {flags.exact(alpha)})" if name == "sff" else name


def write_report(place: Path) -> Path:
    """Write report.md, and its pictures where matplotlib is installed."""
    run = storage.read_record(place / folder.RUN)
    settings = run["settings"]
    records, damaged = folder.results(place)
    rows = sorted((record["row"] for record in records.values()), key=rank)
    surfaces = stored(place, settings["points"])
    names = {name: label(name, settings["alpha"]) for name in NAMES}
    pictures = []
    if importlib.util.find_spec("matplotlib"):
        pictures = _draw(place, surfaces, names, rows=rows)

    count = sum(name.startswith("eigenvalue_") for name in rows[0])
    header = [
        "",
        "loss",
        "range",
        "mean \\|Laplacian\\|",
        "doubles at",
        *[f"eigenvalue {i + 1}" for i in range(count)],
    ]
    header += ["trace"] if count else []
    body = []
    for row in rows:
        far = row["doubling_radius"]
        line = [
            names[row["name"]],
            f"{row['centre']:.4f}",
            f"{row['range']:.4g}",
            f"{row['mean_abs_laplacian']:.4g}",
        ]
        line.append(f"> {flags.exact(settings['radius'])}" if math.isinf(far) else f"{far:.3f}")
        line += [f"{row[f'eigenvalue_{i + 1}']:.3f}" for i in range(count)]
        if count:
            line.append(f"{row['trace']:.1f} ± {row['trace_error']:.1f}")
        body.append(line)
    lines = [
        f"# The loss around {settings['model']} on {settings['data']}",
        "",
        _verdict(rows),
        "",
        report.markdown_table(header, body),
        "",
        "`loss` is that of the model itself, `range` the largest minus the smallest of its "
        "surface, `doubles at` the distance to the nearest point with twice the loss, in norms "
        "of the filters. Eigenvalues and trace (± its standard error) are those of the Hessian "
        "of the same loss.",
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


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Say which surface is the smoothest, by each measure."""
    measures = {"mean |Laplacian|": "mean_abs_laplacian"}
    if "eigenvalue_1" in rows[0]:
        measures["top eigenvalue"] = "eigenvalue_1"
    said = []
    for name, column in measures.items():
        order = sorted(rows, key=lambda row: row[column])
        values = " < ".join(f"{row['name']} {row[column]:.3g}" for row in order)
        said.append(f"{name}: {values}")
    return "; ".join(said) + ". Smaller is smoother."


def _draw(
    place: Path, surfaces: dict[str, Surface], names: dict[str, str], rows: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    plots = place / "plots"
    shown = {names[name]: surface for name, surface in surfaces.items()}
    notes = {}
    for row in rows:
        if "eigenvalue_1" in row:
            notes[names[row["name"]]] = (
                f"loss {row['centre']:.3f}, top eigenvalue {row['eigenvalue_1']:.1f}"
            )
    landscape.draw_contours(shown, plots / "contours.png", notes=notes)
    landscape.draw_hills(shown, plots / "hills.png", notes=notes)
    landscape.draw_lines(shown, plots / "lines.png")
    pictures = [
        ("contours", "The loss around each model, one scale of colours; the cross is the model."),
        ("hills", "The same as hills, cut off where the loss is four times the highest centre."),
        ("lines", "The row through the centre of each."),
    ]
    if (place / PLANE).is_file():
        with np.load(place / PLANE) as file:
            found = Surface(file["x"], file["y"], file["loss"])
            spots = {
                str(name): (float(x), float(y))
                for name, (x, y) in zip(file["names"], file["places"])
            }
        title = "pretrained, random and tuned"
        landscape.draw_contours({title: found}, plots / "plane.png", places=spots)
        pictures.append(
            ("plane", "The plane through the pretrained, the random and the tuned model.")
        )
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.landscape`; returns the exit code."""

    def work() -> int:
        options = flags.parse(Options, sys.argv[1:] if argv is None else argv, __doc__)
        with launch.started(options.hosts):
            w = hosts.on_every_host(resolve, options)
            launch.say(plan(w))
            if options.plan:
                return 0
            hosts.on_first(folder.check, options.folder, w.record)
            with folder.held(options.folder):
                hosts.on_first(folder.write_json, options.folder / folder.RUN, w.record)
                compute(w)
                launch.say(f"report: {hosts.on_first(lambda: str(write_report(options.folder)))}")
        return 0

    return launch.guarded(work)


if __name__ == "__main__":
    launch.leave(main())
