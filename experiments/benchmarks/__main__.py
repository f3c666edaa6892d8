"""Run benchmarks: a row of JSON for each number, and the tables of RESULTS.md from such rows.

Run:   python -m experiments.benchmarks --list
       python -m experiments.benchmarks --only epoch,loop --out rows.jsonl
       python -m experiments.benchmarks --peers FOLDER --out rows.jsonl
       python -m experiments.benchmarks --table rows.jsonl
Needs: with --peers, the network once, for the environments of the programs
       that are compared with (made in FOLDER, used again there). Without it
       our side is measured alone. LTSM_DATA names the folder of the data sets.
Cost:  --list says it of each; half an hour for all without peers.
Gives: a line of JSON a number, with date, device, processor, versions, commit
       and how busy the machine was before (see `rows`). A machine of which
       other programs use more than 0.3 a core is refused; --anyway measures
       and marks the rows.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, ClassVar

from experiments import flags, launch
from experiments.benchmarks import (
    chronos_bolt,
    epoch,
    families,
    first_forecast,
    landscape,
    loop,
    newest,
    peers,
    rows,
    train_step,
)

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        train_step,
        epoch,
        loop,
        first_forecast,
        families,
        landscape,
        chronos_bolt,
        newest,
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the runner."""

    program: ClassVar[str] = "experiments.benchmarks"
    only: Annotated[tuple[str, ...], flags.names(tuple(BENCHMARKS), unset="all")] = ()
    """which benchmarks"""
    peers: Annotated[Path | None, flags.path("FOLDER")] = None
    """folder of the environments of the programs to compare with"""
    out: Annotated[Path | None, flags.path()] = None
    """file that the rows are added to; by default they are printed alone"""
    anyway: bool = False
    """measure beside other programs, and mark the rows"""
    table: Annotated[Path | None, flags.path()] = None
    """make the tables of this file of rows, and measure nothing"""
    list: bool = False
    """say which benchmarks there are, and what they cost"""


def main() -> int:
    args = flags.parse(Options, sys.argv[1:], __doc__)
    if args.table is not None:
        print(rows.table(rows.read(args.table)))
        return 0
    if args.list:
        for name, benchmark in BENCHMARKS.items():
            print(
                f"{name:16} {benchmark.cost}"
                + (f", beside {benchmark.peer}" if benchmark.peer else "")
            )
        return 0
    for name in args.only or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        python = None
        if benchmark.peer is not None and args.peers is not None:
            python = peers.python_of(benchmark.peer, args.peers)
        share = rows.busy()
        if share > rows.BUSY and not args.anyway:
            raise ValueError(
                f"{name}: other programs use {share:.0%} of this machine, more than "
                f"{rows.BUSY:.0%}: a time measured now says little. Wait for them, or measure with "
                "--anyway, which marks the rows"
            )
        for row in rows.of(benchmark, python, share):
            line = json.dumps(row)
            print(line, flush=True)
            if args.out is not None:
                with open(args.out, "a") as file:
                    file.write(line + "\n")
    return 0


if __name__ == "__main__":
    launch.leave(launch.guarded(main))
