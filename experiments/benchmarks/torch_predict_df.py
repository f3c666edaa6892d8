"""The peer of `predict_df`: chronos-forecasting, in an environment of its own, without JAX.

Started by `experiments.benchmarks.predict_df`, which also takes the table and the way to be timed
from here:
python -m experiments.benchmarks.torch_predict_df ITEMS ROWS
"""

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

HORIZON, LEVELS, THREADS = 24, (0.1, 0.5, 0.9), 2
SIZES = {
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 1024,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
}


def table(items: int, rows: int) -> pd.DataFrame:
    """Random walks of `items`, each of `rows` hours, one below the other."""
    steps = np.random.default_rng(0).normal(size=(items, rows))
    return pd.DataFrame(
        {
            "item_id": np.repeat([f"item {i}" for i in range(items)], rows),
            "timestamp": np.tile(pd.date_range("2024-01-01", periods=rows, freq="h"), items),
            "target": steps.cumsum(axis=1).ravel(),
        }
    )


def theirs(df: pd.DataFrame) -> Callable[[], pd.DataFrame]:
    """`predict_df` of a Chronos-Bolt with random weights."""
    import torch
    from chronos.chronos_bolt import ChronosBoltModelForForecasting, ChronosBoltPipeline
    from transformers import T5Config

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = T5Config(
        **SIZES,
        feed_forward_proj="relu",
        vocab_size=2,
        pad_token_id=0,
        decoder_start_token_id=0,
        reg_token_id=1,
        initializer_factor=0.05,
    )
    config.chronos_config = {
        "context_length": 2048,
        "prediction_length": 64,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "quantiles": [round(0.1 * i, 1) for i in range(1, 10)],
        "use_reg_token": True,
    }
    pipeline = ChronosBoltPipeline(ChronosBoltModelForForecasting(config).eval())

    def predict():
        return pipeline.predict_df(df, prediction_length=HORIZON, quantile_levels=list(LEVELS))

    return predict


def serve(call: Callable[[], pd.DataFrame], items: int) -> None:
    """Time one call for every line read; the answer is a line of JSON: seconds on the wall and of
    the processor.
    """
    for _ in sys.stdin:
        started = time.perf_counter(), time.process_time()
        found = call()
        seconds = [time.perf_counter() - started[0], time.process_time() - started[1]]
        assert len(found) == items * HORIZON
        assert not found.isna().any(axis=None)
        print(json.dumps(seconds), flush=True)


def two_processors() -> None:
    """Keep this process to two processors, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


if __name__ == "__main__":
    two_processors()
    n_items, n_rows = map(int, sys.argv[1:])
    serve(theirs(table(n_items, n_rows)), n_items)
