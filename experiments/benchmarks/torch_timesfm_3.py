"""TimesFM 3.0 of the original in PyTorch: a side of `experiments.benchmarks.timesfm_3`.

It needs nothing of ours, so that it runs in an environment without JAX:

python -m experiments.benchmarks.torch_timesfm_3 WINDOWS REPEATS
"""

import json
import sys

from experiments.benchmarks.torch_chronos_bolt import timed

CONTEXT, HORIZON = 1024, 96
D_MODEL, LAYERS, HEADS = 1280, 20, 16  # of google/timesfm-3.0-pytorch


def torch_side(windows: int, repeats: int) -> dict[str, list[float]]:
    """The original's class, untrained, without its reading of series into NumPy."""
    import torch
    from timesfm3.torch.model import TimesFM3Torch

    torch.manual_seed(0)
    layer = {
        "model_dims": D_MODEL,
        "hidden_dims": D_MODEL,
        "num_heads": HEADS,
        "attention_norm": "rms",
        "feedforward_norm": "rms",
        "qk_norm": "rms",
        "use_bias": False,
        "use_rope_seq": True,
        "use_rope_var": False,
        "ff_activation": "relu",
        "deterministic": True,
    }
    block = {
        "hidden_dims": D_MODEL,
        "output_dims": D_MODEL,
        "use_bias": False,
        "activation": "relu",
    }
    model = TimesFM3Torch(
        residual_block_config=block,
        transformer_config={"num_layers": LAYERS, "transformer": layer},
    )
    assert sum(p.numel() for p in model.parameters()) == 330_710_976
    model.eval()
    walks = torch.randn(windows, 1, CONTEXT).cumsum(-1)

    def infer():
        with torch.inference_mode():
            assert torch.isfinite(model.decode(walks, horizon=HORIZON)).all()

    return timed(infer, repeats)


def main() -> None:
    """Print the seconds of the calls as JSON."""
    windows, repeats = map(int, sys.argv[1:])
    print(json.dumps(torch_side(windows, repeats)))


if __name__ == "__main__":
    main()
