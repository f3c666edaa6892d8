"""Names of steps."""

import pytest

from ltsm_jax.frequency import canonical_freq, season_of


@pytest.mark.parametrize(
    "aliases, canonical",
    [
        ("h H hour 1h 60min 60T 3600s", "h"),
        ("15min 15T 15m 900S", "15min"),
        ("D d day daily 24h", "D"),
        ("W W-SUN 7D weekly", "W"),
        ("M MS ME monthly", "M"),
        ("Q QS QE-DEC 3M", "Q"),
        ("Y A AS-JAN YE 12M 4Q", "Y"),
        ("B bday", "B"),
        ("2W 14D", "2W"),
        ("s S sec", "s"),
    ],
)
def test_old_and_new_names_of_steps(aliases, canonical):
    assert {canonical_freq(alias) for alias in aliases.split()} == {canonical}


@pytest.mark.parametrize("freq", ["", "fortnight", "0h", "1.5h", "15", "-h", "hh"])
def test_unknown_steps_are_errors(freq):
    with pytest.raises(ValueError, match="unknown frequency"):
        canonical_freq(freq)


def test_the_season_of_an_old_name():
    assert season_of("15T") == 96
