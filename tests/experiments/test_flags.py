"""One flag system: every command that a document shows, what is wrong with a command line, --help,
and messages.
"""

import dataclasses
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar

import pytest

from experiments import aot, flags, landscape, launch, lists, pretrain, prune_then_finetune, sff
from experiments.flags import UsageError
from ltsm_jax import hosts, hub
from ltsm_jax.data.tables import ReadingOptions

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    "all_families",
    "alpha",
    "anomaly",
    "aot",
    "classification",
    "curvature",
    "demo",
    "few_shot",
    "fev_tasks",
    "gift_eval",
    "imputation",
    "landscape",
    "parity",
    "pretrain",
    "prune_then_finetune",
    "pruning_report",
    "report",
    "sff",
    "stores",
    "study",
    "benchmarks.chronos_bolt",
    "benchmarks.coverage",
    "benchmarks.experts",
    "benchmarks.first_forecast",
    "benchmarks.epoch",
    "benchmarks.families",
    "benchmarks.holes",
    "benchmarks.landscape",
    "benchmarks.lanes",
    "benchmarks.loop",
    "benchmarks.panel",
    "benchmarks.predict_df",
    "benchmarks.pruned_speed",
    "benchmarks.pruning_score",
    "benchmarks.timesfm_3",
    "benchmarks.train_step",
)
COMMAND = re.compile(r"python -m (experiments(?:\.\w+)+)([^\n`#]*)")


def commands_of(path):
    """(module, words) of every command with arguments in a text."""
    text = path.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
    found = []
    for module, rest in COMMAND.findall(text):
        rest = rest.partition(" 2>&1")[0].partition("  (")[0].partition("; ")[0].rstrip("\"')., ")
        quotes = rest.count('"') % 2
        words = shlex.split(rest + '"' * quotes)
        if words and words[0].startswith("--"):
            found.append((module, words))
    return found


def documented():
    files = [ROOT / name for name in ("README.md", "RESULTS.md", "TPU.md", "CONTRIBUTING.md")]
    files += sorted((ROOT / "docs").glob("*.md"))
    files += sorted((ROOT / "experiments").rglob("*.py"))
    return [(f.name, *command) for f in files for command in commands_of(f)]


