"""Record the arguments and results of modules from outside, for statistics of a model whose code
stays as it is.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import flax.linen as nn

from ltsm_jax.layers.masks import module_path
from ltsm_jax.layers.shortcuts import go_whole


@contextlib.contextmanager
def arguments_of(paths: Collection[str]) -> Iterator[dict[str, list[tuple[Any, ...]]]]:
    """While this is open, the positional arguments of every call of the modules at `paths`
    ("layer_0/attn/out").

    Open it inside the function that is compiled, around a forward pass without loops over the
    modules in question: the arrays belong to the trace they were made in. Gives {path: [arguments
    of the first call, ...]}; paths that nobody calls have an empty list.
    """
    seen: dict[str, list[tuple[Any, ...]]] = {path: [] for path in paths}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__" and (path := module_path(context.module)) in seen:
            seen[path].append(args)
        return call(*args, **go_whole(context, kwargs))

    with nn.intercept_methods(note):
        yield seen


@contextlib.contextmanager
def calls_of(paths: Collection[str]) -> Iterator[dict[str, list[tuple[tuple[Any, ...], Any]]]]:
    """As `arguments_of`, with what each call gave: {path: [(arguments, result) of the first call,
    ...]}.
    """
    seen: dict[str, list[tuple[tuple[Any, ...], Any]]] = {path: [] for path in paths}

    def note(call, args, kwargs, context):
        result = call(*args, **go_whole(context, kwargs))
        if context.method_name == "__call__" and (path := module_path(context.module)) in seen:
            seen[path].append((args, result))
        return result

    with nn.intercept_methods(note):
        yield seen
