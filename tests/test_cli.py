"""The command `ltsm`: results on stdout, all else on stderr, exit codes, help that fits
a terminal.
"""

import dataclasses
import inspect
import json
import re
import shlex

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from ltsm_jax import cli, doctor, flags, hosts, hub, storage, trees
from ltsm_jax.cli import main, printing
from ltsm_jax.cli.models import PARAMETERS, count_presets
from ltsm_jax.forecaster import Forecaster
from ltsm_jax.methods import pruning, verdict
from ltsm_jax.models import FAMILIES, folders


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty cache, a terminal of 80 columns, and no setting of the machine's."""
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("LTSM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(capsys):
    """Run a command line: (exit code, stdout, stderr)."""

    def run(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def timer(tmp_path_factory):
    """The folder of a Timer of a few thousand parameters."""
    model = FAMILIES["timer"](FAMILIES["timer"].small())
    folder = tmp_path_factory.mktemp("cli") / "timer"
    return ltsm_jax.save(
        folder, model, model.init(jax.random.key(0)), provenance={"licence": "MIT"}
    )


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """A folder with sales.csv, of three shops of different lengths, and prices.csv, of ten days
    ahead.
    """
    folder = tmp_path_factory.mktemp("shops")
    rng = np.random.default_rng(0)
    rows, ahead = [], []
    for number, length in enumerate((150, 120, 90)):
        days = pd.date_range("2024-01-01", periods=length + 10, freq="D")
        price = 10 + np.sin(np.arange(length + 10) / 5)
        sold = (
            50
            + 5 * number
            + 10 * np.sin(2 * np.pi * np.arange(length) / 7)
            + rng.normal(size=length)
        )
        own = pd.DataFrame(
            {"shop": f"s{number}", "date": days, "price": price.round(2), "size": "SML"[number]}
        )
        rows.append(own[:length].assign(sold=sold.round(2)))
        ahead.append(own[length:].drop(columns="size"))
    pd.concat(rows).to_csv(folder / "sales.csv", index=False)
    pd.concat(ahead).to_csv(folder / "prices.csv", index=False)
    return folder


def fits(text):
    return all(len(line) <= printing.WIDTH for line in text.splitlines())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command, capsys):
    """It fits a terminal, and says an example that is read, and what the command costs."""
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert fits(said.partition("\n")[2]), "beside the line of usage, which a terminal wraps"
    assert f"Example:  ltsm {command}" in said and "Cost:  " in said


def examples():
    """Every command line that a help text shows."""
    texts = [cli.__doc__, *(command.__doc__ for command in cli.COMMANDS.values())]
    found = []
    for text in texts:
        joined = re.sub(r"\\\n\s*", "", text)
        found += re.findall(r"^ *(?:Example:  )?ltsm ([a-z].*)$", joined, re.MULTILINE)
    return found


def test_the_examples_are_read():
    shown = [shlex.split(line) for line in examples()]
    assert {words[0] for words in shown} == cli.COMMANDS.keys()
    for words in shown:
        flags.parse(cli.COMMANDS[words[0]], words[1:], None)


def test_help_of_all(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    for command in cli.COMMANDS:
        assert f"• {command}" in said
    for told in ("Exit codes: 0 done", "--tyro-write-completion"):
        assert told in said
    with pytest.raises(SystemExit):
        main([])
    assert "usage: ltsm" in capsys.readouterr().out


def test_completion(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--tyro-print-completion", "bash"])
    said = capsys.readouterr().out
    assert not left.value.code
    for word in (*cli.COMMANDS, "--accept-license", "--overwrite"):
        assert word in said


def test_usage_errors(ran, capsys):
    code, out, err = ran("modles")
    assert (code, out) == (2, "") and "did you mean models?" in err
    code, out, err = ran("doctor", "--famlies", "timer", "--jsno")
    assert (code, out) == (2, "")
    assert "unknown argument '--famlies' (did you mean --families?)" in err
    assert "unknown argument '--jsno' (did you mean --json?)" in err
    code, out, err = ran("doctor", "--families", "timre")
    assert (code, out) == (2, "") and "did you mean timer?" in err
    with pytest.raises(SystemExit) as left:
        main(["convert"])
    assert left.value.code == 2
    capsys.readouterr()
    code, _, err = ran("models", "timer-tyni")
    assert code == 2 and "did you mean timer-tiny?" in err
    code, _, err = ran("--json")
    assert code == 2 and "unknown '--json'; known: " in err
    assert ran("--version") == (0, f"ltsm {ltsm_jax.__version__}\n", "")


def test_unexpected_errors_are_one_line_unless_asked(ran, monkeypatch):
    def fails(*_):
        raise RuntimeError("the floor\nis lava")

    monkeypatch.setattr("ltsm_jax.cli.models.list_presets", fails)
    code, out, err = ran("models")
    assert (code, out) == (1, "")
    assert err == "error: RuntimeError: the floor is lava; --traceback shows where\n"
    code, _, err = ran("models", "--traceback")
    assert (
        code == 1 and "in fails" in err and err.endswith("error: RuntimeError: the floor is lava\n")
    )
    monkeypatch.setenv("LTSM_DEBUG", "1")
    assert "in fails" in ran("models")[2]


def test_models(ran):
    code, out, err = ran("models")
    assert (code, err) == (0, "") and fits(out)
    for family, cls in FAMILIES.items():
        assert re.search(rf"^{family}: ", out, re.MULTILINE)
        for name in cls.presets():
            assert re.search(rf"^  {re.escape(name)}( \*)?  ", out, re.MULTILINE), "no name is cut"
    line = next(line for line in out.splitlines() if "chronos-bolt-tiny" in line)
    assert line.split() == ["amazon/chronos-bolt-tiny", "8.65", "M", "2048", "64"]
    assert "CC-BY-NC-4.0, non-commercial" in out

    code, out, _ = ran("models", "--json")
    listed = json.loads(out)["models"]
    (tiny,) = [entry for entry in listed if entry["name"] == "timer-tiny"]
    assert tiny == {
        "name": "timer-tiny",
        "family": "timer",
        "licence": "Apache-2.0 (thuml/Large-Time-Series-Model)",
        "tasks": ["forecasting", "imputation", "anomaly"],
        "context": 672,
        "horizon": 96,
        "parameters": 554848,
    }


def test_the_listed_sizes_are_those_of_the_presets():
    sizes = json.loads(PARAMETERS.read_text())
    presets = {
        name: (cls, config) for cls in FAMILIES.values() for name, config in cls.presets().items()
    }
    assert sizes.keys() == presets.keys()
    for name in ("timer-tiny", "ibm-granite/granite-timeseries-ttm-r2", "amazon/chronos-t5-tiny"):
        cls, config = presets[name]
        assert sizes[name] == trees.count(folders.param_shapes(cls(config)))


@pytest.mark.slow
def test_all_the_listed_sizes():
    found = count_presets()
    assert all(found.values()) and json.loads(PARAMETERS.read_text()) == found


def test_one_model(ran, timer):
    code, out, _ = ran("models", timer)
    assert code == 0 and fits(out)
    assert re.search(r"^licence +MIT$", out, re.MULTILINE) and "parameters  4,216" in out
    found = json.loads(ran("models", timer, "--json")[1])
    assert (found["family"], found["parameters"], found["context"]) == ("timer", 4216, 32)
    found = json.loads(ran("models", "Salesforce/moirai-2.0-R-small", "--json")[1])
    assert found["parameters"] == 11387208 and "not on this machine" in found["weights"]


def test_a_capsule(ran, timer, tmp_path):
    words = ("export", timer, tmp_path / "x.capsule", "--capsule")
    code, out, err = ran(*words)
    assert (code, out) == (2, "") and "--capsule needs --horizon" in err
    code, _, err = ran("export", timer, tmp_path / "x.ckpt", "--int8", "--horizon", 3)
    assert code == 2 and "--horizon is of a capsule" in err and "--int8 is of a capsule" in err
    words = (*words, "--horizon", 3, "--levels", "none", "--int8")
    code, out, _ = ran(*words, "--json")
    found = json.loads(out)
    assert code == 0 and found["bytes"] == (tmp_path / "x.capsule").stat().st_size
    assert 0 <= found["mean_drift"] <= found["largest_drift"]
    code, out, err = ran(*words)
    assert (code, out) == (2, "") and "is there already" in err
    code, out, err = ran(*words, "--overwrite")
    assert code == 0 and "8-bit weights move forecasts" in out + err


def test_export_and_convert_are_there_and_back(ran, timer, tmp_path):
    code, out, _ = ran("export", timer, tmp_path / "timer.ckpt")
    assert code == 0 and str(tmp_path / "timer.ckpt") in out
    code, out, _ = ran("convert", tmp_path / "timer.ckpt", tmp_path / "back", "--json")
    found = json.loads(out)
    assert code == 0 and (found["family"], found["parameters"]) == ("timer", 4216)
    before, after = (ltsm_jax.load(folder)[1] for folder in (timer, tmp_path / "back"))
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("not the same"), before, after)

    code, out, err = ran("export", timer, tmp_path / "timer.ckpt")
    assert (code, out) == (2, "") and "is there already" in err
    assert ran("export", timer, tmp_path / "timer.ckpt", "--overwrite")[0] == 0
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "timer.ckpt").read_bytes()[:999])
    code, out, err = ran("convert", tmp_path / "cut.ckpt", tmp_path / "new")
    assert (code, out) == (3, "") and "cut.ckpt" in err
    assert not (tmp_path / "new").exists()


