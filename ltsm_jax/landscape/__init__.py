"""Loss landscapes: the loss on a line or a plane through the parameters of a model.

    import ltsm_jax
    from ltsm_jax import landscape

    model, params = ltsm_jax.load("timer-tiny")
    loss = landscape.split_loss(model, splits.test, sample=512)
    directions = landscape.random_directions(params, seed=0)
    found = landscape.surface(loss, params, directions, radius=1.0, points=25)
    found.save("surface.npz")
    landscape.draw_contours({"pretrained": found}, "surface.png")

A loss is any function of a tree of parameters that returns a scalar; nothing here needs it to be
that of a model.
"""

from ltsm_jax.landscape.directions import Plane, plane_through, random_directions, trajectory_plane
from ltsm_jax.landscape.grid import Surface, surface
from ltsm_jax.landscape.losses import SplitLoss, split_loss
from ltsm_jax.landscape.pictures import draw_contours, draw_hills, draw_lines

__all__ = [
    "Plane",
    "SplitLoss",
    "Surface",
    "draw_contours",
    "draw_hills",
    "draw_lines",
    "plane_through",
    "random_directions",
    "split_loss",
    "surface",
    "trajectory_plane",
]
