"""Where a family's layers lie, and which parts of them it can lose: attention heads, feed-forward
units, experts.

A family lists its stacks of layers as `Model.stacks` and the parts as `Model.prunable`:

    stacks = (LayerStack(),)                                # layer_0, layer_1, ...: config.layers
    prunable = (Group.heads("attn"), Group.units())

`models.parts` finds and removes them without knowing the family. A part is named twice, by the
module that holds its linears within a layer and by the field of the layer's record that counts it
(`layers.dims`); where the two have one name it is written once.
"""

import dataclasses
import re
from typing import Any, Literal

from ltsm_jax.layers.dims import Narrowed


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """Layers one after the other: their modules, and their records in the config.

    path: the module that holds them; "" is the model itself. records: the attributes that lead from
    the config to the tuple of records. name: of a layer's module, before its number. levels: where
    layers are numbered within blocks ("block_1_layer_0"), the attribute beside the records that
    tells the number of blocks.
    """

    path: str = ""
    records: tuple[str, ...] = ("layers",)
    name: str = "layer"
    levels: str | None = None

    def split(self, path: str) -> tuple[str, str] | None:
        """Split the path of a module or leaf of this stack into that of its layer and the rest
        within it; None: it is not of this stack.
        """
        found = self._match(path)
        return None if found is None else (found[0], path[found.end() :].lstrip("/"))

    def number(self, config: Any, layer: str) -> int:
        """Give the place of a layer, a path, among the records."""
        found = self._match(layer)
        if found is None:
            raise ValueError(f"{layer} is no layer of {self}")
        block, number = int(found[1] or 0), int(found[2])
        if self.levels is None:
            return number
        blocks = max(getattr(self.owner(config), self.levels), 1)
        return block * (len(self.of(config)) // blocks) + number

    def owner(self, config: Any) -> Any:
        """Give the config that has the records: the model's, or that of one of its parts."""
        for name in self.records[:-1]:
            config = getattr(config, name)
        return config

    def of(self, config: Any) -> tuple[Any, ...]:
        """Give the records of the layers."""
        return getattr(self.owner(config), self.records[-1])

    def put(self, config: Any, layers: tuple[Any, ...]) -> Any:
        """Give the config with other records.

        Raises: ValueError from the config's class.
        """
        return _replaced(config, self.records, layers)

    def _match(self, path: str) -> re.Match | None:
        within = f"{re.escape(self.path)}/" if self.path else ""
        return re.match(rf"{within}(?:block_(\d+)_)?{self.name}_(\d+)(?=/|$)", path)


def _replaced(config: Any, names: tuple[str, ...], value: Any) -> Any:
    if not names:
        return value
    inner = _replaced(getattr(config, names[0]), names[1:], value)
    return dataclasses.replace(config, **{names[0]: inner})


@dataclasses.dataclass(frozen=True)
class Group:
    """Parts of a layer that a model can lose as a whole: attention heads, feed-forward units,
    experts.

    kind: what they are. module: path, within a layer, of the module around them; "" is the layer.
    field: of the layer's record, that counts them. It holds a `HeadDims`, whose values can then
      become narrower too, or the number of heads; the number of units; or an `ExpertDims`.
    makes, takes: linears in the module whose outputs, or inputs, are the parts: of heads [H, K], of
      units [F]; names that a layer lacks are skipped. The values come out of the last of
      `makes`; of a fused linear, out of the last along its first axis. For experts the stacked
      kernels [E, ...].
    axis: where in the outputs of `makes` (and of the stacked kernels) the parts are counted.
    others: further leaves in the module with an entry per part: (name, axis).
    scores: what queries and keys can lose. They can lose channels where nothing happens to them
      before their product, whose scale stays that of the whole width, and rotary pairs where a
      rotation comes between.
    table: leaf beside the layers of the stack with a column per head on its last axis, as far as
      the largest of the heads' `ids` in any layer.
    normed: what a head gives is normalised before `takes`, so that a channel that the values lack
      is not 0 there: a head is dead where `takes` masks all of its channels, and nothing else
      tells. Of a field that is a number.
    swapped: the module gets the tokens [..., M, S, D] of the layer around it with M and S
      exchanged.
    """

    kind: Literal["heads", "ffn units", "experts"]
    module: str
    field: str
    makes: tuple[str, ...]
    takes: tuple[str, ...]
    axis: int = 0
    others: tuple[tuple[str, int], ...] = ()
    scores: Narrowed = "whole"
    table: str | None = None
    normed: bool = False
    swapped: bool = False

    @classmethod
    def heads(cls, module: str, field: str | None = None, **rest: Any) -> "Group":
        """Attention heads in a module with linears q, k, v and out; the field has its name."""
        linears: dict[str, Any] = {"makes": ("q", "k", "v"), "takes": ("out",)}
        return cls("heads", module, field or module, **(linears | rest))

    @classmethod
    def units(cls, module: str = "", field: str = "ffn") -> "Group":
        """Feed-forward units in a module with linears up, down and, where there is one, gate."""
        return cls("ffn units", module, field, makes=("gate", "up"), takes=("down",))

    @classmethod
    def experts(cls, module: str) -> "Group":
        """Experts as the stacked kernels gate, up [E, D, F] and down [E, F, D] of a module."""
        return cls("experts", module, "experts", makes=("gate", "up"), takes=("down",))


# of the layers of `layers.t5`, of which those of a decoder alone have `cross`
T5_GROUPS = (
    Group.heads("attn", scores="channels", table="relative_bias"),
    Group.heads("cross", scores="channels"),
    Group.units(),
)
