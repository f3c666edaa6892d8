"""Runs on disk: they go on with the same bits, and what is damaged or not theirs is refused by
name.
"""

import dataclasses
import errno
import functools
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
import jax.numpy as jnp
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import storage, training, trees
from ltsm_jax.training import memory

EACH_STEP = dataclasses.replace(problem.CONFIG, checkpoint_seconds=0, steps_per_dispatch=1)


def assert_same_run(a: Path, b: Path):
    """Same metrics, and one same checkpoint: parameters, optimiser state, best parameters."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    (last_a,), (last_b,) = ((f / "checkpoints").iterdir() for f in (a, b))
    assert last_a.name == last_b.name
    digests = [
        storage.read_record(last / "state" / "digests.json")["arrays"] for last in (last_a, last_b)
    ]
    assert digests[0] == digests[1]
    assert {path.split("/")[0] for path in digests[0]} == {"params", "optimizer", "best"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, problem.fit(folder=folder)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run that stopped in the middle of epoch 3, with two checkpoints."""
    folder = tmp_path / "run"

    class Stop(Exception):
        pass

    record = training.RunFolder.record

    def until(self, lines):
        lines = list(lines)
        if lines[0]["step"] == 18:
            raise Stop
        self.wait()  # every step gets its checkpoint, however slow the disk is
        record(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(training.RunFolder, "record", until)
        with pytest.raises(Stop):
            problem.fit(folder=folder, config=EACH_STEP)
    assert [p.name for p in checkpoints(folder)] == ["step_00000016", "step_00000017"]
    return folder


def checkpoints(folder):
    return sorted((folder / "checkpoints").iterdir())


def test_the_folder_holds_what_was_asked_and_measured(undisturbed):
    folder, result = undisturbed
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["lr"] == 3e-3
    assert config["windows"]["n"] == 322
    assert config["start"]["parameters"] == trees.count(problem.init())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 29))
    assert all(set(line) == {"step", "epoch", "loss", "lr"} for line in steps)
    assert [line for line in lines if "loss" not in line] == result.history
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert [line.get("epoch") for line in timing] == [None, 1, 2, 3, 4]


def test_a_stopped_run_ends_with_the_same_bits(undisturbed, stopped):
    result = problem.fit(
        folder=stopped
    )  # the time between checkpoints and the dispatch size may differ
    assert_same_run(undisturbed[0], stopped)
    chex.assert_trees_all_equal(result.params, undisturbed[1].params)
    assert result.history == undisturbed[1].history
    launches = [
        json.loads(s).get("launch_at_step")
        for s in (stopped / "timing.jsonl").read_text().splitlines()
    ]
    assert [at for at in launches if at is not None] == [0, 17]


def test_lines_past_the_checkpoint_are_cut_and_half_a_line_does_no_harm(undisturbed, stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "epoch": 3, "loss": 7.0, "lr": 0.1}\n{"step": 19, "ep')
    problem.fit(folder=stopped)
    assert_same_run(undisturbed[0], stopped)


def test_scraps_of_a_killed_writer_are_swept_away(undisturbed, stopped):
    for scrap in (".step_00000018.abc.tmp", ".step_00000015.old"):
        shutil.copytree(checkpoints(stopped)[-1], stopped / "checkpoints" / scrap)
    problem.fit(folder=stopped)
    assert_same_run(undisturbed[0], stopped)


def test_a_finished_run_is_read_and_not_computed(undisturbed):
    def refuse(*_):
        raise AssertionError("computed again")

    folder, result = undisturbed
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again = problem.fit(folder=folder, loss_fn=refuse, validate=refuse)
    chex.assert_trees_all_equal(again.params, result.params)
    chex.assert_trees_all_equal(again.last_params, result.last_params)
    assert (again.history, again.best_epoch, again.steps, again.seconds) == (
        result.history,
        result.best_epoch,
        result.steps,
        result.seconds,
    )
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_configuration_is_refused_field_by_field(undisturbed):
    folder, _ = undisturbed
    other = dataclasses.replace(problem.CONFIG, lr=1e-3, seed=5, checkpoint_seconds=7)
    with pytest.raises(ValueError, match="another configuration") as caught:
        problem.fit(folder=folder, config=other, facts={"loss": "point"})
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  facts: {} in the folder, absent asked for",
        "  facts.loss: absent in the folder, point asked for",
        "  train.lr: 0.003 in the folder, 0.001 asked for",
        "  train.seed: 0 in the folder, 5 asked for",
    ]
    with pytest.raises(ValueError, match=r"start\.params_sha256"):
        problem.fit(problem.init(2), folder=folder)
    with pytest.raises(ValueError, match=r"windows\.sha256"):
        problem.fit(source=problem.train_windows(problem.series() + 1), folder=folder)
    with pytest.raises(ValueError, match=r"start\.trainable"):
        problem.fit(trainable=trees.select(problem.init(), "head"), folder=folder)


