"""Rows that a program takes in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.batches import CHUNK, in_chunks


def doubled(indices):
    return {"twice": 2.0 * indices, "pair": jnp.stack([indices, indices], axis=1)}


@pytest.mark.parametrize("rows, chunks", [(3 * CHUNK, 3), (CHUNK + 1, 1)])
def test_rows_come_back_in_their_order_however_they_are_cut(rows, chunks):
    indices = np.random.default_rng(0).permutation(rows).astype(np.int32)
    seen = []

    def watched(some):
        seen.append(some.shape)
        return doubled(some)

    found = jax.jit(lambda i: in_chunks(watched, i))(indices)
    assert set(seen) == {(rows // chunks,)}
    np.testing.assert_array_equal(found["twice"], 2.0 * indices)
    np.testing.assert_array_equal(found["pair"], np.stack([indices, indices], axis=1))


def test_over_a_mesh_and_on_accelerators_rows_stay_together(monkeypatch):
    rows = jax.ShapeDtypeStruct((2 * CHUNK,), jnp.int32)
    seen = []

    def watched(some):
        seen.append(some.shape)
        return doubled(some)

    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    jax.eval_shape(lambda i: in_chunks(watched, i, Placement(mesh)), rows)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.eval_shape(lambda i: in_chunks(watched, i), rows)
    assert seen == [rows.shape, rows.shape]