def test_doctor(ran, monkeypatch):
    monkeypatch.setenv("LTSM_CACHE", "cache")  # a path that is longer than a line cannot be wrapped
    monkeypatch.setattr(doctor, "fixed_forecast", lambda family: doctor.answers()[family])
    code, out, _ = ran("doctor")
    assert code == 0 and fits(out)
    for told in ("jax ", "devices", "compiled", "no faults", *FAMILIES):
        assert told in out
    found = json.loads(ran("doctor", "--families", "timer,ttm", "--json")[1])
    assert [check["family"] for check in found["checks"]] == ["timer", "ttm"] and found[
        "faults"
    ] == 0

    monkeypatch.setattr(
        doctor, "fixed_forecast", lambda family: {"point": doctor.answers()["timer"]["point"] + 1}
    )
    code, out, _ = ran("doctor", "--families", "timer")
    assert code == 1 and fits(out)
    assert "FAULT" in out and "reinstall" in out and "1 fault," in out
    code, out, _ = ran("doctor", "--families", "timer", "--json")
    assert code == 1 and json.loads(out)["faults"] == 1


LONG = ("--horizon", 8, "--id", "shop", "--target", "sold")


def test_forecast(ran, timer, shops, tmp_path):
    out = tmp_path / "forecast.csv"
    words = (
        "--model",
        timer,
        *LONG,
        "--future",
        shops / "prices.csv",
        "--levels",
        "0.1,0.9",
        "--out",
        out,
    )
    code, said, plan = ran(
        "forecast", shops / "sales.csv", *words, "--plot", tmp_path / "forecast.png"
    )
    assert code == 0 and said.startswith(f"{out}: 24 rows of 3 items, ")
    assert fits(plan)
    for told in (
        "data      sales: 3 items of 90 to 150 rows, 360 in all",
        "columns   id shop; time date; target sold; known ahead price; static size",
        "step      D; what is forecast begins at 2024-03-31 00:00 to 2024-05-30 00:00",
        "timer, 4,216 parameters, licence MIT",
        "forecast  8 steps from 32 rows at most; levels 0.1,0.9",
        "timer does not use covariates: price, size",
        "split-conformal",
    ):
        assert told in " ".join(plan.split()) or told in plan

    found = pd.read_csv(out)
    assert list(found.columns) == ["shop", "date", "predictions", "0.1", "0.9"]
    assert list(found["shop"]) == ["s0"] * 8 + ["s1"] * 8 + ["s2"] * 8
    assert list(found["date"][[0, 7, 23]]) == ["2024-05-30", "2024-06-06", "2024-04-07"]
    assert (found["0.1"] <= found["0.9"]).all() and np.isfinite(found["predictions"]).all()
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")


