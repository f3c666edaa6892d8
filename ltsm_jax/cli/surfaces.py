"""`ltsm landscape`: how smooth the loss is around a model, a random one, and a mix of the two."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from ltsm_jax import curvature, flags, hosts, landscape, training
from ltsm_jax.cli import printing
from ltsm_jax.cli.options import MODEL, OnTable, of_model, of_table
from ltsm_jax.methods import verdict
from ltsm_jax.methods.starts import start_params
from ltsm_jax.methods.strategies import strategy

SURFACE, PICTURE = "surface.npz", "surface.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landscape(OnTable):
    """Draw the loss around a model, around a random one, and around a mix of them.

    One plane of random directions, the same for all three, each filter as long
    as that of the model; the loss is the MSE of a fixed sample of test windows.
    The sharpest direction at each centre is found from its Hessian. FOLDER gets
    surface.npz (x, y, loss_pretrained, loss_random, loss_sff) and surface.png.
    The same command goes on where a stopped one was.

    Example:  ltsm landscape sales.csv --model timer-tiny --horizon 24 \\
                  --id store --target sold --points 15 --out runs/landscape
    Cost:     three times points * points forecasts of the sample, and about
              60 gradients of it for each model: a minute for a small model.
    """

    program: ClassVar[str] = "ltsm landscape"

    model: Annotated[str, flags.text("MODEL"), flags.described(MODEL)]
    out: Annotated[Path, flags.path("FOLDER")]
    """folder of the results"""
    alpha: Annotated[float, flags.number(0, 1, says="between 0 and 1")] = 0.7
    """weight of the model in the mix"""
    points: Annotated[int, flags.whole(2)] = 11
    """points on each axis; an odd number has the models themselves among them"""
    radius: Annotated[float, flags.number(1e-6, 1e6, says="positive")] = 1.0
    """end of each axis, in norms of the filters"""
    windows: Annotated[int, flags.whole(1)] = 256
    """test windows in the sample"""
    seed: Annotated[int, flags.whole(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = 0
    """of the random model and of the directions"""

    def run(self) -> int:
        """Read, say the plan, compute, write, print."""
        forecaster = self.load(self.model)
        panel = self.read(forecaster)
        prepared = verdict.bind_panel(
            forecaster.model,
            forecaster.params,
            panel,
            horizon=self.horizon,
            context_len=forecaster.context_len,
            seed=self.seed,
        )
        test = prepared.splits.test
        plan = of_table(panel) | {
            "model": of_model(self.model, forecaster),
            "loss": f"MSE of {min(self.windows, test.n):,} of {test.n:,} test windows, "
            f"{test.context_len} -> {self.horizon}",
            "points": f"three surfaces of {self.points} x {self.points}, up to {self.radius:g} "
            "filter norms away",
            "result": str(self.out),
        }
        if self.announce(plan, prepared.notes):
            return 0
        self._show(*self._computed(prepared))
        return 0

    def _computed(
        self, prepared: verdict.BoundPanel
    ) -> tuple[dict[str, landscape.Surface], dict[str, float]]:
        """The surface and the top eigenvalue of each model by name."""
        model, params = prepared.model, prepared.params
        loss = landscape.split_loss(
            model, prepared.splits.test, sample=self.windows, task=prepared.task
        )
        key = training.keys(self.seed)["aux"]
        starts = {
            "pretrained": params,
            "random": start_params(strategy("tfs"), model, params, aux_key=key),
            "sff": start_params(strategy("sff", alpha=self.alpha), model, params, aux_key=key),
        }
        surfaces, top = {}, {}
        for name, start in starts.items():
            hosts.stop_if_asked(f"before {name}")
            surfaces[name] = landscape.surface(
                loss,
                start,
                landscape.random_directions(start, seed=self.seed),
                radius=self.radius,
                points=self.points,
                folder=self.out / "parts" / name,
            )
            top[name] = float(curvature.top_eigenvalues(loss, start)[0])
            printing.say(
                f"{name}: loss {surfaces[name].centre:.4f}, top eigenvalue {top[name]:.4g}"
            )
        return surfaces, top

    def _show(self, surfaces: dict[str, landscape.Surface], top: dict[str, float]) -> None:
        one = surfaces["pretrained"]
        arrays: dict[str, Any] = {"x": one.x, "y": one.y}
        arrays |= {f"loss_{name}": found.loss for name, found in surfaces.items()}
        self.out.mkdir(parents=True, exist_ok=True)
        np.savez(self.out / SURFACE, **arrays)
        picture = None
        if importlib.util.find_spec("matplotlib") is not None:
            notes = {name: f"top eigenvalue {value:.3g}" for name, value in top.items()}
            picture = landscape.draw_contours(surfaces, self.out / PICTURE, notes=notes)

        rows = {
            name: found.smoothness() | {"top_eigenvalue": top[name]}
            for name, found in surfaces.items()
        }
        if self.output.json:
            printing.show_json(
                {
                    "surface": str(self.out / SURFACE),
                    "picture": picture and str(picture),
                    "models": rows,
                }
            )
            return
        header = ["model", "loss", "range", "mean |Laplacian|", "doubles at", "top eigenvalue"]
        lines = []
        for name, row in rows.items():
            lines.append([name, *(f"{number:.4g}" for number in row.values())])
        printing.show(printing.table(header, lines))
        printing.show(f"\nsurface: {self.out / SURFACE}")
        printing.show(f"picture: {picture}" if picture else "no picture: pip install matplotlib")
