import jax

from ltsm_jax.methods.binding import ready_for
from ltsm_jax.models.units import Units


def test_what_a_checkpoint_lacks_lies_beside_what_it_has(series):
    model = Units(Units.small())
    loaded = jax.device_put(jax.jit(model.init)(jax.random.key(0)), jax.devices()[0])
    ready, params = ready_for(model, loaded, series)
    assert ready != model and len(jax.tree.leaves(params)) > len(jax.tree.leaves(loaded)), (
        "there are new tokens"
    )
    assert all(leaf.committed for leaf in jax.tree.leaves(params))
