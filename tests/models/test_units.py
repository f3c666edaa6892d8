"""UniTS: whose tokens speak for a data set."""

import dataclasses

import jax
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.models.units import Units, UnitsTask

MODEL = Units(Units.small())


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_tokens_belong_to_a_number_of_variates(params):
    ready, same = MODEL.for_series(params, n_variates=2)
    assert ready is MODEL
    assert same is params

    # Another data set of the checkpoint, where it forecasts that many.
    other = UnitsTask("LTF_c", "long_term_forecast", "c", 40, 16, 4)
    wide = Units(dataclasses.replace(MODEL.config, tasks=(*MODEL.config.tasks, other)))
    ready, same = wide.for_series(params, n_variates=4)
    assert ready.config.current == "c"
    assert same is params


def test_new_tokens_are_drawn_on_request_alone(params):
    with pytest.raises(
        ValueError, match=r"no tokens for 5 variates; its data sets are a \(2\), b \(3\)"
    ) as told:
        MODEL.for_series(params, n_variates=5)

    # The advice works as it stands.
    advice = str(told.value).partition(" with: ")[2]
    ready, grown = eval(f"model.{advice}", {"model": MODEL, "params": params, "jax": jax})
    old, new = trees.flatten(params), trees.flatten(grown)
    assert new.keys() - old.keys() == {"prompt_tokens/data_5", "mask_tokens/data_5"}
    for path, leaf in old.items():
        np.testing.assert_array_equal(new[path], leaf)

    # Once drawn, and tuned, they are what such data gets: nothing is drawn again.
    assert ready.for_series(grown, n_variates=5)[1] is grown
    back, _ = ready.for_series(grown, n_variates=2)
    assert back.config.current == "a"
    assert back.for_series(grown, n_variates=5)[0] == ready
