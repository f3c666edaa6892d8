"""Parameter trees: paths, selection, comparison, and the arithmetic that fine-tuning methods are
made of.

A tree here is a nested dict of arrays, as `model.init` returns it and as checkpoints store it. A
path names a leaf by its keys joined with "/", for example "layer_0/attn/q/kernel". Nothing in this
file knows what a model is.
"""

import difflib
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any  # a pytree
Params = Mapping[str, Any]  # a model's parameters, and trees of their form: nested dicts of arrays
Patterns = str | Sequence[str] | Callable[[str], bool] | None
Norm = Literal["none", "tensor", "channel", "sphere", "slerp"]
NORMS = get_args(Norm)

# A filter is what makes one unit of the next layer. Kernels are laid out input first, output last;
# axes in front of these two number experts, kinds of patches and the like.
_HEADS = re.compile(r"(^|/)(q|k|v|kv|qkv)/kernel$")  # D first, the axes of the heads after it
_MERGED = re.compile(r"(^|/)out/kernel$")  # H K D: all heads make one unit of the output
_KERNEL = re.compile(r"(^|/)kernel$|(^|/)experts/(up|gate|down)$")


def path_of(key_path: tuple[Any, ...]) -> str:
    """The "/"-joined name of a key path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in the tree's own order: `{"layer_0/attn/q/kernel": array, ...}`."""
    return {path_of(k): leaf for k, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have the given paths; the inverse of `flatten` for
    nested dicts.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"path {path!r} goes through a leaf: {parent!r} is already an array"
                )
        if name in node:
            raise ValueError(f"path {path!r} is both a leaf and a branch")
        node[name] = leaf
    return tree


def count(tree: Tree) -> int:
    """Number of scalars in the tree. Works on arrays and on the shapes of `jax.eval_shape`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def select(tree: Tree, patterns: Patterns) -> Tree:
    """A tree of booleans: which leaves `patterns` choose.

    Args:
      tree: any tree; only its structure is used.
      patterns: None (every leaf), a regular expression or several (searched in the path; a leaf is
        chosen when any matches), or a function of the path.
    Raises: ValueError for a regular expression that matches no path, with near names.
    """
    names = list(flatten(tree))
    if patterns is None:
        chosen = [True] * len(names)
    elif callable(patterns):
        chosen = [bool(patterns(name)) for name in names]
    else:
        expressions = [patterns] if isinstance(patterns, str) else list(patterns)
        hits = []  # of each expression: whether it matches, name by name
        for expression in expressions:
            hits.append([re.search(expression, name) is not None for name in names])
        idle = [e for e, row in zip(expressions, hits, strict=True) if not any(row)]
        if idle:
            near = [
                f"{e!r} (near: "
                f"{', '.join(difflib.get_close_matches(e, names, 3, 0.3)) or 'nothing'})"
                for e in idle
            ]
            raise ValueError(f"no path of the tree matches {'; '.join(near)}")
        chosen = (
            [any(column) for column in zip(*hits, strict=True)] if hits else [False] * len(names)
        )
    return jax.tree.unflatten(jax.tree.structure(tree), chosen)


def partition(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Two trees of the same branches: the leaves where `mask` is True, and the others; None stands
    in the holes.

    None is an empty node to JAX, so gradients and optimiser state of the first tree hold its leaves
    only.
    """
    require_same(tree, mask, ("tree", "mask"), shapes=False)
    chosen = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return chosen, rest


