"""The loop of the original over the points of a surface, in eager PyTorch.

A side of `experiments.benchmarks.landscape`. For each point new weights, then every batch in
evaluation mode. It needs nothing but NumPy and PyTorch, so that it runs in an environment without
JAX: python -m experiments.benchmarks.torch_landscape WINDOWS.npz POINTS ROUNDS
"""

import json
import sys
import time

import numpy as np
import torch

from experiments.benchmarks.torch_timer import TorchTimer

BATCH = 2048  # windows of one forward pass of the original


def direction(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Draw a direction, normalised filter by filter along the first axis."""
    drawn = []
    for w in weights:
        d = torch.randn_like(w)
        for i in range(len(d)):
            d[i] *= w[i].norm() / (d[i].norm() + 1e-10)
        drawn.append(d)
    return drawn


def main() -> None:
    """Print the seconds of each round as JSON."""
    file, points, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    model = TorchTimer(patch_len=96, d_model=128, d_ff=256, layers=4, heads=4).eval()
    with np.load(file) as arrays:
        context, target = (torch.from_numpy(arrays[name]) for name in ("context", "target"))
    weights = [w.detach().clone() for w in model.parameters()]
    right, up = direction(weights), direction(weights)
    axis = np.linspace(-1, 1, points)

    def loss_at(x: float, y: float) -> float:
        for parameter, w, a, b in zip(model.parameters(), weights, right, up):
            parameter.data = w + x * a + y * b
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(context), BATCH):
                part = slice(start, start + BATCH)
                point = model(context[part])[:, -target.shape[1] :]
                total += float(torch.nn.functional.mse_loss(point, target[part])) * len(point)
        return total / len(context)

    loss_at(0.0, 0.0)  # the first call is slower
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for y in axis:
            for x in axis:
                loss_at(float(x), float(y))
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"torch loop": seconds}))


if __name__ == "__main__":
    main()
