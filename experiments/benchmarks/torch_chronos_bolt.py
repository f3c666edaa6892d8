"""Chronos-Bolt of the original in PyTorch: a side of `experiments.benchmarks.chronos_bolt`.

It needs nothing of ours, so that it runs in an environment without JAX:

python -m experiments.benchmarks.torch_chronos_bolt WINDOWS BATCH REPEATS
"""

import json
import sys
import time

CONTEXT, HORIZON = 512, 64


def timed(call, repeats: int) -> dict[str, list[float]]:
    """Wall and processor seconds of each call after the first."""
    wall, cpu = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return {"wall": wall[1:], "cpu": cpu[1:]}


def torch_side(windows: int, rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """The original's class, untrained."""
    import torch
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    torch.manual_seed(0)
    chronos = {
        "context_length": 2048,
        "prediction_length": HORIZON,
        "input_patch_size": 16,
        "input_patch_stride": 16,
    }
    chronos |= {"quantiles": [i / 10 for i in range(1, 10)], "use_reg_token": True}
    sizes = {
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_heads": 8,
        "num_layers": 6,
        "num_decoder_layers": 6,
    }
    model = ChronosBoltModelForForecasting(
        T5Config(
            **sizes,
            vocab_size=2,
            initializer_factor=0.05,
            decoder_start_token_id=0,
            chronos_config=chronos,
        )
    )
    walks = torch.randn(max(windows, rows), CONTEXT + HORIZON).cumsum(-1)
    context, target = walks[:, :CONTEXT], walks[:, CONTEXT:]
    model.eval()

    def infer():
        with torch.inference_mode():
            assert torch.isfinite(model(context=context[:windows]).quantile_preds).all()

    found = {"infer": timed(infer, repeats)}
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

    def train():
        optimizer.zero_grad()
        loss = model(context=context[:rows], target=target[:rows].clone()).loss
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)

    return found | {"train": timed(train, repeats)}


def main() -> None:
    """Print the seconds of each kind of call as JSON."""
    windows, rows, repeats = map(int, sys.argv[1:])
    print(json.dumps(torch_side(windows, rows, repeats)))


if __name__ == "__main__":
    main()
