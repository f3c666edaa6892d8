"""Windows of a series, gathered on the device, and the order in which training sees them.

The series lies on the device once, `[C, T]` float32; a window is a (variate, first row) pair, and a
batch is a vector of window numbers. Nothing but those numbers moves during training, and they are a
pure function of (key, epoch, batch): a resumed run needs no loader state to see the same batches in
the same order.

A series too large for every device to hold is spread over the devices of a mesh (`Windows.over`).

Shapes: B batch, C variates, T rows of the series, L context rows, H horizon rows, N windows, P
parts of a series.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ltsm_jax import sharding

WHOLE_BYTES = 2**28  # a smaller series lies whole on every device: each then cuts its windows alone
LIMIT = 10.0  # targets that many deviations of their context away count no more than such


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A table of windows over one series; a pytree, to be passed to jitted functions as an
    argument.

    Attributes:
      values: [C, T] float32, in the units in which the model is trained and scored (`prepare` gives
        scaled units); an array of the device or, mapped from a file, of the host, until `over`
        places it.
      starts: [N] int32, first context row of each window.
      rows: [N] int32, the variate of each window; None when every window holds all variates
        (`joint`).
      context_len, horizon: L and H; static under jit.
      columns, timestamps: names and stamps for `describe`. They stay on the host: inside jit they
        are empty.
      n_past, n_known: how many of the last rows of `values` are covariates: of joint windows those
        of the past, then those that are known ahead. Static under jit.
    """

    values: jax.Array
    starts: jax.Array
    rows: jax.Array | None
    context_len: int
    horizon: int
    columns: tuple[str, ...] = ()
    timestamps: np.ndarray | None = None
    n_past: int = 0
    n_known: int = 0

    def __post_init__(self):
        if self.rows is not None and self.n_past + self.n_known:
            raise ValueError("covariates go with windows of all variates (joint)")

    @property
    def n(self) -> int:
        """Number of windows N."""
        return self.starts.shape[0]

    @property
    def joint(self) -> bool:
        """Whether a window holds all C variates (else one)."""
        return self.rows is None

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """The windows numbered `indices` [B] (each in [0, N)) as a batch, inside or outside jit.

        Returns: {"context": [B, 1, L], "target": [B, 1, H]}; [B, C, L] and [B, C, H] when joint.
          With covariates also "past" [B, n_past, L] and "known" [B, n_known, L + H], see
          `models.family.Batch`.
        """
        return self._as_batch(self._cut(indices))

    def _cut(self, indices: jax.Array) -> jax.Array:
        """All rows [B, C, L + H] of the windows numbered `indices`."""
        starts_B = self.starts[indices]
        if self.rows is None:
            size = (self.values.shape[0], self.context_len + self.horizon)
            return jax.vmap(lambda t: jax.lax.dynamic_slice(self.values, (0, t), size))(starts_B)
        size = (1, self.context_len + self.horizon)
        cut = jax.vmap(lambda c, t: jax.lax.dynamic_slice(self.values, (c, t), size))
        return cut(self.rows[indices], starts_B)

    def _as_batch(self, x_BCT: jax.Array) -> dict[str, jax.Array]:
        """Take context, target and covariates out of whole windows."""
        covariates = {}
        if self.n_past + self.n_known:
            targets = x_BCT.shape[1] - self.n_past - self.n_known
            x_BCT, past, known = jnp.split(x_BCT, (targets, targets + self.n_past), axis=1)
            if self.n_past:
                covariates["past"] = past[..., : self.context_len]
            if self.n_known:
                covariates["known"] = known
        return {
            "context": x_BCT[..., : self.context_len],
            "target": x_BCT[..., self.context_len :],
        } | covariates

    def take(self, indices: np.ndarray) -> "Windows":
        """The same series with only the windows numbered `indices`, in that order."""
        rows = None if self.rows is None else self.rows[indices]
        return dataclasses.replace(self, starts=self.starts[indices], rows=rows)

    def over(self, mesh: Mesh | None) -> "Windows":
        """The same windows where the devices can cut them: to be called once, before the steps that
        do.

        On a mesh the series lies whole on every device, or, from `WHOLE_BYTES` on, in parts
        (`Spread`), and of a series mapped from a file each host reads only what its devices hold.
        All hosts call.
        """
        if mesh is None:
            return (
                self._apart()
                if self._few()
                else dataclasses.replace(self, values=jnp.asarray(self.values))
            )
        if self.values.nbytes < WHOLE_BYTES:
            return sharding.Placement(mesh).replicate(self)
        return _spread(self, mesh)

    def _few(self) -> bool:
        """Tell whether the windows, cut apart, take less memory than the series."""
        return not self.joint and self.n * (self.context_len + self.horizon) < self.values.size

    def _apart(self) -> "Windows":
        """Cut the windows apart: a series of its own for each, `values` [N, L + H].

        Batches are the same bits. What is compiled depends on the number of windows and no longer
        on the series, so that runs with as many windows of several data sets share it.
        """
        steps_S = np.arange(self.context_len + self.horizon)
        at_NS = np.asarray(self.starts)[:, None] + steps_S
        # Of a series mapped from a file only the windows are read.
        values_NS = jnp.asarray(self.values[np.asarray(self.rows)[:, None], at_NS])
        starts, rows = jnp.zeros(self.n, jnp.int32), jnp.arange(self.n, dtype=jnp.int32)
        return dataclasses.replace(self, values=values_NS, starts=starts, rows=rows)

    def describe(self, i: int) -> dict[str, Any]:
        """Describe the place of window `i`, for reports and error messages (host only).

        Returns: {"window", "variate" (None when joint), "column", "start", "target_start", "stop"}
        with rows counted in the series, `stop` exclusive; with stamps known also {"first",
        "target_first", "last"}.
        """
        if not 0 <= i < self.n:
            raise ValueError(f"window {i} does not exist: there are {self.n}, counted from 0")
        start = int(self.starts[i])
        variate = None if self.rows is None else int(self.rows[i])
        where = {
            "window": int(i),
            "variate": variate,
            "column": self.columns[variate] if variate is not None and self.columns else None,
            "start": start,
            "target_start": start + self.context_len,
            "stop": start + self.context_len + self.horizon,
        }
        if self.timestamps is not None:
            stamps = self.timestamps
            where |= {
                "first": str(stamps[start].item()),
                "target_first": str(stamps[where["target_start"]].item()),
                "last": str(stamps[where["stop"] - 1].item()),
            }
        return where


