"""Experiments on two real processes: the numbers of one, SIGTERM, kills, and another mesh after
each.
"""

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import forked
import numpy as np
import pandas as pd
import pytest

from experiments import prune_then_finetune, sff
from ltsm_jax import hosts, storage

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LTSM_KILLS", "3"))  # ten take minutes
LABELS = ["data", "model", "method", "alpha", "seed", "horizon", "epochs", "windows", "best_epoch"]
SIZES = ["ratio", "ema", "channels_left", "parameters", "nonzero_parameters", "whole_parameters"]
SCORES = ["val_mse", "val_mae", "test_mse", "test_mae", "test_mape", "test_mase", "last_val_mse"]


def flags(waves, micro, out, epochs):
    return [
        "--data",
        str(waves),
        "--model",
        str(micro),
        "--methods",
        "sff",
        "--seeds",
        "0",
        "--epochs",
        str(epochs),
        "--batch-size",
        "64",
        "--lr",
        "1e-3",
        "--out",
        str(out),
    ]


class Launch:
    """The same command as two processes of so many devices each; `program`: what Python runs;
    `limit`: bytes of the largest file that the second may write.
    """

    def __init__(self, words, cache, devices=1, program=("-m", "experiments.sff"), limit=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={devices}",
            "LTSM_CACHE": str(cache),  # what the first launch compiles, the others need not
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        joined = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
        self.processes = [
            forked.start([*program, *words, *joined, str(i)], environment, limit=bytes_of_file)
            for i, bytes_of_file in enumerate((None, limit))
        ]

    def results(self):
        """(exit code, stdout, stderr) of both."""
        said = [process.communicate(timeout=900) for process in self.processes]
        return [(process.returncode, *text) for process, text in zip(self.processes, said)]

    def running(self):
        return all(process.poll() is None for process in self.processes)

    def kill(self, i):
        """One is killed; the other would wait for it until its heartbeat is missed, and is killed
        as well.
        """
        for process in (self.processes[i], self.processes[1 - i]):
            process.send_signal(signal.SIGKILL)
            process.communicate()


def checkpoints(out):
    return sorted(out.glob("cells/*/training/phase-0/checkpoints/step_*"))


def launches(out):
    files = list(out.glob("cells/*/training/phase-0/timing.jsonl"))
    return files[0].read_text().count("launch_at_step") if files else 0


def more_launches(out, before):
    return launches(out) > before


def wait_for(happened, launch):
    deadline = time.monotonic() + 900
    while not happened() and launch.running() and time.monotonic() < deadline:
        time.sleep(0.05)


def check_same(out, want):
    got, expected = (pd.read_csv(folder / "results.csv") for folder in (out, want))
    assert got[LABELS].equals(expected[LABELS])
    np.testing.assert_allclose(got[SCORES], expected[SCORES], rtol=1e-5)
    settings = [json.loads((folder / "run.json").read_text())["settings"] for folder in (out, want)]
    assert settings[0] == settings[1]


@pytest.fixture(scope="module")
def alone(waves, micro, tmp_path_factory):
    """The comparison on one process."""
    out = tmp_path_factory.mktemp("alone") / "alone"
    assert sff.main(flags(waves, micro, out, 5)) == 0
    return out


@pytest.fixture(scope="module")
def stopped(waves, micro, tmp_path_factory):
    """The same on two processes, stopped by SIGTERM to the second: its folder, and what
    both said.
    """
    folder = tmp_path_factory.mktemp("stopped")
    out = folder / "two"
    launch = Launch([*flags(waves, micro, out, 5), "--mesh", "fsdp=2"], folder / "cache")
    wait_for(lambda: checkpoints(out), launch)
    launch.processes[1].send_signal(signal.SIGTERM)
    return out, launch.results()


@pytest.fixture
def out(stopped, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(stopped[0], tmp_path / "two")


@pytest.mark.slow
def test_two_processes_stop_on_sigterm_go_on_with_eight_devices_and_give_the_numbers_of_one(
    waves, micro, alone, stopped, out, tmp_path
):
    for code, _, errors in stopped[1]:
        assert code == hosts.EXIT_STOPPED, errors
        assert "stopped by SIGTERM after step" in errors and "the same command goes on" in errors
    newest = checkpoints(out)[-1]
    stored = storage.read_record(newest / "state" / "digests.json")["arrays"]
    assert [part["at"] for part in stored["params/embed/kernel"]["parts"]] == [
        [[0, 8], [0, 4]],
        [[0, 8], [4, 8]],
    ]
    assert "sha256" in stored["optimizer/0/count"]

    launch = Launch(
        [*flags(waves, micro, out, 5), "--mesh", "data=4,fsdp=2"], tmp_path / "cache", devices=4
    )
    (code, said, errors), (other_code, other_said, other_errors) = launch.results()
    assert (code, other_code) == (0, 0), errors + other_errors
    assert f"going on from step {int(newest.name.removeprefix('step_'))} of" in errors
    assert "test MSE" in said and "test MSE" not in other_said
    check_same(out, alone)


@pytest.mark.slow
def test_two_processes_prune_and_fine_tune_stop_on_sigterm_and_go_on_to_the_numbers_of_one(
    waves, micro, tmp_path
):
    def words(out):
        return [
            "--data",
            str(waves),
            "--model",
            str(micro),
            "--methods",
            "ff",
            "--seeds",
            "0",
            "--epochs",
            "2",
            "--batch-size",
            "64",
            "--lr",
            "1e-3",
            "--ratios",
            "0.3,0.6",
            "--prune-batch-size",
            "4",
            "--macro-batch",
            "128",
            "--timed-runs",
            "3",
            "--out",
            str(out),
        ]

    # A channel of the queries and that of the keys matter equally, but for rounding, and so do one
    # of the values and of the output's input. No step of 128 windows ends between two such twins;
    # of 64 some do, and then rounding, which differs with compiler flags and processors, decides
    # which of the two stays a step longer.
    alone, out, program = (
        tmp_path / "alone",
        tmp_path / "two",
        ("-m", "experiments.prune_then_finetune"),
    )
    assert prune_then_finetune.main(words(alone)) == 0

    launch = Launch([*words(out), "--mesh", "fsdp=2"], tmp_path / "cache", program=program)
    wait_for(lambda: list(out.glob("masks/*/metrics.jsonl")), launch)
    time.sleep(2)  # into the batches, or what is compiled for them
    launch.processes[1].send_signal(signal.SIGTERM)
    for code, _, errors in launch.results():
        assert code == hosts.EXIT_STOPPED, errors
        assert "stopped by SIGTERM after batch" in errors and "the same command goes on" in errors
    assert len(list(out.glob("masks/*/checkpoints/step_*"))) == 1
    assert len(list(out.glob("cells/*/result.json"))) == 2, "the whole arms"

    launch = Launch(
        [*words(out), "--mesh", "data=4,fsdp=2"], tmp_path / "cache", devices=4, program=program
    )
    (code, said, errors), (other_code, other_said, other_errors) = launch.results()
    assert (code, other_code) == (0, 0), errors + other_errors
    assert (
        "test MSE" in said and "report:" in said and not {"MSE", "report"} & set(other_said.split())
    )
    check_same(out, alone)
    got, expected = (pd.read_csv(folder / "results.csv") for folder in (out, alone))
    assert got[SIZES].equals(expected[SIZES]) and (got.removal_gap.dropna() < 1e-5).all()
    assert (got.latency_ms.dropna() > 0).sum() == 2
    found, want = (json.loads((folder / "redundancy.json").read_text()) for folder in (out, alone))
    for kind in ("heads", "units"):
        for path, entry in want[kind].items():
            here = found[kind][path]
            assert here.pop("linear") == entry.pop("linear")
            chex.assert_trees_all_close(here, entry, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_either_of_two_processes_killed_at_random(waves, micro, tmp_path):
    alone, chance, landed, runs = tmp_path / "alone", random.Random(0), 0, 0
    assert sff.main(flags(waves, micro, alone, 12)) == 0
    while landed < KILLS:
        out = tmp_path / str(runs)
        runs += 1
        while landed < KILLS:
            launched = launches(out)
            launch = Launch([*flags(waves, micro, out, 12), "--mesh", "fsdp=2"], tmp_path / "cache")
            if chance.random() < 0.7:  # the others fall anywhere, into start and compilation, too
                wait_for(functools.partial(more_launches, out, launched), launch)
            moment = time.monotonic() + chance.uniform(0, 3)
            while launch.running() and time.monotonic() < moment:
                time.sleep(0.01)
            if not launch.running():
                break
            launch.kill(chance.randrange(2))
            landed += 1
        for code, _, errors in Launch(
            [*flags(waves, micro, out, 12), "--mesh", "fsdp=2"], tmp_path / "cache"
        ).results():
            assert code == 0, errors
        check_same(out, alone)


@pytest.mark.slow
def test_a_host_that_cannot_write_its_part_stops_all_and_nothing_is_lost(
    waves, micro, alone, out, tmp_path
):
    cache = tmp_path / "cache"
    words = [*flags(waves, micro, out, 5), "--mesh", "fsdp=2"]
    before = checkpoints(out)[-1]

    began = time.monotonic()
    for code, _, errors in Launch(words, cache, limit=1000).results():
        assert code == 2 and "could not write checkpoint" in errors and "File too large" in errors
        assert before.name in errors.rpartition("Whole before it: ")[2]
    assert time.monotonic() - began < 600  # inside Orbax the other would wait for 20 minutes
    assert checkpoints(out)[-1] == before

    assert [code for code, *_ in Launch(words, cache).results()] == [0, 0]
    check_same(out, alone)


@pytest.mark.slow
def test_what_one_host_cannot_do_all_give_up(waves, micro, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{")  # only the first host reads it
    for i, (code, _, errors) in enumerate(
        Launch(flags(waves, micro, out, 1), tmp_path / "cache").results()
    ):
        assert code == 2 and "run.json is damaged" in errors
        assert ("host 0: UsageError" in errors) == (i == 1)


@pytest.mark.slow
def test_each_of_two_processes_reads_its_share_of_what_it_is_pretrained_on(tmp_path):
    script = str(Path(__file__).with_name("spread_pretraining.py"))
    words = [
        "--preset",
        "small",
        "--generated",
        "24",
        "--length",
        "800",
        "--steps",
        "6",
        "--batch-size",
        "8",
    ]
    alone, out = tmp_path / "alone", tmp_path / "two"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, script, *words, "--out", str(alone)],
        check=True,
        timeout=900,
        env=environment,
    )
    launch = Launch(
        [*words, "--mesh", "data=2,fsdp=2", "--out", str(out)], tmp_path / "cache", 2, (script,)
    )
    for i, (code, said, errors) in enumerate(launch.results()):
        assert code == 0, errors
        assert f"parts {[2 * i, 2 * i + 1]} of 4: memmap Spread" in said
    one, two = (
        [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, out)
    )
    assert len(one) == 7 and "val_mse" in one[-1]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    configs = [
        json.loads((folder / "train" / "config.json").read_text()) for folder in (alone, out)
    ]
    assert configs[0] == configs[1]
    left = sorted(file.name for file in out.iterdir())
    assert left == [".lock", "model", "train"]  # the shared windows are gone


@pytest.mark.parametrize(
    "words, messages",
    [
        (["--coordinator", "10.0.0.1:12"], ["--num-processes, --process-id missing"]),
        (["--process-id", "0", "--num-processes", "2"], ["--coordinator missing"]),
        (["--coordinator", "auto", "--process-id", "0"], ["--process-id comes from the cluster"]),
        (
            ["--coordinator", "host", "--num-processes", "2", "--process-id", "2"],
            ["address:port", "counts from 0 to"],
        ),
        (["--coordinator", "auto"], ["no cluster that JAX knows was found"]),
        (
            ["--num-processes", "0", "--process-id", "x"],
            ["--num-processes must be at least 1", "not a whole number"],
        ),
    ],
)
def test_flags_of_hosts_that_do_not_go_together_are_refused(words, messages, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    assert sff.main(words) == 2
    said = capsys.readouterr().err
    assert [m for m in messages if m not in said] == []
