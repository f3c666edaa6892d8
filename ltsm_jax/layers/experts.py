"""Mixtures of experts: routing, and gated experts as stacked arrays in four forms that give the
same numbers.

None of the forms has a capacity: every token reaches all experts it is routed to. Milliseconds of
processor time on two cores of a CPU (AMD EPYC) at the width of TimeMoE-50M (D 384, F 768, 8
experts, 2 per token), best of 4, measured interleaved on a machine that other work shared, by
`python -m experiments.benchmarks.experts --tokens 64 512 4096 --repeat 4` (grad: value and gradient
of input and kernels):

    tokens            64             512             4096
              forward   grad  forward   grad  forward    grad
    dense         7.2   22.0     41.9  151.3    395.3  1257.4
    blocks        5.3   47.3     24.1  111.5    146.3   514.4
    turns         3.5   24.6     19.0  107.4    127.8   503.8
    ragged       16.9   51.7     95.3  297.7    880.4  2620.9

The gradients of "turns" are of "dense" or "blocks". On a CPU XLA runs all experts of the ragged
form, masked.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ltsm_jax import sharding
from ltsm_jax.layers.linear import compute_dtype
from ltsm_jax.layers.runtime import Runtime

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [E, D, F], down [E, F, D]
Activation = Callable[[jax.Array], jax.Array]
Form = Literal["auto", "dense", "blocks", "turns", "ragged"]

BLOCK = 128  # most rows of one product in "blocks"
TURN = 8, 64  # least and most rows of one product in "turns"


def route(
    logits_TE: jax.Array, k: int, mask_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k experts of each token: weights [T, k], experts [T, k], and the probabilities [T, E]
    they come from.

    Probabilities are of all experts, in float32; the weights are not normalised again. mask_E:
    factor of each expert's probability before the choice, 0 for pruned ones: the others' weights
    stay what they were, and where fewer than k are left, the rest of the k have weight 0. mask_E
    may be differentiated.
    """
    p_TE = jax.nn.softmax(logits_TE.astype(jnp.float32))
    if mask_E is not None:
        p_TE = p_TE * mask_E.astype(jnp.float32).reshape(1, -1)
    return *jax.lax.top_k(p_TE, k), p_TE


class Experts(nn.Module):
    """The experts of one layer that are there, as stacked arrays gate, up [E, D, F] and down [E, F,
    D].
    """

    d_model: int
    n_experts: int
    ffn_dim: int
    act: Activation
    form: Form = "auto"

    @nn.compact
    def __call__(self, x_TD, weight_TK, chosen_TK, masks: Any = None):
        if not self.n_experts * self.ffn_dim:  # no arrays without values
            return jnp.zeros_like(x_TD)
        dtype = compute_dtype(x_TD)
        into, out = (
            (self.n_experts, self.d_model, self.ffn_dim),
            (self.n_experts, self.ffn_dim, self.d_model),
        )
        gate, up, down = (
            self.param(name, nn.initializers.zeros, shape).astype(dtype)
            for name, shape in (("gate", into), ("up", into), ("down", out))
        )
        return mixture(
            x_TD.astype(dtype),
            (gate, up, down),
            weight_TK,
            chosen_TK,
            self.act,
            form=self.form,
            masks=masks,
            runtime=Runtime.current(),
        )


