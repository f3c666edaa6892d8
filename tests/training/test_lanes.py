"""Runs as lanes of one program: each ends as its separate run would."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_problem as problem

from ltsm_jax import storage, training, trees
from ltsm_jax.training import lanes, memory

ALPHAS, SEEDS, RATES = (1.0, 0.7, 0.0), (0, 1), (3e-3, 0.03)
SOURCE = problem.train_windows()


@jax.jit
def _size(params):
    return sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(params))


def validate(params):
    """So that some runs are at their best early, and stop."""
    return {"mse": problem.validate(params)["mse"] + 0.03 * float(_size(params))}


def jobs_of(folder=None, alphas=ALPHAS, seeds=SEEDS, rates=RATES, **changes):
    """Starts x seeds x learning rates: fits of the small problem, with dropout and early stop."""
    found = []
    for alpha in alphas:
        start = trees.interpolate(problem.init(1), problem.init(2), alpha)
        for seed in seeds:
            for lr in rates:
                name = f"{alpha}-{seed}-{lr}"
                config = dataclasses.replace(
                    problem.CONFIG, seed=seed, lr=lr, patience=1, schedule="constant", **changes
                )
                job = {
                    "loss_fn": problem.loss,
                    "params": start,
                    "train_source": SOURCE,
                    "config": config,
                }
                job |= {"validate": validate, "label": name, "show_progress": False}
                found.append(job | {"folder": folder and folder / name})
    return found


@pytest.fixture(scope="module")
def separate():
    """The runs one after the other."""
    return lanes.fit_jobs(jobs_of(), lanes="off")


@pytest.fixture
def way(monkeypatch):
    """Choose without timing."""

    def way(way, most=99):
        monkeypatch.setattr(
            lanes, "plan_lanes", lambda *args, **kwargs: lanes.LanePlan(way, most, way)
        )

    return way


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.history == b.history
        assert (a.best_epoch, a.steps) == (b.best_epoch, b.steps)
        chex.assert_trees_all_equal((a.params, a.last_params), (b.params, b.last_params))


def assert_close(found, wanted):
    def near(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)

    for a, b in zip(found, wanted, strict=True):
        assert (a.best_epoch, a.steps) == (b.best_epoch, b.steps)
        for mine, other in zip(a.history, b.history, strict=True):
            assert mine == pytest.approx(other, rel=1e-5)
        jax.tree.map(near, (a.params, a.last_params), (b.params, b.last_params))


# --------------------------------------------------------------------------------------------------
# the same results


def test_mapped_lanes_are_their_separate_runs_bit_for_bit(separate, way):
    way("mapped")
    assert {run.steps for run in separate} == {14, 28}, "some stop early"
    assert_same(lanes.fit_jobs(jobs_of()), separate)


def test_batched_lanes_are_their_separate_runs_but_for_rounding(separate, way):
    way("batched", most=8)  # in two programs of six
    assert_close(lanes.fit_jobs(jobs_of()), separate)


def test_lanes_of_one_seed_share_the_order_and_the_dropout(separate, way):
    way("batched")
    few = [0, 1, 4, 5]
    assert_close(lanes.fit_jobs([jobs_of()[i] for i in few]), [separate[i] for i in few])
    sweep = lanes.Sweep(jobs_of(seeds=(0,)), lanes.Over("batched"))
    sweep.begin_epoch(0)
    assert sweep.turn.which == (False, False, True), (
        "key and order are held once, rates are a lane's own"
    )


def test_penalties_and_frozen_leaves_of_a_lane_are_its_own(way):
    way("mapped")
    jobs = []
    for weight, start in ((0.1, 1), (1.0, 2)):
        params = problem.init(start)
        chosen = trees.select(params, "head")
        penalty = jax.tree_util.Partial(_pull, params, weight)
        job = jobs_of(alphas=(1.0,), seeds=(0,), rates=(3e-3,))[0]
        jobs.append(job | {"params": params, "trainable": chosen, "penalty": penalty})
    assert lanes.signature(jobs[0]) == lanes.signature(jobs[1])
    found = lanes.fit_jobs(jobs)
    assert_same(found, lanes.fit_jobs(jobs, lanes="off"))
    np.testing.assert_array_equal(
        found[1].params["body"]["kernel"], problem.init(2)["body"]["kernel"]
    )


def _pull(start, weight, params):
    gaps = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, start)
    return weight * sum(jax.tree.leaves(gaps))


@pytest.mark.parametrize("mode", [pytest.param("mapped", marks=pytest.mark.slow), "batched"])
def test_a_lane_that_is_not_finite_ends_alone(separate, way, mode):
    way(mode)
    jobs = jobs_of(rates=(3e-3,))
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.inf), jobs[2]["params"])
    jobs[2] = jobs[2] | {"params": broken}
    found = lanes.fit_jobs(jobs)
    assert isinstance(found[2], training.NonFiniteError)
    assert str(found[2]).startswith("loss nan at step 1 (epoch 1, batch 1 of 7)\n")
    with pytest.raises(training.NonFiniteError) as caught:
        training.fit(**jobs[2])
    assert str(caught.value) == str(found[2])
    compare = assert_same if mode == "mapped" else assert_close
    others = [i for i in range(len(jobs)) if i != 2]
    compare([found[i] for i in others], [separate[2 * i] for i in others])


@pytest.fixture(scope="module")
def on_devices():
    """What lanes over eight devices give, by mode, as `laned_runs.py` prints it."""
    script = Path(__file__).with_name("laned_runs.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mapped", "batched"])
def test_lanes_over_devices_are_separate_runs(on_devices, mode):
    found, alone = on_devices[mode], on_devices["separate"]
    assert found["devices"] == 8 and found["compiled"] == 1
    assert found["best_epochs"] == alone["best_epochs"] and found["steps"] == alone["steps"]
    np.testing.assert_allclose(found["val"], alone["val"], rtol=2e-5)
    np.testing.assert_allclose(found["sizes"], alone["sizes"], rtol=2e-5)
    # stopped, and gone on with on one device
    np.testing.assert_allclose(found["resumed"], found["val"], rtol=0 if mode == "mapped" else 2e-5)


# --------------------------------------------------------------------------------------------------
# what may be a lane, and which way is taken


def test_runs_that_differ_in_more_than_numbers_are_no_lanes_of_one_program():
    job = jobs_of()[0]
    own = lanes.signature(job)
    config = job["config"]
    for changes in (
        {"lr": 1.0},
        {"seed": 5},
        {"schedule": "cosine"},
        {"patience": None},
        {"warmup": 0.1},
    ):
        assert lanes.signature(job | {"config": dataclasses.replace(config, **changes)}) == own
    for changes in (
        {"epochs": 9},
        {"batch_size": 5},
        {"clip": 1.0},
        {"rho": 0.1},
        {"weight_decay": 0.1},
    ):
        other = lanes.signature(job | {"config": dataclasses.replace(config, **changes)})
        assert other is not None and other != own
    assert lanes.signature(job | {"loss_fn": problem.dry_loss}) != own
    assert lanes.signature(job | {"trainable": trees.select(job["params"], "head")}) != own
    assert lanes.signature(job | {"train_source": SOURCE.take(np.arange(50))}) != own
    # what lanes know nothing of
    assert lanes.signature(job | {"config": dataclasses.replace(config, ema=0.9)}) is None
    assert lanes.signature(job | {"callback": print}) is None


def test_every_field_of_a_config_is_known_to_lanes_or_keeps_runs_apart():
    names = {field.name for field in dataclasses.fields(training.TrainConfig)}
    assert names - {*lanes.ALIKE, *lanes.DIFFERING} == {"ema", "swa"}


class Clockwork:
    """Stands for steps of one way; each takes so long."""

    def __init__(self, seconds, lanes, compiled, total):
        self.seconds, self.lanes, self.compile_seconds, self.work = seconds, lanes, compiled, self
        self.total = total

    def again(self, seconds):
        self.asked = seconds


@pytest.mark.parametrize(
    "seconds, compiled, wanted, says",
    [
        (
            {"batched": 0.004},
            1.0,
            "batched",
            "6 lanes, batched: 0.40x the time of one after the other",
        ),
        ({"mapped": 0.009, "batched": 0.0085}, 1.0, "mapped", "6 lanes, mapped: 0.90x"),
        ({"mapped": 0.009, "batched": 0.014}, 1.0, "mapped", "6 lanes, mapped: 0.90x"),
        (
            {"mapped": 0.010, "batched": 0.011},
            1.0,
            "separate",
            "would take batched 1.10x, mapped 1.00x the time",
        ),
        ({"mapped": 0.001, "batched": 0.001}, 9.0, "separate", "too short to find out"),
        ({}, 1.0, "separate", "a step of one keeps the processor busy for 0.10 s"),
    ],
)
def test_the_quickest_way_is_taken_and_said(monkeypatch, seconds, compiled, wanted, says):
    """What a way is not timed for is not built: its time is missing here."""
    made = []

    def timed(work, lanes):
        mode = getattr(getattr(work, "over", None), "mode", None)
        made.append(
            Clockwork(
                seconds[mode] if mode else (0.010 if seconds else 0.10),
                lanes,
                compiled,
                total=10_000,
            )
        )
        return made[-1]

    assert (
        "too short" in lanes.plan_lanes(jobs_of(rates=(3e-3,))).why
    )  # a few steps: nothing is timed
    monkeypatch.setattr(lanes, "FEWEST_STEPS", 0)
    monkeypatch.setattr(lanes, "_Timed", timed)
    choice = lanes.plan_lanes(jobs_of(rates=(3e-3,)))
    assert choice.way == wanted and says in choice.why
    # All timed dispatches together take less than a hundredth of the runs.
    timings = [each.asked for each in made if hasattr(each, "asked")]
    assert lanes.ROUNDS * sum(timings) <= 0.01 * 6 * 10_000 * 0.010


def test_lanes_are_timed_for_real_and_asked_for(capsys):
    timed = lanes._Timed(lanes._separate(jobs_of()[0]), 1)
    assert timed.compile_seconds >= 0 and 0 < timed.seconds < 1
    assert lanes.plan_lanes(jobs_of(), "on").way == "mapped"
    with pytest.raises(ValueError, match="lanes must be one of auto, on, off; got 'yes'"):
        lanes.fit_jobs(jobs_of(), lanes="yes")


def test_memory_limits_the_lanes_of_one_program(monkeypatch):
    jobs = jobs_of()
    monkeypatch.setattr(memory, "available", lambda: 300_000)
    some = lanes.plan_lanes(jobs, "on")
    assert 2 <= some.most < len(jobs)
    assert lanes._room(jobs, lanes.Over("batched"), False) < lanes._room(
        jobs, lanes.Over("mapped"), False
    )
    monkeypatch.setattr(memory, "available", lambda: 40_000)
    assert lanes.plan_lanes(jobs).way == "separate"


# --------------------------------------------------------------------------------------------------
# on disk


FEW = {"alphas": (0.7,), "rates": (3e-3, 0.03), "seeds": (0,), "epochs": 2}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in between may catch it."""


