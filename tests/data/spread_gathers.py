"""Windows of a series in parts over 8 forced CPU devices, beside those of the whole series; prints
JSON. Run by test_windows.

Per mesh and kind of window: whether every batch has the same bits, what each device holds, and how
the batch lies.
"""

import dataclasses
import json
import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding
from ltsm_jax.data import windows
from ltsm_jax.data.corpus import ScaledWindows

N_ROWS, CONTEXT, HORIZON = 101, 8, 4


def same(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def close(got, want):  # a mean of a row of a split batch may round differently
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True) for a, b in pairs)


def main(file):
    windows.WHOLE_BYTES = 0
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, N_ROWS)).astype(np.float32)
    values[1, 40:60] = np.nan
    np.save(file, values)
    mapped, take, found = (
        np.load(file, mmap_mode="r"),
        jax.jit(lambda source, i: source.gather(i)),
        {},
    )
    for joint in (False, True):
        whole = windows.windows_between(values, 0, N_ROWS, CONTEXT, HORIZON, joint=joint)
        if joint:  # the last two rows are covariates
            whole = dataclasses.replace(whole, n_past=1, n_known=1)
        last = np.arange(
            whole.n - 5, whole.n
        )  # the end of the series, and no multiple of the devices
        for text in ("data=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"):
            mesh = sharding.make_mesh(text)
            spread = dataclasses.replace(whole, values=mapped).over(mesh)
            assert spread.over(mesh) is spread
            batch = take(spread, np.arange(16))
            found[f"{text} {joint}"] = {
                "same": [
                    same(take(spread, i), take(whole, jnp.asarray(i)))
                    for i in (*np.array_split(np.arange(whole.n), 4), last)
                ],
                "held": [shard.data.shape for shard in spread.values.addressable_shards],
                "lies": str(batch["target"].sharding.spec),
                "scaled": close(
                    take(ScaledWindows(spread), last), take(ScaledWindows(whole), last)
                ),
            }
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
