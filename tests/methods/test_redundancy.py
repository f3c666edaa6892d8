import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import trees
from ltsm_jax.data import prepare
from ltsm_jax.data.windows import windows_between
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.methods import redundancy
from ltsm_jax.models import FAMILIES
from ltsm_jax.models.timer import Timer, TimerConfig
from ltsm_jax.sharding import Placement


@pytest.fixture(scope="module")
def relu():
    """A Timer of one layer with two heads, and six ReLU units of which the first never
    is active.
    """
    model = Timer(
        TimerConfig(8, 8, 3, equal_layers(1, 2, 3, 6), context_len=24, horizon=8, activation="relu")
    )
    flat = trees.flatten(model.init(jax.random.key(0)))
    flat["layer_0/up/bias"] = flat["layer_0/up/bias"].at[0].set(-100.0)
    flat["layer_0/attn/out/kernel"] = flat["layer_0/attn/out/kernel"].at[1].multiply(0.05)
    return model, trees.unflatten(flat)


@pytest.fixture(scope="module")
def measured(relu, series):
    """Two parts of four windows, in batches of three and one; the statistics."""
    splits = prepare(series, 24, 8)
    parts = [part.take(np.arange(4)) for part in (splits.train, splits.val)]
    return parts, redundancy.measure(*relu, *parts, batch_size=3, show_progress=False)


