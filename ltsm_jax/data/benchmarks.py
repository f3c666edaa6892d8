"""The benchmark files of the long-term-forecasting literature, by name."""

import dataclasses
from pathlib import PurePath

_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small/"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is known of one benchmark file.

    Attributes:
      file: its name as published.
      rows, variates: T and C of the published file.
      freq: canonical step.
      borders: (train end, val end, test end) in rows, or (train share, test share) of the rows.
      sha256: of the published bytes, unzipped; None where no copy could be checked.
      url: where it is published byte for byte; None where no stable address is known.
      aliases: further names, case aside.
    """

    name: str
    file: str
    rows: int
    variates: int
    freq: str
    borders: tuple[int, int, int] | tuple[float, float] = (0.7, 0.2)
    sha256: str | None = None
    url: str | None = None
    aliases: tuple[str, ...] = ()


_MONTH = 30 * 24  # ETT months have 30 days: 12 of them to train, 4 to validate, 4 to test
_ETTH = (12 * _MONTH, 16 * _MONTH, 20 * _MONTH)
_ETTM = (4 * 12 * _MONTH, 4 * 16 * _MONTH, 4 * 20 * _MONTH)

BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark(
            "ETTh1",
            "ETTh1.csv",
            17420,
            7,
            "h",
            _ETTH,
            "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
            _ETT + "ETTh1.csv",
        ),
        Benchmark("ETTh2", "ETTh2.csv", 17420, 7, "h", _ETTH, None, _ETT + "ETTh2.csv"),
        Benchmark(
            "ETTm1",
            "ETTm1.csv",
            69680,
            7,
            "15min",
            _ETTM,
            "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
            _ETT + "ETTm1.csv",
        ),
        Benchmark("ETTm2", "ETTm2.csv", 69680, 7, "15min", _ETTM, None, _ETT + "ETTm2.csv"),
        Benchmark(
            "weather",
            "weather.csv",
            52696,
            21,
            "10min",
            sha256="34ee981d07313e51da2a50bb600072c8ae4a69cb4b0651f4cb93a069d7a2ba63",
        ),
        Benchmark("electricity", "electricity.csv", 26304, 321, "h", aliases=("ECL",)),
        Benchmark("traffic", "traffic.csv", 17544, 862, "h"),
        Benchmark(
            "exchange_rate",
            "exchange_rate.csv",
            7588,
            8,
            "D",
            sha256="d55e7aa2641009814a18ba3279431b13f6d413b0eab195b9ff21988d8cf94e97",
            aliases=("exchange",),
        ),
        Benchmark(
            "national_illness",
            "national_illness.csv",
            966,
            7,
            "W",
            sha256="8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395",
            aliases=("ILI", "illness"),
        ),
        Benchmark("solar", "solar_AL.txt", 52560, 137, "10min", aliases=("solar_AL", "solar-energy", "solar_energy")),
        Benchmark("PEMS03", "PEMS03.npz", 26208, 358, "5min", (0.6, 0.2)),
        Benchmark("PEMS04", "PEMS04.npz", 16992, 307, "5min", (0.6, 0.2)),
        Benchmark("PEMS07", "PEMS07.npz", 28224, 883, "5min", (0.6, 0.2)),
        Benchmark("PEMS08", "PEMS08.npz", 17856, 170, "5min", (0.6, 0.2)),
        Benchmark(
            "traffic_6",
            "traffic_6.csv",
            17544,
            6,
            "h",
            sha256="e13028520dc78d2c2c183cf95448a99a296442525eb04c2b2c15276a739a543d",
        ),
        Benchmark("solar_12", "solar_12.csv", 52560, 12, "10min"),
    )
}
_BY_ALIAS = {alias.casefold(): b for b in BENCHMARKS.values() for alias in (b.name, PurePath(b.file).stem, *b.aliases)}


def find(name: str) -> Benchmark | None:
    """The benchmark called `name` (its name or an alias, case aside), or None."""
    return _BY_ALIAS.get(name.casefold())
