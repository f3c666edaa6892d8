"""SIGTERM in one process, what stays on disk, and reading parts of it back."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import hosts, storage, training

EACH_STEP = dataclasses.replace(problem.CONFIG, checkpoint_seconds=0, steps_per_dispatch=1, keep_checkpoints=3)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that SIGTERM has stopped while it validated after its second epoch."""
    folder, calls = tmp_path_factory.mktemp("stopped"), []

    def validate(params):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return problem.validate(params)

    before = signal.getsignal(signal.SIGTERM)
    with hosts.session(), pytest.raises(hosts.Stopped) as caught:
        problem.fit(folder=folder, config=EACH_STEP, validate=validate)
    assert signal.getsignal(signal.SIGTERM) is before and not hosts.stopping()
    return folder, str(caught.value)


def test_sigterm_stops_after_a_checkpoint_and_the_run_goes_on_with_the_same_bits(stopped, tmp_path):
    folder, said = stopped
    assert said == f"stopped by SIGTERM after step 14 of 28; checkpoint: {folder}/checkpoints/step_00000014"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir())[-1] == "step_00000014"
    undisturbed = problem.fit(folder=tmp_path / "undisturbed")
    shutil.copytree(folder, tmp_path / "resumed")
    resumed = problem.fit(folder=tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, resumed.last_params, undisturbed.last_params)
    assert resumed.history == undisturbed.history
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "resumed")]
    assert metrics[0] == metrics[1]


def test_as_many_checkpoints_stay_as_asked_for(stopped):
    assert len(list((stopped[0] / "checkpoints").iterdir())) == 3


def test_without_a_folder_or_a_step_there_is_nothing_to_keep(tmp_path):
    for folder in (None, tmp_path):
        with hosts.session():
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(hosts.Stopped, match="after step 0 of 28; nothing to keep"):
                problem.fit(folder=folder)
            with pytest.raises(hosts.Stopped, match="between"):
                hosts.stop_if_asked("between")
    hosts.stop_if_asked("never asked")


def test_parts_of_a_checkpoint_are_read_without_the_rest(stopped):
    folder, _ = stopped
    whole, position = training.read_checkpoint(folder)
    assert position["step"] == 14 and whole.keys() == {"params", "optimizer", "best"}
    weights, _ = training.read_checkpoint(folder, "^params/")
    assert storage.digests(weights) == storage.digests({"params": whole["params"]})
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    like = jax.eval_shape(lambda: {"best": {"head": whole["best"]["head"]}})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    head, _ = training.read_checkpoint(folder, "^best/head/", like=like)
    assert storage.digests(head) == storage.digests({"best": {"head": whole["best"]["head"]}})
    assert head["best"]["head"]["kernel"].sharding == sharding
    steps = sorted(int(p.name[5:]) for p in (folder / "checkpoints").iterdir())
    assert training.read_checkpoint(folder, "count", step=steps[0])[1]["step"] == steps[0]
    with pytest.raises(FileNotFoundError, match=f"no checkpoint of step 3; steps there: {steps[0]}, "):
        training.read_checkpoint(folder, step=3)
    with pytest.raises(ValueError, match="no path of the tree matches 'parms'"):
        training.read_checkpoint(folder, "parms")
    with pytest.raises(ValueError, match="only in the model"):
        training.read_checkpoint(folder, "^best/head/kernel", like=like)


def test_an_array_with_a_digest_a_part_is_checked_part_by_part(tmp_path):
    """As several hosts write it, and one reads it."""
    tree = {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.ones(2, np.float32)}
    storage.save_tree(tmp_path / "t", tree)
    record = storage.read_record(tmp_path / "t" / storage.DIGESTS)
    halves = [([[0, 4], [0, 3]], tree["a"][:, :3]), ([[0, 4], [3, 6]], tree["a"][:, 3:])]
    record["arrays"]["a"] = {"shape": [4, 6], "dtype": "float32", "parts": [
        {"at": at, "sha256": storage.digests({"x": half})["x"]["sha256"]} for at, half in halves]}  # fmt: skip
    storage.write_record(tmp_path / "t" / storage.DIGESTS, record)
    assert storage.digests(storage.load_tree(tmp_path / "t")) == storage.digests(tree)
    record["arrays"]["a"]["parts"][1]["sha256"] = record["arrays"]["a"]["parts"][0]["sha256"]
    storage.write_record(tmp_path / "t" / storage.DIGESTS, record)
    with pytest.raises(storage.DamagedError, match="a: the values differ"):
        storage.load_tree(tmp_path / "t")


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_with_two_and_with_one_and_back(tmp_path):
    """100 steps, in parts and at once; restored 8 -> 2 -> 1, and 1 -> 8: the same batches, the same losses."""
    script = Path(__file__).with_name("elastic_run.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found[name]["stops"] for name in ("8", "8-2-1", "1-8")] == [[], [40, 70], [50]]
    assert [found[name]["devices"] for name in ("8", "8-2-1", "1-8")] == [8, 1, 8]
    for name in ("8-2-1", "1-8"):
        assert len(found[name]["batches"]) == 100
        assert found[name]["batches"] == found["8"]["batches"]
        for what in ("loss", "val_mse"):
            np.testing.assert_allclose(found[name][what], found["8"][what], rtol=2e-5)
    np.testing.assert_allclose(*found["imputation"], rtol=2e-5)
