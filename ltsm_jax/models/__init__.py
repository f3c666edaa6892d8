"""Model families. A family is one file here, one line in this table, and one converter."""

from ltsm_jax.models.chronos_bolt import ChronosBolt
from ltsm_jax.models.chronos_t5 import ChronosT5
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.moirai import Moirai
from ltsm_jax.models.moirai_2 import Moirai2
from ltsm_jax.models.moirai_moe import MoiraiMoe
from ltsm_jax.models.time_moe import TimeMoe
from ltsm_jax.models.timer import Timer
from ltsm_jax.models.timer_hf import TimerHf
from ltsm_jax.models.timer_xl import TimerXL
from ltsm_jax.models.timesfm_1 import TimesFM1
from ltsm_jax.models.timesfm_2p5 import TimesFM2p5
from ltsm_jax.models.ttm import TTM

FAMILIES: dict[str, type[Model]] = {
    family.family: family
    for family in (
        Timer,
        TTM,
        TimerHf,
        TimesFM1,
        TimesFM2p5,
        ChronosBolt,
        ChronosT5,
        Moirai,
        Moirai2,
        MoiraiMoe,
        TimeMoe,
        TimerXL,
    )
}


def preset(name: str) -> Model:
    """The model of a published preset, without weights.

    Raises: ValueError listing the known names.
    """
    known = {p: family for family in FAMILIES.values() for p in family.presets()}
    if name not in known:
        raise ValueError(f"no preset is called {name!r}; known: {', '.join(known)}")
    return known[name](known[name].presets()[name])


__all__ = ["FAMILIES", "Batch", "Forecast", "Model", "Recipe", "preset"]