jax.tree_util.register_dataclass(
    Windows,
    data_fields=["values", "starts", "rows"],
    meta_fields=["context_len", "horizon", "n_past", "n_known"],
    drop_fields=[
        "columns",
        "timestamps",
    ],  # host-only: they are no part of a compiled function's key
)


@dataclasses.dataclass(frozen=True, eq=False)
class Spread(Windows):
    """`Windows` over a series of which each of the P devices of a mesh holds one part.

    Attributes:
      values: [P, C, S + L + H - 1]: part p has rows p * S and following, and so all windows that
        begin in its S rows.
      mesh: over whose devices axis 0 is split; static under jit.
    """

    mesh: Mesh | None = None

    def over(self, mesh: Mesh | None) -> "Spread":
        """Itself: it lies on its mesh. Raises: ValueError for another one."""
        if mesh != self.mesh:
            raise ValueError("these windows lie on another mesh: place those they were made of")
        return self

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """As `Windows.gather`, bit for bit: each device cuts what begins in its part, and the rows
        of the batch that are each device's come together there.
        """
        assert self.mesh is not None
        mesh, width, b = self.mesh, self.context_len + self.horizon, len(indices)
        part_len = self.values.shape[2] - width + 1

        def own(values, starts, rows, indices):
            first = part_len * jax.lax.axis_index(mesh.axis_names)
            starts_B = starts[indices] - first
            mine_B = (starts_B >= 0) & (starts_B < part_len)
            rows_B = None if rows is None else rows[indices]
            here = Windows(
                values=values[0],
                starts=starts_B,
                rows=rows_B,
                context_len=self.context_len,
                horizon=self.horizon,
            )
            x_BCT = here._cut(
                jnp.arange(len(indices))
            )  # of starts elsewhere some rows or other, which go to 0
            x_BCT = jnp.where(mine_B[:, None, None], x_BCT, 0.0)
            x_BCT = jax.lax.psum(x_BCT, "tensor")
            return jax.lax.psum_scatter(x_BCT, ("data", "fsdp"), scatter_dimension=0, tiled=True)

        whole = PartitionSpec()
        cut = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(PartitionSpec(mesh.axis_names), whole, whole, whole),
            out_specs=sharding.BATCH,
        )
        surplus = -b % sharding.Placement(mesh).row_parts
        x_BCT = cut(self.values, self.starts, self.rows, jnp.pad(indices, (0, surplus)))[:b]
        return self._as_batch(x_BCT)


