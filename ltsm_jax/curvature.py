"""Curvature of a loss at a model: what its Hessian says, which is never built.

Everything goes through Hessian-vector products, each about the price of two gradients:

    loss = landscape.split_loss(model, splits.train, sample=512)
    top_eigenvalues(loss, params, k=3)    # [3], the largest first
    trace(loss, params)
    spectral_density(loss, params).density()
    sharpness(loss, params, rho=0.05)

A loss is any function of a tree of parameters that returns a scalar and can be differentiated
twice. One that is a tree itself (`jax.tree_util.Partial`, `landscape.SplitLoss`) is an argument of
the compiled functions. Parameters that lie over a mesh stay there, and so do all vectors. N is the
number of parameters that take part.

A Hessian of at most `WHOLE` parameters is built: its numbers are exact.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax import hosts, sharding, trees
from ltsm_jax.trees import Patterns, Tree

Loss = Callable[[Tree], jax.Array]
Key = jax.Array | int

WHOLE = 256  # parameters: a Hessian of so few is built from as many products
BREAKDOWN = (
    1e-5  # of the largest number in the tridiagonal matrix: what is left of a vector is rounding
)
TINY = 1e-12


def hvp(loss: Loss, params: Tree, vector: Tree) -> Tree:
    """Multiply the Hessian of `loss` at `params` with `vector`, a tree like `params`.

    Forward over reverse: the derivative of the gradient along `vector`. Leaves that are no floats
    get zeros.
    Works inside jit, vmap and grad.
    Raises: ValueError where the trees differ in structure or shape.
    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (Neural Computation 1994).
    Example: `hvp(lambda p: (p["w"] ** 3).sum(), {"w": w}, {"w": v})` is `{"w": 6 * w * v}`
    """
    trees.require_same(params, vector, ("params", "vector"))
    problem = _Problem.of(loss, params, None)
    moving, _ = trees.partition(vector, problem.mask)
    product = _hvp(problem.loss, problem.params, moving)
    return trees.combine(product, jax.tree.map(jnp.zeros_like, problem.rest))


def top_eigenvalues(
    loss: Loss,
    params: Tree,
    k: int = 1,
    key: Key = 0,
    *,
    steps: int = 60,
    tolerance: float = 1e-4,
    only: Patterns = None,
) -> np.ndarray:
    """Find the `k` largest eigenvalues of the Hessian of `loss` at `params`, by Lanczos.

    Each step costs a Hessian-vector product and keeps a vector of N numbers, against which the next
    are made orthogonal (without this Lanczos finds the same eigenvalue again and again). It ends
    when the residuals of all `k` are below `tolerance` times the largest, and after `steps` in any
    case.

    Args:
      k: how many.
      key: PRNG key, or a number, of the vector it begins with.
      steps: most products, at least 2 * k.
      tolerance: relative; an eigenvalue is better than its residual, by about its square.
      only: leaves that take part (see `trees.select`); the others are constants.
    Returns: [k] float64, the largest first. Of eigenvalues that are equal to float32 one may be
      left out, unless the Hessian is built or its rank is below `steps`.
    Raises: ValueError for k outside [1, N], or a loss whose curvature is not finite.
    Example: `top_eigenvalues(loss, params, k=3, key=jax.random.key(0))`
    """
    problem = _Problem.of(loss, params, only)
    if not 1 <= k <= problem.size:
        raise ValueError(f"k lies between 1 and the number of parameters, {problem.size}; got {k}")
    if problem.size <= WHOLE:
        return np.linalg.eigvalsh(problem.hessian())[::-1][:k].copy()

    def converged(lanczos: "_Tridiagonal") -> bool:
        values, vectors = lanczos.eigen()
        if len(values) < k + 1:
            return False
        # The last entry of an eigenvector times what comes next is the length of the residual.
        residuals = np.abs(lanczos.next * vectors[-1, -k:])
        return bool(residuals.max() <= tolerance * np.abs(values).max())

    found = _lanczos(
        problem, problem.normal, _key(key), steps=max(steps, 2 * k), converged=converged
    )
    return found.eigen()[0][::-1][:k].copy()


def trace(
    loss: Loss,
    params: Tree,
    key: Key = 0,
    *,
    samples: int = 30,
    only: Patterns = None,
) -> float:
    """Estimate the trace of the Hessian of `loss` at `params` by Hutch++.

    A third of the products finds the directions in which the Hessian is large, where the trace is
    taken exactly; the rest of the space is sampled with random signs. See `trace_estimate` for the
    error.

    Args:
      key: PRNG key, or a number, of the random vectors.
      samples: Hessian-vector products, 6 at least; a multiple of 3 is used whole.
      only: leaves that take part (see `trees.select`).
    Returns: the sum of the eigenvalues; exact for at most `WHOLE` parameters, and for a Hessian of
      rank samples // 3.
    Raises: ValueError for fewer samples, or a loss whose curvature is not finite.
    Source: Meyer et al., "Hutch++: Optimal Stochastic Trace Estimation" (SOSA 2021, arXiv
      2010.09649).
    """
    return trace_estimate(loss, params, key, samples=samples, only=only)[0]


def trace_estimate(
    loss: Loss,
    params: Tree,
    key: Key = 0,
    *,
    samples: int = 30,
    only: Patterns = None,
) -> tuple[float, float]:
    """Estimate the trace as `trace` does. Returns: the estimate and its standard error, 0 where it
    is exact.
    """
    problem = _Problem.of(loss, params, only)
    if samples < 6:
        raise ValueError(f"the trace needs at least 6 samples, got {samples}")
    if problem.size <= WHOLE:
        return float(np.trace(problem.hessian())), 0.0
    third = samples // 3
    keys = jax.random.split(_key(key), 2 * third)

    large: list[Tree] = []
    total = 0.0
    for one in keys[:third]:
        image, length = _orthogonal(problem.product(problem.signs(one)), large)
        if length > 0:
            large.append(image)
    for vector in large:
        total += _dot(vector, problem.product(vector))

    rest = []
    for one in keys[third:]:
        sample = problem.signs(one)
        for vector in large:
            sample = _plus(sample, vector, -_dot(sample, vector))
        rest.append(_dot(sample, problem.product(sample)))
    error = float(np.std(rest, ddof=1) / math.sqrt(len(rest)))
    return total + float(np.mean(rest)), error


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Distribution of the eigenvalues of a Hessian.

    Attributes:
      values: [S] float64, ascending: eigenvalues, or estimates of places where some lie.
      weights: [S] the share of all eigenvalues that each stands for; they sum to 1.
      size: N, how many eigenvalues there are.
    """

    values: np.ndarray
    weights: np.ndarray
    size: int

    def density(
        self, points: int = 400, width: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give the density of the eigenvalues: places [points], and density [points] there.

        It integrates to 1.

        width: standard deviation of the Gaussian that each value is drawn as; None: a hundredth of
          their spread.
        """
        low, high = float(self.values.min()), float(self.values.max())
        width = width or max((high - low) / 100, 1e-3 * max(abs(low), abs(high)), TINY)
        at = np.linspace(low - 5 * width, high + 5 * width, points)
        away = (at[:, None] - self.values[None]) / width
        bells = np.exp(-0.5 * np.square(away)) / (width * math.sqrt(2 * math.pi))
        return at, bells @ self.weights

    def share(self, low: float, high: float = math.inf) -> float:
        """Give the share of the eigenvalues from `low` to `high`."""
        return float(self.weights[(self.values >= low) & (self.values <= high)].sum())

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues, as these values and weights have it."""
        return float(self.size * (self.values @ self.weights))


def spectral_density(
    loss: Loss,
    params: Tree,
    key: Key = 0,
    *,
    steps: int = 40,
    probes: int = 4,
    only: Patterns = None,
) -> Spectrum:
    """Estimate the spectrum of the Hessian of `loss` at `params` by stochastic Lanczos quadrature.

    From a random vector, `steps` of Lanczos give `steps` values; the squared first entries of the
    eigenvectors of the tridiagonal matrix are their weights. The mean over `probes` vectors
    estimates the density of all N eigenvalues.

    Args:
      key: PRNG key, or a number, of the vectors.
      steps: of Lanczos for each vector; as many vectors of N numbers are kept meanwhile.
      probes: how many vectors.
      only: leaves that take part (see `trees.select`).
    Returns: a `Spectrum`; of at most `WHOLE` parameters the eigenvalues themselves.
    Raises: ValueError for steps or probes below 1, or a loss whose curvature is not finite.
    Source: Ghorbani et al., "An Investigation into Neural Net Optimization via Hessian Eigenvalue
      Density" (ICML 2019, arXiv 1901.10159).
    """
    problem = _Problem.of(loss, params, only)
    if steps < 1 or probes < 1:
        raise ValueError(f"steps and probes must be at least 1, got {steps} and {probes}")
    if problem.size <= WHOLE:
        values = np.linalg.eigvalsh(problem.hessian())
        return Spectrum(values, np.full(len(values), 1 / len(values)), problem.size)
    values, weights = [], []
    for one in jax.random.split(_key(key), probes):
        found = _lanczos(problem, problem.signs, one, steps=steps)
        places, vectors = found.eigen()
        values.append(places)
        weights.append(np.square(vectors[0]) / probes)
    joined, shares = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(joined)
    return Spectrum(joined[order], shares[order], problem.size)


def sharpness(loss: Loss, params: Tree, rho: float = 0.05, *, only: Patterns = None) -> float:
    """Measure how much the loss rises within a distance `rho`, to first order: SAM's sharpness.

    It is `loss(params + rho * g / |g|) - loss(params)`, with g the gradient; 0 where the gradient
    is.

    Raises: ValueError for a rho that is not positive.
    Source: Foret et al., "Sharpness-Aware Minimization" (ICLR 2021, arXiv 2010.01412).
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    problem = _Problem.of(loss, params, only)
    return float(_sharpness(problem.loss, problem.params, jnp.float32(rho)))


# --------------------------------------------------------------------------------------------------
# vectors: trees like the parameters that take part


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A loss and the parameters that take part; None stands where the others were."""

    loss: Loss
    params: Tree
    rest: Tree
    mask: Tree

    @classmethod
    def of(cls, loss: Loss, params: Tree, only: Patterns) -> "_Problem":
        params = jax.tree.map(jnp.asarray, params)

        def takes_part(leaf, chosen):
            return chosen and jnp.issubdtype(leaf.dtype, jnp.floating)

        mask = jax.tree.map(takes_part, params, trees.select(params, only))
        moving, rest = trees.partition(params, mask)
        if not jax.tree.leaves(moving):
            raise ValueError("no parameter takes part: none is a float")
        if jax.tree_util.all_leaves([loss]):
            loss = jax.tree_util.Partial(loss)
        return cls(jax.tree_util.Partial(_with_rest, loss, rest), moving, rest, mask=mask)

    @property
    def size(self) -> int:
        return trees.count(self.params)

    def product(self, vector: Tree) -> Tree:
        hosts.pause()
        return _product(self.loss, self.params, vector)

    def hessian(self) -> np.ndarray:
        """The whole matrix [N, N], float64."""
        leaves, structure = jax.tree.flatten(self.params)
        rows = []
        for number, leaf in enumerate(leaves):
            for i in range(leaf.size):
                one = [jnp.zeros_like(other) for other in leaves]
                one[number] = one[number].reshape(-1).at[i].set(1).reshape(leaf.shape)
                image = self.product(jax.tree.unflatten(structure, one))
                flat = [
                    sharding.on_host(part).astype(np.float64).ravel()
                    for part in jax.tree.leaves(image)
                ]
                rows.append(np.concatenate(flat))
        matrix = np.stack(rows)
        _require_finite(float(np.abs(matrix).sum()))
        return (matrix + matrix.T) / 2

    def normal(self, key: jax.Array) -> Tree:
        return self._draw(jax.random.normal, key)

    def signs(self, key: jax.Array) -> Tree:
        return self._draw(jax.random.rademacher, key)

    def _draw(self, kind: Callable[..., jax.Array], key: jax.Array) -> Tree:
        leaves, structure = jax.tree.flatten(self.params)
        drawn = []
        for leaf, one in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            entries = kind(one, leaf.shape, dtype=jnp.float32).astype(leaf.dtype)
            if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
                entries = sharding.put(entries, leaf.sharding)
            drawn.append(entries)
        return jax.tree.unflatten(structure, drawn)


def _with_rest(loss: Loss, rest: Tree, moving: Tree) -> jax.Array:
    return loss(trees.combine(moving, rest))


def _hvp(loss: Loss, params: Tree, vector: Tree) -> Tree:
    vector = jax.tree.map(lambda leaf, v: jnp.asarray(v, leaf.dtype), params, vector)
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


_product = jax.jit(_hvp)


@jax.jit
def _sharpness(loss: Loss, params: Tree, rho: jax.Array) -> jax.Array:
    here, gradient = jax.value_and_grad(loss)(params)
    length = jnp.sqrt(
        sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradient))
    )
    share = rho / jnp.maximum(length, TINY)
    there = jax.tree.map(
        lambda w, g: (w + share.astype(w.dtype) * g).astype(w.dtype), params, gradient
    )
    return loss(there) - here