def combine(chosen: Tree, rest: Tree) -> Tree:
    """The tree that `partition` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda x: x is None
    )


def listed(problems: list[str], most: int = 10) -> str:
    """Write problems one a line, in order, the first of them where there are many: a message must
    be readable.
    """
    lines = [
        line if len(line) <= 160 else f"{line[:80]}...{line[-75:]}" for line in sorted(problems)
    ]
    more = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(lines[:most] + more)


def require_same(
    a: Tree,
    b: Tree,
    names: tuple[str, str] = ("first", "second"),
    *,
    shapes: bool = True,
    dtypes: bool = False,
) -> None:
    """Compare two trees both ways.

    Raises: ValueError that lists every path only one of them has and every leaf whose shape (or, on
      request, dtype) differs.
    """
    flat_a, flat_b = flatten(a), flatten(b)
    problems = [f"  {path}: only in {names[0]}" for path in flat_a.keys() - flat_b.keys()]
    problems += [f"  {path}: only in {names[1]}" for path in flat_b.keys() - flat_a.keys()]
    for path in flat_a.keys() & flat_b.keys():
        x, y = flat_a[path], flat_b[path]
        if shapes and jnp.shape(x) != jnp.shape(y):
            problems.append(f"  {path}: {names[0]} {jnp.shape(x)}, {names[1]} {jnp.shape(y)}")
        elif dtypes and x.dtype != y.dtype:
            problems.append(f"  {path}: {names[0]} {x.dtype}, {names[1]} {y.dtype}")
    if problems:
        raise ValueError(
            f"{names[0]} and {names[1]} are not the same kind of tree:\n{listed(problems)}"
        )


def interpolate(
    params_pre: Tree,
    params_rand: Tree,
    alpha: float | jax.Array | Tree | Callable[[str], Any],
    *,
    only: Patterns = None,
    skip: Patterns = None,
    norm: Norm = "none",
) -> Tree:
    """The start of Smoothed Full Fine-tuning: `alpha * params_pre + (1 - alpha) * params_rand`,
    leaf by leaf.

    Every leaf takes part, norms and biases included. The ends are exact: where alpha is 1 the
    pretrained leaf comes back bit for bit, where it is 0 the random one, so fine-tuning and
    training from scratch are its two limits. Leaves keep the dtype and sharding of `params_pre`;
    integer leaves are not mixed. Pure: works under jit, vmap and grad (also in alpha).

    Args:
      params_pre: pretrained tree.
      params_rand: tree of the same paths and shapes, a fresh draw of `model.init`.
      alpha: weight of the PRETRAINED side, in [0, 1]: a number, a traced scalar, a tree or a prefix
        of the tree (`{"head": 1.0, "layer_0": 0.5, ...}`), or a function of the path.
      only: leaves to mix (see `select`); the others stay pretrained.
      skip: leaves to leave pretrained.
      norm: what becomes of the length of a leaf, which mixing with an independent draw makes
        smaller. With p the pretrained leaf, r the random one and m = alpha * p + (1 - alpha) * r:
        "none": m.
        "tensor": m * |p| / |m|, in the Euclidean norm of the leaf.
        "channel": the same for each filter of it (see `filter_axes`); leaves of one axis as a
          whole.
        "sphere": |p| times the spherical interpolation of the directions p / |p| and r / |r|,
        (sin(alpha w) p / |p| + sin((1 - alpha) w) r / |r|) / sin(w), with w the angle between them.
        "slerp": the same direction at the length alpha * |p| + (1 - alpha) * |r|.
        "tensor", "channel" and "sphere" have the length of p at alpha 0, too: their end is not the
        random leaf.
    Returns: a tree like `params_pre`.
    Raises: ValueError listing every path where the two trees differ in structure or shape; for an
      alpha outside [0, 1] (an array anywhere in it, too; inside jit its value is not known); for an
      alpha tree that is no prefix of the params, or an array that does not fit its leaf; for an
      unknown norm, or an array as alpha on the sphere.
    Source: Smoothed Full Fine-tuning (arXiv 2606.08578); the released script has alpha = 0.7.
      Spherical interpolation: Shoemake, "Animating Rotation with Quaternion Curves" (SIGGRAPH
        1985).
    Example: `start = interpolate(params, model.init(jax.random.key(1)), 0.7)`
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    require_same(params_pre, params_rand, ("params_pre", "params_rand"))
    alphas = _alphas(alpha, params_pre)
    mixed = jax.tree.map(
        lambda keep, drop: keep and not drop,
        select(params_pre, only),
        select(params_pre, skip) if skip is not None else jax.tree.map(lambda _: False, params_pre),
    )

    def mix(path, pre, rand, a, chosen):
        if not (chosen and jnp.issubdtype(pre.dtype, jnp.inexact)):
            return pre
        # float32 even for bfloat16 leaves: 1 - alpha and the sum would lose bits twice in the
        # narrow type
        wide = jnp.promote_types(pre.dtype, jnp.float32)
        a = jnp.asarray(a, wide)
        mean = a * pre.astype(wide) + (1 - a) * rand.astype(wide)
        if norm in ("none", "slerp"):
            if norm == "slerp":
                mean = _on_sphere(pre.astype(wide), rand.astype(wide), a, path=path_of(path))
                mean = mean * (a * _length(pre.astype(wide)) + (1 - a) * _length(rand.astype(wide)))
            mean = jnp.where(a == 0, rand.astype(wide), mean)
        else:
            if norm == "sphere":
                mean = _on_sphere(pre.astype(wide), rand.astype(wide), a, path=path_of(path))
            axes = (
                filter_axes(path_of(path), pre.ndim) if norm == "channel" and pre.ndim > 1 else ()
            )
            mean = _with_length_of(pre.astype(wide), mean, axes)
        exact = jnp.where(a == 1, pre.astype(wide), mean)
        out = exact.astype(pre.dtype)
        # a leaf that lies nowhere in particular stays so: committing it would compile every later
        # step once more
        placed = not traced(out) and getattr(pre, "committed", False)
        return jax.device_put(out, pre.sharding) if placed else out

    return jax.tree_util.tree_map_with_path(
        mix, *map(_arrays, (params_pre, params_rand)), alphas, mixed
    )


