"""100 steps on 8 forced CPU devices, and on meshes that change on the way; prints JSON. Run by
test_stopping.

python elastic_run.py folder
"""

import json
import sys
from pathlib import Path

import numpy as np
import sharded_runs  # forces the devices

import jax  # isort: skip
from ltsm_jax import hosts, sharding
from ltsm_jax.data.windows import batch_at
from ltsm_jax.tasks import forecasting, imputation
from ltsm_jax.training import TrainConfig, fit, loop

RUNS = {  # (mesh or None for one device, devices, step after which SIGTERM stops it, or None)
    "8": [("data=4,fsdp=2", 8, None)],
    "8-2-1": [("data=4,fsdp=2", 8, 40), ("fsdp=2", 2, 70), (None, 1, None)],
    "1-8": [(None, 1, 50), ("fsdp=8", 8, None)],
}


def run(folder, legs):
    model, params, windows = sharded_runs.problem("timer")
    windows = windows.take(np.arange(38))  # batches of 8, the last one of 6: 5 steps an epoch
    config = TrainConfig(
        epochs=20, batch_size=8, lr=1e-3, schedule="constant", steps_per_dispatch=1
    )
    config = config.filled({"weight_decay": 0.0, "clip": None}, seed=0)
    dispatch, found = loop.Fitting.dispatch, {"stops": [], "batches": [], "devices": []}

    def validate(params):
        return forecasting.evaluate(model, params, windows, batch_size=16)

    for mesh_text, devices, stop in legs:

        def watched(self, epoch, place, steps, stop=stop):
            indices, _ = batch_at(sharding.on_host(self.order), place, self.batch_size)
            found["batches"].append(indices.tolist())
            dispatch(self, epoch, place, steps)
            if self.position.step == stop:
                hosts._stop.set()  # as the handler does

        mesh = mesh_text and sharding.make_mesh(mesh_text, jax.devices()[:devices])
        placed = sharding.shard(params, model.shard_rules, mesh)[0] if mesh else params
        loop.Fitting.dispatch = watched
        try:
            with hosts.session():
                result = fit(
                    model.loss,
                    placed,
                    windows,
                    config=config,
                    validate=validate,
                    folder=folder,
                    show_progress=False,
                )
            found["devices"] = len(
                result.last_params["layer_0"]["up"]["kernel"].sharding.device_set
            )
        except hosts.Stopped:
            found["stops"].append(max(int(p.name[5:]) for p in (folder / "checkpoints").iterdir()))
        finally:
            loop.Fitting.dispatch = dispatch
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found | {
        name: [line[name] for line in lines if name in line] for name in ("loss", "val_mse")
    }


def hidden_error(mesh):
    model, params, windows = sharded_runs.problem("timer")
    params = sharding.shard(params, model.shard_rules, mesh)[0] if mesh else params
    return imputation.evaluate(model, params, windows, batch_size=10)["mse"]


if __name__ == "__main__":
    done = {name: run(Path(sys.argv[1]) / name, legs) for name, legs in RUNS.items()}
    done["imputation"] = [
        hidden_error(mesh) for mesh in (None, sharding.make_mesh("data=2,fsdp=4"))
    ]
    print(json.dumps(done))
