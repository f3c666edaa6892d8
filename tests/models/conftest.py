"""How much of the allowed error the comparisons with recorded vectors use."""

import numpy as np
import parity
import pytest


@pytest.fixture(autouse=True)
def measured(request, monkeypatch):
    """With --parity: how much of the allowed error the comparisons with recorded vectors use."""
    if not request.config.getoption("--parity") or not request.path.stem.endswith("_golden"):
        return
    compare = np.testing.assert_allclose

    def assert_allclose(actual, desired, rtol=1e-7, atol=0, *args, **kwargs):
        compare(actual, desired, rtol, atol, *args, **kwargs)
        actual, desired = (np.asarray(x, np.float64) for x in (actual, desired))
        with np.errstate(invalid="ignore"):  # equal infinities; `note` leaves them out
            parity.note(np.abs(actual - desired), atol + rtol * np.abs(desired))

    monkeypatch.setattr(np.testing, "assert_allclose", assert_allclose)


def pytest_terminal_summary(terminalreporter, config):
    """The table of --parity."""
    if config.getoption("--parity"):
        terminalreporter.section("largest error as a share of the recorded tolerance")
        for family, share in sorted(parity.SHARES.items()):
            terminalreporter.write_line(f"{family:16} {share:.3f}")