@jax.jit
def _inner(a: Tree, b: Tree) -> jax.Array:
    parts = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return sum(jax.tree.leaves(parts), jnp.zeros((), jnp.float32))


@jax.jit
def _add(a: Tree, b: Tree, share: jax.Array) -> Tree:
    return jax.tree.map(lambda x, y: x + share.astype(x.dtype) * y, a, b)


@jax.jit
def _without(a: Tree, b: Tree) -> Tree:
    """`a` less its part along the unit vector `b`."""
    share = _inner(a, b)
    return jax.tree.map(lambda x, y: x - share.astype(x.dtype) * y, a, b)


@jax.jit
def _times(a: Tree, by: jax.Array) -> Tree:
    return jax.tree.map(lambda x: by.astype(x.dtype) * x, a)


def _dot(a: Tree, b: Tree) -> float:
    return float(_inner(a, b))


def _plus(a: Tree, b: Tree, share: float) -> Tree:
    return _add(a, b, jnp.float32(share))


def _orthogonal(vector: Tree, basis: list[Tree]) -> tuple[Tree, float]:
    """Make `vector` orthogonal to unit vectors. Returns: it, of length 1, and its length before.

    The length is 0 where only rounding is left of it.
    """
    before = math.sqrt(_dot(vector, vector))
    _require_finite(before)
    for _ in range(
        2
    ):  # twice is enough: the second pass removes what rounding of the first has left
        for unit in basis:
            vector = _without(vector, unit)
    length = math.sqrt(_dot(vector, vector))
    if length <= BREAKDOWN * before or length < TINY:
        return vector, 0.0
    return _times(vector, jnp.float32(1 / length)), length


