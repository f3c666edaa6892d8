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
from ltsm_jax.models import folders
from ltsm_jax.models.timer import Timer, TimerConfig

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
import converters
from ltsm_jax import storage

def most():  # of this process alone: what getrusage says may be the parent's
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

storage._orbax()  # what is imported on the way is no part of the conversion
before = most()
converters.import_checkpoint(sys.argv[1], sys.argv[2])
print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_conversion_is_little_more_than_the_file(tmp_path):
    model = Timer(TimerConfig(96, 1024, 64, (16,) * 8, (2048,) * 8, context_len=672, horizon=96))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), folders.shapes(model)
    )
    Forecaster(model, params).export(tmp_path / "original.ckpt")
    file = tmp_path / "original.safetensors"
    write_safetensors(file, originals.read(tmp_path / "original.ckpt").state)
    size = file.stat().st_size
    assert size > 250e6
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(tmp_path / "original.ckpt"),
        str(tmp_path / "folder"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.6 * size, "the file itself, or Orbax's copies, as well"