jax.tree_util.register_dataclass(
    Spread,
    data_fields=["values", "starts", "rows"],
    meta_fields=["context_len", "horizon", "mesh", "n_past", "n_known"],
    drop_fields=["columns", "timestamps"],
)


def _spread(windows: Windows, mesh: Mesh) -> Spread:
    c, t = windows.values.shape
    parts, more = mesh.size, windows.context_len + windows.horizon - 1
    part_len = -(-t // parts)
    values = np.asarray(windows.values)  # of a mapped file: no row is read yet

    def part(index: Any) -> np.ndarray:
        first = index[0].indices(parts)[0] * part_len
        rows = values[:, first : first + part_len + more]
        return np.pad(rows, ((0, 0), (0, part_len + more - rows.shape[1])))[None]

    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    spread = jax.make_array_from_callback((parts, c, part_len + more), split, part)
    table = sharding.Placement(mesh).replicate({"starts": windows.starts, "rows": windows.rows})
    return Spread(
        spread,
        table["starts"],
        table["rows"],
        context_len=windows.context_len,
        horizon=windows.horizon,
        mesh=mesh,
        n_past=windows.n_past,
        n_known=windows.n_known,
    )


def context_scale(x: Any) -> tuple[Any, Any]:
    """(mean, std) [..., 1] of the observed values of `x` [..., T], which a model sees as (x - mean)
    / std.

    A context that does not move, but for rounding, has its own size as std, or 1 where it is zero,
    so that a forecast does not depend on the unit. One without any observed value has mean 0 and
    std 1. Works on NumPy and JAX arrays of any float dtype and size: squares are taken of values of
    at most 1.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    observed = ~xp.isnan(x)
    known = xp.where(observed, x, 0.0)
    count = xp.maximum(observed.sum(axis=-1, keepdims=True), 1)

    # Of the values relative to the largest: squares of 1e200 are infinite, those of 1e-200 zero.
    size = xp.abs(known).max(axis=-1, keepdims=True)
    size = xp.where(size > 0, size, 1.0)
    small = known / size
    mean = small.sum(axis=-1, keepdims=True) / count
    centred = xp.where(observed, small - mean, 0.0)
    std = xp.sqrt(xp.square(centred).sum(axis=-1, keepdims=True) / count)

    rounding = 16 * float(jnp.finfo(x.dtype).eps)
    return mean * size, xp.where(std > rounding, std, 1.0) * size


def scaled_covariates(x: Any, length: int) -> Any:
    """Covariates [..., T] by mean and deviation of what is observed of their first `length` steps,
    float32.

    One that does not move there is only moved to 0: its size says nothing about its future. Works
    on NumPy and JAX arrays.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    seen = x[..., :length]
    missing = xp.isnan(seen)
    mean, std = context_scale(seen)
    low = xp.where(missing, xp.inf, seen).min(axis=-1, keepdims=True)
    high = xp.where(missing, -xp.inf, seen).max(axis=-1, keepdims=True)
    return ((x - mean) / xp.where(high > low, std, 1.0)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class OwnScale:
    """Windows of which each is standardised by its own context, see `context_scale`; targets are
    cut at `LIMIT`.

    What training on a table sees, as what a forecast of it sees: no row outside a window has a say
    in it. A pytree like `Windows`; stands in for it wherever `n`, `gather`, `over` and the tables
    are all that is asked for.
    """

    windows: Windows

    @property
    def n(self) -> int:
        """Number of windows."""
        return self.windows.n

    @property
    def horizon(self) -> int:
        """Rows of a target."""
        return self.windows.horizon

    @property
    def starts(self) -> jax.Array:
        """First context row of each window."""
        return self.windows.starts

    def take(self, indices: np.ndarray) -> "OwnScale":
        """As `Windows.take`."""
        return OwnScale(self.windows.take(indices))

    def over(self, mesh: Mesh | None) -> "OwnScale":
        """As `Windows.over`."""
        return OwnScale(self.windows.over(mesh))

    def describe(self, i: int) -> dict[str, Any]:
        """As `Windows.describe`."""
        return self.windows.describe(i)

    def gather(self, indices: jax.Array) -> dict[str, jax.Array]:
        """As `Windows.gather`, standardised per window and variate; covariates by
        `scaled_covariates`.
        """
        batch = self.windows.gather(indices)
        length = batch["context"].shape[-1]
        for name in ("past", "known"):
            if name in batch:
                batch[name] = scaled_covariates(batch[name], length)
        mean, std = context_scale(batch["context"])
        context = (batch["context"] - mean) / std
        target = (batch["target"] - mean) / std
        return batch | {"context": context, "target": jnp.clip(target, -LIMIT, LIMIT)}


jax.tree_util.register_dataclass(OwnScale, data_fields=["windows"], meta_fields=[])


def observed_in(values: np.ndarray, windows: Windows) -> np.ndarray:
    """Return whether window i has an observed value in its context and one in its target: bool [N].

    values: [C, T], those of the windows, on the host. Windows of all variates need one of any
    variate.
    """
    seen_CT: Any = ~np.isnan(values)
    if windows.rows is None:
        seen_CT = seen_CT.any(axis=0, keepdims=True)
    before = np.concatenate(
        [np.zeros((len(seen_CT), 1), np.int64), np.cumsum(seen_CT, axis=1)], axis=1
    )
    row = 0 if windows.rows is None else np.asarray(windows.rows)
    first = np.asarray(windows.starts)
    middle = first + windows.context_len
    last = middle + windows.horizon
    in_context = before[row, middle] - before[row, first]
    in_target = before[row, last] - before[row, middle]
    return (in_context > 0) & (in_target > 0)


def windows_between(
    values: jax.Array | np.ndarray,
    lo: int,
    hi: int,
    context_len: int,
    horizon: int,
    *,
    joint: bool = False,
    **facts: Any,
) -> Windows:
    """Every window (stride 1) that lies wholly in rows [lo, hi) of `values` [C, T], variate by
    variate.

    Window i is variate i // W from row lo + i % W, with W = hi - lo - context_len - horizon + 1
    (joint: N = W). Where values are missing (NaN), windows without any in their context or their
    target are left out. `facts`: `columns`, `timestamps` for `Windows.describe`.

    Raises: ValueError when the range leaves the series, a length is not positive, no window fits,
      or none of those that fit has an observed value in its context and in its target.
    """
    n_variates, n_rows = values.shape
    n_starts = hi - lo - context_len - horizon + 1
    if context_len < 1 or horizon < 1:
        raise ValueError(
            f"context_len and horizon must be at least 1, got {context_len} and {horizon}"
        )
    if not 0 <= lo <= hi <= n_rows:
        raise ValueError(f"rows [{lo}, {hi}) are not inside the series of {n_rows} rows")
    if n_starts < 1:
        need = context_len + horizon
        raise ValueError(
            f"{hi - lo} rows are too few for one window of {context_len} + {horizon} = {need} rows"
        )
    starts = np.arange(lo, lo + n_starts, dtype=np.int32)
    rows = None
    if not joint:
        rows = jnp.asarray(np.repeat(np.arange(n_variates, dtype=np.int32), n_starts))
        starts = np.tile(starts, n_variates)
    found = Windows(
        jnp.asarray(values, jnp.float32),
        jnp.asarray(starts),
        rows,
        context_len=context_len,
        horizon=horizon,
        **facts,
    )
    on_host = np.asarray(found.values)
    if not np.isnan(on_host).any():
        return found
    kept = np.flatnonzero(observed_in(on_host, found))
    if not len(kept):
        raise ValueError(
            f"no window of rows [{lo}, {hi}) has an observed value in its context and in its target"
        )
    return found.take(kept)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in one pass over `n` windows; the last one may be partial and is kept."""
    return -(-n // batch_size)


def epoch_order(key: jax.Array, epoch: int | jax.Array, n: int) -> jax.Array:
    """The order of epoch `epoch`: a permutation of 0..n-1, int32 [n], a pure function of (key,
    epoch, n).

    `n` is static under jit, `epoch` may be traced.
    """
    # One sort by 64 random bits each: a third of the time of jax.random.permutation at ten million
    # windows. The number itself is the last key, so that the order never depends on how a device
    # breaks ties.
    bits_2N = jax.random.bits(jax.random.fold_in(key, epoch), (2, n), jnp.uint32)
    number_N = jnp.arange(n, dtype=jnp.int32)
    return jax.lax.sort((bits_2N[0], bits_2N[1], number_N), num_keys=3, is_stable=False)[2]


def batch_at(order: jax.Array, b: int | jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Batch `b` of an epoch seen in `order` [n]: (indices [B] int32, weight [B] float32).

    The last batch is filled up to `batch_size` with window 0 at weight 0, so that every batch has
    one shape and no window is lost. `b` may be traced, `batch_size` is static.
    """
    n = order.shape[0]
    place = b * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    real = place < n
    return jnp.where(real, order[jnp.minimum(place, n - 1)], 0), real.astype(jnp.float32)
