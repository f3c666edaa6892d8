"""Lanes over eight forced CPU devices beside separate runs; prints JSON. Run by test_lanes."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import test_lanes

from ltsm_jax import sharding
from ltsm_jax.stacks import Over
from ltsm_jax.training import RunFolder, lanes

jax.config.update("jax_default_matmul_precision", "highest")


def said(outcomes):
    """What is compared of the outcomes."""
    return {
        "best_epochs": [run.best_epoch for run in outcomes],
        "steps": [run.steps for run in outcomes],
        "val": [[row["val_mse"] for row in run.history] for run in outcomes],
        "sizes": [float(test_lanes._size(run.params)) for run in outcomes],
    }


def stopped_and_resumed(jobs, mode, mesh, folder):
    """Stop a sweep over the mesh in its second epoch, and go on with it on one device."""

    class Stop(Exception):
        pass

    record = RunFolder.record

    def until(self, lines):
        lines = list(lines)
        if lines[0]["step"] == 9:
            raise Stop
        self.wait()
        record(self, lines)

    RunFolder.record = until
    try:
        lanes._as_lanes(jobs, range(len(jobs)), Over(mode, mesh), folder, None)
    except Stop:
        RunFolder.record = record
    on_one = jax.device_put(jobs, jax.devices()[0]) if mesh is None else jobs
    return lanes._as_lanes(on_one, range(len(jobs)), Over(mode), folder, None)


def main():
    """Train six runs each way."""
    changes = {"checkpoint_seconds": 0, "steps_per_dispatch": 1}
    found = {"separate": said(lanes.fit_jobs(test_lanes.jobs_of(rates=(3e-3,)), lanes="off"))}
    mesh = sharding.make_mesh("data=8")
    for mode in ("mapped", "batched"):
        placement = sharding.Placement(mesh)
        jobs = [
            job | {"params": placement.replicate(job["params"])}
            for job in test_lanes.jobs_of(rates=(3e-3,))
        ]
        assert lanes.signature(jobs[0]) is not None
        before = lanes.advance_lanes._cache_size()
        outcomes = lanes._as_lanes(jobs, range(6), Over(mode, mesh), None, None)
        compiled = lanes.advance_lanes._cache_size() - before
        leaf = outcomes[0].params["body"]["kernel"]
        found[mode] = said(list(outcomes.values())) | {
            "devices": len(leaf.sharding.device_set),
            "compiled": compiled,
        }
        with tempfile.TemporaryDirectory() as folder:
            stop = [
                job | {"params": placement.replicate(job["params"])}
                for job in test_lanes.jobs_of(rates=(3e-3,), **changes)
            ]
            again = stopped_and_resumed(stop, mode, mesh, Path(folder) / "sweep")
        found[mode]["resumed"] = said(list(again.values()))["val"]
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
