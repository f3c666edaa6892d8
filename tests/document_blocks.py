"""The code blocks of README.md and docs/*.md, run as they are printed.

A block of Python or shell runs, in the order of its document, in a folder that has the tables the
documents speak of. One that CI cannot run stands behind `<!-- not run: REASON -->`. As a program:
run documents of the checkout in the working directory, with what is installed.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Without the experiments, which are not in the wheel.
OF_THE_WHEEL = ("README.md", "docs/research.md", "docs/converting.md")
FENCED = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" for output), its text, and why it is not run, or None."""

    name: str
    language: str
    text: str
    reason: str | None

    @property
    def runs(self) -> bool:
        """Whether it is code that must run."""
        return self.language in ("python", "sh") and self.reason is None


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in FENCED.finditer(text):
        line = text[: match.start("text")].count("\n") + 1
        name = f"{document.name}, line {line}"
        found.append(Block(name, match["language"], match["text"], match["reason"]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, as words; variables that are set in front are left away."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def write_tables(folder: Path) -> None:
    """Write what the blocks speak of: sales.csv, and a smaller stores.csv and ahead.csv than
    experiments.stores has.
    """
    t = np.arange(1200)
    sales = 20 + 5 * np.sin(2 * np.pi * t / 24) + np.random.default_rng(0).normal(size=t.size)
    stamps = pd.date_range("2024-01-01", periods=t.size, freq="h")
    pd.DataFrame({"timestamp": stamps, "sales": sales}).to_csv(folder / "sales.csv", index=False)

    past, ahead = [], []
    for number in range(3):
        t = np.arange(400 + 28)
        days = pd.date_range("2023-01-01", periods=t.size) + pd.Timedelta(days=number)
        sold = (
            50 + 10 * np.sin(2 * np.pi * t / 7) + np.random.default_rng(number).normal(size=t.size)
        )
        facts = {"store": f"store_{number}", "price": 10.0 + t % 5, "size": "small"}
        whole = pd.DataFrame({"day": days, "sold": sold, **facts})
        past.append(whole[:400].drop(index=[7, 50]))
        ahead.append(whole.loc[400:, ["store", "day", "price"]])
    pd.concat(past).to_csv(folder / "stores.csv", index=False)
    pd.concat(ahead).to_csv(folder / "ahead.csv", index=False)


def run(block: Block) -> None:
    """Execute a block in the working directory; what it says that it prints must be printed."""
    if block.language == "sh":
        for words in commands(block):
            code = _run_command(words)
            assert code == 0, f"{block.name}: {shlex.join(words)} ended with {code}"
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, block.name, "exec"), {})
    for line, said in re.findall(r"(print\(.*?\))  # (\(.*?\))$", block.text, re.MULTILINE):
        assert said in printed.getvalue(), f"{block.name}: {line}"


def _run_command(words: list[str]) -> int:
    """The exit code of a command of a document; ours run in this process, which has JAX loaded."""
    if words[0] == "ltsm":
        return importlib.import_module("ltsm_jax.cli").main(words[1:])
    if words[:2] == ["python", "-m"] and words[2].startswith("experiments."):
        return importlib.import_module(words[2]).main(words[3:])
    if words[0] == "python":
        return subprocess.run([sys.executable, *words[1:]], env=os.environ).returncode
    raise ValueError(f"{shlex.join(words)}: say why it is not run, or teach this file to run it")


if __name__ == "__main__":
    import ltsm_jax

    print(f"ltsm_jax {ltsm_jax.__version__} in {Path(ltsm_jax.__file__).parent}")
    write_tables(Path.cwd())
    for name in OF_THE_WHEEL:
        for block in blocks(ROOT / name):
            if block.runs:
                run(block)
                print(f"{block.name}: runs")
