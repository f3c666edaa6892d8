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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import trees
from ltsm_jax.models.configs import entry_of
from ltsm_jax.models.family import Model
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Params


@dataclasses.dataclass(frozen=True)
class Place:
    """A module with parts of one kind: `group` says which, `path` is the module's, `match` that of
    the pattern.
    """

    group: Group
    path: str
    match: re.Match

    def entry(self, name: str | None) -> str:
        """The config's entry for this module: of the group's "n_heads.\\1", "n_heads.3"; "" where
        it has none.
        """
        return self.match.expand(name or "")

    def size(self, config: Any) -> str:
        """The entry that counts the parts; of experts, their units."""
        size = self.group.inner if self.group.kind == "experts" else self.group.size
        return size(config, self.match) if callable(size) else self.entry(size)


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
        for group in model.prunable:
            if match := re.fullmatch(group.pattern, path):
                found.append(Place(group, path, match))
    return found


def stacks(model: Model, paths: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers among the `paths` of parameters, stack by stack, each in the order in which a
    forward pass has them.

    Returns: paths of layers, such as [("encoder/layer_0", "encoder/layer_1"),
      ("decoder/layer_0",)]; a layer is what `Model.blocks` matches, and the layers beside each
      other in one module are a stack.
    """
    found: dict[str, None] = {}
    for path in paths:
        if match := re.search(model.blocks, path):
            found[path[: match.end()].rstrip("/")] = None
    together: dict[str, list[str]] = {}
    for layer in found:
        together.setdefault(layer.rpartition("/")[0], []).append(layer)
    return [tuple(sorted(stack, key=_numbers)) for stack in together.values()]


def _numbers(layer: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", layer)]


def shorter(model: Model, params: Params, gone: Iterable[str]) -> tuple[Model, Params]:
    """The model without whole layers, the others in their order and numbered anew; see
    `pruning.drop_layers`.

    It works for families whose stacks are plain lists: layer i of a stack has number i, every
    entry that the family's groups have for it is entry i of a field of the config, and a model with
    shorter fields has the parameters of the layers that are left. Leaves beside the layers may have
    a row for each layer. Anything else is refused.
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
    """The model whose config has no entries for these layers."""
    paths, fields = list(paths), model.config_to_dict()
    for stack in stacks(model, paths):
        left = [i for i, layer in enumerate(stack) if layer not in gone]
        if not left:
            raise ValueError(f"all layers of a stack would go ({', '.join(stack)}); one must stay")
        if len(left) == len(stack):
            continue
        for entry in sorted(_fields_of_layers(model, paths, stack)):
            value = entry_of(model.config, entry)
            fields = _with(fields, entry, tuple(value[i] for i in left))
    try:
        return dataclasses.replace(model, config=model.config_from_dict(fields))
    except ValueError as err:
        raise _not_plain(model, str(err)) from err


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


def _fields_of_layers(model: Model, paths: Iterable[str], stack: tuple[str, ...]) -> set[str]:
    """Fields of the config with an entry for each layer of a stack:
    "n_heads", "encoder.ffn_dims".
    """
    found = set()
    for place in places(model, paths):
        layer = next(
            (i for i, layer in enumerate(stack) if f"{place.path}/".startswith(f"{layer}/")), None
        )
        if layer is None:
            continue
        if int(re.findall(r"\d+", stack[layer])[-1]) != layer:
            raise _not_plain(model, f"{stack[layer]} is number {layer} of its stack")
        group = place.group
        texts = (
            group.ids,
            group.shared,
            group.inner,
            group.values,
            group.scores,
            group.pairs,
            *group.beside,
        )
        entries = [place.size(model.config), *(place.entry(text) for text in texts if text)]
        for entry in filter(None, entries):
            field, _, index = entry.rpartition(".")
            if index != str(layer):
                raise _not_plain(model, f"{entry} is the entry of {stack[layer]}")
            if entry_of(model.config, field):
                found.add(field)
    return found


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
    flat, own, fields = (
        dict(trees.flatten(params)),
        dict(trees.flatten(masks)),
        model.config_to_dict(),
    )
    for place, stays in kept:
        for path, axes, indices in arrays(place, stays):
            for tree in (flat, own):
                if path in tree:
                    front = tuple(range(len(axes)))
                    x = np.moveaxis(
                        np.asarray(tree[path]), axes, front
                    )  # on the host: jnp compiles each shape anew
                    tree[path] = jnp.asarray(np.moveaxis(x[indices], front, axes))
        fields = _narrowed(fields, model.config, place, stays)
    small = dataclasses.replace(model, config=model.config_from_dict(fields))
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


def _narrowed(
    fields: Mapping[str, Any], config: Any, place: Place, kept: Kept
) -> Mapping[str, Any]:
    """The fields of a config, with the numbers of what is kept; `config` is the one before."""
    group, size = place.group, place.size(config)
    if group.kind == "experts":
        return _with(fields, size, kept.units.shape[1]) if kept.units is not None else fields
    fields = _with(fields, size, len(kept.parts))
    if group.kind != "heads":
        return fields
    if kept.shared is not None and group.shared:
        fields = _with(fields, place.entry(group.shared), len(kept.shared))
    if group.ids:
        ids = np.asarray(_ids(config, place))[kept.parts]
        fields = _with(
            fields, place.entry(group.ids), tuple(map(int, ids)), lambda i: _ids(config, place, i)
        )

    def whole(_: int) -> int:
        return _beside(config, size, "head_dim")

    for entry, channels in ((group.values, kept.values), (group.scores, kept.scores)):
        if entry and channels is not None and len(channels):
            fields = _with(fields, place.entry(entry), channels.shape[1], whole)
    if group.pairs and kept.scores is not None and len(kept.scores):
        # The first members of the pairs, in the order of the channels.
        n = kept.scores.shape[1] // 2
        before = _pairs(config, place)
        heads = kept.parts if kept.shared is None else kept.shared
        pairs = []
        for g, channels in zip(heads, kept.scores, strict=True):
            pairs.append(tuple(before[int(g)][int(j)] for j in channels[:n]))
        fields = _with(fields, place.entry(group.pairs), tuple(pairs), lambda _: ())
    elif group.pairs and not len(kept.parts) and entry_of(config, _field(place.entry(group.pairs))):
        fields = _with(fields, place.entry(group.pairs), ())
    return fields


def _field(entry: str) -> str:
    """ "encoder.n_heads.3" -> "encoder.n_heads"."""
    return entry.rpartition(".")[0]


def _beside(config: Any, entry: str, name: str) -> Any:
    """The entry `name` beside a field: ("encoder.n_heads.3", "head_dim") -> encoder.head_dim."""
    return entry_of(config, f"{_field(_field(entry))}.{name}".lstrip("."))


def _with(fields: Any, entry: str, value: Any, default: Any = None) -> Any:
    """Plain fields with another value at an entry. default: function of the layer, for a field that
    is still ().
    """
    name, _, rest = entry.partition(".")
    if not name:
        return value
    if isinstance(fields, Mapping):
        inner = fields[name]
        if default is not None and inner == () and rest.isdigit():
            if value == default(int(rest)):
                return fields
            inner = tuple(default(i) for i in range(_layers(fields)))
        return {**fields, name: _with(inner, rest, value, default)}
    i = int(name)
    return (*fields[:i], _with(fields[i], rest, value, default), *fields[i + 1 :])


def _layers(fields: Mapping[str, Any]) -> int:
    return len(fields["n_heads"])


def _ids(config: Any, place: Place, layer: int | None = None) -> tuple[int, ...]:
    """The original numbers of the parts of this layer, or of another."""
    entry, size = place.entry(place.group.ids), place.size(config)
    at = entry.rpartition(".")[2] if layer is None else layer
    told = entry_of(config, _field(entry))
    return tuple(told[int(at)]) if told else tuple(range(entry_of(config, f"{_field(size)}.{at}")))


def _pairs(config: Any, place: Place) -> tuple[tuple[int, ...], ...]:
    """The rotary pairs of each key head."""
    entry, size = place.entry(place.group.pairs), place.size(config)
    told = entry_of(config, _field(entry))
    own = told[int(entry.rpartition(".")[2])] if told else ()
    heads = entry_of(config, place.entry(place.group.shared) or size)
    return own or (tuple(range(_beside(config, size, "head_dim") // 2)),) * heads


def _width(config: Any, place: Place, name: str) -> int:
    """The width of the values or scores of this layer."""
    entry = place.entry(name)
    told = entry_of(config, _field(entry))
    return (
        told[int(entry.rpartition(".")[2])]
        if told
        else _beside(config, place.size(config), "head_dim")
    )


def _tables(model: Model, found: Iterable[Place]) -> dict[str, int]:
    """How many columns each table has: up to the largest id of any layer."""
    columns = {}
    for place in found:
        if place.group.table and place.group.ids:
            told = entry_of(model.config, _field(place.entry(place.group.ids)))
            if told:
                columns[place.group.table] = max(sum(told, ()), default=-1) + 1
    return columns


def narrow_heads(model: Model) -> list[str]:
    """Fields of the config that say that heads are narrower than those of the model it was:
    "value_dims (7, 8)".
    """
    entries = set()
    for group in model.prunable:
        entries |= {entry for entry in (group.values, group.scores, group.pairs) if entry}
    told = {_field(entry): entry_of(model.config, _field(entry)) for entry in sorted(entries)}
    return [f"{name} {value}" for name, value in told.items() if value]


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
    group = place.group
    n = entry_of(config, place.size(config))
    if group.kind == "experts":
        here, there = _ids_of_experts(config, place), _ids_of_experts(full, place)
        if here != there:
            lost = sorted(set(there) - set(here))
            raise ValueError(
                f"experts {lost} are gone, and the original's router would go on choosing them"
            )
        return Kept(np.arange(len(there)), units=np.tile(np.arange(n), (len(there), 1)))
    if group.kind != "heads":
        return Kept(np.arange(n))
    parts = np.arange(n)
    if group.ids:
        there = _ids(full, place)
        parts = np.asarray([there.index(i) for i in _ids(config, place)], int)
    shared, heads = None, n
    if group.shared:
        heads = entry_of(config, place.entry(group.shared))
        shared = np.arange(heads)
        if heads and n // heads != entry_of(full, place.size(full)) // entry_of(
            full, place.entry(group.shared)
        ):
            raise ValueError("as many heads must share a key head as in the full model")
    values = scores = None
    if group.values:
        values = np.tile(np.arange(_width(config, place, group.values)), (heads, 1))
    if group.scores:
        scores = np.tile(np.arange(_width(config, place, group.scores)), (heads, 1))
    if group.pairs:
        there = _pairs(full, place)
        half = len(there[0]) if there else 0
        rows = []
        for g, own in enumerate(_pairs(config, place)):
            rows.append([there[g].index(j) for j in own])
        firsts = np.asarray(rows, int).reshape(heads, -1) if heads else np.zeros((0, 0), int)
        scores = np.concatenate([firsts, firsts + half], axis=1)
    return Kept(parts, shared, values, scores)


def _ids_of_experts(config: Any, place: Place) -> tuple[int, ...]:
    return tuple(entry_of(config, place.entry(place.group.ids)))
