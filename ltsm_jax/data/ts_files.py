"""Labelled series from `.ts` files, the format of the UCR and UEA classification archives.

A header of `@name value` lines, then after `@data` one example a line: a comma-separated list of
numbers for each dimension, the dimensions separated by colons, and the class label at the end. `#`
begins a comment line, `?` is a missing value. Lengths may differ. Files with time stamps
(`@timeStamps true`) and without class labels are refused.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from ltsm_jax.data.series import DataError

KEYS = frozenset(
    {
        "problemname",
        "timestamps",
        "missing",
        "univariate",
        "dimensions",
        "dimension",
        "equallength",
        "serieslength",
        "classlabel",
        "targetlabel",
    }
)
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 60  # characters of a line in an error


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledExamples:
    """Contents of a `.ts` file.

    name: of the problem. values: [N, C, T] float32, shorter examples with NaN in front; missing
    values are NaN. labels: [N] int32, numbers of `classes`. classes: names, in the order of the
    header.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def read_ts(path: str | Path) -> LabelledExamples:
    """Read a `.ts` file.

    Raises: ValueError that names the line of what cannot be read; FileNotFoundError.
    Example: `examples = read_ts("BasicMotions_TRAIN.ts")`
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is no text: {error}") from error
    header, first = _header(path.name, lines)
    classes = _classes(path.name, header)
    examples, labels = [], []
    for number, line in enumerate(lines[first:], first + 1):
        line = line.strip()
        if line and not line.startswith("#"):
            example, label = _example(f"{path.name}, line {number}", line)
            if label not in classes:
                raise DataError(
                    f"{path.name}, line {number}: the header has no class {label[:SHOWN]!r}"
                )
            examples.append(example)
            labels.append(classes.index(label))
    if not examples:
        raise DataError(f"{path.name}: no examples after @data")
    values = _padded(path.name, examples, header)
    return LabelledExamples(
        name=header.get("problemname") or path.stem,
        values=values,
        labels=np.array(labels, np.int32),
        classes=classes,
    )


def _header(name: str, lines: list[str]) -> tuple[dict[str, str], int]:
    """Read the lines up to @data: their values by lower-case name, and the number of the line after
    it.
    """
    found = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not line.startswith("@"):
            raise DataError(
                f"{name}, line {number}: expected @name value before @data, not {line[:SHOWN]!r}"
            )
        key, _, value = line[1:].partition(" ")
        key = key.lower()
        if key == "data":
            return found, number
        if key not in KEYS:
            raise DataError(f"{name}, line {number}: unknown @{key[:SHOWN]}")
        found[key] = value.strip()
    raise DataError(f"{name}: there is no @data")


def _classes(name: str, header: dict[str, str]) -> tuple[str, ...]:
    if header.get("timestamps", "false").lower() != "false":
        raise DataError(f"{name}: files with time stamps are not read")
    has, *classes = header.get("classlabel", "").split() or [""]
    if has.lower() != "true" or len(classes) < 2:
        raise DataError(
            f"{name}: the header needs '@classLabel true' and the names of at least two classes"
        )
    if len(set(classes)) < len(classes):
        raise DataError(f"{name}: a class is named twice in the header")
    return tuple(classes)


def _example(where: str, line: str) -> tuple[list[np.ndarray], str]:
    """Read a line of data: the values of each dimension, and the label."""
    *dimensions, label = line.split(":")
    if not dimensions:
        raise DataError(f"{where}: no ':' between values and class label in {line[:SHOWN]!r}")
    return [_numbers(where, text) for text in dimensions], label.strip()


def _numbers(where: str, text: str) -> np.ndarray:
    values = []
    for cell in text.split(","):
        cell = cell.strip()
        if cell == "?":
            values.append(math.nan)
            continue
        try:
            value = float(cell)
        except ValueError:
            raise DataError(f"{where}: {cell[:SHOWN]!r} is no number") from None
        # Models take float32, in which a larger value would be infinite.
        if math.isinf(value) or abs(value) > LARGEST:
            raise DataError(f"{where}: {cell[:SHOWN]!r} is not finite")
        values.append(value)
    return np.array(values, np.float32)


def _padded(name: str, examples: list[list[np.ndarray]], header: dict[str, str]) -> np.ndarray:
    """Stack examples [N, C, T], shorter ones with NaN in front."""
    counts = {len(example) for example in examples}
    if len(counts) > 1:
        raise DataError(f"{name}: examples of {min(counts)} to {max(counts)} dimensions")
    count = counts.pop()
    told = header.get("dimensions") or header.get("dimension")
    if told and told.isdigit() and int(told) != count:
        raise DataError(
            f"{name}: the header says {told[:SHOWN]} dimensions, the examples have {count}"
        )
    longest = max(max(map(len, example)) for example in examples)
    values = np.full((len(examples), count, longest), np.nan, np.float32)
    for example, into in zip(examples, values, strict=True):
        for row, place in zip(example, into, strict=True):
            place[longest - len(row) :] = row
    if np.isnan(values).all(axis=(1, 2)).any():
        raise DataError(f"{name}: an example has no value at all")
    return values


def read_problem(path: str | Path) -> tuple[LabelledExamples, LabelledExamples]:
    """Read the training and the test part of a problem.

    Args:
      path: `<name>_TRAIN.ts`, beside which `<name>_TEST.ts` lies, or a folder that holds one such
        pair.
    Raises: ValueError for parts that do not go together, or a folder with none or several pairs;
      FileNotFoundError.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*_TRAIN.ts"))
        if len(found) != 1:
            raise DataError(f"{path}: {len(found)} files called *_TRAIN.ts, one is needed")
        path = found[0]
    if not path.name.endswith("_TRAIN.ts"):
        raise DataError(f"{path.name} is not called <name>_TRAIN.ts")
    train = read_ts(path)
    test = read_ts(path.with_name(path.name.replace("_TRAIN.ts", "_TEST.ts")))
    if train.classes != test.classes or train.values.shape[1] != test.values.shape[1]:
        raise DataError(f"{path.name}: training and test part differ in classes or dimensions")
    length = max(train.values.shape[2], test.values.shape[2])
    return _lengthened(train, length), _lengthened(test, length)


def _lengthened(part: LabelledExamples, length: int) -> LabelledExamples:
    more = length - part.values.shape[2]
    values = np.pad(part.values, ((0, 0), (0, 0), (more, 0)), constant_values=np.nan)
    return dataclasses.replace(part, values=values)