def mixture(
    x_TD: jax.Array,
    kernels: Kernels,
    weight_TK: jax.Array,
    chosen_TK: jax.Array,
    act: Activation,
    form: Form = "auto",
    masks: Any = None,
    runtime: Runtime | None = None,
) -> jax.Array:
    """Sum over each token's experts of weight * down(act(gate(x)) * up(x)), [T, D].

    masks: of the inputs and outputs of the three products of each expert, {"gate": {"in": [E, D],
    "out": [E, F]}, "up":
    ..., "down": {"in": [E, F], "out": [E, D]}}; with them the form is "dense".

    form: "auto" takes what was fastest where it was measured: on a CPU "turns", whose derivatives
    are those of "blocks", or of "dense" where an expert has less than half a block of tokens on
    average; on a mesh these two themselves; on accelerators, where it was not measured, the
    operation that XLA has for it, "ragged".

    runtime: on a mesh each device computes its own rows of x; None: there is no mesh, and the
    platform is this machine's.
    """
    if masks is not None:
        return _dense(x_TD, kernels, weight_TK, chosen_TK, act, masks)
    runtime = runtime or Runtime()
    mesh, parts = runtime.placement.mesh, runtime.placement.row_parts
    if form == "auto":
        few = _few(chosen_TK.size // parts, kernels[0].shape[0])
        if not runtime.on_cpu:
            form = "ragged"
        elif mesh is None:
            form = "turns"
        else:
            form = "dense" if few else "blocks"
    compute = {"dense": _dense, "blocks": _blocks, "turns": _turns, "ragged": _ragged}[form]
    if mesh is None or form == "dense" or x_TD.shape[0] % parts:  # nothing is sorted in "dense"
        return compute(x_TD, kernels, weight_TK, chosen_TK, act)
    units = "tensor" if kernels[0].shape[2] % mesh.shape["tensor"] == 0 else None

    def own(x_TD, kernels, weight_TK, chosen_TK):
        y_TD = compute(x_TD, kernels, weight_TK, chosen_TK, act)
        return (
            y_TD if units is None else jax.lax.psum(y_TD, units)
        )  # each device has a part of the units F

    into, out, rows = (
        PartitionSpec(None, None, units),
        PartitionSpec(None, units, None),
        sharding.BATCH,
    )
    specs = (rows, (into, into, out), rows, rows)
    spread = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return spread(x_TD, kernels, weight_TK, chosen_TK)


def _few(rows: int, n_experts: int) -> bool:
    """Tell whether gradients of so few routed rows are fastest with every expert on every token."""
    return 2 * rows < BLOCK * n_experts


def _dense(
    x_TD, kernels: Kernels, weight_TK, chosen_TK, act: Activation, masks: Any = None
) -> jax.Array:
    """Every expert on every token, one after another."""
    one_hot_TKE = jax.nn.one_hot(chosen_TK, kernels[0].shape[0])
    weight_ET = (one_hot_TKE * weight_TK[..., None]).sum(1).T.astype(x_TD.dtype)

    def add(y_TD, expert):
        gate_DF, up_DF, down_FD, weight_T, own = expert
        h_TF = act(_product(x_TD, gate_DF, own, "gate")) * _product(x_TD, up_DF, own, "up")
        return y_TD + weight_T[:, None] * _product(h_TF, down_FD, own, "down"), None

    return jax.lax.scan(add, jnp.zeros_like(x_TD), (*kernels, weight_ET, masks))[0]


def _product(x, kernel, masks, name: str) -> jax.Array:
    if masks is None:
        return x @ kernel
    y = (x * masks[name]["in"][None]).astype(x.dtype) @ kernel
    return (y * masks[name]["out"][None]).astype(x.dtype)


def _ragged(x_TD, kernels: Kernels, weight_TK, chosen_TK, act: Activation) -> jax.Array:
    """Each expert on its own tokens: tokens sorted by expert, `jax.lax.ragged_dot`, and back."""
    gate_EDF, up_EDF, down_EFD = kernels
    order_R, sizes_E = _sorted(chosen_TK, gate_EDF.shape[0])
    x_RD = x_TD[order_R // chosen_TK.shape[1]]
    h_RF = act(jax.lax.ragged_dot(x_RD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(
        x_RD, up_EDF, sizes_E
    )
    y_RD = jax.lax.ragged_dot(h_RF, down_EFD, sizes_E)
    return _weighed(y_RD, order_R, jnp.arange(order_R.size), weight_TK)


def _blocks(x_TD, kernels: Kernels, weight_TK, chosen_TK, act: Activation) -> jax.Array:
    """Each expert on its own tokens: tokens sorted by expert, each expert's in blocks of its own,
    one after another.
    """
    (t, d), (e, r) = x_TD.shape, (kernels[0].shape[0], chosen_TK.size)
    block = min(
        max(1 << math.ceil(math.log2(max(r / e, 1))), 8), BLOCK
    )  # no longer than a fair share of the rows
    n = -(-r // block) + e  # blocks: each expert leaves at most one unfilled
    order_R, sizes_E = _sorted(chosen_TK, e)
    blocks_E = -(-sizes_E // block)
    moved_E = (jnp.cumsum(blocks_E) - blocks_E) * block - (
        jnp.cumsum(sizes_E) - sizes_E
    )  # by the gaps before it
    slot_R = jnp.arange(r) + moved_E[chosen_TK.reshape(-1)[order_R]]
    # each slot's token; slots without one read a row of zeros past the last
    token_S = (
        jnp.full(n * block, t, jnp.int32)
        .at[slot_R]
        .set((order_R // chosen_TK.shape[1]).astype(jnp.int32))
    )
    x_NSD = jnp.concatenate([x_TD, jnp.zeros((1, d), x_TD.dtype)])[token_S].reshape(n, block, d)
    expert_N = jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(n), side="right").clip(0, e - 1)

    arrays = [jnp.asarray(kernel) for kernel in kernels]  # one of NumPy takes no traced index

    def one(args):
        x_SD, expert = args
        gate_DF, up_DF, down_FD = (array[expert] for array in arrays)
        return (act(x_SD @ gate_DF) * (x_SD @ up_DF)) @ down_FD

    y_NSD = jax.lax.map(one, (x_NSD, expert_N))
    return _weighed(y_NSD.reshape(n * block, d), order_R, slot_R, weight_TK)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _turns(x_TD, kernels: Kernels, weight_TK, chosen_TK, act: Activation) -> jax.Array:
    """Each expert on its own tokens: experts take their turn, each as often as its tokens need.

    The kernels of an expert are read once, and no block is computed that holds no token. No
    reverse-mode derivative goes through a loop whose number of rounds depends on values, so
    derivatives are of another form.
    """
    e, r = kernels[0].shape[0], chosen_TK.size
    share = max(r / e / 2, 1)  # experts have few tokens more often than many
    block = min(max(1 << math.ceil(math.log2(share)), TURN[0]), TURN[1])

    # Under vmap one after another: batched, a loop would copy all of its output in every round.
    @jax.custom_batching.sequential_vmap
    def compute(x_TD, kernels, weight_TK, chosen_TK):
        order_R, sizes_E = _sorted(chosen_TK, e)
        starts_E = jnp.cumsum(sizes_E) - sizes_E
        x_RD = jnp.pad(x_TD[order_R // chosen_TK.shape[1]], ((0, block), (0, 0)))

        def turn(y_RD, expert):
            gate_DF, up_DF, down_FD, start, size = expert

            def one(i, y_RD):
                # The last block of an expert reaches into the rows of the next ones, which are
                # written after it.
                x_SD = jax.lax.dynamic_slice_in_dim(x_RD, start + i * block, block)
                y_SD = (act(x_SD @ gate_DF) * (x_SD @ up_DF)) @ down_FD
                return jax.lax.dynamic_update_slice_in_dim(y_RD, y_SD, start + i * block, 0)

            return jax.lax.fori_loop(0, -(-size // block), one, y_RD), None

        y_RD, _ = jax.lax.scan(turn, jnp.zeros_like(x_RD), (*kernels, starts_E, sizes_E))
        return _weighed(y_RD, order_R, jnp.arange(r), weight_TK)

    return compute(x_TD, kernels, weight_TK, chosen_TK)


@_turns.defjvp
def _turns_jvp(act, primals, tangents):
    x_TD, kernels, weight_TK, chosen_TK = primals
    form = _dense if _few(chosen_TK.size, kernels[0].shape[0]) else _blocks

    def again(x_TD, kernels, weight_TK):
        return form(x_TD, kernels, weight_TK, chosen_TK, act)

    return jax.jvp(again, (x_TD, kernels, weight_TK), tangents[:-1])


def _sorted(chosen_TK, e: int) -> tuple[jax.Array, jax.Array]:
    """Rows (token, choice) sorted by expert, and how many each expert has."""
    chosen_R = chosen_TK.reshape(-1)
    return jnp.argsort(chosen_R, stable=True), jnp.bincount(chosen_R, length=e)


def _weighed(y_SD, order_R, slot_R, weight_TK) -> jax.Array:
    """Rows back to their tokens, weighed and summed. slot_R: where in y_SD the sorted rows lie."""
    t, k = weight_TK.shape
    # Places are put in order, not rows: rows would be written once more.
    place_R = jnp.zeros_like(slot_R).at[order_R].set(slot_R)
    y_TKD = y_SD[place_R].reshape(t, k, -1)
    return (y_TKD * weight_TK[..., None].astype(y_SD.dtype)).sum(1)