def filter_axes(path: str, ndim: int) -> tuple[int, ...]:
    """The axes of a leaf that number its filters; the norm of a filter is over the other axes.

    A filter is what makes one unit of the next layer: a column of a kernel [in, out], a unit of a
    head of a kernel [D, H, K]; of other leaves a slice along the first axis, of leaves of one axis
    a number.
    """
    if ndim <= 1:
        return tuple(range(ndim))
    if _HEADS.search(path) and ndim > 2:
        return tuple(range(1, ndim))
    if _MERGED.search(path) and ndim == 3:
        return (2,)
    if _KERNEL.search(path):
        return (*range(ndim - 2), ndim - 1)
    return (0,)


def _length(x: jax.Array, axes: tuple[int, ...] = ()) -> jax.Array:
    """Euclidean norm of each slice along `axes`, with the axes of `x`; its gradient at 0 is 0."""
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    square = jnp.sum(jnp.square(x), axis=others, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _with_length_of(like: jax.Array, x: jax.Array, axes: tuple[int, ...] = ()) -> jax.Array:
    """`x` with the length of `like` in each slice along `axes`; slices of zeros stay so."""
    length = _length(x, axes)
    return jnp.where(length > 0, x * (_length(like, axes) / jnp.where(length > 0, length, 1.0)), x)


def _on_sphere(p: jax.Array, r: jax.Array, a: jax.Array, path: str) -> jax.Array:
    """Unit vector between the directions of two leaves; zeros where neither has one."""
    if jnp.size(a) != 1:
        raise ValueError(
            f"on the sphere each leaf has one alpha; that of {path or 'params'} is {jnp.shape(a)}"
        )
    one = jnp.ones((1,) * p.ndim, p.dtype)
    u, v = _with_length_of(one, p), _with_length_of(one, r)
    cosine = jnp.clip(jnp.sum(u * v), -1.0, 1.0)

    # Directions that are nearly the same, or opposite, span no plane: the straight line serves.
    # (So it does where one of the two leaves is zero and has none.)
    curved = (jnp.abs(cosine) < 1 - 1e-6) & (_length(p) > 0) & (_length(r) > 0)
    angle = jnp.arccos(jnp.where(curved, cosine, 0.0))
    arc = (jnp.sin(a * angle) * u + jnp.sin((1 - a) * angle) * v) / jnp.sin(angle)
    return _with_length_of(one, jnp.where(curved, arc, a * u + (1 - a) * v))


def traced(x: Any) -> bool:
    """Return whether `x` is a value inside jit, vmap or grad, of which only shape and dtype are
    known.
    """
    return isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def _arrays(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def _alphas(alpha, like: Tree) -> Tree:
    """Alpha as a tree with one entry for every leaf of `like`."""
    if callable(alpha):
        alphas = jax.tree_util.tree_map_with_path(lambda k, _: alpha(path_of(k)), like)
    else:
        try:
            # a prefix: each leaf of alpha stands for the whole branch below it
            alphas = jax.tree.map(lambda a, branch: jax.tree.map(lambda _: a, branch), alpha, like)
        except (ValueError, TypeError) as err:
            raise ValueError(
                "alpha is neither a number, a function of the path, nor a prefix of the params "
                f"tree: {err}"
            ) from None
    leaves = flatten(like)
    for path, a in flatten(alphas).items():
        leaf, where = leaves[path], path or "params"
        # An alpha with an axis that the leaf lacks, such as [[0.5]] for a bias, would make another
        # leaf of it.
        try:
            wider = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(leaf)) != jnp.shape(leaf)
        except ValueError:
            wider = True
        if wider:
            raise ValueError(
                f"alpha of shape {jnp.shape(a)} does not fit {where} of shape {jnp.shape(leaf)}"
            )
        if traced(a):
            continue
        low, high = np.min(a), np.max(a)
        if not (low >= 0 and high <= 1):
            got = low if not low >= 0 else high
            raise ValueError(
                f"alpha is the weight of the pretrained side and lies in [0, 1]; got {got} for "
                f"{where}"
            )
    return alphas


def shrink_and_perturb(
    params: Tree, params_rand: Tree, shrink: float = 0.4, perturb: float = 0.1
) -> Tree:
    """`shrink * params + perturb * params_rand`: the two weights need not add up to one.

    Source: Ash & Adams, "On Warm-Starting Neural Network Training" (NeurIPS 2020, arXiv
    1910.08475).
    """
    require_same(params, params_rand, ("params", "params_rand"))
    return jax.tree.map(
        lambda p, r: (shrink * p + perturb * r).astype(p.dtype), params, params_rand
    )


def wise_ft(
    params_zero_shot: Tree, params_tuned: Tree, alpha: float = 0.5, *, skip: Patterns = None
) -> Tree:
    """Average of a model before and after fine-tuning; alpha is the weight of the TUNED side.

    skip: leaves to leave as tuned (see `select`).

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (CVPR 2022, arXiv 2109.01903).
    """
    return interpolate(params_tuned, params_zero_shot, alpha, skip=skip)


def soup(trees: Sequence[Tree]) -> Tree:
    """Mean of n trees, leaf by leaf (a uniform soup).

    Source: Wortsman et al., "Model soups" (ICML 2022, arXiv 2203.05482).
    """
    if not trees:
        raise ValueError("a soup needs at least one tree")
    for i, tree in enumerate(trees[1:], 1):
        require_same(trees[0], tree, ("tree 0", f"tree {i}"))
    total = jax.tree.map(lambda *leaves: functools.reduce(operator.add, leaves), *trees)
    return jax.tree.map(
        lambda summed, first: (summed / len(trees)).astype(first.dtype), total, trees[0]
    )


def ema(average: Tree, params: Tree, decay: float = 0.999) -> Tree:
    """One step of an exponential moving average: `decay * average + (1 - decay) * params`.

    Source: Polyak & Juditsky 1992; as used for weights in Tarvainen & Valpola (NeurIPS 2017, arXiv
    1703.01780).
    """
    require_same(average, params, ("average", "params"))
    return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), average, params)