def test_a_forecast_on_stdout(ran, timer, shops):
    words = ("forecast", shops / "sales.csv", "--model", timer, *LONG, "--levels", "0.5")
    code, out, _ = ran(*words)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "shop,date,predictions,0.5" and len(lines) == 25
    found = json.loads(ran(*words, "--json")[1])
    assert (found["items"], found["rows"], found["out"]) == (3, 24, None)
    assert found["columns"] == lines[0].split(",")
    row = found["forecast"][0]
    assert row["shop"] == "s0" and row["date"].startswith("2024-05-30")
    assert float(lines[1].split(",")[2]) == row["predictions"]
    assert any("split-conformal" in note for note in found["notes"])


def test_a_plan_does_nothing(ran, timer, shops, tmp_path, monkeypatch):
    monkeypatch.setattr("ltsm_jax.forecaster.Forecaster.predict", None)
    words = (
        "forecast",
        shops / "sales.csv",
        "--model",
        timer,
        *LONG,
        "--out",
        tmp_path / "no.csv",
        "--plan",
    )
    code, out, err = ran(*words)
    assert (code, out) == (0, "") and "data      sales: 3 items" in err
    code, out, err = ran(*words, "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)["plan"]
    assert plan["columns"] == "id shop; time date; target sold; past price; static size"
    assert re.fullmatch(r"about \d+ s(, \d+ s of it to compile)?", plan["time"])
    assert not (tmp_path / "no.csv").exists()
    code, _, err = ran(
        "prune", shops / "sales.csv", "--model", timer, *LONG, "--out", tmp_path / "no", "--plan"
    )
    assert (
        code == 0 and "windows" in err and "to validate; 32 -> 8" in err and "time     about" in err
    )
    assert not (tmp_path / "no").exists()


def test_what_is_wrong_with_the_data_is_exit_code_3(ran, timer, shops, tmp_path):
    words = ("--model", timer, "--horizon", 8)
    code, out, err = ran("forecast", tmp_path / "no.csv", *words)
    assert (code, out) == (3, "") and err == f"error: no data file at {tmp_path / 'no.csv'}\n"
    code, out, err = ran("forecast", shops / "sales.csv", *words, "--id", "shpo")
    assert (code, out) == (3, "") and "did you mean 'shop'" in err
    code, _, err = ran(
        "forecast", shops / "sales.csv", *words, "--id", "shop", "--future", tmp_path / "no.csv"
    )
    assert code == 3 and "no.csv" in err
    (tmp_path / "empty.csv").write_text("")
    assert ran("evaluate", tmp_path / "empty.csv", *words)[0] == 3
    code, _, err = ran(
        "evaluate",
        shops / "sales.csv",
        "--model",
        timer,
        "--id",
        "shop",
        "--target",
        "sold",
        "--horizon",
        100,
    )
    assert code == 3 and "the longest allows a horizon of 74" in err


def test_what_is_wrong_with_the_options_is_exit_code_2(ran, timer, shops, tmp_path):
    words = ("forecast", shops / "sales.csv", "--model", timer, *LONG)
    code, out, err = ran(*words, "--levels", "0.1,1.5", "--out", "f.docx", "--missing", "hope")
    assert (code, out) == (2, "")
    assert "--levels must be between 0 and 1; got 1.5" in err
    assert "--out is a file of .csv, .csv.gz, .parquet, .json; got 'f.docx'" in err
    assert "--missing: unknown 'hope'; known: error, interpolate, keep" in err
    assert ran(*words, "--levels", "none")[1].splitlines()[0] == "shop,date,predictions"
    code, _, err = ran(*words, "--out", tmp_path / "no" / "f.csv")
    assert code == 2 and "make it first" in err
    code, _, err = ran("forecast", shops / "sales.csv", "--model", "timer-tyni", *LONG)
    assert code == 2 and "Did you mean 'timer-tiny'?" in err


def test_other_kinds_of_files(ran, timer, shops, tmp_path):
    pd.read_csv(shops / "sales.csv").to_parquet(tmp_path / "sales.parquet")
    words = ("forecast", tmp_path / "sales.parquet", "--model", timer, *LONG)
    for name, read in (
        ("f.parquet", pd.read_parquet),
        ("f.json", pd.read_json),
        ("f.csv.gz", pd.read_csv),
    ):
        assert ran(*words, "--out", name)[0] == 0
        assert list(read(name).columns) == ["shop", "date", "predictions", "0.1", "0.5", "0.9"]


def test_evaluate(ran, timer, shops):
    words = ("evaluate", shops / "sales.csv", "--model", timer, *LONG)
    code, out, err = ran(*words)
    assert code == 0 and fits(out) and fits(err)
    assert "score" in err and re.search(r"^zero_shot +\d", out, re.MULTILINE)
    assert re.search(r"^time +about \d+ s", err, re.MULTILINE)
    found = json.loads(ran(*words, "--json")[1])
    assert found["methods"].keys() == {"zero_shot"}
    assert {"last_value", "seasonal_naive", "mean"} <= found["naive"].keys()
    # A seven-day wave with little noise: the naive forecast knows it, fresh weights do not.
    assert found["deploy"] == "seasonal_naive"
    assert (
        found["methods"]["zero_shot"]["test"]["mse"]
        > found["naive"]["seasonal_naive"]["test"]["mse"]
    )


def test_compare(ran, timer, shops, tmp_path):
    model, params = ltsm_jax.load(timer)
    other = ltsm_jax.save(tmp_path / "other", model, jax.tree.map(lambda x: x * 0.5, params))
    words = ("compare", shops / "sales.csv", "--models", f"{timer},{other},nowhere", *LONG)
    code, out, err = ran(*words)
    assert code == 0 and fits(out)
    assert "[1/3]" in err and "[3/3] nowhere: no model" in err
    assert re.search(r"^time +about \d+ s", err, re.MULTILINE)
    assert re.search(r"\[1/3\].*; about \d+ s left$", err, re.MULTILINE)

    found = json.loads(ran(*words, "--json")[1])
    ranking = found["ranking"]
    assert [row["mse"] for row in ranking] == sorted(row["mse"] for row in ranking)
    names = {row["name"] for row in ranking}
    assert names == {str(timer), str(other), "last_value", "seasonal_naive", "mean"}
    assert ranking[0]["name"] == "seasonal_naive" and found["failed"].keys() == {"nowhere"}
    by_name = {row["name"]: row for row in ranking}
    assert by_name[str(timer)]["interval"][0] > 0, "worse than naive, and clearly"
    gap = by_name[str(timer)]["mse"] - by_name["seasonal_naive"]["mse"]
    assert by_name[str(timer)]["difference"] == pytest.approx(gap, rel=1e-4)
    assert len({row["windows"] for row in ranking}) == 1

    code, out, err = ran("compare", shops / "sales.csv", "--models", f"nowhere,{timer}", *LONG)
    assert code == 2 and out == ""


def test_prune(ran, timer, shops, tmp_path, monkeypatch):
    results = []
    prune = pruning.prune

    def noted(*args, **rest):
        results.append(results[0] if results else prune(*args, **rest))
        return results[-1]

    monkeypatch.setattr(pruning, "prune", noted)
    words = ("prune", shops / "sales.csv", "--model", timer, *LONG, "--ratio", "0.3")
    code, out, err = ran(*words, "--out", "run")
    assert code == 0 and fits(out) and fits(err)
    facts = json.loads((tmp_path / "run/prune.json").read_text())
    assert 0.5 < facts["left"] < 0.95 and facts["parameters"] == facts["parameters_before"] == 4216
    assert f"{facts['left']:.1%} of the channels are left" in out
    _, params = ltsm_jax.load("run/model")
    zeros = sum(int((np.asarray(leaf) == 0).sum()) for leaf in jax.tree.leaves(params))
    assert zeros > 200
    masks = storage.load_tree("run/masks")
    assert set(np.unique(np.concatenate([np.ravel(m) for m in jax.tree.leaves(masks)]))) == {0, 1}

    code, out, err = ran(*words, "--out", "run")
    assert (code, out) == (2, "") and "run" in err and len(results) == 1
    code, out, _ = ran(*words, "--out", "run", "--remove", "--overwrite", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["parameters"] < 4216
    assert trees.count(ltsm_jax.load("run/model")[1]) == facts["parameters"]
    assert folders.read_config("run/model")[1]["provenance"]["pruned_from"]


@pytest.mark.slow
def test_landscape(ran, timer, shops, tmp_path):
    on = (shops / "sales.csv", "--model", timer, *LONG)
    words = ("landscape", *on, "--points", 3, "--windows", 4096, "--out", tmp_path)
    code, out, err = ran(*words)
    assert code == 0 and fits(out) and "three surfaces of 3 x 3" in err
    with np.load(tmp_path / "surface.npz") as found:
        assert {*found} == {"x", "y", "loss_pretrained", "loss_random", "loss_sff"}
        assert found["x"].tolist() == [-1, 0, 1] and found["loss_sff"].shape == (3, 3)
        centre = found["loss_pretrained"][1, 1]
    assert (tmp_path / "surface.png").stat().st_size > 1000
    code, out, _ = ran(*words, "--json")
    assert json.loads(out)["models"]["pretrained"]["centre"] == pytest.approx(centre)

    # The centre is the model's own error; one that is mixed with nothing is the model.
    _, out, _ = ran("evaluate", *on, "--json")
    assert json.loads(out)["methods"]["zero_shot"]["test"]["mse"] == pytest.approx(centre, rel=1e-5)
    whole = (*words[:-2], "--alpha", 1, "--out", tmp_path / "whole")
    models = json.loads(ran(*whole, "--json")[1])["models"]
    assert models["sff"]["centre"] == pytest.approx(centre) and models["random"][
        "centre"
    ] != pytest.approx(centre)


def test_fit_and_what_it_leaves(ran, timer, shops, tmp_path, monkeypatch):
    words = (
        "fit",
        shops / "sales.csv",
        "--model",
        timer,
        *LONG,
        "--methods",
        "zero_shot",
        "--out",
        tmp_path / "run",
    )
    code, out, _ = ran(*words, "--json")
    assert code == 0 and json.loads(out)["out"] == str(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "model",
        "verdict.json",
        "report.md",
        "report.html",
    }
    found = json.loads((tmp_path / "run/verdict.json").read_text())
    assert found["deploy"] == "seasonal_naive" and found["methods"].keys() == {"zero_shot"}
    assert json.loads(out).items() >= found.items()

    # What was said of the table is known to what was fitted on it.
    code, out, err = ran(
        "forecast", shops / "sales.csv", "--model", tmp_path / "run/model", "--horizon", 8
    )
    assert code == 0 and out.startswith("shop,date,predictions,0.1,0.5,0.9\ns0,2024-05-30,")
    assert "forecasts with seasonal_naive" in " ".join(err.split())
    table = pd.read_csv(shops / "sales.csv")
    last_week = table[table["shop"] == "s0"]["sold"].tail(7).tolist()
    given = [float(line.split(",")[2]) for line in out.splitlines()[1:8]]
    assert given == pytest.approx(last_week)

    code, out, err = ran("export", tmp_path / "run/model", tmp_path / "back.ckpt")
    assert code == 0 and "seasonal_naive" in err
    code, out, err = ran(*words)
    assert (code, out) == (2, "") and str(tmp_path / "run" / "model") in err


def test_what_fit_asks_for(ran, timer, shops, tmp_path, monkeypatch):
    """Of the library, which trains; and what it prints of the result."""
    asked = {}
    prepared = {}
    cuts = []
    prepare = verdict.bind_panel

    def fit(self, panel, horizon, **rest):
        asked.update(rest, panel=panel, horizon=horizon)
        compared = verdict.compare(
            self.model, self.params, panel, horizon, methods=(), show_progress=False
        )
        return dataclasses.replace(self, verdict=compared.verdict)

    def noted(*args, **rest):
        prepared.update(rest)
        cuts.append(prepare(*args, **rest))
        return cuts[-1]

    monkeypatch.setattr(Forecaster, "fit", fit)
    monkeypatch.setattr("ltsm_jax.forecaster.bind_panel", noted)
    model, _ = ltsm_jax.load(timer)
    storage.save_tree(tmp_path / "masks", pruning.full_masks(model))
    ltsm_jax.save(tmp_path / "run" / "model", model, ltsm_jax.load(timer)[1])
    (tmp_path / "run" / "training").mkdir()
    words = (
        "fit",
        shops / "sales.csv",
        "--model",
        timer,
        *LONG,
        "--methods",
        "ff,sff",
        "--budget",
        40,
        "--seed",
        3,
        "--lr",
        1e-4,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--accumulate",
        2,
        "--mode",
        "direct",
        "--masks",
        tmp_path / "masks",
        "--alpha",
        0.9,
        "--out",
        tmp_path / "run",
    )
    code, out, err = ran(*words, "--overwrite", "--plan")
    assert (
        (code, out) == (0, "")
        and fits(err)
        and not asked
        and (tmp_path / "run" / "training").exists()
    )
    told_of = (
        "methods   zero_shot, ff, sff and the naive",
        "training  40 steps",
        "memory    about",
        "to test",
    )
    for told in (*told_of, "time      about"):
        assert told in err
    assert prepared["masks"] is not None and prepared["mode"] == "direct"

    code, out, _ = ran(*words, "--overwrite")
    assert code == 0
    assert (asked["methods"], asked["budget"], asked["seed"], asked["mode"]) == (
        ["ff", "sff"],
        40,
        3,
        "direct",
    )
    assert asked["alpha"] == 0.9
    assert len(cuts) == 2 and asked["prepared"] is cuts[1], "the windows of a run are cut once"
    config = asked["config"]
    assert (config.lr, config.epochs, config.batch_size, config.accumulate) == (1e-4, 2, 16, 2)
    assert (asked["horizon"], asked["folder"]) == (8, tmp_path / "run")
    assert asked["masks"] is not None and asked["panel"].n_items == 3
    assert not (tmp_path / "run" / "training").exists(), "checkpoints of what is replaced"
    text, _, places = out.partition("\nmodel: ")
    assert fits(text) and "seasonal_naive" in text and "report.html" in places

    auto = [word if word != 0.9 else "auto" for word in words]
    code, _, err = ran(*auto, "--overwrite", "--plan")
    assert code == 0 and "sff-0.5, sff-0.7, sff-0.9" in " ".join(err.split())
    code, _, err = ran(*[word if word != 0.9 else "1.5" for word in words])
    assert code == 2 and "--alpha must be between 0 and 1, or auto" in err


def test_more_memory_than_there_is_is_refused_with_the_plan(
    ran, timer, shops, tmp_path, monkeypatch
):
    monkeypatch.setattr("ltsm_jax.training.memory.available", lambda: 10**6)
    code, out, err = ran(
        "fit", shops / "sales.csv", "--model", timer, *LONG, "--out", "run", "--plan"
    )
    assert (code, out) == (2, "") and "--batch-size" in err and "fits" in err


def test_non_commercial_weights_ask_for_the_option(ran, shops, monkeypatch):
    given = []

    def load(source, *, accept_license=False):
        given.append(accept_license)
        raise hub.LicenceError("NON-COMMERCIAL USE ONLY. To accept it: --accept-license")

    monkeypatch.setattr("ltsm_jax.cli.options.Forecaster.load", load)
    words = ("forecast", shops / "sales.csv", "--model", "Salesforce/moirai-2.0-R-small", *LONG)
    code, out, err = ran(*words)
    assert (code, out) == (2, "") and "--accept-license" in err
    ran(*words, "--accept-license")
    assert given == [False, True]


def test_sigterm_stops_between_two_pieces_of_work(timer, shops, monkeypatch, capsys):
    """Exit code 75: what asked for the end may ask for it again."""
    monkeypatch.setattr(hosts, "stopping", lambda: True)
    words = ["compare", str(shops / "sales.csv"), "--models", str(timer), *map(str, LONG)]
    assert main(words) == 75
    captured = capsys.readouterr()
    assert captured.out == "" and "stopped by SIGTERM before" in captured.err


def test_texts_are_set_to_80_columns():
    rows = [("a" * 90, "1", "2"), ("b", "10", "200")]
    text = printing.table(("name", "x", "y"), rows)
    assert fits(text) and text.splitlines()[2] == "b" + " " * 72 + "10  200"
    assert printing.shorten("abcdefghij", 7) == "ab...ij"
    long = printing.facts({"note": "word " * 40})
    assert fits(long) and all(line.startswith("      word") for line in long.splitlines()[1:])
    assert (
        printing.notes(["taken as the time; time= says otherwise"])
        == "note  taken as the time; --time says otherwise"
    )
    assert printing.in_millions(8652672) == "8.65 M" and printing.in_millions(999) == "999"


def test_json_has_no_numbers_that_json_lacks(capsys):
    printing.show_json({"a": float("nan"), "b": (1, {"c": float("inf")}), 3: None})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, {"c": None}], "3": None}


def test_docstrings_begin_with_one_line():
    for command in cli.COMMANDS.values():
        first, second, *_ = inspect.cleandoc(command.__doc__).splitlines()
        assert first.endswith(".") and not second