def by_hand(model, params, windows):
    """The statistics of the only layer, token by token in float64."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(params).items()}
    shares, whole, units = [], [], []
    for i in range(windows.n):
        _, taps = model.apply(params, windows.gather(jnp.asarray([i]))["context"])
        x_ND = np.asarray(taps["embed"][0], np.float64)
        q, k, v = (
            np.einsum("ND,DHK->HNK", x_ND, p[f"layer_0/attn/{n}/kernel"])
            + p[f"layer_0/attn/{n}/bias"][:, None]
            for n in "qkv"
        )
        for n in range(len(x_ND)):
            total = p["layer_0/attn/out/bias"].copy()
            for h in range(2):
                scores = q[h, n] @ k[h, : n + 1].T / np.sqrt(3)
                w = np.exp(scores - scores.max())
                z = (w / w.sum() @ v[h, : n + 1]) @ p["layer_0/attn/out/kernel"][h]
                total += z
                shares.append(np.linalg.norm(z) / np.linalg.norm(x_ND[n]))
            whole.append(np.linalg.norm(total) / np.linalg.norm(x_ND[n]))
        normed = np.asarray(taps["layer_0/norm1"][0], np.float64)
        units.append(np.maximum(normed @ p["layer_0/up/kernel"] + p["layer_0/up/bias"], 0))
    return np.reshape(shares, (-1, 2)), np.array(whole), np.concatenate(units)


def test_statistics_are_those_computed_by_hand(relu, measured):
    (model, params), (parts, found) = relu, measured
    columns = zip(*(by_hand(model, params, part) for part in parts), strict=True)
    share_TH, whole_T, a_TF = (np.concatenate(column) for column in columns)
    heads, units = found.heads["layer_0/attn"], found.units["layer_0"]
    assert found.tokens == {"layer_0/attn": 24, "layer_0": 24}
    np.testing.assert_allclose(heads.contribution, share_TH.mean(0), rtol=1e-5)
    np.testing.assert_allclose(heads.attention, whole_T.mean(), rtol=1e-5)
    np.testing.assert_allclose(heads.sparse, (share_TH <= 0.05).mean(0), rtol=1e-6)
    assert heads.sparse[1] > 0.5 > heads.sparse[0]
    np.testing.assert_allclose(units.active, (a_TF > 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(units.size, a_TF.mean(0), rtol=1e-5)
    assert units.active[0] == 0.0 and (units.active[1:] > 0).all()


def test_idle_parts_are_masked_where_they_enter_the_next_linear(measured):
    _, found = measured
    ones = {
        "attn": {"out": {"in": jnp.ones((2, 3)), "out": jnp.ones(8)}},
        "down": {"in": jnp.ones(6), "out": jnp.ones(8)},
    }
    limit = float(found.heads["layer_0/attn"].contribution.mean())  # between the two
    masks = redundancy.mask_idle({"layer_0": ones}, found, contribution=limit, active=0.0)[
        "layer_0"
    ]
    np.testing.assert_array_equal(masks["attn"]["out"]["in"], [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(masks["down"]["in"], [0, 1, 1, 1, 1, 1])
    assert (
        masks["attn"]["out"]["out"].all()
        and masks["down"]["out"].all()
        and ones["down"]["in"].all()
    )
    same = redundancy.mask_idle({"layer_0": ones}, found)["layer_0"]
    assert all(leaf.all() for leaf in jax.tree.leaves(same))
    with pytest.raises(ValueError, match="no masks, of layer_0/attn/out/in"):
        redundancy.mask_idle({"layer_0": {"down": ones["down"]}}, found, contribution=0.1)


def test_a_part_is_needed(relu):
    with pytest.raises(ValueError, match="at least one part"):
        redundancy.measure(*relu)


QUICK = ("chronos_2", "chronos_bolt", "time_moe")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_every_family_is_measured_where_it_can_be_pruned(family):
    """Shapes only: each group's modules are found, and called once with the tokens of the layer
    around them.
    """
    model = FAMILIES[family](FAMILIES[family].small())
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    model, params = model.for_series(params, n_variates=3, freq="h", key=jax.random.key(0))
    mode = model.recipe().mode
    length = model.context_len + model.horizon + 1
    windows = windows_between(
        np.zeros((3, length)),
        0,
        length,
        model.context_len,
        model.horizon,
        joint=model.variates == "joint",
    )

    def sums_of(p, w):
        return redundancy._sums(model, mode, p, w.gather(jnp.arange(2)), Placement())

    sums = jax.eval_shape(sums_of, params, windows)
    assert {g.kind for g in model.prunable} - {"experts"} <= {
        "heads" if "sparse" in s else "ffn units" for s in sums.values()
    }
    flat = trees.flatten(params)
    for path, s in sums.items():
        if "sparse" in s:
            assert s["contribution"].shape == flat[f"{path}/out/kernel"].shape[:1]
        else:
            assert s["active"].shape == flat[f"{path}/down/kernel"].shape[:1]


def test_modules_that_no_token_reaches_are_left_out():
    """With one variate there is no exchange between variates."""
    model = FAMILIES["tirex_2"](FAMILIES["tirex_2"].small())
    params = model.init(jax.random.key(0))
    length = model.context_len + model.horizon
    values = np.sin(np.arange(length + 3))[None]
    windows = windows_between(values, 0, length + 3, model.context_len, model.horizon, joint=True)
    found = redundancy.measure(model, params, windows, show_progress=False)
    assert set(found.heads) == {"layer_0/mlstm"}
    assert set(found.units) == {"layer_0", "layer_1"}


def mask(*zeros, of):
    found = np.ones(of, np.float32)
    for at in zeros:
        found[at] = 0
    return found


MASKS = {
    "embed": {"in": mask(of=4), "out": mask(0, of=4)},
    "layer_10": {
        "attn": {
            "q": {"in": mask(0, of=4), "out": mask((0, 0), (0, 1), of=(2, 2))},
            "out": {"in": mask(of=(2, 2)), "out": mask(of=4)},
        }
    },
    "layer_2": {
        "attn": {"q": {"in": mask(of=4), "out": mask((1, 1), of=(2, 2))}},
        "mixture": {
            "experts": {
                "up": {"in": mask((0, 0), of=(2, 4)), "out": mask((0, 0), (1, 0), of=(2, 2))}
            }
        },
        "up": {"in": mask(0, 1, 2, of=4), "out": mask(of=2)},
    },
}


def test_sparsity_of_matrices():
    rows = {
        (r["layer"], r["matrix"]): (r["inputs"], r["outputs"], r["weights"])
        for r in redundancy.sparsity(MASKS)
    }
    assert rows == {
        ("", "embed"): (0, 0.25, 0.25),
        ("layer_2", "attn/q"): (0, 0.25, 0.25),
        ("layer_2", "mixture/experts/up"): (
            0.125,
            0.5,
            pytest.approx(1 - (3 / 4 * 1 / 2 + 1 / 2) / 2),
        ),
        ("layer_2", "up"): (0.75, 0, 0.75),
        ("layer_10", "attn/q"): (0.25, 0.5, 1 - 3 / 4 * 1 / 2),
        ("layer_10", "attn/out"): (0, 0, 0),
    }


def test_heat_map_has_a_row_per_layer_and_a_column_per_matrix():
    layers, matrices, values = redundancy.heat_map(redundancy.sparsity(MASKS))
    assert layers == ["", "layer_2", "layer_10"]
    assert matrices == ["attn/q", "attn/out", "mixture/experts/up", "up", "embed"]
    assert values[2, 0] == 0.625 and np.isnan(values[1, 1])
    assert redundancy.heat_map(redundancy.sparsity(MASKS), "outputs")[2][2, 0] == 0.5
