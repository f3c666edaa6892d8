"""Shorter ways through a network: the same numbers sooner, but not through every layer by its name.

A loop over equal layers calls one of them for all, and an attention of few queries needs no keys.
Whoever masks linears or records their arguments must meet each of them. So a module that knows a
shorter way has `shortens = True` and takes the argument `whole`, and those who intercept calls of
modules pass `whole=True` to it.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn


def go_whole(context: nn.module.InterceptorContext, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the named arguments of an intercepted call that the module takes no shorter way."""
    shortens = getattr(context.module, "shortens", False)
    if shortens and context.method_name == "__call__":
        return {**options, "whole": True}
    return dict(options)
