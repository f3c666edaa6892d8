"""Settings that validation chooses: a grid at the first seed, the winner alone at all others.

Every candidate of an arm (a learning rate, an alpha, a ratio, or a combination of them) is run at
the first seed. The one with the lowest validation MSE, mean over the origins of `--origins`, is the
arm's, and only it is run at the other seeds. The choice is not stored: it follows from the results,
so that a larger grid may join a folder later.
"""

# pandas types rows and groups by all they might hold:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

ARM = (
    "method",
    "alpha",
    "ratio",
    "ema",
)  # what tells the runs of a seed apart, besides what is chosen
OVER, SEED = "chosen_by_validation", "chosen_at_seed"  # settings of a folder with a grid


def settings(over: Sequence[str], seed: int, origins: int) -> dict[str, Any]:
    """Give the settings of a folder that say what is chosen, where anything is."""
    if not over:
        return {}
    found: dict[str, Any] = {OVER: ",".join(over), SEED: seed}
    return found | ({"origins": origins} if origins > 1 else {})


def arm(row: Mapping[str, Any], over: Sequence[str]) -> tuple[Any, ...]:
    """Give the part of a run's columns that is compared, and not chosen."""
    return tuple(_plain(row.get(name)) for name in ARM if name not in over)


def candidate(row: Mapping[str, Any], over: Sequence[str]) -> tuple[Any, ...]:
    """Give the part of a run's columns that is chosen."""
    return tuple(_plain(row.get(name)) for name in over)


def choices(
    rows: Iterable[Mapping[str, Any]], over: Sequence[str], seed: int
) -> dict[tuple, tuple]:
    """Choose the candidate of each arm with the lowest mean validation MSE over the origins, at one
    seed.

    A candidate with fewer finished origins than another of its arm is not compared; the first of
    equal ones wins.
    """
    scores: dict[tuple, dict[tuple, list[float]]] = {}
    for row in rows:
        if row["seed"] == seed:
            found = scores.setdefault(arm(row, over), {})
            found.setdefault(candidate(row, over), []).append(row["val_mse"])
    best = {}
    for name, found in scores.items():
        most = max(len(values) for values in found.values())
        complete = {
            key: float(np.mean(values)) for key, values in found.items() if len(values) == most
        }
        best[name] = min(complete, key=lambda key: complete[key])
    return best


def mark(rows: Sequence[dict[str, Any]], of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add the column `chosen` to the rows of a folder whose settings `of` have a grid; others stay
    as they are.
    """
    if OVER not in of:
        return list(rows)
    over = tuple(of[OVER].split(","))
    best = choices(rows, over, of[SEED])
    marked = []
    for row in rows:
        is_chosen = best.get(arm(row, over)) == candidate(row, over) and not row.get("origin")
        marked.append(row | {"chosen": is_chosen})
    return marked


def table(results: pd.DataFrame, of: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of every candidate at the first seed: validation MSE, mean over the origins,
    and the choice.
    """
    over = of[OVER].split(",")
    names = [name for name in (*ARM, "lr") if name in results]
    first = results[results["seed"] == of[SEED]]
    body = []
    for key, group in first.groupby(names, sort=False, dropna=False):
        cells = [
            "" if _plain(value) is None else f"{value:g}" if name != "method" else str(value)
            for name, value in zip(names, key, strict=True)
        ]
        if len(first[first["method"] == group["method"].iloc[0]]) > 1:
            body.append(
                [
                    *cells,
                    f"{group['val_mse'].mean():.4f}",
                    "chosen" if group["chosen"].any() else "",
                ]
            )
    return [*names, f"val MSE, seed {of[SEED]}", ", ".join(over)], body


def _plain(value: Any) -> Any:
    """Give a missing value as None, and a number as Python has it."""
    if value is None or isinstance(value, str):
        return value
    return None if np.isnan(value) else float(value)
