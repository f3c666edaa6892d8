"""Originals in PyTorch: a side of `experiments.benchmarks.newest`.

It needs nothing of ours, so that it runs in an environment without JAX:

python -m experiments.benchmarks.torch_newest FAMILY KIND FOLDER

FOLDER holds the checkpoint (`model`) and the series (`in.npz`); what is computed from them is
written there. KIND is forecast or train.
"""

import json
import os
import sys
import time
from pathlib import Path

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


def serve(call) -> None:
    """Call once, say so, then once for each line of the standard input, and print the seconds of
    each call, by the clock and of the processor.
    """
    call()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


def quickest(forecast, context):
    """A call that forecasts `context` in batches of the size that takes the least time."""

    def batched(size: int):
        return lambda: [forecast(context[i : i + size]) for i in range(0, len(context), size)]

    sizes = [len(context), *(size for size in (256, 128, 64, 32) if size < len(context))]
    return _quickest([batched(size) for size in sizes])


def _quickest(calls):
    """The call with the lowest time of three, behind one that warms up."""
    times = []
    for call in calls:
        call()
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        times.append(min(seconds))
    return calls[times.index(min(times))]


def timesfm_3(folder: str, horizon: int):
    """Quantiles [B, C, H, Q] in order, as `predict` gives them."""
    from timesfm3.torch.model import TimesFM3Torch

    model = TimesFM3Torch.from_pretrained(folder).eval()
    return lambda context: model.decode(context, horizon=horizon).sort(-1).values


def tirex_2(folder: str, horizon: int):
    """Quantiles [B, C, H, Q]."""
    import torch
    from tirex2 import load_model
    from tirex2.model.types import TimeseriesType

    model = load_model(folder, device="cpu")

    def forecast(context):
        series = [TimeseriesType(one, None, None) for one in context]
        found = model.predict(series, horizon)
        return torch.stack([torch.as_tensor(one).swapaxes(1, 2) for one in found])

    return forecast


def toto_2(folder: str, horizon: int):
    """Quantiles [B, C, H, Q]."""
    import torch
    from toto2 import Toto2Model

    model = Toto2Model.from_pretrained(folder).eval()

    def forecast(context):
        given = {
            "target": context,
            "target_mask": torch.ones_like(context, dtype=torch.bool),
            "series_ids": torch.zeros(context.shape[:2], dtype=torch.long),
        }
        return model.forecast(given, horizon).movedim(0, -1)

    return forecast


def _ttm_r3(folder: str):
    from tsfm_public.models.tinytimemixer import TinyTimeMixerForDecomposedPrediction

    return TinyTimeMixerForDecomposedPrediction.from_pretrained(folder)


def ttm_r3(folder: str, horizon: int):
    """Quantiles [B, C, H, Q]."""
    model = _ttm_r3(folder).eval()

    def forecast(context):
        found = model(past_values=context.swapaxes(1, 2), return_loss=False).quantile_outputs
        return found.permute(0, 3, 2, 1)

    return forecast


FORECASTS = {"timesfm_3": timesfm_3, "tirex_2": tirex_2, "toto_2": toto_2, "ttm_r3": ttm_r3}


def training(folder: str, context, target):
    """The loss without dropout, and a call that does one step with it; of TTM r3, the one original
    that trains.
    """
    import torch

    model = _ttm_r3(folder)
    given = {"past_values": context.swapaxes(1, 2), "future_values": target.swapaxes(1, 2)}
    with torch.no_grad():
        before = model.eval()(**given).loss
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )

    def in_parts(parts: int):
        pieces = zip(*(values.chunk(parts) for values in given.values()), strict=True)
        batches = [{"past_values": past, "future_values": future} for past, future in pieces]

        def step():
            optimizer.zero_grad()
            for batch in batches:
                loss = model(**batch).loss / parts
                loss.backward()
                assert torch.isfinite(loss)
            optimizer.step()

        return step

    return before, _quickest([in_parts(parts) for parts in (1, 2, 4, 8)])


def main(family: str, kind: str, place: str) -> None:
    """Write what the original computes, then wait for its turns."""
    import numpy as np
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    given = np.load(Path(place) / "in.npz")
    context, target = (torch.tensor(given[name]) for name in ("context", "target"))
    folder, out = str(Path(place) / "model"), Path(place) / f"torch_{kind}.npy"
    if kind == "train":
        before, step = training(folder, context, target)
        np.save(out, before.numpy())
        serve(step)
        return
    forecast = FORECASTS[family](folder, target.shape[-1])
    with torch.inference_mode():
        np.save(out, forecast(context).to(torch.float32).numpy())
        serve(quickest(forecast, context))


if __name__ == "__main__":
    main(*sys.argv[1:])
