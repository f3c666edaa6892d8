"""Bind data to a model: read it, make the model ready for it, and cut windows that its training
takes.

What fits is asked of the model itself, by tracing its loss on shapes: lengths of patches, gaps and
heads are said in one place, the family's own, and nowhere again.
"""

import dataclasses
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd

from ltsm_jax import sharding, storage, training, trees
from ltsm_jax.data import Borders, DataError, Series, Splits, borders_of, prepare
from ltsm_jax.data.benchmarks import load_series
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.models import Model, folders
from ltsm_jax.tasks.forecasting import MODES, Forecasting, Mode, loss_fn
from ltsm_jax.trees import Params

Data = str | Path | pd.DataFrame | Series
SHORTEST_VAL = (
    0.1  # share of the rows that validation keeps where a series is too short for 70/10/20
)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A model and data that go together.

    model, params: made ready for the data. splits: windows that training takes. task: whose loss it
    takes them with.
    """

    model: Model
    params: Params
    splits: Splits
    task: Forecasting


def as_series(data: Data, options: ReadingOptions) -> Series:
    """Read a `Series` from whatever names one.

    Raises: ValueError for options beside a `Series`, which is read already; DataError.
    """
    if isinstance(data, Series):
        given = given_options(options)
        if given:
            raise ValueError(
                f"{', '.join(given)}: a Series is read already; these options are for tables and "
                "files"
            )
        return data
    return load_series(data, **vars(options))


def given_options(options: ReadingOptions) -> tuple[str, ...]:
    """Names of the options that are not at their default."""
    plain = ReadingOptions()
    return tuple(name for name, value in vars(options).items() if value != getattr(plain, name))


def ready_for(model: Model, params: Params, series: Series, seed: int = 0) -> tuple[Model, Params]:
    """`Model.for_series` with the facts of `series`; what a checkpoint lacks is drawn from the
    seed's `init` key.
    """
    model, params = model.for_series(
        params,
        n_variates=series.n_variates,
        freq=series.model_freq or series.freq,
        key=training.keys(seed)["init"],
    )
    return model, sharding.colocate(params)


def drawn(before: Params, after: Params) -> tuple[str, ...]:
    """Paths of the parameters that `ready_for` has drawn at random."""
    if before is after:
        return ()
    old = {path: jnp.shape(leaf) for path, leaf in trees.flatten(before).items()}
    return tuple(
        path for path, leaf in trees.flatten(after).items() if old.get(path) != jnp.shape(leaf)
    )


def check_params(model: Model, params: Params) -> None:
    """Raises: ValueError, in one line, where `params` are those of another model."""
    own = {path: leaf.shape for path, leaf in trees.flatten(folders.param_shapes(model)).items()}
    given = {path: jnp.shape(leaf) for path, leaf in trees.flatten(params).items()}
    odd = sorted(path for path in own.keys() | given.keys() if own.get(path) != given.get(path))
    if odd:
        first = odd[0]
        said = f"{first}: {given.get(first, 'none')} given, {own.get(first, 'none')} in the model"
        raise ValueError(
            f"these parameters are not those of this {model.family} model: {len(odd)} arrays "
            f"differ ({said}); hand in a model and parameters that were returned together, such as "
            "fitted.model with fitted.params"
        )


def default_mode(model: Model) -> Mode:
    """Return the mode of the model's recipe."""
    return model.recipe().mode


def positive_int(value: Any, name: str) -> int:
    """A whole number of at least 1, as Python's int.

    Raises: ValueError for anything else, 4.0 and True included.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    return number


def takes(
    model: Model, params: Params, mode: Mode, context_len: int, horizon: int, n_variates: int
) -> bool:
    """Return whether training in `mode` takes windows of this context, for forecasts of `horizon`
    steps.
    """
    c = n_variates if model.variates == "joint" else 1
    batch = {
        "context": jax.ShapeDtypeStruct((1, c, context_len), jnp.float32),
        "target": jax.ShapeDtypeStruct((1, c, target_len(model, mode, horizon)), jnp.float32),
    }
    loss = loss_fn(model, mode)
    try:
        jax.eval_shape(lambda p, b: loss(p, b, jax.random.key(0), True), params, batch)
    except (ValueError, TypeError):
        return False
    return True


def target_len(model: Model, mode: Mode, horizon: int) -> int:
    """Steps of a training target: the model's own for its own loss, else those of the forecast."""
    return model.horizon if mode == "ims" else horizon


