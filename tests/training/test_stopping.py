"""SIGTERM and Ctrl-C in one process, what stays on disk, and reading parts of it back."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import forked
import jax
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import hosts, storage, training
from ltsm_jax.tasks.batches import in_batches

EACH_STEP = dataclasses.replace(
    problem.CONFIG, checkpoint_seconds=0, steps_per_dispatch=1, keep_checkpoints=3
)


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
    assert (
        said
        == f"stopped by SIGTERM after step 14 of 28; checkpoint: {folder}/checkpoints/step_00000014"
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir())[-1] == "step_00000014"
    undisturbed = problem.fit(folder=tmp_path / "undisturbed")
    shutil.copytree(folder, tmp_path / "resumed")
    resumed = problem.fit(folder=tmp_path / "resumed")
    chex.assert_trees_all_equal(resumed.last_params, undisturbed.last_params)
    assert resumed.history == undisturbed.history
    metrics = [
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "resumed")
    ]
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


# --------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell has background jobs ignore it, and they pass that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(calls, at):
    """A validation in whose call number `at` Ctrl-C is pressed; the windows are scored in batches
    after that.
    """

    def validate(params):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        batches = in_batches(lambda i: params["head"]["bias"][i], 8, 4)
        assert batches.shape[0] == 8
        return problem.validate(params)

    return validate


def test_ctrl_c_saves_and_stops_without_a_session_and_the_run_goes_on_with_the_same_bits(
    tmp_path, capfd
):
    undisturbed = problem.fit(validate=interrupting([], at=0))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        problem.fit(folder=tmp_path, validate=interrupting([], at=2))
    assert (
        signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
        and not hosts.stopping()
    )
    assert (
        str(caught.value) == "stopped by Ctrl-C after step 14 of 28; checkpoint: "
        f"{tmp_path}/checkpoints/step_00000014"
    )
    assert (
        capfd.readouterr().err
        == "Ctrl-C: stopping after what is being computed (once more: stop at once)\n"
    )
    # it was stopped between its last step and its validation, which comes now
    assert len(training.read_checkpoint(tmp_path)[1]["history"]) == 1
    calls = []
    resumed = problem.fit(folder=tmp_path, validate=interrupting(calls, at=0))
    assert len(calls) == 3 and resumed.history == undisturbed.history
    chex.assert_trees_all_equal(resumed.params, undisturbed.params)
    chex.assert_trees_all_equal(resumed.last_params, undisturbed.last_params)


def test_ctrl_c_in_a_session_is_a_stop_with_an_exit_code_of_its_own(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with hosts.session():
        with pytest.raises(
            hosts.Stopped, match="stopped by Ctrl-C after step 7 of 28; checkpoint: "
        ) as caught:
            problem.fit(folder=tmp_path, validate=interrupting([], at=1))
        assert caught.value.exit_code == hosts.EXIT_INTERRUPTED == 130
    with hosts.session():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(hosts.Stopped, match="stopped by SIGTERM between two batches") as caught:
            in_batches(lambda i: i, 8, 4)
        assert caught.value.exit_code == hosts.EXIT_STOPPED == 75
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_stops_at_once_and_what_it_breaks_off_is_not_saved(tmp_path):
    def validate(params):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt) as caught:
        problem.fit(folder=tmp_path, validate=validate)
    assert not caught.value.args and not list((tmp_path / "checkpoints").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_itself_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with hosts.session(), hosts.interruptible():
            signal.raise_signal(signal.SIGINT)
            assert seen == [1] and not hosts.stopping()
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C"), hosts.interruptible():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]


@pytest.mark.slow
def test_a_single_ctrl_c_at_any_moment_ends_cleanly_and_the_run_goes_on_to_the_same_end(tmp_path):
    """Into compiling, steps, validation and writing: JAX's compiler, broken off, ends the process
    with signal 11.
    """

    def start(*folders):
        script = Path(__file__).with_name("small_problem.py")
        return forked.start([script, "timer", *folders], os.environ)

    def finish(process):
        errors = process.communicate(timeout=900)[1]
        assert process.returncode == 0, errors
        return errors

    finish(start(tmp_path / "undisturbed"))
    expected = (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()
    chance, landed = random.Random(0), 0
    folders = [tmp_path / str(i) for i in range(8)]
    for i, folder in enumerate(folders):
        process = start(folder)
        timing = folder / "timing.jsonl"
        while process.poll() is None and not timing.exists():
            time.sleep(0.01)
        # the first second or so is the compiler's
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2 if i % 2 else chance.uniform(0, 6))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=900)[1]
        if process.returncode:
            assert process.returncode == -signal.SIGINT, (
                errors
            )  # as Python ends for an uncaught KeyboardInterrupt
            over = (folder / "metrics.jsonl").read_bytes() == expected
            if errors or not over:  # else it came while the interpreter was leaving
                landed += 1
                # After a step, or between two batches of a validation, which is made up for when
                # the run goes on.
                assert "KeyboardInterrupt: stopped by Ctrl-C" in errors
    assert landed > 3

    # One process goes on with them all: starting takes longer than what is left to do.
    finish(start(*folders))
    for folder in folders:
        assert (folder / "metrics.jsonl").read_bytes() == expected


def test_parts_of_a_checkpoint_are_read_without_the_rest(stopped):
    folder, _ = stopped
    whole, position = training.read_checkpoint(folder)
    assert position["step"] == 14 and whole.keys() == {"params", "optimizer", "best"}
    weights, _ = training.read_checkpoint(folder, "^params/")
    assert storage.digests(weights) == storage.digests({"params": whole["params"]})
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec()
    )
    like = jax.eval_shape(lambda: {"best": {"head": whole["best"]["head"]}})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    head, _ = training.read_checkpoint(folder, "^best/head/", like=like)
    assert storage.digests(head) == storage.digests({"best": {"head": whole["best"]["head"]}})
    assert head["best"]["head"]["kernel"].sharding == sharding
    steps = sorted(int(p.name[5:]) for p in (folder / "checkpoints").iterdir())
    assert training.read_checkpoint(folder, "count", step=steps[0])[1]["step"] == steps[0]
    with pytest.raises(
        FileNotFoundError, match=f"no checkpoint of step 3; steps there: {steps[0]}, "
    ):
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
    record["arrays"]["a"] = {
        "shape": [4, 6],
        "dtype": "float32",
        "parts": [
            {"at": at, "sha256": storage.digests({"x": half})["x"]["sha256"]} for at, half in halves
        ],
    }
    storage.write_record(tmp_path / "t" / storage.DIGESTS, record)
    assert storage.digests(storage.load_tree(tmp_path / "t")) == storage.digests(tree)
    record["arrays"]["a"]["parts"][1]["sha256"] = record["arrays"]["a"]["parts"][0]["sha256"]
    storage.write_record(tmp_path / "t" / storage.DIGESTS, record)
    with pytest.raises(storage.DamagedError, match="a: the values differ"):
        storage.load_tree(tmp_path / "t")


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_with_two_and_with_one_and_back(tmp_path):
    """100 steps, in parts and at once; restored 8 -> 2 -> 1, and 1 -> 8: the same batches, the same
    losses.
    """
    script = Path(__file__).with_name("elastic_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=2400
    )
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
