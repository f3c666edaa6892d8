"""The key-table engine: strict in both directions, every problem in one error."""

import dataclasses
import mmap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import tables
from converters.tables import (
    BUFFER,
    CONV1,
    COPY,
    DROP,
    SAME,
    TRANSPOSE,
    cut_into,
    split_bias,
    split_in,
    split_out,
    to_params,
    to_state,
)
from converters.torch_files import CheckpointError
from ltsm_jax import trees

HEAD = 3
RULES = [
    (r"blocks\.(\d+)\.(a|b)\.weight", r"layer_\1/\2/kernel", TRANSPOSE),
    (r"blocks\.(\d+)\.q\.weight", r"layer_\1/q/kernel", split_out(HEAD)),
    (r"blocks\.(\d+)\.q\.bias", r"layer_\1/q/bias", split_bias(HEAD)),
    (r"blocks\.(\d+)\.o\.weight", r"layer_\1/o/kernel", split_in(HEAD)),
    (r"blocks\.(\d+)\.conv\.weight", r"layer_\1/conv/kernel", CONV1),
    (r"scale", "scale", SAME),
    (r"table", BUFFER, "fixed"),
    (r".*\.inv_freq", DROP, "recomputed"),
]


def a_state(layers=1, d=4, heads=2, f=5, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"scale": ()}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{n}.weight": (f, d) for n in "ab"} | {
            f"blocks.{i}.conv.weight": (f, d, 1)
        }
        shapes |= {f"blocks.{i}.q.weight": (heads * HEAD, d), f"blocks.{i}.q.bias": (heads * HEAD,)}
        shapes |= {f"blocks.{i}.o.weight": (d, heads * HEAD)}
    return {key: np.asarray(rng.normal(size=shape), np.float32) for key, shape in shapes.items()}


def the_shapes(layers=1, d=4, heads=2, f=5):
    flat = {"scale": ()}
    for i in range(layers):
        flat |= {f"layer_{i}/{n}/kernel": (d, f) for n in ("a", "b", "conv")}
        flat |= {f"layer_{i}/q/kernel": (d, heads, HEAD), f"layer_{i}/q/bias": (heads, HEAD)}
        flat |= {f"layer_{i}/o/kernel": (heads, HEAD, d)}
    return trees.unflatten({k: jax.ShapeDtypeStruct(v, np.float32) for k, v in flat.items()})


sizes = st.fixed_dictionaries({k: st.integers(1, 4) for k in ("layers", "d", "heads", "f")})


@given(sizes=sizes, seed=st.integers(0, 99))
def test_a_table_read_forwards_and_backwards_is_the_identity(sizes, seed):
    state = a_state(**sizes, seed=seed)
    extra = {"table": np.arange(3), "x.inv_freq": np.zeros(2, np.float64)}
    found = to_params(RULES, state | extra, the_shapes(**sizes), what="m", allow_cast=True)
    assert found.dropped == {"x.inv_freq": "recomputed", "table": "not a parameter: fixed"}
    assert list(found.buffers) == ["table"]
    back, wider = to_state(RULES, found.params)
    assert not wider and set(back) == set(state)
    for key, value in state.items():
        assert back[key].shape == value.shape and back[key].tobytes() == value.tobytes(), key


def test_heads_are_split_as_the_original_views_them():
    x = np.arange(24, dtype=np.float32).reshape(6, 4)  # [H*K, D]
    y = split_out(3).forward(x)
    assert y.shape == (4, 2, 3) and y[1, 1, 2] == x[1 * 3 + 2, 1]
    z = split_in(3).forward(x.T)
    assert z.shape == (2, 3, 4) and z[1, 2, 1] == x.T[1, 1 * 3 + 2]


def test_arrays_have_memory_of_their_own_which_jax_takes_over_without_a_copy():
    state = a_state()
    found = to_params(RULES, state, the_shapes(), what="m")
    for leaf in jax.tree.leaves(found.params):
        assert not any(np.shares_memory(leaf, x) for x in state.values())
        assert leaf.flags.writeable and leaf.ctypes.data % 64 == 0
        if jax.default_backend() == "cpu":
            assert np.shares_memory(leaf, np.asarray(jax.device_put(leaf)))


