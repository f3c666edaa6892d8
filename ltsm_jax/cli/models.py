"""Commands about models and the machine, without data: models, convert, export, doctor."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from ltsm_jax import capsule, doctor, flags, hosts, hub, trees
from ltsm_jax.cli import printing
from ltsm_jax.cli.options import Command, Licence, quantile_levels
from ltsm_jax.forecaster import LEVELS, Forecaster
from ltsm_jax.models import FAMILIES, Model, folders, near_presets
from ltsm_jax.original_files import CheckpointError, find_converters
from ltsm_jax.training.memory import size_in_words

PARAMETERS = Path(__file__).with_name(
    "parameters.json"
)  # counts by preset, which take 15 s to find out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Command):
    """List the published models that can be loaded, or say what one model is.

    Without SOURCE: every family with its licence and tasks, and its presets
    with parameters, context and horizon in time steps. A preset that has its
    weights in the package is marked *. With SOURCE: a preset, a model folder,
    a checkpoint file of an original, or a name of the hub.

    Example:  ltsm models
              ltsm models amazon/chronos-bolt-tiny
              ltsm models my-folder --json
    Cost:     3 seconds; a checkpoint is read whole.
    """

    program: ClassVar[str] = "ltsm models"

    source: Annotated[tyro.conf.Positional[str | None], flags.text("SOURCE")] = None
    """what to describe"""
    licence: Licence = dataclasses.field(default_factory=Licence)

    def run(self) -> int:
        """Print a table, or the facts of one model."""
        if self.source is None:
            found = list_presets()
            if self.output.json:
                printing.show_json({"models": found})
            else:
                _show_list(found)
            return 0
        found = describe_source(self.source, self.licence.accept_license)
        if self.output.json:
            printing.show_json(found)
        else:
            printing.show(printing.facts({name: _in_words(value) for name, value in found.items()}))
        return 0


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Name the source in unforeseen errors: reading a damaged file may raise any.

    Raises: CheckpointError in their place.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, hosts.Stopped):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{source}: can't be read ({type(error).__name__}: {said})"
        ) from error


def list_presets() -> list[dict[str, Any]]:
    """Give every preset with its facts."""
    counts = json.loads(PARAMETERS.read_text())
    found = []
    for family in FAMILIES.values():
        for name, config in family.presets().items():
            model = family(config)
            found.append(_facts(model) | {"name": name, "parameters": counts[name]})
    return found


def count_presets() -> dict[str, int]:
    """Count the parameters of every preset, without making any."""
    found = {}
    for family in FAMILIES.values():
        for name, config in family.presets().items():
            found[name] = trees.count(folders.param_shapes(family(config)))
    return found


def record_counts() -> None:
    """Store the counts of all presets, for maintainers who have added one."""
    PARAMETERS.write_text(json.dumps(count_presets(), indent=1) + "\n")


def _facts(model: Model) -> dict[str, Any]:
    return {
        "family": model.family,
        "licence": model.licence,
        "tasks": list(model.tasks),
        "context": model.context_len,
        "horizon": model.horizon,
    }


def _show_list(found: list[dict[str, Any]]) -> None:
    with_weights = folders.shipped()
    # One table, so that its columns are aligned; the headings of families are inserted afterwards.
    rows = []
    for entry in found:
        label = f"  {entry['name']}{' *' if entry['name'] in with_weights else ''}"
        rows.append(
            (
                label,
                printing.in_millions(entry["parameters"]),
                str(entry["context"]),
                str(entry["horizon"]),
            )
        )
    header, *lines = printing.table(("preset", "weights", "context", "ahead"), rows).splitlines()
    printing.show(header)
    family = ""
    for entry, line in zip(found, lines, strict=True):
        if entry["family"] != family:
            family = entry["family"]
            licence = entry["licence"].partition(" (")[0]
            printing.show(f"\n{family}: {', '.join(entry['tasks'])}\n  {licence}")
        printing.show(line)
    printing.show(
        "\n* comes with the package. Names with an owner are fetched from the hub, once;\n"
        "the files of the others go into $LTSM_CACHE/models, or are given by their path."
    )


def describe_source(source: str, accept_license: bool) -> dict[str, Any]:
    """Say what a preset, model folder, checkpoint or name of the hub is; weights are fetched for
    the last alone.
    """
    if folders.local(source) is None and folders.is_preset(source):
        (entry,) = [entry for entry in list_presets() if entry["name"] == source]
        return entry | {"weights": "not on this machine; fetched from the hub when they are used"}
    if folders.local(source) is None and hub.parse_name(source) is None:
        near = near_presets(source, folders.shipped())
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise flags.UsageError(
            f"no model {source!r} on this machine, and no name of the hub (owner/name){guess}"
        )
    with _named(source):
        found = find_converters().inspect(source, accept_license=accept_license)
    model = FAMILIES[found["family"]](FAMILIES[found["family"]].config_from_dict(found["config"]))
    return _facts(model) | found


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_in_words(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Make a model folder of an original checkpoint, without PyTorch.

    SOURCE is a checkpoint file (.safetensors, .bin, .pth, .ckpt), the index
    of several, a folder with one in it, or a name of the hub. The folder is
    what every other command takes as --model.

    Example:  ltsm convert Timer_forecast_1.0.ckpt timer-67m
              ltsm convert amazon/chronos-bolt-tiny bolt
    Cost:     seconds, and twice the size of the file in memory.
    """

    program: ClassVar[str] = "ltsm convert"

    source: Annotated[tyro.conf.Positional[str], flags.text("SOURCE")]
    """the original"""
    folder: Annotated[tyro.conf.Positional[Path], flags.path("FOLDER")]
    """model folder to write, whole or not at all"""
    config: Annotated[Path | None, flags.path("FILE")] = None
    """JSON file of the original's hyper-parameters; by default config.json beside it, else what the
    tensors say
    """
    allow_cast: bool = False
    """round float64 and integer tensors to float32 instead of refusing them"""
    overwrite: bool = False
    """replace FOLDER where it is a model folder"""
    licence: Licence = dataclasses.field(default_factory=Licence)

    def run(self) -> int:
        """Convert, and say what came out."""
        with _named(self.source):
            model, params, provenance, _ = find_converters().import_checkpoint(
                self.source,
                self.folder,
                config=self.config,
                allow_cast=self.allow_cast,
                overwrite=self.overwrite,
                accept_license=self.licence.accept_license,
            )
        found = {
            "folder": str(self.folder),
            **_facts(model),
            "parameters": trees.count(params),
            "source": provenance["source"],
            "sha256": provenance["sha256"],
            "licence": provenance["licence"],
            **({"hub": provenance["hub"]} if "hub" in provenance else {}),
            "notes": provenance["notes"],
        }
        _show_written(self, found)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a model folder as what the original's code loads, or as a capsule.

    The suffix of FILE says the container: .safetensors, .bin or .pth (a bare
    state dict), .ckpt. Without a suffix it is a folder in the form of the
    hub. A folder that `ltsm fit` wrote is exported as well.
    With --capsule FILE is a forecaster that runs without this library, where
    there is Python with jax: python sales.capsule history.csv forecast.csv

    Example:  ltsm export runs/sales/model tuned.safetensors
              ltsm export runs/sales/model sales.capsule --capsule --horizon 28
    Cost:     seconds, and twice the size of the model in memory.
    """

    program: ClassVar[str] = "ltsm export"

    folder: Annotated[tyro.conf.Positional[str], flags.text("FOLDER")]
    """model folder, or whatever else --model takes"""
    file: Annotated[tyro.conf.Positional[Path], flags.path("FILE")]
    """file or folder to write"""
    overwrite: bool = False
    """replace an earlier export"""
    capsule: bool = False
    """write a capsule"""
    horizon: Annotated[int | None, flags.whole(1, unset="none")] = None
    """of a capsule: rows that it forecasts"""
    context: Annotated[int | None, flags.whole(1, unset="as fitted")] = None
    """of a capsule: rows that it looks at"""
    levels: Annotated[tuple[float, ...], quantile_levels()] = LEVELS
    """of a capsule: its quantiles; none: the point forecast alone"""
    int8: bool = False
    """of a capsule: keep matrices in 8 bits, a quarter of the size; what it changes is measured"""
    licence: Licence = dataclasses.field(default_factory=Licence)

    def problems(self, given: set[str]) -> list[str]:
        """Say what does not go together."""
        if self.capsule:
            return [] if self.horizon else ["--capsule needs --horizon, the rows that it forecasts"]
        only = sorted({"horizon", "context", "levels", "int8"} & given)
        return [f"--{name} is of a capsule; give --capsule" for name in only]

    def run(self) -> int:
        """Export, and say what could not be kept."""
        with _named(self.folder):
            forecaster = Forecaster.load(self.folder, accept_license=self.licence.accept_license)
        if self.capsule:
            assert self.horizon is not None
            written = capsule.write(
                forecaster,
                self.file,
                self.horizon,
                quantile_levels=self.levels,
                context_len=self.context,
                int8=self.int8,
                overwrite=self.overwrite,
            )
            found = {"file": str(written.path), "bytes": written.size, "batch": written.batch}
            if written.drift is not None:
                found |= dict(zip(("mean_drift", "largest_drift"), written.drift, strict=True))
            _show_written(self, {**found, "notes": [*str(written).split("\n")[1:]]})
            return 0
        notes = forecaster.export(self.file, overwrite=self.overwrite)
        _show_written(self, {"file": str(self.file), "notes": notes})
        return 0


def _show_written(command: Command, found: dict[str, Any]) -> None:
    if command.output.json:
        printing.show_json(found)
        return
    notes = found.pop("notes")
    printing.show(printing.facts({name: _in_words(value) for name, value in found.items()}))
    if notes:
        printing.say(printing.notes(notes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Examine this installation: versions, devices, a forecast of every family.

    Each family forecasts a fixed series at a small size with fixed weights,
    and the answer is compared with the stored one. Nothing is downloaded.
    Exit code 1 where something is wrong; the line says what to do.

    Example:  ltsm doctor
              ltsm doctor --families timer,chronos_bolt --json
    Cost:     half a minute on 2 cores, most of it compiling.
    """

    program: ClassVar[str] = "ltsm doctor"

    families: Annotated[
        tuple[str, ...],
        flags.names(tuple(FAMILIES)),
        flags.described(f"which to examine, of {', '.join(FAMILIES)}; by default all"),
    ] = tuple(FAMILIES)
    record: Annotated[Path | None, flags.path("FILE")] = None
    """write the answers of this device to a file instead, after a family has changed on purpose"""

    def run(self) -> int:
        """Examine, family by family."""
        start = time.perf_counter()
        if self.record is not None:
            doctor.record(self.record)
            printing.show_json({"record": str(self.record)}) if self.output.json else printing.show(
                str(self.record)
            )
            return 0
        found = doctor.environment()
        if not self.output.json:
            _show_environment(found)
        checks = []
        for check in doctor.examine(self.families):
            hosts.stop_if_asked("before all families were examined")
            checks.append(check)
            if not self.output.json:
                printing.show(_checked(check))
        faults = sum(bool(check.problem) for check in checks)
        faults += sum(bool(cache["problem"]) for cache in found["caches"].values())
        took = time.perf_counter() - start
        if self.output.json:
            everything = [dataclasses.asdict(check) for check in checks]
            printing.show_json(found | {"checks": everything, "faults": faults, "seconds": took})
        else:
            printing.show(f"\n{faults or 'no'} fault{'' if faults == 1 else 's'}, {took:.0f} s")
        return 1 if faults else 0


def _show_environment(found: dict[str, Any]) -> None:
    versions = [
        f"{name} {version}" for name, version in found["versions"].items() if version is not None
    ]
    absent = [name for name, version in found["versions"].items() if version is None]
    caches = {}
    for kind, cache in found["caches"].items():
        said = cache["problem"] or f"{size_in_words(cache['free'])} free"
        caches[kind] = f"{cache['folder']} ({said})"
    printing.show(
        printing.facts(
            {
                "python": f"{found['python']} on {found['system']}, {found['cores']} cores",
                "packages": ", ".join(versions),
                **({"not installed": f"{', '.join(absent)} (all optional)"} if absent else {}),
                "devices": f"{', '.join(found['devices'])} ({found['backend']})",
                **caches,
            }
        )
    )
    printing.show()


def _checked(check: doctor.Check) -> str:
    if not check.problem:
        return str(check)
    return printing.facts({f"{check.family:14} FAULT": check.problem})
