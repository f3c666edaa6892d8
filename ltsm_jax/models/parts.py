"""Parts that a model can lose (`Model.prunable`): where they are, the model without some of them,
and in full again.

Nothing here knows a family: where heads, units and experts lie in the parameters, and where a
config counts them, is what the family's groups say.

Letters: H heads, G heads of keys and values, V width of the values, K width of queries and keys, F
units, E experts.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import trees
from ltsm_jax.layers.dims import ExpertDims, HeadDims, attention_dims
from ltsm_jax.models.family import Model
from ltsm_jax.models.groups import Group, LayerStack
from ltsm_jax.trees import Params


@dataclasses.dataclass(frozen=True)
class Place:
    """A module with parts of one kind: `group` says which, `path` is the module's; it lies in a
    layer, a path too, of `stack`.
    """

    group: Group
    path: str
    stack: LayerStack
    layer: str

    @property
    def table(self) -> str | None:
        """The path of the table with a column per head."""
        within = f"{self.stack.path}/" if self.stack.path else ""
        return self.group.table and within + self.group.table

    def dims(self, config: Any) -> Any:
        """The field of the layer's record for these parts: `HeadDims`, `ExpertDims` or a count."""
        layers = self.stack.of(config)
        return getattr(layers[self.stack.number(config, self.layer)], self.group.field)

    def count(self, config: Any) -> int:
        """The number of heads or units, or of the units of each expert."""
        dims = self.dims(config)
        if isinstance(dims, HeadDims):
            return dims.heads
        return dims.ffn if isinstance(dims, ExpertDims) else dims

    def put(self, config: Any, dims: Any) -> Any:
        """The config with another value in this field of the layer's record."""
        layers, number = self.stack.of(config), self.stack.number(config, self.layer)
        layer = dataclasses.replace(layers[number], **{self.group.field: dims})
        return self.stack.put(config, (*layers[:number], layer, *layers[number + 1 :]))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Indices of the parts of a module that stay.

    parts: of the heads [H'] or units [F'], or of the experts all [E]. shared: of the key and value
    heads [G']. values [G', V'], scores [G', K']: channels of each of those heads; None: all. units:
    of each expert [E, F'].
    """

    parts: np.ndarray
    shared: np.ndarray | None = None
    values: np.ndarray | None = None
    scores: np.ndarray | None = None
    units: np.ndarray | None = None


def places(model: Model, paths: Iterable[str]) -> list[Place]:
    """The modules among the `paths` of parameters that have parts, each with its group."""
    modules: dict[str, None] = {}
    for path in paths:
        names = path.split("/")
        modules |= dict.fromkeys("/".join(names[:i]) for i in range(1, len(names)))
    found = []
    for path in modules:
        found += _places_at(model, path)
    return found


def place_of(model: Model, path: str, kind: str) -> Place | None:
    """The place at the path of a module, of parts of this kind; None: there is none."""
    return next((place for place in _places_at(model, path) if place.group.kind == kind), None)


def _places_at(model: Model, path: str) -> list[Place]:
    found = []
    for stack in model.stacks:
        if (split := stack.split(path)) is None:
            continue
        layer, module = split
        groups = [group for group in model.prunable if group.module == module]
        found += [Place(group, path, stack, layer=layer) for group in groups]
    return found


def stacks(model: Model, paths: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers among the `paths` of parameters, stack by stack, each in the order in which a
    forward pass has them.

    Returns: paths of layers, such as [("encoder/layer_0", "encoder/layer_1"),
      ("decoder/layer_0",)], of each of `Model.stacks` that there is.
    """
    together: dict[LayerStack, dict[str, None]] = {}
    for path in paths:
        for stack in model.stacks:
            if split := stack.split(path):
                together.setdefault(stack, {})[split[0]] = None
    return [tuple(sorted(found, key=_numbers)) for found in together.values()]


def layer_of(model: Model, path: str) -> str | None:
    """The path of the layer that a module or leaf lies in; None for what lies outside the stacks.

    Example: "layer_3/attn/q/kernel" lies in "layer_3".
    """
    for stack in model.stacks:
        split = stack.split(path)
        if split is not None and split[1]:
            return split[0]
    return None


def _numbers(layer: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", layer)]


def shorter(model: Model, params: Params, gone: Iterable[str]) -> tuple[Model, Params]:
    """The model without whole layers, the others in their order and numbered anew; see
    `pruning.drop_layers`.

    It works for families whose stacks are plain lists: layer i of a stack has number i, and a model
    with fewer records has the parameters of the layers that are left. Leaves beside the layers may
    have a row for each layer. Anything else is refused.
    """
    flat, out = trees.flatten(params), set(gone)
    found = stacks(model, flat)
    layers = list(itertools.chain.from_iterable(found))
    if unknown := out.difference(layers):
        raise ValueError(
            f"{', '.join(sorted(unknown))}: no layers of this {model.family}; there are "
            f"{', '.join(layers)}"
        )
    small = _shortened(model, flat, out)
    try:
        shapes = trees.flatten(jax.eval_shape(small.init, jax.random.key(0)))
    except (ValueError, TypeError, IndexError) as err:
        raise _not_plain(model, str(err)) from err

    names, rows = {}, []
    for stack in found:
        left = [i for i, layer in enumerate(stack) if layer not in out]
        names |= {stack[i]: re.sub(r"\d+$", str(j), stack[i]) for j, i in enumerate(left)}
        rows.append((len(stack), left))
    kept = {}
    for path, leaf in flat.items():
        layer = next((layer for layer in layers if path.startswith(f"{layer}/")), None)
        if layer in out:
            continue
        new = names.get(layer, layer) + path[len(layer) :] if layer else path
        wanted = getattr(shapes.get(new), "shape", None)
        for n, left in rows:
            if (
                wanted is not None
                and leaf.shape != wanted
                and leaf.shape[:1] == (n,)
                and wanted[:1] == (len(left),)
            ):
                leaf = leaf[np.asarray(left)]
        kept[new] = leaf
    tree = trees.unflatten(kept)
    try:
        trees.require_same(tree, trees.unflatten(shapes), ("what is left", "the shorter model"))
    except ValueError as err:
        raise _not_plain(model, str(err)) from err
    return small, tree


def _shortened(model: Model, paths: Iterable[str], gone: Collection[str]) -> Model:
    """The model whose config has no records of these layers."""
    config = model.config
    for found in stacks(model, paths):
        left = [i for i, layer in enumerate(found) if layer not in gone]
        if not left:
            raise ValueError(f"all layers of a stack would go ({', '.join(found)}); one must stay")
        if len(left) == len(found):
            continue
        stack = next(stack for stack in model.stacks if stack.split(found[0]))
        if stack.levels is not None:
            raise _not_plain(model, f"{found[0]} works at a resolution of its own")
        if [stack.number(config, layer) for layer in found] != list(range(len(found))):
            raise _not_plain(model, f"{', '.join(found)} are not numbered one after the other")
        records = stack.of(config)
        try:
            config = stack.put(config, tuple(records[i] for i in left))
        except ValueError as err:
            raise _not_plain(model, str(err)) from err
    return dataclasses.replace(model, config=config)


def as_deep(full: Model, model: Model, params: Params) -> Model:
    """`full` with as many layers as a model has that was made of it; whose they were plays no part
    in widths.
    """
    paths = list(trees.flatten(jax.eval_shape(full.init, jax.random.key(0))))
    own = {stack[0]: len(stack) for stack in stacks(model, trees.flatten(params))}
    gone = []
    for stack in stacks(full, paths):
        gone += stack[own.get(stack[0], len(stack)) :]
    return _shortened(full, paths, gone) if gone else full


def _not_plain(model: Model, why: str) -> ValueError:
    return ValueError(
        f"layers of a {model.family} can't be taken out: they are not a plain list of equal ones "
        f"({why})"
    )


def arrays(place: Place, kept: Kept) -> Iterator[tuple[str, tuple[int, ...], tuple[Any, ...]]]:
    """Slices of a module's parameters and masks that belong to its kept parts: (path, axes,
    indices), of kernels and of what else there may be. indices: [n] of one axis, or two that
    broadcast and index two axes at once.
    """
    group = place.group

    def at(name: str, leaf: str) -> str:
        return f"{place.path}/{name}/{leaf}".removesuffix("/")

    if group.kind == "experts":
        both = kept.parts[:, None], kept.units
        for name in group.makes:
            yield at(name, ""), (0, 2), both
            yield at(name, "out"), (0, 1), both
        for name in group.takes:
            yield from ((at(name, leaf), (0, 1), both) for leaf in ("", "in"))
        return
    for i, name in enumerate(group.makes):
        heads = kept.parts if kept.shared is None or not i else kept.shared
        channels = kept.values if i == len(group.makes) - 1 else kept.scores
        axes, indices = _index(heads, channels, (-2, -1) if group.kind == "heads" else (-1,))
        yield from ((at(name, leaf), axes, indices) for leaf in ("kernel", "bias", "out"))
    axes, indices = _index(kept.parts, kept.values, (0, 1))
    for name in group.takes:
        yield from ((at(name, leaf), axes, indices) for leaf in ("kernel", "in"))
    yield from ((at(name, ""), (axis,), (kept.parts,)) for name, axis in group.others)


def _index(
    parts: np.ndarray, channels: np.ndarray | None, axes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[np.ndarray, ...]]:
    """Axes and indices of parts, with channels [G', n] where it has some: of each, or of each that
    several share.
    """
    if channels is None:
        return axes[:1], (parts,)
    return axes, (parts[:, None], np.repeat(channels, len(parts) // max(len(channels), 1), axis=0))


def without(
    model: Model, params: Params, kept: Sequence[tuple[Place, Kept]], masks: trees.Tree
) -> tuple[Model, Params, trees.Tree]:
    """The model, its parameters and its masks with nothing but what is kept.

    Linears that have lost all their inputs or outputs have no kernel, and masks only where they
    still have a bias.
    """
    flat, own, config = dict(trees.flatten(params)), dict(trees.flatten(masks)), model.config
    for place, stays in kept:
        for path, axes, indices in arrays(place, stays):
            for tree in (flat, own):
                if path in tree:
                    front = tuple(range(len(axes)))
                    x = np.moveaxis(
                        np.asarray(tree[path]), axes, front
                    )  # on the host: jnp compiles each shape anew
                    tree[path] = jnp.asarray(np.moveaxis(x[indices], front, axes))
        config = place.put(config, _narrowed(place.dims(config), place.group, stays))
    small = dataclasses.replace(model, config=config)
    for table, n in _tables(small, (place for place, _ in kept)).items():
        flat[table] = flat[table][..., :n]
    flat = {path: leaf for path, leaf in flat.items() if leaf.size}

    def linear(path: str) -> str:
        return path.rpartition("/")[0]

    gone = {linear(path) for path, mask in own.items() if not mask.size}
    own = {
        path: m
        for path, m in own.items()
        if linear(path) not in gone or f"{linear(path)}/bias" in flat
    }
    return small, trees.unflatten(flat), trees.unflatten(own)


def _narrowed(dims: Any, group: Group, kept: Kept) -> Any:
    """The field of a layer's record after all but the kept parts are removed."""
    if isinstance(dims, ExpertDims):
        units = kept.units
        return dims if units is None else dataclasses.replace(dims, ffn=units.shape[1])
    if not isinstance(dims, HeadDims):
        return len(kept.parts)
    changes: dict[str, Any] = {"heads": len(kept.parts)}
    if kept.shared is not None:
        changes["kv_heads"] = len(kept.shared)
    if group.table:
        numbers = tuple(dims.numbers[i] for i in kept.parts)
        changes["ids"] = None if numbers == tuple(range(len(numbers))) else numbers

    # Where no head is left nothing says how wide it was.
    if kept.values is not None and len(kept.values):
        changes["value"] = kept.values.shape[1]
    if kept.scores is not None and len(kept.scores):
        changes["qk"] = kept.scores.shape[1]
        if group.scores == "pairs":
            changes["pairs"] = _kept_pairs(dims, kept)
    elif not len(kept.parts):
        changes["pairs"] = ()
    return dataclasses.replace(dims, **changes)


def _kept_pairs(dims: HeadDims, kept: Kept) -> tuple[tuple[int, ...], ...]:
    """The rotary pairs that are left of each key head: the first members of `kept.scores`."""
    assert kept.scores is not None
    if not dims.pairs and kept.scores.shape[1] == dims.qk:
        return ()  # all
    before = pairs_of(dims)
    half = kept.scores.shape[1] // 2
    heads = kept.parts if kept.shared is None else kept.shared
    pairs = []
    for head, channels in zip(heads, kept.scores, strict=True):
        pairs.append(tuple(before[int(head)][int(j)] for j in channels[:half]))
    return tuple(pairs)


def pairs_of(dims: HeadDims) -> tuple[tuple[int, ...], ...]:
    """The rotary pairs of each key head."""
    return dims.pairs or (tuple(range(dims.qk // 2)),) * dims.key_heads


def _tables(model: Model, found: Iterable[Place]) -> dict[str, int]:
    """How many columns each table has: up to the largest number of a head in any layer."""
    columns: dict[str, int] = {}
    for place in found:
        if place.table:
            numbers = place.dims(model.config).numbers
            columns[place.table] = max(columns.get(place.table, 0), *(i + 1 for i in numbers), 0)
    return columns


def narrow_heads(model: Model) -> list[str]:
    """List the attentions whose heads are narrower than those of the published model:
    "layers[1].attn: values 7 of 8".
    """
    found = []
    for stack in model.stacks:
        whole = getattr(stack.owner(model.config), "head_dim", None)
        for where, dims in attention_dims(stack.of(model.config)):
            scores = next(g.scores for g in model.prunable if where.endswith(f".{g.field}"))
            if dims.value != whole:
                found.append(f"{where}: values {dims.value} of {whole}")
            if dims.pairs or (scores != "whole" and dims.qk != whole):
                found.append(f"{where}: queries and keys {dims.qk} of {whole}")
    return found


def pad(model: Model, params: Params, full: Model) -> Params:
    """The parameters that make `full` compute what a model with fewer parts computes: zeros where
    parts are missing.

    It is the form in which an original that has one width for all layers can hold a pruned model.

    Args:
      model, params: what removal gave, trained since or not.
      full: the model as it was before, see `pruned_from` in the provenance of a model folder.
    Returns: parameters of `full`, as numpy arrays where something was added.
    Raises: ValueError for experts that are missing, which zeros can't replace: the router would go
      on choosing them, where the pruned model takes the next ones; and listing every parameter that
      does not fit.
    """
    flat, whole = trees.flatten(params), trees.flatten(jax.eval_shape(full.init, jax.random.key(0)))
    if type(model) is not type(full):
        raise ValueError(f"a {model.family} can't be padded to a {full.family}")
    found, problems, where = places(full, whole), [], {}
    for place in found:
        try:
            where |= {
                path: rest
                for path, *rest in arrays(place, _standing(model.config, full.config, place))
            }
        except ValueError as err:
            problems.append(f"  {place.path}: {err}")
    tables, padded = {place.group.table for place in found} - {None}, {}
    for path, leaf in whole.items():
        x, place = flat.get(path), where.get(path)
        if x is not None and np.shape(x) == leaf.shape and place is None:
            padded[path] = x
            continue
        new = padded[path] = np.zeros(leaf.shape, leaf.dtype)
        if x is None and (place or path in tables):
            continue
        if x is not None and path in tables and len(leaf.shape) == np.ndim(x):
            new[..., : x.shape[-1]] = x
            continue
        try:
            axes, indices = place or ((), ())
            front = tuple(range(len(axes)))
            part = np.moveaxis(new, axes, front)
            if part[indices].shape != np.moveaxis(np.asarray(x), axes, front).shape:
                raise ValueError("another shape")
            part[indices] = np.moveaxis(np.asarray(x), axes, front)
        except (ValueError, IndexError):
            problems.append(
                f"  {path}: {None if x is None else np.shape(x)} does not go into {leaf.shape}"
            )
    problems += [f"  {path}: not in the full model" for path in flat.keys() - whole.keys()]
    if problems:
        raise ValueError("the model can't be padded to its full size:\n" + "\n".join(problems))
    return trees.unflatten(padded)


def _standing(config: Any, full: Any, place: Place) -> Kept:
    """Where the parts of a module with `config` stand in that of the `full` config."""
    own, whole = place.dims(config), place.dims(full)
    n = place.count(config)
    if isinstance(own, ExpertDims):
        if own.ids != whole.ids:
            lost = sorted(set(whole.ids) - set(own.ids))
            raise ValueError(
                f"experts {lost} are gone, and the original's router would go on choosing them"
            )
        return Kept(np.arange(len(own.ids)), units=np.tile(np.arange(n), (len(own.ids), 1)))
    if not isinstance(own, HeadDims):
        return Kept(np.arange(n))
    parts = np.arange(n)
    if place.group.table:
        parts = np.asarray([whole.numbers.index(i) for i in own.numbers], int)
    shared, heads = None, own.key_heads
    if own.kv_heads is not None:
        shared = np.arange(heads)
        if heads and n // heads != whole.heads // whole.key_heads:
            raise ValueError("as many heads must share a key head as in the full model")
    values = np.tile(np.arange(own.value), (heads, 1))
    scores = None
    if place.group.scores == "channels":
        scores = np.tile(np.arange(own.qk), (heads, 1))
    elif place.group.scores == "pairs":
        scores = _standing_pairs(own, whole)
    return Kept(parts, shared, values, scores=scores)


def _standing_pairs(own: HeadDims, whole: HeadDims) -> np.ndarray:
    """The channels [G, K] of the full model's keys that the rotary pairs of a smaller one are."""
    there = pairs_of(whole)
    half = len(there[0]) if there else 0
    rows = []
    for head, pairs in enumerate(pairs_of(own)):
        rows.append([there[head].index(j) for j in pairs])
    count = own.key_heads
    firsts = np.asarray(rows, int).reshape(count, -1) if count else np.zeros((0, 0), int)
    return np.concatenate([firsts, firsts + half], axis=1)
