"""An epoch as the released pipeline runs it, in eager PyTorch: a side of
`experiments.benchmarks.epoch`.

Every item of the data set is one window of one variate, cut and turned into a tensor by itself; a
loader puts 2048 of them together. After the training windows come those of validation and test, of
which all predictions are joined before they are scored. Loss and scores are of the last 96 points.
It needs nothing but NumPy and PyTorch:

python -m experiments.benchmarks.torch_epoch FOLDER WORKERS THREADS
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from experiments.benchmarks.torch_timer import TorchTimer

BATCH, CONTEXT, HORIZON, RATE = 2048, 672, 96, 3e-5


class Windows(Dataset):
    """Windows of each variate of `values` [T, C], variate by variate."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.starts = len(values) - CONTEXT - HORIZON + 1

    def __len__(self) -> int:
        return self.starts * self.values.shape[1]

    def __getitem__(self, item: int):
        variate, first = item // self.starts, item % self.starts
        middle = first + CONTEXT
        column = slice(variate, variate + 1)
        context = torch.tensor(self.values[first:middle, column])
        return context, torch.tensor(self.values[middle : middle + HORIZON, column])


def load(model: TorchTimer, folder: Path) -> None:
    """Put the weights of WEIGHTS.npz into the model."""
    with np.load(folder / "weights.npz") as arrays:
        model.load_state_dict(
            {name: torch.from_numpy(arrays[name]) for name in arrays.files}, strict=False
        )


def forecast(model: TorchTimer, context: torch.Tensor) -> torch.Tensor:
    return model(context[..., 0])[:, -HORIZON:]


def score(model: TorchTimer, loader: DataLoader) -> float:
    """Mean squared error of every window of a part."""
    model.eval()
    points, targets = [], []
    with torch.no_grad():
        for context, target in loader:
            points.append(forecast(model, context).numpy())
            targets.append(target[..., 0].numpy())
    model.train()
    return float(np.mean((np.concatenate(points) - np.concatenate(targets)) ** 2))


def main() -> None:
    """Print the scores of the start and after an epoch, and the seconds of the epoch, as JSON."""
    folder, workers, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = TorchTimer(patch_len=96, d_model=256, d_ff=512, layers=4, heads=8)
    load(model, folder)
    started = time.perf_counter()
    with np.load(folder / "rows.npz") as arrays:
        parts = {name: Windows(arrays[name]) for name in ("train", "val", "test")}
    loaders = {
        name: DataLoader(part, BATCH, shuffle=name == "train", num_workers=workers)
        for name, part in parts.items()
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    model.train()
    for context, target in loaders["train"]:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(forecast(model, context), target[..., 0])
        loss.backward()
        optimizer.step()
    trained = time.perf_counter() - started
    val, test = (score(model, loaders[name]) for name in ("val", "test"))
    seconds = time.perf_counter() - started

    load(model, folder)
    found = {
        "start": score(model, loaders["val"]),
        "val": val,
        "test": test,
        "train_seconds": trained,
    }
    print(json.dumps(found | {"seconds": seconds}))


if __name__ == "__main__":
    main()
