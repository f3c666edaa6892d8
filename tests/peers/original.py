"""Forecasts by the originals' own packages; runs where these are installed, and ours is not.

python original.py

Reads requests from stdin, a line of JSON each: [FAMILY, FOLDER, inputs.npz, outputs.npz]. Answers
each by a line on stdout: null, or what failed. One process answers many, as importing the packages
takes longer than most forecasts.
"""

import json
import os
import sys
import traceback

import numpy as np
import torch


def chronos_bolt(folder, context, horizon, freq):
    from chronos import BaseChronosPipeline

    pipeline = BaseChronosPipeline.from_pretrained(folder)
    levels = pipeline.quantiles
    quantiles, _ = pipeline.predict_quantiles(
        torch.tensor(context[:, 0]), prediction_length=horizon, quantile_levels=levels
    )
    return quantiles[:, None]


def chronos_2(folder, context, horizon, freq):
    from chronos import BaseChronosPipeline

    pipeline = BaseChronosPipeline.from_pretrained(folder)
    found = pipeline.predict(list(torch.tensor(context)), prediction_length=horizon)
    return torch.stack([one.swapaxes(1, 2) for one in found])


def chronos_t5(folder, context, horizon, freq):
    """Forecasts are draws; the encoder's output says whether tokens and weights are the same."""
    from chronos import ChronosPipeline

    embedding, _ = ChronosPipeline.from_pretrained(folder).embed(torch.tensor(context[:, 0]))
    return embedding


def timesfm_3(folder, context, horizon, freq):
    from timesfm3.torch.model import TimesFM3Torch

    model = TimesFM3Torch.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.decode(torch.tensor(context), horizon=horizon).sort(-1).values


def tirex_2(folder, context, horizon, freq):
    from tirex2 import load_model
    from tirex2.model.types import TimeseriesType

    model = load_model(folder, device="cpu")
    series = [TimeseriesType(torch.tensor(one), None, None) for one in context]
    found = model.predict(series, horizon)
    return torch.stack([torch.as_tensor(one).swapaxes(1, 2) for one in found])


def toto_2(folder, context, horizon, freq):
    from toto2 import Toto2Model

    model = Toto2Model.from_pretrained(folder).eval()
    target = torch.tensor(context)
    given = {
        "target": target,
        "target_mask": torch.ones_like(target, dtype=torch.bool),
        "series_ids": torch.zeros(target.shape[:2], dtype=torch.long),
    }
    with torch.no_grad():
        return model.forecast(given, horizon).movedim(0, -1)


def ttm_r3(folder, context, horizon, freq):
    from tsfm_public.models.tinytimemixer import TinyTimeMixerForDecomposedPrediction

    model = TinyTimeMixerForDecomposedPrediction.from_pretrained(folder).eval()
    values = torch.tensor(context.swapaxes(1, 2))
    with torch.no_grad():
        found = model(past_values=values, return_loss=False).quantile_outputs
    return found.permute(0, 3, 2, 1)


def ttm(folder, context, horizon, freq):
    from tsfm_public.models.tinytimemixer import TinyTimeMixerForPrediction

    model = TinyTimeMixerForPrediction.from_pretrained(folder).eval()
    values = torch.tensor(context.swapaxes(1, 2))
    prefix = model.config.resolution_prefix_tuning
    more = {"freq_token": torch.full((len(values),), freq)} if prefix else {}
    with torch.no_grad():
        found = model(past_values=values, return_loss=False, **more).prediction_outputs
    return found.swapaxes(1, 2)


def write_forecast(family, folder, inputs, outputs):
    given = np.load(inputs)
    found = globals()[family](folder, given["context"], int(given["horizon"]), int(given["freq"]))
    np.savez(outputs, forecast=found.to(torch.float32).numpy())


def main():
    # Whatever the packages print goes to stderr: on stdout there is nothing but answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        problem = None
        try:
            write_forecast(*json.loads(line))
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps(problem), file=answers, flush=True)


if __name__ == "__main__":
    main()