def shorter_contexts(longest: int, usual: int, room: int, horizon: int) -> list[int]:
    """Context lengths up to `longest` to try, the best first: multiples of what a family may count
    in.

    A long context is good, and so is more than one window; as many as a forecast has steps are
    enough. room: rows of training beside one target.
    """
    units = {d for d in range(1, usual + 1) if usual % d == 0}
    units |= {2**i for i in range(11)}
    found = set()
    for end in (longest, room - horizon + 1):
        fitting = [unit for unit in units if unit <= end]
        found.update(fitting)
        found.update(end // unit * unit for unit in fitting)

    def worth(length: int) -> int:
        return length * min(room - length + 1, horizon)

    return sorted((length for length in found if 1 <= length <= longest), key=worth, reverse=True)


def short_borders(n_rows: int, horizon: int) -> Borders | None:
    """Borders that leave training what they can: one window to test, a tenth of the rows to
    validate.
    """
    test = n_rows - horizon
    val = test - max(horizon, int(n_rows * SHORTEST_VAL))
    return Borders((0, val), (val, test), (test, n_rows)) if val > 0 else None


@dataclasses.dataclass(frozen=True)
class _Cut:
    """One way to cut a series into windows: how, and what is to be said about it."""

    borders: Borders
    context_len: int
    mode: Mode
    notes: tuple[str, ...]


def _ways(
    model: Model,
    params: Params,
    series: Series,
    horizon: int,
    context_len: int | None,
    mode: Mode | None,
) -> Iterator[_Cut]:
    """Every way to cut a series that training takes, the one with the least given up first."""
    recipe = model.recipe()
    usual = recipe.context_len
    own = mode or default_mode(model)
    modes = (own,) if mode else (own, *(m for m in MODES if m != own))
    borders = [(borders_of(series.benchmark, series.n_rows), "")]
    if series.benchmark is None and (short := short_borders(series.n_rows, horizon)):
        lo, hi = short.val
        borders.append(
            (
                short,
                f"too short for 70/10/20 percent: {lo} rows train, {hi - lo} validate, {horizon} "
                "test",
            )
        )
    for parts, said in borders:
        if min(hi - lo for lo, hi in (parts.val, parts.test)) < horizon:
            continue
        for which in modes:
            notes = [said] if said else []
            if which != own:
                notes.append(
                    f"training loss: {which}, as the series is too short for the model's {own}"
                )
            room = parts.train[1] - parts.train[0] - max(target_len(model, which, horizon), horizon)
            if context_len is not None:
                lengths = [context_len] if context_len <= room else []
            else:
                lengths = [usual] if usual <= room else []
                lengths += shorter_contexts(min(room, usual), usual, room, horizon=horizon)
            for length in lengths:
                if takes(
                    model,
                    params,
                    which,
                    context_len=length,
                    horizon=horizon,
                    n_variates=series.n_variates,
                ):
                    if length != usual and context_len is None:
                        notes.append(
                            f"context of {length} rows instead of {usual}: the series has "
                            f"{series.n_rows}"
                        )
                    yield _Cut(borders=parts, context_len=length, mode=which, notes=tuple(notes))
                    break


def what_fits(
    model: Model, params: Params, series: Series, horizon: int, *, usual_borders: bool = False
) -> str:
    """Say what training of this model takes of this series, as advice that works.

    usual_borders: only with those of `borders_of`, as an experiment has them.
    """
    usual = borders_of(series.benchmark, series.n_rows)
    asked = horizon
    while horizon >= 1:
        for way in _ways(model, params, series, horizon=horizon, context_len=None, mode=None):
            if usual_borders and way.borders != usual:
                continue
            shorter = f"horizon={horizon}, " if horizon != asked else ""
            return f"What fits: {shorter}context_len={way.context_len}, mode={way.mode!r}"
        horizon //= 2
    return (
        f"{series.n_rows} rows are too few to tune this model on, whatever the lengths; forecast "
        "without tuning"
    )


def cut_windows(
    model: Model,
    params: Params,
    series: Series,
    *,
    horizon: int,
    context_len: int | None = None,
    mode: Mode | None = None,
    few_shot: float = 1.0,
) -> tuple[Splits, Mode]:
    """Windows of a series that training of this model takes, and the mode that takes them.

    A table is split 70/10/20 percent, the context is that of the model's recipe, and so is the
    mode. Where the series is too short for that, the context is shortened first; then the other
    mode is taken, then borders that leave training nearly all rows. Whatever was given up stands in
    `Splits.notes`. What is given here is kept.

    Raises: DataError for a series that is too short, with what would fit.
    """
    for way in _ways(model, params, series, horizon=horizon, context_len=context_len, mode=mode):
        splits = prepare(
            series,
            way.context_len,
            horizon,
            borders=way.borders,
            few_shot=few_shot,
            joint=model.variates == "joint",
        )
        return dataclasses.replace(splits, notes=(*splits.notes, *way.notes)), way.mode
    asked = f"horizon {horizon}"
    if context_len is not None:
        asked += f", context {context_len}"
    if mode is not None:
        asked += f", mode {mode!r}"
    raise DataError(
        f"{series.name} ({series.n_rows} rows): no window to train a {model.family} model on with "
        f"{asked}. " + what_fits(model, params, series, horizon=horizon)
    )


def bind(
    model: Model,
    params: Params,
    data: Data | Splits,
    options: ReadingOptions,
    *,
    horizon: int | None = None,
    context_len: int | None = None,
    mode: Mode | None = None,
    few_shot: float = 1.0,
    seed: int = 0,
) -> Bound:
    """Read data, make the model ready for them and cut windows; arguments as in `api.fit`.

    Ready `Splits` come back as they are, and the model with them.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    check_params(model, params)
    if isinstance(data, Splits):
        own = {
            "horizon": data.val.horizon,
            "context_len": data.val.context_len,
            "few_shot": data.few_shot,
        }
        asked = {
            "horizon": horizon,
            "context_len": context_len,
            "few_shot": few_shot if few_shot != 1 else None,
        }
        given = [name for name, value in asked.items() if value not in (None, own[name])]
        given += given_options(options)
        if given:
            raise ValueError(
                f"{', '.join(given)}: Splits are cut already; give these to data.prepare instead"
            )
        return Bound(
            model=model,
            params=params,
            splits=data,
            task=Forecasting(mode or default_mode(model), "context"),
        )
    recipe = model.recipe()
    horizon = recipe.horizon if horizon is None else positive_int(horizon, "horizon")
    context_len = None if context_len is None else positive_int(context_len, "context_len")
    series = as_series(data, options)
    model, params = ready_for(model, params, series, seed=seed)
    splits, mode = cut_windows(
        model,
        params,
        series,
        horizon=horizon,
        context_len=context_len,
        mode=mode,
        few_shot=few_shot,
    )
    return Bound(model=model, params=params, splits=splits, task=Forecasting(mode, "context"))


def train_config(model: Model, **changes: Any) -> training.TrainConfig:
    """The model's own fine-tuning recipe as a `TrainConfig`, with `changes`."""
    return training.TrainConfig(**changes).filled(model.recipe())


def model_facts(model: Model, params: Params) -> dict[str, Any]:
    """Describe a model for a run folder, so that another one is refused: family, config, digest of
    the weights.

    On several hosts all call.
    """
    return {
        "model": {"family": model.family, "config": model.config_to_dict()},
        "params_sha256": storage.sha256_of(params),
    }
