"""Files of the originals: who reads and writes them, and the error for one that can't be used.

`converters` makes models of this library from original PyTorch checkpoints, so it imports this
library. The way back would close a circle. Yet a model is loaded by name whatever it is stored as,
so here the package is found among those that are installed: it is named in the entry-point group
`GROUP` of pyproject.toml, and imported when the first original is read or written. Another package
with the same three functions can be named there in its place.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ltsm_jax.trees import Tree

GROUP = "ltsm_jax.original_files"
MAX_MESSAGE = 1900  # characters; with what a command line puts before it, below 2,000


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return `text`, cut to `limit` characters where it is longer."""
    end = " ... (cut)"
    return text if len(text) <= limit else text[: limit - len(end)] + end


class CheckpointError(ValueError):
    """A checkpoint file that can't be used. The message names the file, what is wrong and what to
    do.
    """

    def __init__(self, message: str):
        super().__init__(shortened(message))


class Converters(Protocol):
    """The functions of the package that reads and writes files of the originals; `converters`
    documents them.
    """

    import_checkpoint: Callable[..., tuple[Any, Tree, dict[str, Any], dict[str, np.ndarray]]]
    export_checkpoint: Callable[..., list[str]]
    inspect: Callable[..., dict[str, Any]]


@functools.cache
def find_converters() -> Converters:
    """Find the package that reads and writes files of the originals.

    Raises: ModuleNotFoundError where none is installed.
    """
    named = list(importlib.metadata.entry_points(group=GROUP))
    if not named:
        raise ModuleNotFoundError(
            "no installed package reads and writes files of the originals: this library runs "
            "without having been installed, or was installed before it named one. Install it "
            "(anew): pip install ltsm-jax, or pip install -e . in a checkout"
        )
    return named[0].load()
