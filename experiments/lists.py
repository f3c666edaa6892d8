"""Lists on the command line of an experiment that compares methods on one thing: it runs once for
each combination, in a folder of its own, and OUT/results.csv has the rows of all.

    python -m experiments.sff --data ETTh1,ETTm1 --model timer-tiny --few-shot 0.05,0.25 --out OUT
"""

import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import pandas as pd

from experiments import folder, launch
from ltsm_jax import hosts

FLAGS = ("--data", "--model", "--few-shot")


def combinations(argv: Sequence[str], names: Sequence[str] = FLAGS) -> dict[str, list[str]]:
    """Give the command line of each combination of the values of `names`, by a name for its folder.

    A value with a comma that is a file or folder is one value. Empty where no flag has several.
    """
    places: dict[int, tuple[str, list[str]]] = {}
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in names:
            continue
        at = i if equals else i + 1
        value = value if equals else (argv[at] if at < len(argv) else "")
        if "," in value and not Path(value).exists():
            prefix = f"{flag}=" if equals else ""
            places[at] = (prefix, [part.strip() for part in value.split(",") if part.strip()])
    found = {}
    for values in itertools.product(*(parts for _, parts in places.values())) if places else ():
        words = list(argv)
        for (at, (prefix, _)), value in zip(places.items(), values, strict=True):
            words[at] = prefix + value
        found["-".join(Path(value).name for value in values)] = words
    return found


def run(
    argv: Sequence[str],
    out: Path,
    one: Callable[[Sequence[str]], int],
    names: Sequence[str] = FLAGS,
) -> int | None:
    """Run an experiment for each combination in OUT/<combination>, and join their results.

    out: folder of all. one: runs one command line, which names a folder of its own; gives an exit
    code.
    Returns: the exit code: 0, or 1 where a run failed; that of one which was stopped or refused, at
      once; None where there are no lists, and nothing was run.
    """
    every = combinations(argv, names)
    if not every:
        return None
    commands = [[*_without_out(words), "--out", str(out / name)] for name, words in every.items()]
    return each(commands, one, lambda: hosts.on_first(join, out, list(every)))


def each(
    commands: Sequence[Sequence[str]],
    one: Callable[[Sequence[str]], int],
    after: Callable[[], object],
) -> int:
    """Run one command line after the other, and `after` each; exit code as of `run`."""
    failed = 0
    for number, words in enumerate(commands, 1):
        launch.say(f"\n{number} of {len(commands)}: {shlex.join(words)}")
        code = one(words)
        if code not in (0, 1):  # stopped, or refused: the rest would fare alike
            return code
        failed = max(failed, code)
        after()
        jax.clear_caches()  # nothing that was compiled serves the next one, and it adds up
    return failed


def join(out: Path, names: Sequence[str]) -> None:
    """Write OUT/results.csv from those of the combinations that have one."""
    files = [out / name / folder.CSV for name in names]
    tables = [pd.read_csv(file) for file in files if file.is_file()]
    if tables:
        with folder.replacing(out / folder.CSV) as temporary:
            pd.concat(tables, ignore_index=True).to_csv(temporary, index=False)


def out_of(argv: Sequence[str], default: str) -> Path:
    """Give the folder that --out of a command line names."""
    for i, word in enumerate(argv):
        if word.startswith("--out="):
            return Path(word.removeprefix("--out=")).expanduser()
        if word == "--out" and i + 1 < len(argv):
            return Path(argv[i + 1]).expanduser()
    return Path(default)


def _without_out(argv: Sequence[str]) -> list[str]:
    found, skip = [], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            found.append(word)
        skip = word == "--out"
    return found
