"""Progress of a run: a bar on a terminal, a plain line every few seconds elsewhere, or nothing."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ltsm_jax.training import compiling

PLAIN_SECONDS = 5.0
QUIET_SECONDS = 2.0
_part = [1, 1]  # number of the run that lasts, and of how many


@contextlib.contextmanager
def part(number: int, count: int) -> Iterator[None]:
    """Let bars inside the block say what is left of all `count` runs, of about the same length, of
    which this is one.

    number: of the run, from 1.
    """
    before = _part[:]
    _part[:] = number, count
    try:
        yield
    finally:
        _part[:] = before


class Counter:
    """Progress of counted work, on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Work that is done within `QUIET_SECONDS` says nothing.

    Args:
      label: what is done. unit: what is counted.
      show: False is silent.
    """

    def __init__(self, label: str, unit: str, show: bool = True):
        self.label, self.unit, self.show = label, unit, show
        self.began = self.spoke = time.monotonic()
        self.first: tuple[float, int] | None = None
        self.live: Progress | None = None
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Counter":
        self.waited = self.stack.enter_context(compiling.measured())
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()
        if self.live:
            self.live.stop()

    def __call__(self, done: int, total: int) -> None:
        """Tell how many of how many are done."""
        now = time.monotonic()
        # Each shape waits for the compiler once, and the pace is that of what has been compiled.
        worked = now - self.waited.seconds
        if self.first is None:
            self.first = worked, done
        if not self.show or now - self.began < QUIET_SECONDS:
            return
        if self.live is None and Console(stderr=True).is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.live.add_task(self.label, total=total)
            self.live.start()
        if self.live:
            self.live.update(self.task, completed=done, total=total)
        elif now - self.spoke >= PLAIN_SECONDS and done < total:
            self.spoke = now
            since, at = self.first
            left = (
                f", {(total - done) * (worked - since) / (done - at):.0f} s left"
                if done > at
                else ""
            )
            print(
                f"{self.label}: {done:,} of {total:,} {self.unit}{left}",
                file=sys.stderr,
                flush=True,
            )


class Bar:
    """Progress of one fit. Everything goes to stderr, so that tables on stdout stay clean.

    Args:
      total: steps of the whole run.
      epochs: epochs of the whole run.
      label: what is being trained.
      done: steps that an earlier launch has done already (they do not count for the throughput).
      show: False is silent.
    """

    def __init__(
        self, total: int, epochs: int, label: str = "", *, done: int = 0, show: bool = True
    ):
        self.total, self.epochs, self.label, self.first = total, epochs, label or "training", done
        number, count = _part
        if count > 1:
            self.label += f" ({number} of {count})"
        self.later = (count - number) * total  # steps of the runs behind this one
        self.console = Console(stderr=True)
        self.show = show
        self.live = None
        self.began, self.spoke = None, time.monotonic()
        self.windows = 0
        if show and self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.live.add_task(
                self.label, total=total, completed=done, facts="compiling"
            )

    def __enter__(self) -> "Bar":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        if self.live:
            self.live.console.print(line, highlight=False)
        elif self.show:
            print(line, file=sys.stderr, flush=True)

    def update(
        self, step: int, epoch: int, windows: int, loss: float | None = None, note: str = ""
    ) -> None:
        """Tell where the run is. `windows`: training windows seen since the last call; `note`: last
        validation.
        """
        if not self.show:
            return
        now = time.monotonic()
        if (
            self.began is None
        ):  # the first call has waited for the compiler: throughput counts from here
            self.began, self.first, windows = now, step, 0
        self.windows += windows
        seconds = max(now - self.began, 1e-9)
        speed = f"  {self.windows / seconds:,.0f} windows/s" if self.windows else ""
        facts = (
            "epoch "
            f"{epoch}/{self.epochs}{'' if loss is None else f'  loss {loss:.4f}'}{speed}{note}"
        )
        if self.later and step > self.first:
            rest = (self.total - step + self.later) * seconds / (step - self.first)
            facts += f"  all in {rest:.0f} s"
        if self.live:
            self.live.update(self.task, completed=step, facts=facts)
        elif now - self.spoke >= PLAIN_SECONDS:
            self.spoke = now
            left = (
                f"  {(self.total - step) * seconds / (step - self.first):.0f} s left"
                if step > self.first
                else ""
            )
            self.say(f"{self.label}: step {step}/{self.total}  {facts}{left}")
