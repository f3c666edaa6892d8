"""How to prune."""

import dataclasses
from typing import Any, get_args

from ltsm_jax.methods.pruning.channels import Score, known_quirks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Settings of pruning: what is scored, how much goes, and when a run stops. All fields are
    keywords.

    Attributes:
      ratio: share of the channels pruned per epoch, in (0, 1); about exp(-ratio) of them are left
        after one.
      ema: weight of the NEW score in the average importance, in (0, 1].
      score: see `importance_of`.
      epochs: at most; 0 prunes no channel (experts alone, or none).
      batch_size: windows of one batch; None: that of the model's recipe.
      macro_batch: windows of one group, rounded down to whole batches; up to batch_size: a group is
        one batch. With one epoch the last, smaller group counts too; with more its gradients go on
        into the next epoch.
      patience: epochs without a validation as good as the best before the run stops.
      max_prune_ratio: below 1: pruning stops before zeros / parameters plus the share of a step
        exceeds it.
      ema_abs: average |s| instead of s, so that scores of opposite sign do not cancel out.
      average_expert_score: scores of stacked experts are means over the windows that reached the
        expert, instead of all of the group: an expert for few windows is judged by those.
      expert_threshold: first take out the experts that at most this share of the tokens of training
        and validation windows choose (0.1, 0.01, ...); below 0: all but each layer's top_k; None:
        none. See `keep_experts`.
      depth: first take out this many whole layers, those that turn the stream least on the training
        windows. See `block_influence` and `drop_layers`.
      include_embed, include_head: prune the linears before the blocks, or the head, too. See
        `full_masks`.
      quirks: released behaviours to follow, see `full_masks`.
      stride: rows from one training window to the next.
      ratios: shares of the channels whose masks, `cut` from this one run, are validated too, each
        in [0, 1).
      chunk: rows whose gradients are computed side by side, see `gradient_sums`. Has no influence
        on results but for rounding.
    Raises: ValueError listing every field out of range, and for quirks that are unknown or refused.
    Source: published grids: ratio 0.01 to 0.9, ema 0.1, 0.2, 0.4, 0.5, 0.8.
    Example: `PruneConfig(ratio=0.2, ema=0.5, macro_batch=8192)`
    """

    ratio: float
    ema: float
    score: Score = "taylor2"
    epochs: int = 10
    batch_size: int | None = None
    macro_batch: int = 0
    patience: int = 1
    max_prune_ratio: float = 1.0
    ema_abs: bool = False
    average_expert_score: bool = False
    expert_threshold: float | None = None
    depth: int = 0
    include_embed: bool = False
    include_head: bool = False
    quirks: tuple[str, ...] = ()
    stride: int = 1
    ratios: tuple[float, ...] = ()
    chunk: int | None = None

    def __post_init__(self):
        # A set or a list would make the config unhashable and its record depend on an order that
        # says nothing.
        object.__setattr__(self, "quirks", tuple(sorted(known_quirks(self.quirks))))
        object.__setattr__(self, "ratios", tuple(self.ratios))
        counts = ("batch_size", "patience", "stride", "chunk", "epochs", "macro_batch", "depth")
        odd = [
            name
            for name in counts
            if not _whole(getattr(self, name), optional=name in ("batch_size", "chunk"))
        ]
        if odd:
            raise ValueError(f"PruneConfig: {', '.join(odd)} must be whole numbers")
        smallest = min(self.batch_size or 1, self.patience, self.stride, self.chunk or 1)
        zeros = [name for name in ("batch_size", "chunk") if getattr(self, name) == 0]
        bad = {
            "ratio is a share per epoch, in (0, 1)": not 0 < self.ratio < 1,
            "ema is the weight of the new score, in (0, 1]": not 0 < self.ema <= 1,
            f"score must be one of {', '.join(get_args(Score))}": self.score not in get_args(Score),
            "epochs, macro_batch and depth must not be negative": min(
                self.epochs, self.macro_batch, self.depth
            )
            < 0,
            "batch_size, patience, stride and chunk must be at least 1": smallest < 1
            or bool(zeros),
            "max_prune_ratio must be in (0, 1]": not 0 < self.max_prune_ratio <= 1,
            "ratios are shares of all channels, in [0, 1)": any(
                not 0 <= share < 1 for share in self.ratios
            ),
        }
        if problems := [text for text, is_bad in bad.items() if is_bad]:
            raise ValueError("PruneConfig: " + "; ".join(problems))

    def record(self) -> dict[str, Any]:
        """List the fields that decide the masks, as JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("ratios", "chunk"):
            del fields[name]
        if not self.depth:
            del fields["depth"]  # as folders of earlier versions have it
        return fields | {"quirks": list(self.quirks)}


def _whole(value: Any, *, optional: bool) -> bool:
    if value is None:
        return optional
    return hasattr(value, "__index__") and not isinstance(value, bool)
