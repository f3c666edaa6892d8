"""Trains every family of the command line on several meshes of 8 forced CPU devices; prints JSON. Run by test_sharding.

python sharded_runs.py family mesh[:option=value...] ...   ("one" is one device without a mesh)
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import sharding, trees
from ltsm_jax.data.windows import windows_between
from ltsm_jax.models import FAMILIES
from ltsm_jax.training import TrainConfig, fit, loop

jax.config.update("jax_default_matmul_precision", "highest")


def problem(family):
    cls = FAMILIES[family]
    model = cls(cls.small())
    params = jax.jit(model.init)(jax.random.key(0))
    length = model.context_len + model.horizon + 40
    t = np.arange(length)
    noise = np.random.default_rng(0).normal(size=(2, length))
    values = np.sin(2 * np.pi * t / 12 + np.arange(2)[:, None]) + 0.1 * noise
    joint = model.variates == "joint"
    return model, params, windows_between(values, 0, length, model.context_len, model.horizon, joint=joint)


def run(family, mesh_text, folder=None, **options):
    model, params, windows = problem(family)
    windows = windows.take(np.arange(min(windows.n, 40)))  # the last batch of 16 is partial
    mesh = None if mesh_text == "one" else sharding.make_mesh(mesh_text)
    notes = ()
    if mesh is not None:
        params, notes = sharding.shard(params, model.shard_rules, mesh)
    start = {path: str(leaf.sharding.spec) for path, leaf in trees.flatten(params).items()} if mesh else {}
    compiled = loop._advance._cache_size()
    config = TrainConfig(epochs=2, batch_size=16, lr=1e-3, schedule="constant", **options)
    result = fit(model.loss, params, windows, config=config, folder=folder, show_progress=False)
    flat = trees.flatten(result.last_params)
    grads = jax.jit(jax.grad(lambda p, b: model.loss(p, b)))(params, windows.gather(jnp.arange(16)))
    return {
        "losses": [row["train_loss"] for row in result.history],
        "params": {path: np.asarray(leaf, np.float64).ravel().tolist() for path, leaf in flat.items()},
        "grads": {path: np.asarray(leaf, np.float64).ravel().tolist() for path, leaf in trees.flatten(grads).items()},
        "start": start,
        "end": {path: str(leaf.sharding.spec) for path, leaf in flat.items()} if mesh else {},
        "split": {path: leaf.size // leaf.addressable_shards[0].data.size for path, leaf in flat.items()},
        "compiled": loop._advance._cache_size() - compiled,
        "notes": list(notes),
        "dtypes": sorted({str(leaf.dtype) for leaf in flat.values()}),
    }


if __name__ == "__main__":
    found = {}
    for text in sys.argv[2:]:
        mesh_text, *rest = text.split(":")
        options = dict(item.split("=", 1) for item in rest)
        found[text] = run(sys.argv[1], mesh_text, **{k: int(v) if v.isdigit() else v for k, v in options.items()})
    print(json.dumps(found))
