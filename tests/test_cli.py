"""The command `ltsm`: results on stdout, all else on stderr, exit codes, help that fits a terminal."""

import inspect
import json
import re
import shlex

import jax
import pytest

import ltsm_jax
from ltsm_jax import cli, doctor, flags
from ltsm_jax.cli import main, printing
from ltsm_jax.cli.models import PARAMETERS
from ltsm_jax.models import FAMILIES, folders
from ltsm_jax.trees import count


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
    return ltsm_jax.save(folder, model, model.init(jax.random.key(0)), provenance={"licence": "MIT"})


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

    monkeypatch.setattr("ltsm_jax.cli.models.listed", fails)
    code, out, err = ran("models")
    assert (code, out) == (1, "")
    assert err == "error: RuntimeError: the floor is lava; --traceback shows where\n"
    code, _, err = ran("models", "--traceback")
    assert code == 1 and "in fails" in err and err.endswith("error: RuntimeError: the floor is lava\n")
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
    presets = {name: (cls, config) for cls in FAMILIES.values() for name, config in cls.presets().items()}
    assert sizes.keys() == presets.keys()
    for name in ("timer-tiny", "ibm-granite/granite-timeseries-ttm-r2", "amazon/chronos-t5-tiny"):
        cls, config = presets[name]
        assert sizes[name] == count(folders.shapes(cls(config)))


@pytest.mark.slow
def test_all_the_listed_sizes():
    sizes = json.loads(PARAMETERS.read_text())
    for cls in FAMILIES.values():
        for name, config in cls.presets().items():
            assert sizes[name] == count(folders.shapes(cls(config))), name


def test_one_model(ran, timer):
    code, out, _ = ran("models", timer)
    assert code == 0 and fits(out)
    assert re.search(r"^licence +MIT$", out, re.MULTILINE) and "parameters  4,216" in out
    found = json.loads(ran("models", timer, "--json")[1])
    assert (found["family"], found["parameters"], found["context"]) == ("timer", 4216, 32)
    found = json.loads(ran("models", "Salesforce/moirai-2.0-R-small", "--json")[1])
    assert found["parameters"] == 11387208 and "not on this machine" in found["weights"]


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
    monkeypatch.setattr(doctor, "forecast", lambda family: doctor.answers()[family])
    code, out, _ = ran("doctor")
    assert code == 0 and fits(out)
    for told in ("jax ", "devices", "compiled", "no faults", *FAMILIES):
        assert told in out
    found = json.loads(ran("doctor", "--families", "timer,ttm", "--json")[1])
    assert [check["family"] for check in found["checks"]] == ["timer", "ttm"] and found["faults"] == 0

    monkeypatch.setattr(doctor, "forecast", lambda family: {"point": doctor.answers()["timer"]["point"] + 1})
    code, out, _ = ran("doctor", "--families", "timer")
    assert code == 1 and fits(out)
    assert "FAULT" in out and "reinstall" in out and "1 fault," in out
    code, out, _ = ran("doctor", "--families", "timer", "--json")
    assert code == 1 and json.loads(out)["faults"] == 1


def test_texts_are_set_to_80_columns():
    rows = [("a" * 90, "1", "2"), ("b", "10", "200")]
    text = printing.table(("name", "x", "y"), rows)
    assert fits(text) and text.splitlines()[2] == "b" + " " * 72 + "10  200"
    assert printing.cut("abcdefghij", 7) == "ab...ij"
    long = printing.facts({"note": "word " * 40})
    assert fits(long) and all(line.startswith("      word") for line in long.splitlines()[1:])
    assert printing.count(8652672) == "8.65 M" and printing.count(999) == "999"
    assert [printing.seconds(x) for x in (3.4, 600, 7200)] == ["3 s", "10 min", "2.0 h"]


def test_json_has_no_numbers_that_json_lacks(capsys):
    printing.show_json({"a": float("nan"), "b": (1, {"c": float("inf")}), 3: None})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, {"c": None}], "3": None}


def test_docstrings_begin_with_one_line():
    for command in cli.COMMANDS.values():
        first, second, *_ = inspect.cleandoc(command.__doc__).splitlines()
        assert first.endswith(".") and not second