def test_a_refused_run_makes_no_folder(tmp_path, monkeypatch):
    def wrong(*_):
        raise ValueError("these windows do not fit")

    folder, config = tmp_path / "outer" / "run", problem.CONFIG
    patient = dataclasses.replace(config, patience=1)
    for says, arguments in {
        "does not say lr": {"config": dataclasses.replace(config, lr=None)},
        "patience counts": {"config": patient, "validate": None},
        "does not divide": {"config": dataclasses.replace(config, accumulate=5)},
        "no training window": {"source": problem.train_windows().take(np.arange(0))},
        "nothing to train": {"trainable": jax.tree.map(lambda _: False, problem.init())},
        "these windows do not fit": {"loss_fn": wrong},
    }.items():
        with pytest.raises(ValueError, match=says):
            problem.fit(folder=folder, **arguments)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(ValueError, match="is available"):
        problem.fit(folder=folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_refused_stays_as_it_is(undisturbed, tmp_path):
    (tmp_path / "config.json").write_text('{"made": "by another program"}')
    with pytest.raises(ValueError, match="another configuration"):
        problem.fit(folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    before = {path: path.stat().st_mtime_ns for path in undisturbed[0].rglob("*")}
    with pytest.raises(ValueError, match="another configuration") as caught:
        problem.fit(folder=undisturbed[0], facts={f"fact {i}": "long" * 1000 for i in range(100)})
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed[0].rglob("*")}
    assert len(str(caught.value)) < 2000 and "and 91 more" in str(caught.value)


def test_a_config_that_is_gone_or_edited_is_named(stopped):
    file = stopped / "config.json"
    whole = file.read_text()
    file.unlink()
    with pytest.raises(
        storage.DamagedError, match=r"config\.json is missing, although .* has checkpoints"
    ):
        problem.fit(folder=stopped)
    # edited, and the same asked for: the checkpoints are of the run before it
    assert '"lr": 0.003' in whole
    file.write_text(whole.replace('"lr": 0.003', '"lr": 0.002'))
    with pytest.raises(
        storage.DamagedError, match=r"config\.json was edited: checkpoint step_00000017 is of a run"
    ):
        problem.fit(folder=stopped, config=dataclasses.replace(problem.CONFIG, lr=2e-3))
    file.write_text(whole)
    assert problem.fit(folder=stopped).steps == 28


def test_stamps_are_part_of_the_data(tmp_path):
    def stamped(first):
        stamps = np.datetime64(first, "h") + np.arange(300) * np.timedelta64(1, "h")
        return dataclasses.replace(
            problem.train_windows(), timestamps=stamps.astype("datetime64[ns]")
        )

    short = dataclasses.replace(problem.CONFIG, epochs=1)
    problem.fit(source=stamped("2024-01-01"), folder=tmp_path, config=short)
    problem.fit(source=stamped("2024-01-01"), folder=tmp_path, config=short)
    with pytest.raises(
        ValueError, match=r"windows\.stamps_sha256: \w+ in the folder, \w+ asked for"
    ):
        problem.fit(source=stamped("2024-01-02"), folder=tmp_path, config=short)
    with pytest.raises(
        ValueError, match=r"windows\.stamps_sha256: \w+ in the folder, absent asked for"
    ):
        problem.fit(folder=tmp_path, config=short)


@pytest.mark.slow
def test_a_write_that_fails_is_said_in_one_message(tmp_path):
    """A limit on the size of files stands for a full disk: tensorstore fails in its threads, as it
    does there.
    """
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import small_problem; "
        "small_problem.main('mlp', sys.argv[1])"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Event loop is closed" not in done.stderr and "_SignalingThread" not in done.stderr
    said = done.stderr.rstrip().splitlines()[-2:]
    assert "WriteError: could not write checkpoint" in said[0]
    assert said[1].endswith("then give the same command again to go on.")


def test_a_disk_without_room_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(
        training.WriteError,
        match=r"No space left on device: 0\.\d MB are to be written and 0\.0 MB",
    ):
        problem.fit(folder=tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path):
    first = training.RunFolder(tmp_path, {})
    with pytest.raises(ValueError, match="another process is running in"):
        training.RunFolder(tmp_path, {})
    first.restore({"a": jnp.zeros(1)})
    first.close()
    training.RunFolder(tmp_path, {}).close()


@pytest.mark.slow
def test_of_two_processes_with_one_folder_the_second_is_refused_and_loses_nothing_of_the_first(
    tmp_path, uninterrupted
):
    first = launch("mlp", tmp_path / "run")
    while first.poll() is None and not (tmp_path / "run" / "timing.jsonl").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it must not end before the second has begun
    second = launch("mlp", tmp_path / "run")
    errors = second.communicate()[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and "another process is running in" in errors
    finish(first)
    assert_same_run(uninterrupted("mlp"), tmp_path / "run")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "harm", [flip, *(pytest.param(h, marks=pytest.mark.slow) for h in (cut, Path.unlink))]
)
def test_damage_to_any_file_of_the_newest_checkpoint_is_refused_by_name(stopped, harm):
    newest = checkpoints(stopped)[-1]
    files = [p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
    assert {"digests.json", "position.json", "manifest.ocdbt"} <= {p.name for p in files}
    for file in files:
        whole = file.read_bytes()
        harm(file)
        with pytest.raises(storage.DamagedError) as caught:
            problem.fit(folder=stopped)
        text = str(caught.value)
        assert (
            f"checkpoint {newest} is damaged; delete that folder to go on from step_00000016"
            in text
        )
        assert file.name in text
        file.write_bytes(whole)


def test_another_dtype_and_another_value_are_refused_by_path(stopped):
    state = checkpoints(stopped)[-1] / "state"
    tree = storage.load_tree(state)
    tree["params"]["head"]["bias"] = tree["params"]["head"]["bias"].astype(jnp.float16)
    storage.save_tree(state, tree, overwrite=True)
    with pytest.raises(storage.DamagedError, match=r"params/head/bias: .*float32.*float16"):
        problem.fit(folder=stopped)

    state = checkpoints(stopped)[-2] / "state"
    shutil.rmtree(checkpoints(stopped)[-1])
    record = storage.read_record(state / "digests.json")
    record["arrays"]["optimizer/0/mu/head/bias"]["sha256"] = (
        "0" * 64
    )  # as if Orbax had given back another value
    storage.write_record(state / "digests.json", record)
    with pytest.raises(
        storage.DamagedError, match="optimizer/0/mu/head/bias: the values differ"
    ) as caught:
        problem.fit(folder=stopped)
    assert "delete that folder to start the run again" in str(caught.value)


def test_deleting_the_damaged_one_goes_on_from_the_one_before(undisturbed, stopped):
    newest = checkpoints(stopped)[-1]
    cut(newest / "position.json")
    with pytest.raises(storage.DamagedError, match=r"position\.json is cut"):
        problem.fit(folder=stopped)
    shutil.rmtree(newest)
    problem.fit(folder=stopped)
    assert_same_run(undisturbed[0], stopped)


def test_edited_metrics_and_config_are_refused(stopped):
    metrics = stopped / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text.replace('"step": 3,', '"step": 4,'))
    with pytest.raises(storage.DamagedError, match=r"metrics\.jsonl is damaged"):
        problem.fit(folder=stopped)
    metrics.write_text(text)
    cut(stopped / "config.json")
    with pytest.raises(storage.DamagedError, match=r"config\.json cannot be read"):
        problem.fit(folder=stopped)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(undisturbed, tmp_path, monkeypatch):
    seal, calls = storage.seal, []

    def full(folder):
        calls.append(folder)
        if len(calls) > 3:
            (folder / "half").mkdir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        seal(folder)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "seal", full)
        with pytest.raises(training.WriteError, match="No space left on device") as caught:
            problem.fit(folder=tmp_path, config=EACH_STEP)
    assert "give the same command again to go on" in str(caught.value)
    assert len(checkpoints(tmp_path)) == 2
    for whole in checkpoints(tmp_path):
        assert whole.name in str(caught.value)
    problem.fit(folder=tmp_path)
    assert_same_run(undisturbed[0], tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(training.WriteError, match="cannot write to"):
        problem.fit(folder=tmp_path / "file" / "run", loss_fn=None)


def test_a_checkpoint_right_after_lines_were_cut_off_knows_how_many_are_left(tmp_path):
    state, position = {"x": jnp.ones(3)}, {"step": 1, "finished": False}
    run = training.RunFolder(tmp_path, {})
    run.record([{"step": 1}])
    run.save(state, position)
    run.record([{"step": 2}])  # and killed before the next checkpoint
    run.close()
    for _ in range(2):
        run = training.RunFolder(tmp_path, {})
        assert run.restore(state)[1]["step"] == 1
        run.save(state, position)
        run.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def launch(name, folder):
    return forked.start([Path(__file__).with_name("small_problem.py"), name, folder], os.environ)


def finish(process):
    errors = process.communicate()[1]
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """`uninterrupted(name)`: the folder of a run in a process of its own."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("uninterrupted") / name
        finish(launch(name, folder))
        return folder

    return run


def kill_and_resume(name, folder, undisturbed, kills, seed):
    """Run to the end in fresh processes, `kills` of them killed at random moments, in as many
    folders as that takes.
    """
    chance, landed, runs = random.Random(seed), 0, 0
    while landed < kills:
        run = folder / str(runs)
        runs += 1
        while landed < kills:
            timing = run / "timing.jsonl"
            launches = timing.read_text().count("launch_at_step") if timing.exists() else 0
            process = launch(name, run)
            # half the kills fall anywhere, half after training has begun
            while chance.random() < 0.5 and process.poll() is None:
                if timing.exists() and timing.read_text().count("launch_at_step") > launches:
                    break
                time.sleep(0.01)
            try:
                process.wait(chance.uniform(0, 3))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                landed += 1
            else:
                finish(process)
                break
        else:
            finish(launch(name, run))
        assert_same_run(undisturbed, run)


@pytest.mark.slow
@pytest.mark.parametrize("name, kills", [("mlp", 20), ("timer", 12)])
def test_a_run_killed_many_times_ends_with_the_same_bits(tmp_path, uninterrupted, name, kills):
    kill_and_resume(name, tmp_path, uninterrupted(name), kills=kills, seed=1)