def _require_finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            "the curvature of the loss is not finite here: look for NaN or infinite losses or "
            "gradients"
        )


def _key(key: Key) -> jax.Array:
    return jax.random.key(key) if isinstance(key, (int, np.integer)) else key


# --------------------------------------------------------------------------------------------------
# Lanczos


@dataclasses.dataclass
class _Tridiagonal:
    """Result of Lanczos: a tridiagonal matrix with the eigenvalues of the Hessian on the space of
    its vectors.
    """

    diagonal: list[float]
    beside: list[float]
    next: float = (
        0.0  # what would stand beside the next entry; 0: the space is closed under the Hessian
    )

    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, ascending, and eigenvectors as columns."""
        matrix = np.diag(self.diagonal)
        if self.beside:
            matrix = matrix + np.diag(self.beside, 1) + np.diag(self.beside, -1)
        return np.linalg.eigh(matrix)


def _lanczos(
    problem: _Problem,
    draw: Callable[[jax.Array], Tree],
    key: jax.Array,
    steps: int,
    converged: Callable[[_Tridiagonal], bool] | None = None,
) -> _Tridiagonal:
    """Tridiagonalise the Hessian from the vector `draw(key)`, at most `steps` times.

    Where the vectors so far span a space that the Hessian does not leave, no product leads out of
    it. Without a test for convergence that is the end: the first vector has no part outside. With
    one, a new random vector begins another block, in which equal eigenvalues turn up again; then
    all `steps` are taken.
    """
    steps = min(steps, problem.size)
    vector, length = _orthogonal(draw(key), [])
    assert length > 0, "a random vector has a length"
    basis, found, closed = [vector], _Tridiagonal([], []), False
    while True:
        image = problem.product(basis[-1])
        found.diagonal.append(_dot(basis[-1], image))
        scale = max(map(abs, found.diagonal + found.beside))
        _require_finite(scale)
        vector, length = _orthogonal(image, basis)
        found.next = length if length > BREAKDOWN * scale else 0.0
        if len(found.diagonal) == steps:
            return found
        if found.next == 0:
            if converged is None:
                return found
            closed = True
            vector, _ = _orthogonal(draw(jax.random.fold_in(key, len(basis))), basis)
        elif not closed and converged is not None and converged(found):
            return found
        basis.append(vector)
        found.beside.append(found.next)
