"""Model families. A family is one file here, one line in this table, and one converter."""

import difflib
from collections.abc import Iterable

from ltsm_jax.models.chronos_2 import Chronos2
from ltsm_jax.models.chronos_bolt import ChronosBolt
from ltsm_jax.models.chronos_t5 import ChronosT5
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.moirai import Moirai
from ltsm_jax.models.moirai_2 import Moirai2
from ltsm_jax.models.moirai_moe import MoiraiMoe
from ltsm_jax.models.moment import Moment
from ltsm_jax.models.sundial import Sundial
from ltsm_jax.models.time_moe import TimeMoe
from ltsm_jax.models.timer import Timer
from ltsm_jax.models.timer_hf import TimerHf
from ltsm_jax.models.timer_xl import TimerXL
from ltsm_jax.models.timesfm_1 import TimesFM1
from ltsm_jax.models.timesfm_2p5 import TimesFM2p5
from ltsm_jax.models.timesfm_3 import TimesFM3
from ltsm_jax.models.tirex_2 import TiRex2
from ltsm_jax.models.toto_2 import Toto2
from ltsm_jax.models.ttm import TTM
from ltsm_jax.models.ttm_r3 import TTMR3
from ltsm_jax.models.units import Units

FAMILIES: dict[str, type[Model]] = {
    family.family: family
    for family in (
        Timer,
        TTM,
        TTMR3,
        TimerHf,
        TimesFM1,
        TimesFM2p5,
        TimesFM3,
        ChronosBolt,
        ChronosT5,
        Chronos2,
        Moirai,
        Moirai2,
        MoiraiMoe,
        TimeMoe,
        Moment,
        TimerXL,
        Units,
        Sundial,
        Toto2,
        TiRex2,
    )
}


def _by_preset() -> dict[str, type[Model]]:
    """Every preset's family."""
    found: dict[str, type[Model]] = {}
    for family in FAMILIES.values():
        found |= dict.fromkeys(family.presets(), family)
    return found


def preset(name: str) -> Model:
    """The model of a published preset, without weights.

    Raises: ValueError with the names that may have been meant, or with all that there are.
    """
    known = _by_preset()
    if name not in known:
        near = near_presets(name)
        # All names are a long list, which hides whatever else is wrong.
        meant = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"known: {', '.join(known)}"
        )
        raise ValueError(f"no preset is called {name!r}; {meant}")
    return known[name](known[name].presets()[name])


def near_presets(name: str, more: Iterable[str] = ()) -> list[str]:
    """Names of presets, and of `more`, that may have been meant by `name`: at most three, best
    first, case aside; the owner may be missing or another.
    """
    whole: dict[str, str] = {}
    for known in (*more, *_by_preset()):
        whole |= {known.lower(): known}
        whole.setdefault(known.rpartition("/")[2].lower(), known)
    wanted = name.lower()
    close = [
        *difflib.get_close_matches(wanted, whole, 3, 0.75),
        *difflib.get_close_matches(wanted.rpartition("/")[2], whole, 3, 0.75),
    ]
    return list(dict.fromkeys(whole[key] for key in close))[:3]


__all__ = ["FAMILIES", "Batch", "Forecast", "Model", "Recipe", "near_presets", "preset"]
