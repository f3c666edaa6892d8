"""The runner of the benchmarks: rows, tables, refusals. Nothing is timed here."""

import json
import subprocess
import sys

import pytest

from experiments.benchmarks import __main__ as runner
from experiments.benchmarks import peers, rows
from experiments.benchmarks.rows import Benchmark, Measured

asked = []


def measure(python):
    asked.append(python)
    yield Measured("ours", 2.0, "s")
    yield Measured("ours / theirs", 0.5, "ratio")


@pytest.fixture
def run(monkeypatch):
    """Run the runner over one benchmark that costs nothing, on a machine that is idle."""
    asked.clear()
    monkeypatch.setattr(
        runner, "BENCHMARKS", {"epoch": Benchmark("epoch", "nothing", measure, peer="torch")}
    )
    monkeypatch.setattr(rows, "busy", lambda: 0.1)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, argv)])
        return runner.main()

    return call


def test_a_row_says_what_where_and_when(run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert run("--out", out) == 0
    first, second = rows.read(out)
    assert (first["benchmark"], first["what"], first["value"], first["unit"]) == (
        "epoch",
        "ours",
        2.0,
        "s",
    )
    assert {
        "date",
        "device",
        "processor",
        "cores",
        "busy",
        "python",
        "versions",
        "commit",
    } <= first.keys()
    assert not first["loaded"] and asked == [None]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [first, second]


def test_a_busy_machine_is_refused_or_its_rows_marked(run, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "busy", lambda: 0.31)
    with pytest.raises(ValueError, match="other programs use 31% of this machine.*--anyway"):
        run()
    assert asked == []
    out = tmp_path / "rows.jsonl"
    run("--anyway", "--out", out)
    assert [row["loaded"] for row in rows.read(out)] == [True, True]
    assert "beside other programs" in rows.table(rows.read(out))


def test_the_table_gives_medians_and_keeps_machines_apart(run, tmp_path, capsys):
    known = {
        "date": "2026-01-02T03:04:05+00:00",
        "processor": "A",
        "cores": 2,
        "commit": "abc",
        "versions": {"jax": "1"},
    }
    one = {"benchmark": "epoch", "what": "ours", "unit": "s", **known}
    found = [one | {"value": value} for value in (1.0, 5.0, 2.0)] + [
        one | {"value": 9.0, "processor": "B"}
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, found)))
    run("--table", file)
    said = capsys.readouterr().out
    assert "**epoch**: 2026-01-02, A, 2 cores, jax 1, commit abc" in said
    assert "| ours | 2 | s | 3 |" in said and "| ours | 9 | s | 1 |" in said
    assert asked == []


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"benchmark": "epoch", "what": "x", "value": 1, "unit": "s"}\n{"what": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no measurement"):
        rows.read(file)


def test_the_environment_of_a_peer_is_made_once(run, monkeypatch, tmp_path):
    called = []

    def made(command, **_):
        called.append(command)
        (tmp_path / "torch" / "bin").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", made)
    monkeypatch.setattr(rows, "commit", lambda: "abc")
    run("--peers", tmp_path)
    run("--peers", tmp_path)
    assert asked == [str(tmp_path / "torch" / "bin" / "python")] * 2
    assert len(called) == 2 and "torch==2.13.0" in called[1]


def test_an_environment_that_cannot_be_made_is_said(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="for chronos cannot be made: no network"):
        peers.python_of("chronos", tmp_path)


def test_every_benchmark_says_its_name_and_cost(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--list"])
    assert runner.main() == 0
    said = capsys.readouterr().out
    for name in (
        "train_step",
        "epoch",
        "loop",
        "first_forecast",
        "families",
        "landscape",
        "chronos_bolt",
        "newest",
    ):
        assert f"\n{name} " in f"\n{said}"


def test_the_share_of_busy_cores_is_a_share(monkeypatch):
    monkeypatch.setattr(rows, "LOOK_SECONDS", 0.05)
    assert 0 <= rows.busy() <= 1.001
    ticks = iter(([0, 0, 0, 0, 0], [30, 0, 0, 65, 5]))
    monkeypatch.setattr(rows, "_ticks", lambda: next(ticks))
    assert rows.busy() == pytest.approx(0.3)
