"""Shared by the experiments on the loss around a model: options, models, data and the loss."""

import abc
import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax

import ltsm_jax
from experiments import cells, flags, folder
from experiments.flags import UsageError
from ltsm_jax import landscape, sharding, storage, training
from ltsm_jax.data import Splits, prepare
from ltsm_jax.data.tables import ReadingOptions
from ltsm_jax.landscape.losses import KINDS
from ltsm_jax.methods import binding, run
from ltsm_jax.methods.starts import start_params
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.models import FAMILIES, Model
from ltsm_jax.sharding import Placement
from ltsm_jax.tasks.base import Part
from ltsm_jax.tasks.forecasting import Forecasting
from ltsm_jax.trees import Tree

PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Options(abc.ABC):
    """Options of these experiments."""

    program: ClassVar[str]  # what `python -m` runs
    data: Annotated[str, flags.text("DATA")] = "ETTh1"
    """benchmark name ($LTSM_DATA, cache or download) or a .csv, .csv.gz or .parquet file"""
    seed: Annotated[int, flags.whole(0, 2**32 - 1, says="between 0 and 2**32 - 1")] = 0
    """of the random model, the directions and the random vectors"""
    part: Annotated[str, flags.one_of(PARTS)] = "test"
    """split whose loss is taken: train, val or test"""
    windows: Annotated[int, flags.whole(0)] = 512
    """windows of the split, evenly spaced; 0: all of them"""
    loss: Annotated[str, flags.one_of(KINDS)] = "mse"
    """mse of the forecast, or the family's own training loss"""
    horizon: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """steps to forecast"""
    context: Annotated[int | None, flags.whole(1, unset="recipe")] = None
    """steps the model sees"""
    mesh: Annotated[str | None, flags.text("AXES")] = None
    """devices by axis, as data=4,fsdp=2; by default all on data"""
    out: Annotated[str | None, flags.text("FOLDER")] = None
    """folder of the results; by default runs/EXPERIMENT-DATA-MODEL"""
    plan: bool = False
    """print what would run, and stop"""
    accept_license: bool = False
    """accept a licence that forbids commercial use; asked once for each repository"""
    reading: flags.Reading = dataclasses.field(default_factory=flags.Reading)
    hosts: flags.Hosts = dataclasses.field(default_factory=flags.Hosts)

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """The models, as the command line names them."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        parts = [Path(name).name.split(".")[0] for name in (self.data, *self.names)]
        default = "-".join((self.program.split(".")[-1], *parts))
        return Path(self.out or f"runs/{default}").expanduser()

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together; `given`: the fields that were set."""
        del given
        try:
            ReadingOptions(**self.reading.asked())
        except ValueError as err:
            return [flags.in_flags(str(err))]
        return []

    def command(self, *always: str) -> str:
        """Write the command line that asks for the same, on one host or several."""
        place = dataclasses.replace(self, out=str(self.folder))
        hosts = [field.name for field in dataclasses.fields(flags.Hosts)]
        return flags.command(place, always=("data", *always, "out"), without=hosts)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model in the middle of what is looked at.

    Attributes:
      name: as the command line has it. model: its family at its size.
      params: pretrained. random: the fresh model that methods of the same seed mix in or begin
        with.
      splits: the data. windows: those whose loss is taken.
      facts: what decides every number, for the settings of the folder.
    """

    name: str
    model: Model
    params: Tree
    random: Tree
    splits: Splits
    windows: Any
    facts: dict[str, Any]

    def loss(self, options: Options, *, rows: bool) -> landscape.SplitLoss:
        """Make the loss of a tree of parameters.

        rows: over a mesh, split the windows among its devices. Otherwise each can compute a point
        of a surface alone, where the parameters lie whole on all of them.
        """
        whole = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(self.params))
        placement = Placement.of(self.params) if rows or not whole else None
        return landscape.split_loss(
            self.model,
            self.windows,
            kind=options.loss,  # pyright: ignore[reportArgumentType]
            sample=options.windows or None,
            task=Forecasting(binding.default_mode(self.model)),
            placement=placement,
        )

    def mixed(self, alpha: float, seed: int) -> Tree:
        """The start of smoothed fine-tuning."""
        return start_params(
            strategy("sff", alpha=alpha),
            self.model,
            self.params,
            aux_key=training.keys(seed)["aux"],
        )

    def moves(self, path: str) -> bool:
        """Return whether a leaf is a parameter, and no table of data that the family keeps among
        them.
        """
        return self.model.fixed is None or re.search(self.model.fixed, path) is None


def subject(options: Options, name: str, *, train: int | None = None) -> Subject:
    """Load a model and its data, and draw the random model beside it. Every host for itself.

    train: a name that is a family's own, such as "moment", stands for its small size, trained from
    scratch on the training part for so many epochs; it is kept in the folder. None: such names are
    refused.
    Raises: UsageError with what does not work.
    """
    try:
        series = cells.read_series(options.data, options.reading)
        small = train is not None and name in FAMILIES
        if small:
            model = FAMILIES[name](FAMILIES[name].small())
            params = jax.jit(model.init)(training.keys(options.seed)["init"])
        else:
            model, params = ltsm_jax.load(name, accept_license=options.accept_license)
        model, params = binding.ready_for(model, params, series)
        recipe = model.recipe()
        context = options.context or recipe.context_len
        horizon = options.horizon or recipe.horizon
        splits = prepare(series, context, horizon, joint=model.variates == "joint")
        mesh = sharding.make_mesh(options.mesh)
    except (ValueError, OSError) as err:
        raise UsageError(f"{name}: {err}") from None
    if small:
        assert train is not None
        params = _trained(options, name, (model, params), splits=splits, epochs=train)

    facts = {
        "family": model.family,
        "context": context,
        "horizon": horizon,
        "sha256": storage.sha256_of(params)[:16],
    }
    facts |= cells.series_facts(series)
    params, _ = sharding.shard(params, model.shard_rules, mesh)
    random = start_params(
        strategy("tfs"), model, params, aux_key=training.keys(options.seed)["aux"]
    )
    task = Forecasting(binding.default_mode(model))
    if options.loss == "own" and options.part != "train":
        raise UsageError("--loss own needs targets as long as the family trains with: --part train")
    windows = (
        task.windows(model, splits) if options.loss == "own" else getattr(splits, options.part)
    )
    return Subject(
        name=name,
        model=model,
        params=params,
        random=random,
        splits=splits,
        windows=windows,
        facts=facts,
    )


def _trained(
    options: Options, name: str, start: tuple[Model, Tree], splits: Splits, epochs: int
) -> Tree:
    """The small model of a family after a short training, from the folder where it is there
    already.
    """
    place = options.folder / "models" / f"{name}-{epochs}-{options.seed}"
    if place.is_dir():
        return ltsm_jax.load(place)[1]
    model, params = start
    config = binding.train_config(model, epochs=epochs, batch_size=256, lr=1e-3)
    result = run.run(
        model,
        params,
        strategy("ff"),
        data=splits,
        seed=options.seed,
        config=config,
        test=False,
        task=Forecasting(binding.default_mode(model)),
        label=name,
    )
    made = {"source": "random", "command": options.command(), "git_commit": folder.git_commit()}
    place.parent.mkdir(parents=True, exist_ok=True)
    ltsm_jax.save(place, model, result.params, provenance=made)
    return result.params


def settings(options: Options, *own: str) -> dict[str, Any]:
    """Settings that every number depends on, beside the facts of the models. own: fields of one
    experiment.
    """
    names = ("data", "seed", "part", "windows", "loss", "horizon", "context", *own)
    found = {name: getattr(options, name) for name in names}
    return {k: ", ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in found.items()}


def origin() -> dict[str, str]:
    """Provenance of a row."""
    return {
        "git_commit": folder.git_commit(),
        "versions": folder.versions(),
        "device": folder.device(),
    }
