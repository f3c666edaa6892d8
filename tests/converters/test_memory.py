"""Converting takes little more memory than the checkpoint has bytes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import originals
from converters.torch_files import write_safetensors
from ltsm_jax import Forecaster
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.timer import Timer, TimerConfig

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
import converters

def most():  # of this process alone: what getrusage says may be the parent's
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

# A small one first: what JAX and Orbax take once, whatever the size, is no part of it.
converters.import_checkpoint(sys.argv[1], sys.argv[2])
before = most()
converters.import_checkpoint(sys.argv[3], sys.argv[4])
print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_conversion_is_little_more_than_the_file(tmp_path):
    words, size = [], 0
    for width in (64, 1024):
        file = checkpoint(tmp_path / f"{width}", width)
        words += [str(file), str(tmp_path / f"folder-{width}")]
        size = file.stat().st_size
    assert size > 250e6
    command = [sys.executable, "-c", CHILD, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    # More where the file itself, or Orbax's copies, are in memory as well.
    assert int(done.stdout.split()[-1]) < 1.6 * size


def checkpoint(place, width):
    """A random Timer in the form of the original, as a safetensors file."""
    heads = width // 64
    model = Timer(
        TimerConfig(
            96, width, 64, equal_layers(8, heads, 64, 2 * width), context_len=672, horizon=96
        )
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), folders.param_shapes(model)
    )
    place.mkdir()
    Forecaster(model, params).export(place / "original.ckpt")
    state = originals.read_original(place / "original.ckpt").state
    write_safetensors(place / "original.safetensors", state)
    return place / "original.safetensors"
