"""Forecast tables with large time-series models, tune them on your own data, and see whether that
pays.

    ltsm forecast sales.csv --model amazon/chronos-bolt-tiny --horizon 24 \\
        --id store --target sold --future prices.csv --out forecast.csv --plot forecast.png
    ltsm fit sales.csv --model amazon/chronos-bolt-tiny --horizon 24 \\
        --id store --target sold --methods zero_shot,ff,sff --out runs/sales
    ltsm forecast new.csv --model runs/sales/model --horizon 24 --out forecast.csv

DATA is a .csv, .parquet or .xlsx file, wide or long, or the name of a
benchmark (ETTh1). MODEL is a name of `ltsm models`, a model folder, what
`ltsm fit` wrote, a checkpoint of an original, or a name of the hub. Lists are
separated by commas. `ltsm COMMAND --help` says the options, an example and
the cost of each command.

Exit codes: 0 done; 1 a fault (of this machine, in doctor; of the program);
2 options that do not work; 3 data or files that cannot be used; 75 stopped
by SIGTERM, 130 by Ctrl-C. Results go to stdout, all else to stderr.

Completion of options in a shell:
    ltsm --tyro-write-completion bash ~/.local/share/bash-completion/completions/ltsm
"""

import functools
import importlib.metadata
import inspect
import operator
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from ltsm_jax import flags, hosts, storage, terminal
from ltsm_jax.cli import printing
from ltsm_jax.cli.detection import Detect
from ltsm_jax.cli.imputation import Impute
from ltsm_jax.cli.models import Convert, Doctor, Export, Models
from ltsm_jax.cli.options import Command
from ltsm_jax.cli.surfaces import Landscape
from ltsm_jax.cli.tables import Compare, Evaluate, ForecastCommand, Prune
from ltsm_jax.cli.tuning import Fit
from ltsm_jax.data import DataError
from ltsm_jax.original_files import CheckpointError

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_DATA = 3
COMMANDS: dict[str, type[Command]] = {
    "models": Models,
    "forecast": ForecastCommand,
    "fit": Fit,
    "evaluate": Evaluate,
    "compare": Compare,
    "prune": Prune,
    "detect": Detect,
    "impute": Impute,
    "landscape": Landscape,
    "convert": Convert,
    "export": Export,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ltsm`; returns the exit code.

    argv: the words behind `ltsm`; None: those of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    terminal.speak_plainly()
    code = terminal.guarded(lambda: _run(words), _code_of)
    if argv is None and code == hosts.EXIT_INTERRUPTED:
        terminal.end(
            code
        )  # a compiler may be at work in another thread, and would be torn down under it
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        return _general(words)
    command = COMMANDS[words[0]]
    shown = "--traceback" in words or bool(os.environ.get("LTSM_DEBUG"))
    try:
        options = flags.parse(command, words[1:], inspect.cleandoc(command.__doc__ or ""))
        with hosts.session():
            storage.keep_compiled()
            return options.run()
    except (hosts.Stopped, BrokenPipeError):
        raise
    except Exception as error:
        if shown:
            traceback.print_exc()
        if isinstance(error, OSError | ValueError | ModuleNotFoundError):
            raise
        said = " ".join(str(error).split())
        more = "" if shown else "; --traceback shows where"
        printing.say(f"error: {type(error).__name__}: {said[:1000]}{more}")
        return EXIT_FAULT


def _general(words: list[str]) -> int:
    """--help, --version and completion, which are about all commands.

    Raises: UsageError for anything else.
    """
    first = words[0] if words else "--help"
    if first == "--version":
        printing.show(f"ltsm {importlib.metadata.version('ltsm-jax')}")
        return 0
    if first in ("-h", "--help") or first.startswith("--tyro-"):
        _parse_all(words or [first])
    raise flags.UsageError(flags.unknown("ltsm", [first], list(COMMANDS)))


def _parse_all(words: list[str]) -> Any:
    """Have tyro read the words of any command: it prints help and completion, and ends the program
    then.
    """
    kinds = []
    for name, command in COMMANDS.items():
        first = inspect.cleandoc(command.__doc__ or "").partition("\n")[0]
        kinds.append(
            Annotated[command, tyro.conf.subcommand(name, description=first, prefix_name=False)]
        )
    with flags.REGISTRY:
        return tyro.cli(
            functools.reduce(operator.or_, kinds),
            prog="ltsm",
            description=textwrap.indent(__doc__ or "", " ", lambda line: True),
            args=words,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )


def _code_of(error: Exception) -> int:
    of_data = isinstance(error, DataError | storage.DamagedError | CheckpointError)
    return EXIT_DATA if of_data else EXIT_USAGE
