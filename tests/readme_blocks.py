"""The README's Python, block by block. As a program: run them all in the working directory, with
what is installed.
"""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


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


def run(number: int) -> None:
    """Execute a block in the working directory; what it says that it prints must be printed."""
    block = BLOCKS[number]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, f"README block {number}", "exec"), {})

    for line, said in re.findall(r"(print\(.*?\))  # (\(.*?\))$", block, re.MULTILINE):
        assert said in printed.getvalue(), line


if __name__ == "__main__":
    import ltsm_jax

    print(f"ltsm_jax {ltsm_jax.__version__} in {Path(ltsm_jax.__file__).parent}")
    write_tables(Path.cwd())
    for number in range(len(BLOCKS)):
        run(number)
        print(f"README block {number + 1} of {len(BLOCKS)} runs")
