"""Decide what to deploy: candidates with their scores, the rule that picks one, and the sentence
that says why.

The rule, on scores of an untouched test span:

1. A tuned model is deployed where it did better than the checkpoint on validation and its test
   intervals against the checkpoint and against the best naive forecast both lie below zero.
2. Else the naive forecast, where its interval against the checkpoint does, or where a tuned model
   beats the checkpoint and not the naive forecast: of two that cannot be told apart, the simpler.
3. Else the checkpoint, where it beats the naive forecast.
4. Else nothing is shown, and of the two the one that did better on validation is deployed.
"""

import dataclasses
import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ltsm_jax.methods.checks import FEWEST, Difference

ZERO_SHOT = "zero_shot"
UNSHOWN = "no difference that the data can show"
TITLES = {
    ZERO_SHOT: "the checkpoint",
    "last_value": "the last value",
    "seasonal_naive": "the seasonal naive forecast",
    "mean": "the mean of the context",
    "auto_ets": "AutoETS",
}
WIDTH = 80


def title(name: str) -> str:
    """A candidate as a sentence calls it."""
    return TITLES.get(name, f"the model tuned by {name}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One forecast that was compared.

    Attributes:
      name: "zero_shot", a method, or a naive forecast: "last_value", "seasonal_naive", "mean",
        "auto_ets".
      kind: "model" or "naive".
      val, test: mse, mae and windows, in units standardised per item by its training rows; None
        where it was not scored: only what validation chose is scored on the test span.
      seconds: of training and scoring, without compilation. compile_seconds: those of it.
      epochs, best_epoch: trained, and the one whose weights are kept.
      history: a dict per epoch, epoch 0 (before training) first: epoch, val_mse, val_mae, and
        train_loss and lr where something was trained.
      notes: what to look at, in words.
    """

    name: str
    kind: Literal["model", "naive"]
    val: Mapping[str, Any]
    test: Mapping[str, Any] | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0
    epochs: int = 0
    best_epoch: int = 0
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Verdict:
    """Result of a comparison: the candidates, their differences, and the one to deploy; print it.

    Attributes:
      deploy: name of the candidate to use.
      reason: why, in one sentence.
      candidates: all of them, the checkpoint first.
      tuned: the tuned method that did best on validation, or None. naive: the naive forecast that
        did.
      differences: on the test span, by "tuned_vs_zero_shot", "tuned_vs_naive" and
        "zero_shot_vs_naive"; those that exist.
      name: of the data. model: of the family. columns: of the targets. horizon, context_len: rows.
      freq: step of the data, or None.
      items: long enough to be scored. windows: of "train", "val" and "test".
      spans: first and last stamp of the targets of each part; empty without stamps.
      settings: mode, seed, budget and configuration of the training.
      notes: what was done to the data, and what the result rests on.
      examples: some test windows with the forecasts of what was scored there, in data units.
      versions: of what computed it.
    """

    deploy: str
    reason: str
    candidates: tuple[Candidate, ...]
    tuned: str | None
    naive: str | None
    differences: Mapping[str, Difference]
    name: str
    model: str
    columns: tuple[str, ...]
    horizon: int
    context_len: int
    freq: str | None
    items: int
    windows: Mapping[str, int]
    spans: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    examples: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def candidate(self, name: str) -> Candidate:
        """The candidate called `name`.

        Raises: KeyError.
        """
        for found in self.candidates:
            if found.name == name:
                return found
        raise KeyError(name)

    @property
    def blocks(self) -> int:
        """Blocks of `horizon` rows of the test span in which windows begin."""
        return max((found.blocks for found in self.differences.values()), default=0)

    @property
    def best_model(self) -> str:
        """The checkpoint or the method, whichever did best on validation."""
        models = [found for found in self.candidates if found.kind == "model"]
        return min(models, key=lambda found: found.val["mse"]).name

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of candidates."""
        header = ["candidate", "val MSE", "val MAE", "test MSE", "test MAE", "epochs", "seconds"]
        rows = []
        for found in self.candidates:
            scores = []
            for part in (found.val, found.test):
                scores += (
                    ["-", "-"]
                    if part is None
                    else [four_digits(part["mse"]), four_digits(part["mae"])]
                )
            epochs = str(found.epochs) if found.epochs else ""
            rows.append([found.name, *scores, epochs, f"{found.seconds:.1f}"])
        return header, rows

    def difference_lines(self) -> list[str]:
        """One line for each difference on the test span."""
        names = {"tuned": self.tuned, "naive": self.naive, ZERO_SHOT: ZERO_SHOT}
        lines = []
        for key, found in self.differences.items():
            first, second = key.split("_vs_")
            lines.append(f"{names[first]} - {names[second]}: {said(found)}")
        return lines

    def __str__(self) -> str:
        header, rows = self.rows()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        table = []
        for cells in (header, *rows):
            numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            table.append("  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip())
        windows = f"windows: {self.windows['val']:,} to validate, {self.windows['test']:,} to test"
        facts = f"{self.name}: {counted(self.items, 'item')}, horizon {self.horizon}, {windows}"
        lines = [
            *textwrap.wrap(self.reason, WIDTH),
            "",
            *textwrap.wrap(facts, WIDTH),
            "",
            *table,
            "",
        ]
        if self.differences:
            lines.append("difference in MSE on the test span:")
            for text in self.difference_lines():
                lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
        for note in self.all_notes():
            lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(lines)

    def all_notes(self) -> tuple[str, ...]:
        """Notes on the data, then those on candidates."""
        own = []
        for found in self.candidates:
            own += [f"{found.name}: {note}" for note in found.notes]
        return (*self.notes, *own)

    def __repr__(self) -> str:
        return f"<Verdict on {self.name}, horizon {self.horizon}: deploy {self.deploy}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_json(self) -> dict[str, Any]:
        """As JSON types: `deploy`, `reason`, `methods` and `naive` by name, and all else."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = _plain(fields)
        candidates = plain.pop("candidates")
        plain["best_tuned"] = plain.pop("tuned")
        plain["best_naive"] = plain.pop("naive")
        for key, kind in (("methods", "model"), ("naive", "naive")):
            plain[key] = {found["name"]: found for found in candidates if found["kind"] == kind}
        first = ("deploy", "reason", "methods", "naive")
        return {name: plain[name] for name in first} | {"blocks": self.blocks} | plain

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Verdict":
        """Read back what `to_json` gave.

        Raises: ValueError for anything else.
        """
        try:
            fields = dict(stored)
            fields.pop("blocks", None)
            named = [*fields.pop("methods").values(), *fields.pop("naive").values()]
            candidates = []
            for entry in named:
                tuples = {key: tuple(entry[key]) for key in ("history", "notes")}
                candidates.append(Candidate(**(entry | tuples)))
            differences = {}
            for key, entry in fields.pop("differences").items():
                ends = {
                    end: math.nan if entry[end] is None else entry[end] for end in ("low", "high")
                }
                differences[key] = Difference(**(entry | ends))
            fields |= {key: tuple(fields[key]) for key in ("columns", "notes", "examples")}
            fields["spans"] = {part: tuple(span) for part, span in fields["spans"].items()}
            fields["tuned"], fields["naive"] = fields.pop("best_tuned"), fields.pop("best_naive")
            return cls(candidates=tuple(candidates), differences=differences, **fields)
        except (KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"this is no verdict: {type(err).__name__} {err}") from err


def four_digits(x: float) -> str:
    """An error with four decimals, a large or tiny one with four digits."""
    return f"{x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e4 else f"{x:.3e}"


def counted(n: int, word: str) -> str:
    """A number of things: "1 item", "2,000 items"."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def signed(x: float) -> str:
    """A difference with its sign and four decimals, a large or tiny one with two digits."""
    return f"{x:+.4f}" if x == 0 or 5e-5 <= abs(x) < 1e4 else f"{x:+.1e}"


def said(found: Difference) -> str:
    """A difference in words and numbers."""
    if not found.units:
        few = f"{counted(found.blocks, 'block')} of time and {counted(found.items, 'item')}"
        return f"{signed(found.mean)}; too few for an interval: {few}"
    units = (
        f"{found.blocks} blocks of time" if found.units == "blocks" else f"{found.items:,} items"
    )
    return f"{signed(found.mean)} (95 %: {signed(found.low)} to {signed(found.high)}, from {units})"


def _interval(found: Difference) -> str:
    if not found.units:
        return "too few blocks of time for an interval"
    return (
        f"difference in MSE {signed(found.mean)}, 95 %: {signed(found.low)} to {signed(found.high)}"
    )


def decide(
    val: Mapping[str, float],
    tuned: str | None,
    naive: str | None,
    differences: Mapping[str, Difference],
) -> tuple[str, str]:
    """Pick what to deploy, see the module docstring.

    Args:
      val: validation MSE of every candidate by name.
      tuned: the tuned method with the lowest one, or None. naive: likewise.
      differences: on the test span, as in `Verdict.differences`; `tuned_vs_...` where the tuned
        method did better than the checkpoint on validation.
    Returns: (name, sentence).
    """
    gain = differences.get("tuned_vs_zero_shot")
    over_naive = differences.get("tuned_vs_naive")
    zero = differences.get("zero_shot_vs_naive")
    gained = gain is not None and gain.high < 0
    beats_naive = over_naive is None or over_naive.high < 0

    if tuned and gain and gained and beats_naive:
        return tuned, _for_tuned(tuned, naive, gain, over_naive=over_naive)
    if naive is None or zero is None:
        return ZERO_SHOT, f"Deploy {title(ZERO_SHOT)} as it is: {_tuning(tuned, gain)}."
    if zero.low > 0:
        text = f"Deploy {title(naive)}: on the untouched test span it beats {title(ZERO_SHOT)} "
        text += f"({_interval(_turned(zero))})" + _beside_naive(tuned, over_naive)
        return naive, text + _worse_on_validation(val, naive) + "."
    if tuned and gain and gained and over_naive:
        text = f"Deploy {title(naive)}: on the untouched test span {title(tuned)} beats "
        text += f"{title(ZERO_SHOT)} ({_interval(gain)}), but "
        if over_naive.low > 0:
            text += f"{title(naive)} beats both ({_interval(_turned(over_naive))})"
        else:
            text += (
                f"between it and {title(naive)}, which is simpler, there is {UNSHOWN} "
                f"({_interval(over_naive)})"
            )
        return naive, text + _worse_on_validation(val, naive) + "."
    if zero.high < 0:
        text = (
            f"Deploy {title(ZERO_SHOT)} as it is: on the untouched test span it beats "
            f"{title(naive)} "
        )
        return ZERO_SHOT, text + f"({_interval(zero)}), and {_tuning(tuned, gain)}."

    better, other = (ZERO_SHOT, naive) if val[ZERO_SHOT] <= val[naive] else (naive, ZERO_SHOT)
    as_is = " as it is" if better == ZERO_SHOT else ""
    text = (
        f"Deploy {title(better)}{as_is}: on the untouched test span there is {UNSHOWN} between it "
        "and "
    )
    text += (
        f"{title(other)} ({_interval(zero)}), on validation it did better, and "
        f"{_tuning(tuned, gain)}."
    )
    return better, text


def _for_tuned(
    tuned: str, naive: str | None, gain: Difference, over_naive: Difference | None
) -> str:
    text = (
        f"Deploy {title(tuned)}: on the untouched test span it beats {title(ZERO_SHOT)} "
        f"({_interval(gain)})"
    )
    if naive is not None and over_naive is not None:
        text += f" and {title(naive)} ({_interval(over_naive)})"
    return text + "."


def _turned(found: Difference) -> Difference:
    return dataclasses.replace(found, mean=-found.mean, low=-found.high, high=-found.low)


def _tuning(tuned: str | None, gain: Difference | None) -> str:
    """Say how tuning did against the checkpoint, where the tuned model is not deployed."""
    if tuned is None:
        return "nothing was tuned"
    if gain is None:
        return "no tuned model did better than the checkpoint on validation"
    if gain.low > 0:
        return f"{title(tuned)} does worse than the checkpoint ({_interval(gain)})"
    return f"between {title(tuned)} and the checkpoint there is {UNSHOWN} ({_interval(gain)})"


def _beside_naive(tuned: str | None, over_naive: Difference | None) -> str:
    """Say how tuning did, where a naive forecast beats the checkpoint."""
    if tuned is None:
        return ""
    if over_naive is None:
        return ", and no tuned model did better than the checkpoint on validation"
    if over_naive.low > 0:
        return f" and {title(tuned)} ({_interval(_turned(over_naive))})"
    return f"; between it and {title(tuned)} there is {UNSHOWN} ({_interval(over_naive)})"


def _worse_on_validation(val: Mapping[str, float], name: str) -> str:
    if val[name] <= val[ZERO_SHOT]:
        return ""
    return (
        f"; on validation it did worse than the checkpoint (MSE {four_digits(val[name])}, not "
        f"{four_digits(val[ZERO_SHOT])})"
    )


def few_blocks(difference: Difference | None) -> tuple[str, ...]:
    """Say what an interval does not rest on."""
    if difference is None or difference.blocks >= FEWEST:
        return ()
    count = f"the test span has {counted(difference.blocks, 'block')} of time"
    if not difference.units:
        items = counted(difference.items, "item")
        return (f"{count} and {items}: an interval takes at least {FEWEST} of one of them",)
    return (
        f"{count}: intervals come from the spread over items, what all items share is not in them",
    )


def _plain(value: Any) -> Any:
    """A value as JSON knows it; numbers with seven digits, NaN as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Sequence):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
