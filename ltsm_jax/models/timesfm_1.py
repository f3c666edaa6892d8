"""TimesFM 1.0 and 2.0: a decoder-only Transformer over patches of one variate, with a longer patch
coming out.

Das et al., "A decoder-only foundation model for time-series forecasting" (ICML 2024, arXiv
2310.10688). Follows google-research/timesfm (commit 3dae50b), v1/src/timesfm. The two versions are
one architecture: 1.0 adds a sinusoid position to the input (20 layers, context 512), 2.0 does not
(50 layers, context 2048). A series is scaled by the mean and the deviation of its FIRST patch with
three observed values; the output of every patch is the next `output_len` steps, as a mean (column
0) and quantiles. A class of frequency (0 up to daily, 1 weekly and monthly, 2 rarer) is embedded
and added to every patch.

As in the original, a series whose first patch is constant gets the smallest scale there is, and
huge inputs after it: cut it, or give its first values as NaN. The original's fine-tuning loss
trains the mean column alone unless asked for the quantiles, while its forecast is the median
column: here the quantiles are trained too (`quantile_loss`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ltsm_jax.frequency import split_freq, unit_of
from ltsm_jax.layers import shard_rules as shards
from ltsm_jax.layers.attend import attend
from ltsm_jax.layers.context import check_context
from ltsm_jax.layers.dims import HeadDims, LayerDims, equal_layers, layer_problems
from ltsm_jax.layers.initial import Constant, Normal, draw, torch_linear
from ltsm_jax.layers.linear import Linear
from ltsm_jax.layers.missing import interpolate_missing, mean_observed
from ltsm_jax.layers.mlp import feed_forward
from ltsm_jax.layers.network import nested, parameter_shapes, run_network
from ltsm_jax.layers.norm import RMSNorm
from ltsm_jax.layers.positions import require_table
from ltsm_jax.layers.quantiles import DECILES, pinball
from ltsm_jax.layers.residual import ResidualBlock
from ltsm_jax.models.configs import field_problems, refuse
from ltsm_jax.models.family import Batch, Forecast, Model, Recipe
from ltsm_jax.models.groups import Group
from ltsm_jax.trees import Tree, flatten

FREQS = 3  # rows of the frequency table
# finite: a padded patch, which sees nothing, attends evenly to all.
UNSEEN = -0.7 * float(np.finfo(np.float32).max)
LOG2_E = 1.442695041  # as the original rounds it


@dataclasses.dataclass(frozen=True)
class TimesFM1Config:
    """Widths are per layer, so that a pruned TimesFM is a TimesFM.

    patch_len P of the input, output_len O of the output, d_model D, head_dim K, layers: H, K and F
    of each, block_dim: hidden width of the blocks before and after the
    layers; context_len in time steps. quantiles: levels of the output's columns 1, 2, ...; point:
    the column that is the point forecast. freq: class of frequency of the series. pad_val: value
    that means "missing" in the original's raw input. norm_eps: of the RMS norms. min_scale: lower
    bound of a series' scale.
    """

    patch_len: int
    output_len: int
    d_model: int
    head_dim: int
    block_dim: int
    layers: tuple[LayerDims, ...]
    context_len: int = 512
    quantiles: tuple[float, ...] = DECILES
    use_positional_embedding: bool = True
    freq: int = 0
    point: Literal["median", "mean"] = "median"
    quantile_loss: bool = True
    norm_eps: float = 1e-6
    min_scale: float = 1e-6
    pad_val: float = 1123581321.0

    def __post_init__(self):
        problems = layer_problems(self.layers, self.head_dim)
        sizes = ("patch_len", "output_len", "d_model", "head_dim", "block_dim", "context_len")
        problems += field_problems(self, *sizes)
        if self.patch_len > 0 and self.context_len % self.patch_len:
            problems.append(
                f"the context ({self.context_len}) must be whole patches ({self.patch_len})"
            )
        if self.d_model % 2:
            problems.append(f"d_model must be even for the sinusoid table, got {self.d_model}")
        if any(not 0 < q < 1 for q in self.quantiles):
            problems.append(f"quantiles must lie between 0 and 1: {self.quantiles}")
        if self.point == "median" and 0.5 not in self.quantiles:
            problems.append(f"a median needs 0.5 among the quantiles: {self.quantiles}")
        if self.freq not in range(FREQS):
            problems.append(f"freq must be 0, 1 or 2, got {self.freq}")
        refuse(self, problems)

    @classmethod
    def of(
        cls,
        patch_len: int,
        output_len: int,
        d_model: int,
        d_ff: int,
        layers: int,
        heads: int,
        head_dim: int,
        **k,
    ):
        """Equal layers; the blocks around them are as wide as the feed-forward layers, as in the
        original.
        """
        equal = equal_layers(layers, heads, head_dim, ffn=d_ff)
        return cls(
            patch_len=patch_len,
            output_len=output_len,
            d_model=d_model,
            head_dim=head_dim,
            block_dim=d_ff,
            layers=equal,
            **k,
        )

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TimesFM1Config":
        """Reads the fields of the original's TimesFmHparams, with those of its TimesFMConfig under
        "model_config" where they are told, or the config.json of the transformers library.

        Raises: ValueError naming the fields that are missing.
        """
        inner = fields.get("model_config") or {}
        names = {  # ours: theirs in TimesFMConfig, in TimesFmHparams, in transformers
            "patch_len": ("patch_len", "input_patch_len", "patch_length"),
            "output_len": ("horizon_len", "output_patch_len", "horizon_length"),
            "d_model": ("hidden_size", "model_dims", "hidden_size"),
            "d_ff": ("intermediate_size", "intermediate_size", "intermediate_size"),
            "layers": ("num_layers", "num_layers", "num_hidden_layers"),
            "heads": ("num_heads", "num_heads", "num_attention_heads"),
            "head_dim": ("head_dim", "head_dim", "head_dim"),
            "context_len": ("context_len", "context_len", "context_length"),
            "quantiles": ("quantiles", "quantiles", "quantiles"),
            "norm_eps": ("rms_norm_eps", "rms_norm_eps", "rms_norm_eps"),
            "min_scale": ("tolerance", "tolerance", "tolerance"),
            "pad_val": ("pad_val", "pad_val", "pad_val"),
            "use_positional_embedding": ("use_positional_embedding",) * 3,
            "point": ("point_forecast_mode",) * 3,
        }
        told: dict[str, Any] = {}
        for ours, (config, hparams, transformers) in names.items():
            for source, name in ((inner, config), (fields, hparams), (fields, transformers)):
                if name in source:
                    told.setdefault(ours, source[name])
        needed = (
            "patch_len",
            "output_len",
            "d_model",
            "layers",
            "heads",
            "use_positional_embedding",
        )
        missing = [names[name][1] for name in needed if name not in told]
        if missing:
            raise ValueError(f"the config of a TimesFM checkpoint lacks {', '.join(missing)}")
        told.setdefault("d_ff", told["d_model"])
        if "head_dim" not in told:
            if told["d_model"] % told["heads"]:
                raise ValueError(
                    f"model_dims ({told['d_model']}) must be a multiple of num_heads "
                    f"({told['heads']})"
                )
            told["head_dim"] = told["d_model"] // told["heads"]
        told["quantiles"] = tuple(told.get("quantiles", DECILES))
        return cls.of(**told)


PRESETS = {
    # hyper-parameters from the README of google-research/timesfm v1; no config file ships with the
    # .ckpt files
    "google/timesfm-1.0-200m-pytorch": TimesFM1Config.of(
        patch_len=32,
        output_len=128,
        d_model=1280,
        d_ff=1280,
        layers=20,
        heads=16,
        head_dim=80,
        context_len=512,
    ),
    "google/timesfm-2.0-500m-pytorch": TimesFM1Config.of(
        patch_len=32,
        output_len=128,
        d_model=1280,
        d_ff=1280,
        layers=50,
        heads=16,
        head_dim=80,
        context_len=2048,
        use_positional_embedding=False,
    ),
}

# pandas' units by the original's class of frequency (its `freq_map`, and the names that pandas gave
# since)
_CLASSES = (
    "ns us ms s min h bh cbh N U L S T H BH CBH D B C",
    "W M ME MS BM BME BMS CBM CBME CBMS SM SME SMS WOM LWOM",
    "Q QE QS BQ BQE BQS REQ A AS Y YE YS BA BAS BY BYE BYS RE",
)
_CLASS_OF: dict[str, int] = {}
for _number, _units in enumerate(_CLASSES):
    _CLASS_OF |= dict.fromkeys(_units.split(), _number)


def freq_class(freq: str) -> int:
    """The class of frequency of a step as pandas writes it: 0 up to daily, 1 weekly and monthly, 2
    rarer.

    As in the original, the unit decides, not the number before it: "15min" is 0, "3MS" is 1.
    Raises: ValueError for a unit that is none of pandas'.
    """
    _, written = split_freq(freq) or (0, "")
    unit = written if written in _CLASS_OF else unit_of(freq)
    if unit not in _CLASS_OF:
        raise ValueError(
            f"TimesFM knows no frequency {freq!r}; give a pandas offset such as '15min', 'h', 'D', "
            "'MS', or 'oov' for the class of the config"
        )
    return _CLASS_OF[unit]


def timescales(d_model: int) -> np.ndarray:
    """Inverse timescales [D/2] of the sinusoid position, from 1 to 1/10000, float32."""
    n = d_model // 2
    return np.exp(
        np.arange(n, dtype=np.float32) * np.float32(-math.log(10000.0) / max(n - 1, 1))
    ).astype(np.float32)


def halved_sinusoids(n: int, d_model: int) -> np.ndarray:
    """The original's position table [n, D], float32: all sines, then all cosines."""
    require_table(n, d_model)
    angle = (np.arange(n, dtype=np.float32)[:, None] * timescales(d_model)).astype(np.float64)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


