"""What a run says while it lasts, alone and as one of several."""

import pytest

from ltsm_jax.training import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand; no terminal, and a line for every update."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    return now


def said(clock, capsys):
    """The line of a run of 40 steps that has taken ten, a second each, behind the first."""
    with progress.Bar(40, 4, "ff") as bar:
        bar.update(1, 1, 8)
        clock[0] += 10
        bar.update(11, 2, 80)
    return capsys.readouterr().err.splitlines()[-1]


def test_one_run(clock, capsys):
    assert said(clock, capsys) == "ff: step 11/40  epoch 2/4  8 windows/s  29 s left"


def test_several_runs_say_when_all_of_them_are_done(clock, capsys):
    with progress.part(1, 3):
        assert (
            said(clock, capsys)
            == "ff (1 of 3): step 11/40  epoch 2/4  8 windows/s  all in 109 s  29 s left"
        )
    with progress.part(3, 3):
        assert said(clock, capsys) == "ff (3 of 3): step 11/40  epoch 2/4  8 windows/s  29 s left"
    assert said(clock, capsys).startswith("ff: step")


def test_a_run_that_fails_is_no_part_any_more(clock, capsys):
    with pytest.raises(ValueError), progress.part(1, 2):
        raise ValueError
    assert said(clock, capsys).startswith("ff: step")
