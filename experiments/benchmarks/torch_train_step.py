"""Training steps of a Timer in eager PyTorch: a side of `experiments.benchmarks.train_step`.

It needs nothing but PyTorch: python -m experiments.benchmarks.torch_train_step BATCH STEPS
"""

import json
import sys
import time

import torch

from experiments.benchmarks.torch_timer import TorchTimer


def main() -> None:
    """Print the seconds of each step after the first as JSON."""
    batch, steps = map(int, sys.argv[1:])
    torch.manual_seed(0)
    model = TorchTimer(patch_len=96, d_model=1024, d_ff=2048, layers=8, heads=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-5)
    draw = torch.randn(batch, 672 + 96)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(draw[:, :672]), draw[:, 96:])
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    main()