def test_a_mapped_tensor_is_let_go_of_and_reads_the_same_again(tmp_path):
    values = np.arange(1 << 18, dtype=np.float32)
    (tmp_path / "x").write_bytes(values.tobytes())
    with open(tmp_path / "x", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.ndarray(values.shape, np.float32, memoryview(mapped))
    assert array.sum() == values.sum()
    before = resident()
    tables.forget(array[: 1 << 17])
    tables.forget(values)  # lies elsewhere
    tables.forget(np.zeros(0))
    assert before - resident() > 300_000 or before == 0
    np.testing.assert_array_equal(array, values)


def resident():
    """Bytes of mapped files in memory; 0 where that cannot be known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("RssFile")]
    return 1024 * int(line.split()[1])


def test_every_problem_stands_in_one_error():
    state = a_state(layers=2)
    del state["scale"]
    state["scales"] = np.ones((), np.float32)
    state["blocks.0.a.weight"] = np.zeros((5, 7), np.float32)
    state["blocks.0.q.weight"] = np.zeros((7, 4), np.float32)
    state["blocks.0.conv.weight"] = np.zeros((5, 4, 2), np.float32)
    state["blocks.1.q.bias"] = np.ones(6)
    state["blocks.1.b.weight"] = np.full((5, 4), np.nan, np.float32)
    state["blocks.1.a.weight"] = "text"
    state["blocks.2.a.weight"] = np.zeros((5, 4), np.float32)
    with pytest.raises(CheckpointError) as error:
        to_params(
            RULES,
            state,
            the_shapes(layers=2),
            what="file.pth: model",
            hints={"/q/": "check n_heads"},
        )
    lines = str(error.value).split("\n  ")
    assert lines[0] == "file.pth: model: the checkpoint does not fit:"
    for expected in (
        "'scales': no rule matches (did it mean 'scale'?)",
        "layer_0/a/kernel: checkpoint (7, 5), model (4, 5), from 'blocks.0.a.weight'",
        "layer_0/q/kernel: checkpoint (7, 4) (does not split outputs into heads of 3), model (4, "
        "2, 3), from 'blocks.0.q.weight' (check n_heads)",
        "layer_0/conv/kernel: checkpoint (5, 4, 2) (three axes expected, the last of length 1), "
        "model (4, 5), from 'blocks.0.conv.weight'",
        "'blocks.1.q.bias': float64 would be rounded to float32, and is not unless a cast is "
        "allowed (--allow-cast)",
        "'blocks.1.b.weight': 20 of 20 values are NaN, infinite or too large for float32",
        "'blocks.1.a.weight': not a tensor but 'str'",
        "'blocks.2.a.weight': the model has no layer_2/a/kernel",
        "scale: missing in the checkpoint (its key would be 'scale')",
        "layer_1/a/kernel: missing in the checkpoint (its key would be 'blocks.1.a.weight')",
    ):
        assert expected in lines
    assert len(lines) == 11


def test_two_rules_for_a_key_and_two_keys_for_a_parameter():
    rules = [*RULES, (r"sc.*", "other", SAME), (r"copy", "layer_0/a/kernel", TRANSPOSE)]
    state = a_state() | {"copy": np.zeros((5, 4), np.float32)}
    with pytest.raises(CheckpointError, match="'scale': several rules match") as error:
        to_params(rules, state, the_shapes(), what="m")
    assert "'copy': writes layer_0/a/kernel, which 'blocks.0.a.weight' has written already" in str(
        error.value
    )


def test_a_hostile_number_of_problems_gives_a_bounded_message():
    state = a_state() | {f"{i}" * 5000: np.zeros(1, np.float32) for i in range(1000)}
    with pytest.raises(CheckpointError, match=r"\.\.\. and 98\d more") as error:
        to_params(RULES, state, the_shapes(), what="m")
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly_and_goes_back(dtype):
    state = {k: v.astype(dtype) for k, v in a_state().items()}
    found = to_params(RULES, state, the_shapes(), what="m")
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    back, wider = to_state(RULES, found.params, found.dtypes)
    assert not wider and all(
        back[k].dtype == dtype and back[k].tobytes() == state[k].tobytes() for k in state
    )
    found.params["scale"] = np.float32(1 / 3)
    back, wider = to_state(RULES, found.params, np.dtype(dtype).name)
    assert (
        wider == ["scale"]
        and back["scale"].dtype == np.float32
        and back["scale"] == np.float32(1 / 3)
    )


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.bool_])
def test_other_types_are_refused_unless_a_cast_is_allowed(dtype):
    state = {k: np.asarray(np.round(v), dtype) for k, v in a_state().items()}
    with pytest.raises(CheckpointError, match="rounded to float32") as error:
        to_params(RULES, state, the_shapes(), what="m")
    assert all(key in str(error.value) for key in state)
    found = to_params(RULES, state, the_shapes(), what="m", allow_cast=True)
    expected = state["blocks.0.a.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(found.params["layer_0"]["a"]["kernel"], expected)
    assert set(found.dtypes.values()) == {np.dtype(dtype).name}


def test_values_that_float32_can_not_hold_are_refused_even_with_a_cast():
    state = {k: v.astype(np.float64) for k, v in a_state().items()} | {
        "scale": np.float64(1e300).reshape(())
    }
    state["scale"] = np.array(1e300)
    with pytest.raises(
        CheckpointError, match="'scale': 1 of 1 values are NaN, infinite or too large"
    ):
        to_params(RULES, state, the_shapes(), what="m", allow_cast=True)
    complex_state = a_state() | {"scale": np.array(1j)}
    with pytest.raises(CheckpointError, match="'scale': complex numbers"):
        to_params(RULES, complex_state, the_shapes(), what="m", allow_cast=True)


def test_parameters_that_the_original_does_not_have_are_not_exported():
    with pytest.raises(ValueError, match=r"no place for these parameters:\n  adapter/kernel"):
        to_state(
            RULES,
            {"adapter": {"kernel": np.zeros(2, np.float32)}, "scale": np.ones((), np.float32)},
        )


def test_key_of_reads_a_table_backwards():
    assert tables.key_of(RULES, "layer_12/b/kernel") == ("blocks.12.b.weight", TRANSPOSE)
    assert tables.key_of(RULES, "layer_x/b/kernel") is None


def test_a_fused_tensor_is_several_parameters():
    rules = [(r"blocks\.(\d+)\.qkv\.weight", r"layer_\1/{q,k,v}/kernel", split_out(2))]
    fused = np.arange(3 * 4 * 5, dtype=np.float32).reshape(
        12, 5
    )  # q | k | v, two heads of width 2 each
    paths = [f"layer_0/{name}/kernel" for name in "qkv"]
    shapes = trees.unflatten({path: jax.ShapeDtypeStruct((5, 2, 2), np.float32) for path in paths})
    found = to_params(rules, {"blocks.0.qkv.weight": fused}, shapes, what="m")
    np.testing.assert_array_equal(
        found.params["layer_0"]["k"]["kernel"], fused[4:8].T.reshape(5, 2, 2)
    )
    (back,) = to_state(rules, found.params)[0].items()
    assert back[0] == "blocks.0.qkv.weight" and tables.same_bytes(back[1], fused)
    assert tables.key_of(rules, "layer_3/v/kernel") == ("blocks.3.qkv.weight", rules[0][2])
    with pytest.raises(CheckpointError, match=r"\(11, 5\) is not 3 equal parts"):
        to_params(rules, {"blocks.0.qkv.weight": fused[:11]}, shapes, what="m")
    with pytest.raises(CheckpointError, match="layer_0/v/kernel: missing in the checkpoint"):
        to_params(rules, {}, shapes, what="m")


def test_one_tensor_cut_into_parts_of_different_lengths():
    """Of each part a transform of its own, as of queries and values of different widths."""
    cut = cut_into((6, split_out(3)), (3, split_out(3)), (4, split_out(4)))
    rules = [(r"blocks\.(\d+)\.qkv\.weight", r"layer_\1/{q,k,v}/kernel", cut)]
    shapes = {"q": (5, 2, 3), "k": (5, 1, 3), "v": (5, 1, 4)}
    flat = {
        f"layer_0/{name}/kernel": jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in shapes.items()
    }
    state = {"blocks.0.qkv.weight": np.arange(65, dtype=np.float32).reshape(13, 5)}
    params = to_params(rules, state, trees.unflatten(flat), what="m").params
    np.testing.assert_array_equal(
        params["layer_0"]["k"]["kernel"][:, 0], state["blocks.0.qkv.weight"][6:9].T
    )
    np.testing.assert_array_equal(
        params["layer_0"]["v"]["kernel"][:, 0], state["blocks.0.qkv.weight"][9:].T
    )
    back, _ = to_state(rules, params)
    assert tables.same_bytes(back["blocks.0.qkv.weight"], state["blocks.0.qkv.weight"])
    with pytest.raises(
        CheckpointError, match=r"\(12, 5\) is not cut into \[6, 3, 4\] \(check heads\)"
    ):
        short = {"blocks.0.qkv.weight": np.zeros((12, 5), np.float32)}
        to_params(rules, short, trees.unflatten(flat), what="m", hints={"/q/": "check heads"})


STACKED = [
    (r"layers\.(\d+)\.experts\.(\d+)\.(up|down)\.weight", r"layer_\1/experts/\3[\2]", TRANSPOSE),
    (r"layers\.(\d+)\.gate\.weight", r"layer_\1/gate/kernel", TRANSPOSE),
]


def stacked_state(experts=3, d=4, f=5):
    rng = np.random.default_rng(1)
    shapes = {f"layers.{i}.experts.{e}.up.weight": (f, d) for i in range(2) for e in range(experts)}
    shapes |= {
        f"layers.{i}.experts.{e}.down.weight": (d, f) for i in range(2) for e in range(experts)
    }
    shapes |= {f"layers.{i}.gate.weight": (experts, d) for i in range(2)}
    return {key: np.asarray(rng.normal(size=shape), np.float32) for key, shape in shapes.items()}


def stacked_shapes(experts=3, d=4, f=5):
    sizes = {
        "experts/up": (experts, d, f),
        "experts/down": (experts, f, d),
        "gate/kernel": (d, experts),
    }
    flat = {f"layer_{i}/{name}": shape for i in range(2) for name, shape in sizes.items()}
    return trees.unflatten({k: jax.ShapeDtypeStruct(v, np.float32) for k, v in flat.items()})


def test_tensors_of_many_keys_are_stacked_and_taken_apart():
    state = stacked_state(experts=12)  # "10" comes after "9", not after "1"
    found = to_params(STACKED, state, stacked_shapes(experts=12), what="m")
    for i in range(2):
        for e in (0, 9, 10, 11):
            stacked = found.params[f"layer_{i}"]["experts"]["up"]
            np.testing.assert_array_equal(stacked[e], state[f"layers.{i}.experts.{e}.up.weight"].T)
    back, wider = to_state(STACKED, found.params)
    assert not wider and back.keys() == state.keys()
    assert all(tables.same_bytes(back[key], value) for key, value in state.items())
    assert tables.key_of(STACKED, "layer_1/experts/down[2]") == (
        "layers.1.experts.2.down.weight",
        TRANSPOSE,
    )


def test_a_missing_surplus_or_misshapen_part_of_a_stack_is_named():
    state = stacked_state()
    del state["layers.0.experts.1.up.weight"]
    state["layers.0.experts.3.up.weight"] = np.zeros((5, 4), np.float32)
    state["layers.1.experts.2.down.weight"] = np.zeros((4, 6), np.float32)
    state["layers.1.experts.02.up.weight"] = np.zeros((5, 4), np.float32)
    with pytest.raises(CheckpointError) as error:
        to_params(STACKED, state, stacked_shapes(), what="m")
    lines = str(error.value).split("\n  ")
    for expected in (
        "layer_0/experts/up[1]: missing in the checkpoint (its key would be "
        "'layers.0.experts.1.up.weight')",
        "'layers.0.experts.3.up.weight': the model has no layer_0/experts/up[3]",
        "layer_1/experts/down[2]: checkpoint (6, 4), model (5, 4), from "
        "'layers.1.experts.2.down.weight'",
        "'layers.1.experts.02.up.weight': the model has no layer_1/experts/up[02]",
    ):
        assert expected in lines, str(error.value)
    assert len(lines) == 5


COPIES = [
    (r"shared\.(\d+)", r"layer_\1/kernel", TRANSPOSE),
    (r"(encoder|decoder)\.(\d+)", COPY, r"shared.\2"),
]
TWO_LAYERS = trees.unflatten(
    {f"layer_{i}/kernel": jax.ShapeDtypeStruct((3, 2), np.float32) for i in range(2)}
)


def shared(layer):
    return np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * layer


def test_copies_go_to_their_own_source_and_stand_in_for_a_missing_one():
    state = {
        f"{name}.{i}": shared(i) for name in ("encoder", "shared", "decoder") for i in range(2)
    }
    del state["shared.1"]
    found = to_params(COPIES, state, TWO_LAYERS, what="m")
    assert found.copies == {
        f"{name}.{i}": f"shared.{i}" for name in ("encoder", "decoder") for i in range(2)
    }
    assert found.dropped["encoder.1"] == "the same tensor as shared.1"
    for i in range(2):
        np.testing.assert_array_equal(found.params[f"layer_{i}"]["kernel"], shared(i).T)
    assert set(to_state(COPIES, found.params)[0]) == {"shared.0", "shared.1"}


@pytest.mark.parametrize("other", ["values", "dtype", "shape", "object"])
def test_a_copy_that_differs_is_refused(other):
    state = {"shared.0": shared(0), "shared.1": shared(1), "encoder.1": shared(1)}
    wrong = {
        "values": shared(2),
        "dtype": shared(1).astype(np.float64),
        "shape": shared(1)[:1],
        "object": "text",
    }
    with pytest.raises(
        CheckpointError,
        match=r"'encoder\.1': differs from 'shared\.1', of which it should be a copy",
    ):
        to_params(COPIES, state | {"encoder.1": wrong[other]}, TWO_LAYERS, what="m")


def test_two_copies_of_a_missing_source_that_differ_are_refused():
    state = {"shared.0": shared(0), "encoder.1": shared(1), "decoder.1": shared(0)}
    with pytest.raises(CheckpointError, match=r"'decoder\.1': differs from 'shared\.1'"):
        to_params(COPIES, state, TWO_LAYERS, what="m")


def test_a_tensor_that_is_kept_may_be_wider_and_keeps_its_bytes():
    rules = [
        (r"centroid", "centroid", dataclasses.replace(SAME, keep=True)),
        (r"scale", "scale", SAME),
    ]
    shapes = {name: jax.ShapeDtypeStruct((3,), np.float32) for name in ("centroid", "scale")}
    exact = np.array([1 / 3, 2 / 3, 1e-20])
    state = {"centroid": exact, "scale": np.ones(3, np.float32)}
    found = to_params(rules, state, shapes, what="m")
    assert (
        found.params["centroid"].dtype == np.float32
        and found.buffers["centroid"].tobytes() == exact.tobytes()
    )
    np.testing.assert_array_equal(found.params["centroid"], exact.astype(np.float32))
    with pytest.raises(CheckpointError, match="'scale': float64 would be rounded"):
        to_params(rules, state | {"scale": exact}, shapes, what="m")
    with pytest.raises(CheckpointError, match=r"'centroid': 1 of 3 values are NaN"):
        to_params(rules, state | {"centroid": np.array([1.0, np.nan, 0.0])}, shapes, what="m")


@given(seed=st.integers(0, 99), layers=st.integers(1, 3), experts=st.integers(1, 12))
def test_slots_of_any_number_go_in_and_out(seed, layers, experts):
    rules = [
        (r"l\.(\d+)\.experts\.(\d+)\.up\.weight", r"layer_\1/experts/up/kernel[\2]", TRANSPOSE)
    ]
    rng = np.random.default_rng(seed)
    keys = [f"l.{i}.experts.{j}.up.weight" for i in range(layers) for j in range(experts)]
    rng.shuffle(keys)
    state = {key: rng.normal(size=(2, 3)).astype(np.float32) for key in keys}
    shape = jax.ShapeDtypeStruct((experts, 3, 2), np.float32)
    shapes = trees.unflatten({f"layer_{i}/experts/up/kernel": shape for i in range(layers)})
    found = to_params(rules, state, shapes, what="m")
    back, _ = to_state(rules, found.params)
    assert set(back) == set(state) and all(
        back[key].tobytes() == state[key].tobytes() for key in state
    )
    surplus = {f"l.0.experts.{experts}.up.weight": state[keys[0]]}
    with pytest.raises(
        CheckpointError, match=rf"the model has no layer_0/experts/up/kernel\[{experts}\]"
    ):
        to_params(rules, state | surplus, shapes, what="m")