def contents(folder):
    """Metrics and arrays of every run folder."""
    found = {}
    for run in sorted(path for path in folder.iterdir() if path.name[0].isdigit()):
        (last,) = (run / "checkpoints").iterdir()
        digests = storage.read_record(last / "state" / "digests.json")["arrays"]
        config = json.loads((run / "config.json").read_text())
        found[run.name] = (config, (run / "metrics.jsonl").read_text(), last.name, digests)
    return found


@pytest.fixture(scope="module")
def alone_on_disk(tmp_path_factory):
    """Run folders of separate runs."""
    folder = tmp_path_factory.mktemp("alone")
    lanes.fit_jobs(jobs_of(folder, **FEW), lanes="off")
    return contents(folder)


def test_each_lane_leaves_the_run_folder_of_its_separate_run(alone_on_disk, way, tmp_path):
    way("mapped")
    found = lanes.fit_jobs(jobs_of(tmp_path, **FEW), folder=tmp_path / "sweep")
    assert contents(tmp_path) == alone_on_disk
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["choice.json"]
    way("never chosen again")
    assert_same(lanes.fit_jobs(jobs_of(tmp_path, **FEW), folder=tmp_path / "sweep"), found)


@pytest.mark.parametrize(
    "where",
    [
        "in the middle of an epoch",
        pytest.param("between two lanes handed out", marks=pytest.mark.slow),
    ],
)
def test_a_killed_sweep_goes_on_to_the_same_bits(alone_on_disk, way, tmp_path, monkeypatch, where):
    way("mapped")
    each_step = {"checkpoint_seconds": 0, "steps_per_dispatch": 1}
    record, handed, ran = training.RunFolder.record, lanes.Sweep.hand_out, lanes.Sweep.advance
    with monkeypatch.context() as patch:
        if where == "in the middle of an epoch":

            def dies(self, lines):
                lines = list(lines)
                if lines[0]["step"] == 10:
                    raise Killed
                self.wait()
                record(self, lines)

            patch.setattr(training.RunFolder, "record", dies)
        else:

            def dies(self, lane, lines):
                if lane == 1:
                    raise Killed
                handed(self, lane, lines)

            patch.setattr(lanes.Sweep, "hand_out", dies)
        with pytest.raises(Killed):
            lanes.fit_jobs(jobs_of(tmp_path, **FEW, **each_step), folder=tmp_path / "sweep")
    taken = []

    def counted(self, place, count):
        taken.append(count)
        return ran(self, place, count)

    monkeypatch.setattr(lanes.Sweep, "advance", counted)
    way("never chosen again")
    lanes.fit_jobs(jobs_of(tmp_path, **FEW, **each_step), folder=tmp_path / "sweep")
    assert sum(taken) == (5 if where == "in the middle of an epoch" else 0)
    assert contents(tmp_path) == alone_on_disk