class Attention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D] whose queries are scaled per dimension; and its weights
    [B, H, N, S].
    """

    d_model: int
    dims: HeadDims

    @nn.compact
    def __call__(self, x_BND, seen_BHNS):
        dims = self.dims

        def project(name):
            y_BNHK = Linear((self.d_model,), dims.shapes[name], name=name)(x_BND)
            return jnp.swapaxes(y_BNHK, 1, 2)

        q_BHNK = project("q")
        scaling_K = nn.softplus(self.param("scaling", nn.initializers.zeros, (dims.qk,)))
        scaling_K = (scaling_K * (LOG2_E * dims.qk**-0.5)).astype(q_BHNK.dtype)
        y_BHNK, w_BHNS = attend(
            q_BHNK * scaling_K[None, None, None],
            project("k"),
            project("v"),
            seen=seen_BHNS,
            hidden=UNSEEN,
        )
        out = Linear(dims.joined, (self.d_model,), name="out")
        return out(jnp.swapaxes(y_BHNK, 1, 2)), w_BHNS


class Block(nn.Module):
    """Attention after an RMS norm, feed-forward after a layer norm, each added to its input; and
    the steps between.
    """

    cfg: TimesFM1Config
    dims: LayerDims

    @nn.compact
    def __call__(self, x_BND, observed_BN, seen_BHNS):
        cfg, taps = self.cfg, {}
        y_BND = taps["attn_norm"] = RMSNorm(cfg.norm_eps, name="attn_norm")(x_BND)
        attention = Attention(cfg.d_model, self.dims.attn, name="attn")
        y_BND, taps["attn_weights"] = attention(y_BND, seen_BHNS)
        taps["attn"] = y_BND
        x_BND = x_BND + y_BND
        ffn_dim = self.dims.ffn
        y_BND = nn.LayerNorm(epsilon=1e-6, name="ffn_norm")(x_BND)
        y_BND = feed_forward(y_BND, ffn_dim, "relu")
        # Padding keeps what attention made of it, as in the original.
        return x_BND + y_BND * observed_BN[..., None].astype(y_BND.dtype), taps


class TimesFM1Net(nn.Module):
    """Scaled patches [B, N, P], 0 where nothing is observed, which points are [B, N, P], and class
    of frequency [B] -> scaled outputs [B, N, O, 1 + Q], mean and quantiles (of the last patch
    alone: N is 1), and the named steps between.
    """

    cfg: TimesFM1Config

    @nn.compact
    def __call__(self, z_BNP, observed_BNP, freq_B, last: bool = False):
        cfg, taps = self.cfg, {}
        n, observed_BN = z_BNP.shape[1], observed_BNP.any(-1)  # one observed point makes a patch
        block = ResidualBlock(2 * cfg.patch_len, cfg.block_dim, cfg.d_model, name="embed")
        # The original's mask, which its weights are made for, is 1 where nothing is observed.
        mask_BNP = (~observed_BNP).astype(z_BNP.dtype)
        x_BND = taps["embed"] = block(jnp.concatenate([z_BNP, mask_BNP], axis=-1))
        if cfg.use_positional_embedding:
            table_ND = taps["positions"] = jnp.asarray(
                halved_sinusoids(n, cfg.d_model), x_BND.dtype
            )
            # the first patch with a value has position 0; padded ones go round, and count from 1
            # where all are padded
            first_B = jnp.where(observed_BN.any(1), jnp.argmax(observed_BN, axis=1), -1)
            x_BND = x_BND + table_ND[(jnp.arange(n)[None] - first_B[:, None]) % n]
        taps["placed"] = x_BND
        table_FD = self.param("freq_embed", nn.initializers.zeros, (FREQS, cfg.d_model)).astype(
            x_BND.dtype
        )
        freq_BD = taps["freq_embed"] = table_FD[freq_B]
        x_BND = x_BND + freq_BD[:, None]
        causal_NS = jnp.tril(jnp.ones((n, n), bool))
        seen_BHNS = (
            causal_NS[None, None] & observed_BN[:, None, None] & observed_BN[:, None, :, None]
        )
        # A loop and no scan: pruned layers differ in width.
        for i, dims in enumerate(cfg.layers):
            x_BND, inner = Block(cfg, dims, name=f"layer_{i}")(x_BND, observed_BN, seen_BHNS)
            taps |= nested(f"layer_{i}", inner, x_BND)
        columns = 1 + len(cfg.quantiles)
        head = ResidualBlock(cfg.d_model, cfg.block_dim, cfg.output_len * columns, name="head")
        y_BN_ = taps["head"] = head(x_BND[:, -1:] if last else x_BND)
        return y_BN_.reshape(*y_BN_.shape[:2], cfg.output_len, columns), taps


@dataclasses.dataclass(frozen=True)
class TimesFM1(Model):
    """TimesFM 1.0 or 2.0 at one size. See the module docstring; `Model` documents the methods."""

    config: TimesFM1Config

    family = "timesfm_1"
    published = PRESETS
    tasks = ("forecasting",)
    licence = "Apache-2.0 (google/timesfm-1.0-200m-pytorch, google/timesfm-2.0-500m-pytorch)"
    shard_rules = (
        (r"^(embed|head)/hidden/kernel$", ("fsdp", "tensor")),
        (r"^(embed|head)/hidden/bias$", ("tensor",)),
        (r"^(embed|head)/out/kernel$", ("tensor", "fsdp")),
        (r"^(embed|head)/residual/kernel$", (None, "fsdp")),
        (r"^freq_embed$", ()),
        *shards.LAYERS,
        *shards.UP_BIAS,
        *shards.WHOLE,
    )
    prunable = (Group.heads("attn"), Group.units())

    @classmethod
    def small(cls) -> TimesFM1Config:
        return TimesFM1Config.of(
            patch_len=8,
            output_len=16,
            d_model=16,
            d_ff=24,
            layers=2,
            heads=2,
            head_dim=8,
            context_len=32,
        )

    @property
    def missing_in_front(self) -> bool:
        return True

    @property
    def horizon(self) -> int:
        return self.config.output_len

    @property
    def eval_batch(self) -> int:
        return max(1, 8192 * self.config.patch_len // self.config.context_len)

    def init(self, key: jax.Array) -> Tree:
        """Torch's defaults for linear layers and the frequency table; weights of the RMS norms 0,
        so that attention starts from its biases. The original leaves `scaling` uninitialised; 0
        here, which is neutral.
        """
        cfg = self.config
        patches = jax.ShapeDtypeStruct((1, 1, cfg.patch_len), jnp.float32)
        observed = jax.ShapeDtypeStruct(patches.shape, bool)
        freq = jax.ShapeDtypeStruct((1,), jnp.int32)
        shapes = parameter_shapes(TimesFM1Net(cfg), key, patches, observed, freq_B=freq)
        flat = flatten(shapes)

        def rule(path, shape):
            if path == "freq_embed":
                return Normal(1.0)
            return torch_linear(flat, path) or Constant(float(path.endswith("/ffn_norm/scale")))

        return draw(key, shapes, rule)

    def recipe(self) -> Recipe:
        source = "google-research/timesfm v1/src/finetuning/finetuning_torch.py: FinetuningConfig"
        return self._recipe(
            lr=1e-4, batch_size=32, epochs=20, schedule="constant", source=source, weight_decay=0.01
        )

    def for_series(
        self, params: Tree, *, n_variates: int, freq=None, key=None
    ) -> tuple[Model, Tree]:
        """The class of frequency is taken from `freq`; where that is unknown (None, "oov"), the
        config's stands.
        """
        if freq in (None, "oov"):
            return self, params
        return TimesFM1(dataclasses.replace(self.config, freq=freq_class(freq))), params

    # --- the network around its scaling, in rows [B, T]

    def apply(
        self, params: Tree, x_BT: jax.Array, observed_BT=None, freq_B=None, last: bool = False
    ):
        """One forward pass in the units of x: [B, N, O, 1 + Q], what follows each of the N = T / P
        patches, and the named steps.

        observed: booleans, False where x is no value. freq: class of frequency, by default the
        config's. last: the last patch only.
        Raises: ValueError for T that is not whole patches.
        """
        cfg = self.config
        b, t = x_BT.shape
        if t % cfg.patch_len or not t:
            raise ValueError(
                f"TimesFM takes whole patches of {cfg.patch_len} time steps, got {t} steps"
            )
        x_BNP = x_BT.astype(jnp.float32).reshape(b, -1, cfg.patch_len)
        observed_BT = jnp.ones((b, t), bool) if observed_BT is None else observed_BT
        observed_BNP = observed_BT.reshape(x_BNP.shape)
        freq_B = jnp.full(b, cfg.freq) if freq_B is None else freq_B
        x_BNP = jnp.where(observed_BNP, x_BNP, 0.0)
        observed_BNP = observed_BNP & (x_BNP != jnp.float32(cfg.pad_val))
        weight_BNP = observed_BNP.astype(jnp.float32)
        mean_B, std_B = self._scale(x_BNP, weight_BNP)
        z_BNP = (x_BNP - mean_B[:, None, None]) / std_B[:, None, None] * weight_BNP
        y_BNOQ, taps = run_network(
            TimesFM1Net(cfg), params, z_BNP, observed_BNP=observed_BNP, freq_B=freq_B, last=last
        )
        taps |= {"patches": z_BNP, "observed": observed_BNP.any(-1), "mean": mean_B, "std": std_B}
        return y_BNOQ * std_B[:, None, None, None] + mean_B[:, None, None, None], taps

    def _scale(self, x_BNP, weight_BNP):
        """Mean and deviation [B] of the first patch with three observed values, or of the last
        patch.
        """
        enough_BN = weight_BNP.sum(-1) >= 3
        first_B = jnp.where(enough_BN.any(1), jnp.argmax(enough_BN, axis=1), enough_BN.shape[1] - 1)

        def pick(y_BNP):
            return jnp.take_along_axis(y_BNP, first_B[:, None, None], axis=1)[:, 0]

        x_BP, weight_BP = pick(x_BNP), pick(weight_BNP)
        n_B = jnp.maximum(weight_BP.sum(-1), 1.0)
        mean_B = (x_BP * weight_BP).sum(-1) / n_B
        std_B = jnp.sqrt(jnp.square((x_BP - mean_B[:, None]) * weight_BP).sum(-1) / n_B)
        return jax.lax.stop_gradient((mean_B, jnp.maximum(std_B, self.config.min_scale)))

    def decode(
        self,
        params: Tree,
        x_BT: jax.Array,
        observed_BT: jax.Array,
        horizon: int,
        *,
        freq_B: jax.Array | None = None,
        step: int | None = None,
        max_len: int | None = None,
        on_context: bool = False,
    ) -> jax.Array:
        """The original's roll-out: [B, horizon, 1 + Q]. Its MEAN column is appended and the window
        read anew.

        Args:
          x_BT, observed_BT: whole patches. step: time steps kept of each output, at most O (the
            default).
          max_len: time steps of the window, whole patches; by default T.
          on_context: put before it what the patches but the last say of the patch after them (P
            steps each).
        """
        p, t = self.config.patch_len, x_BT.shape[1]
        step = step or self.config.output_len
        steps, max_len = math.ceil(horizon / step), max_len or t
        # padding in front makes room, so that the window can be of one size
        room = min(max(max_len - t, 0), math.ceil((steps - 1) * step / p) * p)
        x_BT = jnp.pad(x_BT.astype(jnp.float32), ((0, 0), (room, 0)))[:, -max_len:]
        observed_BT = jnp.pad(observed_BT, ((0, 0), (room, 0)))[:, -max_len:]
        window = x_BT.shape[1]

        def advance(x_BT, observed_BT, y_BOQ):
            x_BT = jnp.concatenate([x_BT, y_BOQ[..., 0]], axis=1)[:, -window:]
            behind = ((0, 0), (0, step))
            return x_BT, jnp.pad(observed_BT, behind, constant_values=True)[:, -window:]

        def again(carry, _):
            x_BT, observed_BT = carry
            y_BOQ = self.apply(params, x_BT, observed_BT, freq_B=freq_B, last=True)[0][:, -1, :step]
            return advance(x_BT, observed_BT, y_BOQ), y_BOQ

        outputs = []
        if on_context or steps == 1:
            y_BNOQ, _ = self.apply(params, x_BT, observed_BT, freq_B=freq_B, last=not on_context)
            y_BOQ = y_BNOQ[:, -1, :step]
            outputs = (
                [y_BNOQ[:, room // p : -1, :p].reshape(len(x_BT), -1, y_BOQ.shape[-1])]
                if on_context
                else []
            )
            outputs.append(y_BOQ)
            x_BT, observed_BT = advance(x_BT, observed_BT, y_BOQ)
            steps -= 1
        if steps:
            _, y_SBOQ = jax.lax.scan(again, (x_BT, observed_BT), length=steps)
            outputs.append(jnp.moveaxis(y_SBOQ, 0, 1).reshape(len(x_BT), -1, y_SBOQ.shape[-1]))
        total = horizon + (outputs[0].shape[1] if on_context else 0)
        return jnp.concatenate(outputs, axis=1)[:, :total]

    # --- series [B, C, T]

    def forecast(
        self,
        params: Tree,
        context: jax.Array,
        horizon: int,
        *,
        freq: jax.Array | None = None,
        normalize: bool = False,
        window: int | None = None,
        newest: int | None = None,
        on_context: bool = False,
    ) -> jax.Array:
        """Mean and quantiles [B, C, horizon, 1 + Q] after `context` [B, C, T], with the options of
        the original's `forecast`.

        Args:
          freq: class of frequency [B, C]; by default the config's.
          normalize: scale each series by its mean and deviation first.
          window: forecast a moving average over so many steps and what is left of it apart, and add
            the two.
          newest: of the context, use the last so many steps (the original's forecast_context_len).
          on_context: put the model's view of the context before it: [B, C, context_len - P +
            horizon, 1 + Q].
        """
        check_context(context, horizon)
        cfg, (b, c, t) = self.config, jnp.shape(context)
        x_BT, begun_BT = interpolate_missing(jnp.asarray(context, jnp.float32).reshape(b * c, t))
        mean_B1, std_B1 = jnp.zeros((b * c, 1)), jnp.ones((b * c, 1))
        if normalize:
            n_B1 = jnp.maximum(begun_BT.sum(1, keepdims=True), 1)
            mean_B1 = x_BT.sum(1, keepdims=True) / n_B1
            std_B1 = jnp.sqrt(
                jnp.where(begun_BT, jnp.square(x_BT - mean_B1), 0.0).sum(1, keepdims=True) / n_B1
            )
            std_B1 = jnp.where(std_B1 > cfg.min_scale, std_B1, 1.0)
            x_BT = jnp.where(begun_BT, (x_BT - mean_B1) / std_B1, 0.0)

        # Whole patches of the newest steps.
        newest = min(newest or t, t)
        at_least = cfg.context_len if on_context else 0
        x_BT, observed_BT = self._patches(x_BT[:, -newest:], begun_BT[:, -newest:], at_least)
        freq_B = None if freq is None else jnp.asarray(freq).reshape(b * c)
        if window:
            # The moving average and what is left of it are rows of their own.
            n = x_BT.shape[1]
            moved = [jnp.pad(x_BT, ((0, 0), (i, 0)))[:, :n] for i in range(window)]
            smooth_BT = jnp.where(observed_BT, sum(moved[1:], moved[0]) / window, 0.0)
            x_BT = jnp.concatenate([smooth_BT, x_BT - smooth_BT])
            observed_BT = jnp.concatenate([observed_BT] * 2)
            freq_B = None if freq_B is None else jnp.concatenate([freq_B] * 2)

        y_BHQ = self.decode(
            params,
            x_BT,
            observed_BT,
            horizon=horizon,
            freq_B=freq_B,
            max_len=cfg.context_len,
            on_context=on_context,
        )
        if window:
            y_BHQ = y_BHQ[: b * c] + y_BHQ[b * c :]
        return (y_BHQ * std_B1[..., None] + mean_B1[..., None]).reshape(b, c, *y_BHQ.shape[1:])

    def _patches(self, x_BT, begun_BT, at_least: int = 0):
        """Cut to the context length, zeros in front up to whole patches: values, and what is
        observed.
        """
        cfg = self.config
        x_BT, begun_BT = x_BT[:, -cfg.context_len :], begun_BT[:, -cfg.context_len :]
        front = max(-x_BT.shape[1] % cfg.patch_len, at_least - x_BT.shape[1])

        room = ((0, 0), (front, 0))
        return jnp.pad(x_BT, room), jnp.pad(begun_BT, room)

    def predict(self, params: Tree, context: jax.Array, horizon: int, key=None) -> Forecast:
        """Rolled out in a window of at most `context_len` steps, as in the original: newest steps,
        padding in front.

        Missing values lie on the line between their neighbours, before the first value they are
        padding, after the last they repeat it.
        """
        full_BCHQ = self.forecast(params, context, horizon)
        return Forecast(
            full_BCHQ[..., self._point], full_BCHQ[..., 1:], levels=self.config.quantiles
        )

    @property
    def _point(self) -> int:
        return 0 if self.config.point == "mean" else 1 + self.config.quantiles.index(0.5)

    def _last(self, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Forecast the target with the last patch [B, C, H, 1 + Q]. Returns also the target with 0
        for NaN, and the mask of its observed values.
        """
        context, target = batch["context"], batch["target"]
        h = target.shape[-1]
        if h > self.config.output_len:
            raise ValueError(
                f"the loss reaches one output patch ({self.config.output_len} steps), not {h}"
            )
        rows = context.astype(jnp.float32).reshape(-1, context.shape[-1])
        freq_B = batch["freq"].reshape(-1) if "freq" in batch else None
        y_BNOQ, _ = self.apply(
            params, *self._patches(*interpolate_missing(rows)), freq_B, last=True
        )
        observed = ~jnp.isnan(target)
        return (
            y_BNOQ[:, -1, :h].reshape(*target.shape, -1),
            jnp.where(observed, target, 0.0),
            observed,
        )

    def loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """The original's fine-tuning loss of the last patch, in the units of the batch: MSE of the
        mean column plus, with `quantile_loss`, the sum over the quantiles of twice their pinball
        loss.

        At most O steps of target. A batch of several frequencies may hold their classes as "freq"
        [B, C].
        """
        y_BCHQ, target_BCH, observed_BCH = self._last(params, batch)
        error_BCH = jnp.square(y_BCHQ[..., 0] - target_BCH)
        if self.config.quantile_loss:
            loss_BCHQ = pinball(target_BCH, y_BCHQ[..., 1:], self.config.quantiles)
            error_BCH = error_BCH + 2 * loss_BCHQ.sum(-1)
        return mean_observed(error_BCH, observed_BCH, batch)

    def point_loss(self, params: Tree, batch: Batch, key=None, train=False) -> jax.Array:
        """MSE of the point column of the last patch. At most O steps of target."""
        y_BCHQ, target_BCH, observed_BCH = self._last(params, batch)
        return mean_observed(jnp.square(y_BCHQ[..., self._point] - target_BCH), observed_BCH, batch)