def read(module, words):
    """The options that a command line means; KeyError for a program that has none."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    options = getattr(found, "Options", None) or getattr(found, "Pretrain", None)
    if module == "experiments.benchmarks.first_forecast":
        return None
    if module in (
        "experiments.demo",
        "experiments.all_families",
        "experiments.few_shot",
        "experiments.study",
    ):
        own, rest = flags.parse_some(options, words, None)
        return own, sff.parse(rest)
    if module in ("experiments.sff", "experiments.prune_then_finetune"):
        every = lists.combinations(words)
        return [flags.parse(options, one, None) for one in every.values() or (words,)]
    return flags.parse(options, words, None)


def test_every_command_that_a_document_shows_is_read():
    shown = [(name, module, words) for name, module, words in documented() if words != ["--row"]]
    assert len(shown) > 40 and {name for name, *_ in shown} >= {
        "README.md",
        "methods.md",
        "RESULTS.md",
        "TPU.md",
        "sff.py",
    }
    failed = []
    for name, module, words in shown:
        try:
            read(module, words)
        except (UsageError, SystemExit) as err:
            failed.append(f"{name}: {module} {' '.join(words)}: {err}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("experiment", [sff, landscape])
def test_licences_are_accepted_by_an_option(experiment, monkeypatch):
    asked = []

    def load(name, accept_license=False):
        asked.append(accept_license)
        raise hub.LicenceError("NON-COMMERCIAL USE ONLY")

    monkeypatch.setattr("ltsm_jax.load", load)
    monkeypatch.setattr("experiments.cells.read_series", lambda *_: None)
    for words in ([], ["--accept-license"]):
        options = flags.parse(
            experiment.Options, ["--model", "Salesforce/moirai-2.0-R-small", *words], None
        )
        with pytest.raises(UsageError, match="NON-COMMERCIAL"):
            experiment.resolve(options)
    assert asked == [False, True]


def test_options_of_a_documented_command_are_what_it_says():
    words = (
        "--data ETTh1 --model timer-tiny --methods zero_shot,ff,tfs,sff,lp,lpff --alpha 0.7 "
        "--seeds 0,1,2 --horizon 96"
    )
    o = sff.parse(words.split())
    assert (o.data, o.model, o.alpha, o.seeds, o.horizon) == (
        "ETTh1",
        "timer-tiny",
        (0.7,),
        (0, 1, 2),
        96,
    )
    assert o.methods == ("zero_shot", "ff", "tfs", "sff", "lp", "lpff")
    assert o == dataclasses.replace(sff.Options(), horizon=96)
    words = (
        "--data ETTm1 --ema 0.5 --methods ff,sff --macro-batch 512 --few-shot 0.05 --epochs 1 "
        "--ratios 0.1,0.3"
    )
    p = prune_then_finetune.parse(words.split())
    assert (p.ema, p.methods, p.ratios, p.ratio) == ((0.5,), ("ff", "sff"), (0.1, 0.3), None)
    assert (p.training.few_shot, p.training.epochs, p.pruning.macro_batch) == (0.05, 1, 512)
    a = aot.parse(
        [
            "--preset",
            "Maple728/TimeMoE-200M",
            "--topology",
            "v5e:4x4",
            "--mesh",
            "data=4,fsdp=4",
            "--compute",
            "bfloat16",
            "--remat",
            "all but products",
        ]
    )
    assert (a.devices.mesh, a.devices.compute, a.devices.remat) == (
        "data=4,fsdp=4",
        "bfloat16",
        "all but products",
    )
    assert (a.preset, a.topology, a.batch, a.variates, a.rows) == (
        "Maple728/TimeMoE-200M",
        "v5e:4x4",
        None,
        7,
        17420,
    )
    made = (
        "--preset timer-tiny --generated 40000 --steps 5000 --seed 0 --evaluate ETTh1,ETTm1 --out "
        "runs/x"
    )
    t = flags.parse(pretrain.Pretrain, made.split(), None)
    assert (t.generated, t.steps, t.seed, t.evaluate) == (40000, 5000, 0, ("ETTh1", "ETTm1"))
    assert (t.out, t.parts, t.length) == (Path("runs/x"), ("val", "test"), 1024)


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds=0,1", "--few-shot=0.1"],
        [
            "--remat",
            "all but products",
            "--target",
            "a,b",
            "--id",
            "shop",
            "--freq",
            "15min",
            "--missing",
            "keep",
        ],
        ["--alpha", "0.70000001,0.7", "--lr", "1e-05", "--methods", "sff"],
        ["--coordinator", "auto", "--lora-rank", "8", "--irregular", "regularise"],
    ],
)
def test_a_command_asks_for_the_same_again(words):
    options = sff.parse(words)
    again = shlex.split(options.command())
    assert again[:3] == ["python", "-m", "experiments.sff"]
    without_hosts = dataclasses.replace(options, out=str(options.folder), hosts=flags.Hosts())
    assert sff.parse(again[3:]) == without_hosts


def test_reading_options_are_those_of_the_library():
    o = sff.parse(["--time", "when", "--target", "a", "--missing", "interpolate"])
    assert (o.reading.time, o.reading.target, o.reading.missing) == (
        ("when",),
        ("a",),
        "interpolate",
    )
    assert o.reading.asked() == {"time": "when", "target": "a", "missing": "interpolate"}
    assert sff.parse(["--time", "date,hour"]).reading.asked()["time"] == ["date", "hour"]
    theirs, ours = dataclasses.fields(ReadingOptions), dataclasses.fields(flags.Reading)
    assert [(f.name, f.default) for f in ours] == [(f.name, f.default) for f in theirs]
    for program in (sff.Options, prune_then_finetune.Options, pretrain.Pretrain):
        known = set(flags.known_flags(program))
        assert known >= {flags.flag_of(field.name) for field in theirs} - {"--name"}
    with pytest.raises(
        UsageError,
        match="'interpolat' .did you mean interpolate..; known: error, interpolate, keep",
    ):
        sff.parse(["--missing", "interpolat"])
    with pytest.raises(UsageError, match="unknown frequency 'fortnight'"):
        sff.parse(["--freq", "fortnight"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_an_example_and_its_cost_and_fits_80_columns(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"experiments.{program}")
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as stop:
        getattr(module, "_program", module.main)()
    assert stop.value.code in (0, None)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith(f"usage: python -m experiments.{program}")
    for section in ("Run:", "Cost:", "Gives:"):
        assert sum(line.startswith(f" {section}") for line in lines) == 1
    example = said.partition(" Run:")[2].partition(" Cost:")[0]
    assert f"python -m experiments.{program}" in example
    long = [line for line in lines[1:] if len(line) > 80]
    assert not long, "\n".join(long)


@dataclasses.dataclass(frozen=True)
class Small:
    program: ClassVar[str] = "experiments.small"
    few: Annotated[float, flags.number(flags.TINY, 1, says="a share above 0 and at most 1")] = 1.0
    """share"""
    counts: tuple[int, ...] = (1, 2)
    """several words"""
    on: bool = False
    """a switch"""


def test_checks_of_one_field_speak_of_its_flag():
    assert flags.parse(Small, ["--few", "0.5", "--counts", "3", "4", "--on"], None) == Small(
        0.5, (3, 4), True
    )
    with pytest.raises(UsageError) as err:
        flags.parse(Small, ["--few", "2", "--counts", "3", "x", "--onn", "7"], None)
    assert str(err.value).splitlines() == [
        "--few must be a share above 0 and at most 1; got 2.0",
        "--counts: 'x' is not a whole number",
        "unknown argument '--onn' (did you mean --on?)",
    ]


def test_numbers_are_written_so_that_reading_gives_them_back():
    values = (0.7, 1.0, 0.30000001, 1e-05, 0.1 + 0.2, 2.0**-40)
    assert [float(flags.exact(value)) for value in values] == list(values)
    assert [flags.exact(value) for value in values[:4]] == ["0.7", "1", "0.30000001", "1e-05"]


@pytest.mark.parametrize(
    "python, line",
    [
        ("missing='interpolate' fills them", "--missing interpolate fills them"),
        ("give freq= or target=['a', 'b']", "give --freq or --target a,b"),
        (
            'irregular="regularise" sorts (context_len=32)',
            "--irregular regularise sorts (--context 32)",
        ),
        ("say which with time=", "say which with --time"),
        ("ask for the point alone: quantile_levels=()", "ask for the point alone: --levels none"),
        ("it is a covariate (past=)", "it is a covariate (--past)"),
        ("freq='2 weeks', few_shot=0.1.", "--freq '2 weeks', --few-shot 0.1."),
        ("--missing interpolate", "--missing interpolate"),
        ("name='x', d_model=8", "name='x', d_model=8"),  # no options of a command line
        ("lifetime=3 and runtime='h'", "lifetime=3 and runtime='h'"),
    ],
)
def test_messages_of_the_library_are_shown_as_options(python, line):
    assert flags.in_flags(python) == line


def test_the_advice_for_a_table_with_a_hole_works_on_the_command_line(
    tmp_path, micro, waves, capsys
):
    lines = waves.read_text().splitlines()
    lines[40] = re.sub(r",[^,]*$", ",", lines[40])
    (tmp_path / "hole.csv").write_text("\n".join(lines))
    words = ["--data", str(tmp_path / "hole.csv"), "--model", str(micro), "--plan"]
    assert sff.main(words) == 2
    said = capsys.readouterr().err
    advice = re.search(r"--missing \w+", said)
    assert advice and "missing=" not in said
    assert sff.main([*words, *advice[0].split()]) == 0
    assert "300 rows x 3 columns" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding, wanted",
    [
        ("ascii", "0.37 +/- 0.01 -> ok ... \\u03a9mega"),
        ("latin-1", "0.37 ± 0.01 -> ok ... \\u03a9mega"),
        ("utf-8", "0.37 ± 0.01 → ok … Ωmega"),
    ],
)
def test_a_terminal_that_knows_no_utf8_gets_its_text_all_the_same(monkeypatch, encoding, wanted):
    """As a whole process it is tested with the table of a report."""
    written = {}
    for name in ("stdout", "stderr"):
        written[name] = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written[name], encoding=encoding))
    launch.speak_plainly()
    print("0.37 ± 0.01 → ok …", "Ωmega", flush=True)
    print("±", file=sys.stderr, flush=True)
    assert written["stdout"].getvalue().decode(encoding).strip() == wanted
    assert written["stderr"].getvalue()


def test_ctrl_c_ends_without_tearing_down_what_is_at_work():
    code = (
        "import atexit, sys; from experiments import launch; atexit.register(lambda: print('torn "
        "down'));\n"
        "def work(): raise KeyboardInterrupt\n"
        "launch.leave(launch.guarded(work))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == hosts.EXIT_INTERRUPTED
    assert "the same command goes on" in done.stderr and "torn down" not in done.stdout


def test_a_full_disk_is_one_clear_line(capsys):
    def work():
        raise OSError(28, "No space left on device", "runs/x/run.json")

    assert launch.guarded(work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and "runs/x/run.json" in line and "make room" in line
