"""In from a published file, tuned, out again: the original's package forecasts the same.

LTSM_PEERS names a Python that has the originals' packages (`.ci/run peers` makes one).
"""

import json
import os
import select
import subprocess
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax import Forecaster, TrainConfig

PEERS = os.environ.get("LTSM_PEERS")
ORIGINAL = Path(__file__).with_name("original.py")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PEERS, reason="LTSM_PEERS names no Python with the originals"),
]
CASES = {
    "chronos_bolt": "chronos_bolt",
    "chronos_2": "chronos_2",
    "chronos_t5": "chronos_t5",
    "timesfm_3": "timesfm_3",
    "tirex_2": "tirex_2",
    "toto_2": "toto_2",
    "ttm": "ttm",
    "ttm_r2": "ttm",
    "ttm_r3": "ttm_r3",
}


@pytest.fixture(scope="module")
def originals():
    """A process with the originals' packages, which answers for all cases (see `original.py`)."""
    words = [str(PEERS), str(ORIGINAL)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def forecast_by(originals, *request):
    """Ask for a forecast, and wait for it."""
    originals.stdin.write(json.dumps([str(word) for word in request]) + "\n")
    originals.stdin.flush()
    answered, _, _ = select.select([originals.stdout], [], [], 900)
    assert answered, "no answer after 900 s"
    line = originals.stdout.readline()
    assert line, f"it ended with {originals.wait()}"
    problem = json.loads(line)
    assert problem is None, problem


def waves(rows, columns):
    rng = np.random.default_rng(0)
    stamps = pd.date_range("2024-01-01", periods=rows, freq="h")
    table = pd.DataFrame({"date": stamps})
    for c in range(columns):
        season = np.sin(2 * np.pi * np.arange(rows) / (12 + 3 * c))
        table[f"x{c}"] = 0.5 * c + season + rng.normal(0, 0.2, rows)
    return table


def ours(model, params, context, horizon):
    if model.family == "chronos_t5":
        return model.embed(params, context)[:, 0]
    if model.family == "toto_2":  # the network's forecast, without what the leaderboards add to it
        return model.forecast(params, context, np.ones(context.shape, bool), horizon)
    found = model.predict(params, context, horizon)
    return found.point if found.quantiles is None else found.quantiles


@pytest.mark.parametrize("folder, family", CASES.items())
def test_the_original_loads_what_was_tuned_and_forecasts_the_same(
    folder, family, request, tmp_path, originals
):
    golden = request.config.getoption("--golden") / folder
    model, params = ltsm_jax.load(golden / "model.safetensors")
    columns = getattr(model.config, "n_channels", None) or 3
    table = waves(max(int(1.6 * model.context_len) + 100, 400), columns)
    # A few steps on short contexts move every weight as well; those of a whole context of Toto 2
    # take minutes. What is compared below has the whole context.
    fitted = ltsm_jax.fit(
        model,
        params,
        table.tail(400),
        method="sff",
        context_len=min(model.context_len, 128),
        horizon=min(model.horizon, 8),
        config=TrainConfig(epochs=1, batch_size=16, lr=1e-3),
        show_progress=False,
    )
    moved = [
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(params), strict=True)
    ]
    assert max(moved) > 1e-3, "tuned"

    place = tmp_path / "tuned"
    provenance = Forecaster.load(golden / "model.safetensors")
    notes = Forecaster(
        fitted.model, fitted.params, provenance=provenance.provenance, buffers=provenance.buffers
    ).export(place)
    context = table.iloc[-model.context_len :, 1:].to_numpy(np.float32).T
    together = model.variates == "joint" or family.startswith("ttm")
    context = context[None] if together else context[:, None]
    context = np.concatenate([context, context[:, ::-1, ::-1] * 3 + 1])
    horizon = model.horizon if family.startswith("ttm") else min(model.horizon, 8)
    freq = getattr(fitted.model.config, "freq_token", None) or 0
    np.savez(tmp_path / "in.npz", context=context, horizon=horizon, freq=freq)
    forecast_by(originals, family, place, tmp_path / "in.npz", tmp_path / "out.npz")
    theirs = np.load(tmp_path / "out.npz")["forecast"]
    mine = np.asarray(
        jax.jit(ours, static_argnums=(0, 3))(fitted.model, fitted.params, context, horizon)
    )
    assert theirs.shape == mine.shape, notes
    scale = context.std(axis=-1).max() if family != "chronos_t5" else np.abs(theirs).max()
    np.testing.assert_allclose(mine, theirs, atol=1e-5 * scale, rtol=0)
