"""How fast is `Forecaster.predict` on a long table, beside chronos-forecasting's `predict_df`?

1,000 items of 512 rows, 24 rows ahead, three quantiles, by a Chronos-Bolt of the size of chronos-bolt-tiny (8.7M random
weights on both sides), float32, CPU. Both start from the same pandas table and end with one.

Run:   python -m experiments.benchmarks.predict_df --torch-python PATH [--rounds 5]
Needs: --torch-python, a Python with PyTorch and chronos-forecasting:
       python3.11 -m venv DIR
       DIR/bin/pip install torch==2.13.0 chronos-forecasting
       (a CPU build of torch will do)
Cost:  about a minute on two quiet cores.
Gives: seconds of a call on the wall and of the processor, the best and the median of the rounds, and their ratios.
       The rounds of the two sides alternate, each side in a process of its own that has two processors and two
       threads. The first call of each side (compilation, warming up) is told apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

HORIZON, LEVELS, THREADS = 24, (0.1, 0.5, 0.9), 2
SIZES = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}


def table(items: int, rows: int):
    import numpy as np
    import pandas as pd

    steps = np.random.default_rng(0).normal(size=(items, rows))
    return pd.DataFrame(
        {
            "item_id": np.repeat([f"item {i}" for i in range(items)], rows),
            "timestamp": np.tile(pd.date_range("2024-01-01", periods=rows, freq="h"), items),
            "target": steps.cumsum(axis=1).ravel(),
        }
    )


def ours(df):
    import jax

    import ltsm_jax

    model = ltsm_jax.preset("amazon/chronos-bolt-tiny")
    forecaster = ltsm_jax.Forecaster(model, jax.jit(model.init)(jax.random.key(0)))

    def predict():
        return forecaster.predict(
            df,
            HORIZON,
            id="item_id",
            time="timestamp",
            target="target",
            quantile_levels=LEVELS,
        )

    return predict


def theirs(df):
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


def serve(side: str, items: int, rows: int) -> None:
    """Time one call for every line read; the answer is a line of JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    call = {"ours": ours, "theirs": theirs}[side](table(items, rows))
    for _ in sys.stdin:
        started = time.perf_counter(), time.process_time()
        found = call()
        seconds = [time.perf_counter() - started[0], time.process_time() - started[1]]
        assert len(found) == items * HORIZON
        assert not found.isna().any(axis=None)
        print(json.dumps(seconds), flush=True)


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="a Python with PyTorch and chronos-forecasting; without: ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.items, args.rows)
        return

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    pythons = {"ours": sys.executable} | ({"theirs": args.torch_python} if args.torch_python else {})
    sides = {}
    for side, python in pythons.items():
        command = [python, os.path.abspath(__file__), "--serve", side]
        command += ["--items", str(args.items), "--rows", str(args.rows)]
        environment = dict(os.environ, PYTHONPATH=root, OMP_NUM_THREADS=str(THREADS))
        sides[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    found = {side: [] for side in sides}
    for _ in range(args.rounds + 1):
        for side, process in sides.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"{side} failed")
            found[side].append(json.loads(answer))
    for process in sides.values():
        process.communicate()

    print(f"{processor()}, {THREADS} threads; {args.items} items x {args.rows} -> {HORIZON}, {args.rounds} rounds")
    print(f"{'':8s}{'first':>8s}{'wall best':>11s}{'median':>9s}{'cpu best':>10s}{'median':>9s}")
    kept = {}
    for side, rounds in found.items():
        first, rest = rounds[0], rounds[1:]
        wall, cpu = ([seconds[i] for seconds in rest] for i in (0, 1))
        kept[side] = min(wall), statistics.median(wall), min(cpu), statistics.median(cpu)
        numbers = "{:11.3f}{:9.3f}{:10.3f}{:9.3f}".format(*kept[side])
        print(f"{side:8s}{first[0]:8.2f}{numbers}")
    if "theirs" in kept:
        ratios = [b / a for a, b in zip(kept["ours"], kept["theirs"], strict=True)]
        numbers = "{:11.2f}{:9.2f}{:10.2f}{:9.2f}".format(*ratios)
        print(f"{'times':8s}{'':8s}{numbers}")


if __name__ == "__main__":
    main()
