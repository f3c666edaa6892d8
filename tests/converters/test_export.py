"""What an export writes beside the tensors, what neither import nor export ever replaces, and the
command line.
"""

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest

import converters
import ltsm_jax
from converters import export_checkpoint, import_checkpoint
from converters.torch_files import read_safetensors
from ltsm_jax import storage
from ltsm_jax.cli import main
from ltsm_jax.models import folders

# Whose files bring a config.json.
NAMES = (
    "chronos_2",
    "chronos_bolt",
    "chronos_t5",
    "moirai",
    "moirai_2",
    "moirai_moe",
    "moment",
    "sundial",
    "time_moe",
    "timer_hf",
    "timer_xl",
    "timesfm_1",
    "timesfm_2p5",
    "timesfm_3",
    "tirex_2",
    "toto_2",
    "ttm",
    "ttm_r2",
    "ttm_r3",
    "units",
)
STRICT = ("tirex_2",)  # refuses fields that it does not know


@pytest.fixture(scope="module")
def original(golden, tmp_path_factory):
    """A recorded checkpoint in the form of the hub, with two fields that this library does not
    read.
    """
    folder = tmp_path_factory.mktemp("original")
    vectors = golden("chronos_bolt")
    shutil.copy(vectors.checkpoint, folder / "model.safetensors")
    published = vectors.config | {"_name_or_path": "somewhere", "unknown": [1, {"a": None}]}
    (folder / "config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture(scope="module")
def imported(original):
    import_checkpoint(original, original.parent / "imported")
    return original.parent / "imported"


@pytest.fixture
def model(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "model")
    return tmp_path / "model"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- the fields


@pytest.mark.parametrize("name", NAMES)
def test_a_config_comes_back_as_it_was(golden, tmp_path, name):
    """Every field of the original, also where the weights were trained since the import."""
    vectors = golden(name)
    file = vectors.folder / "model.safetensors"
    file = file if file.exists() else vectors.checkpoint
    foreign = {"not_read_by_us": {"a": [1, 2]}, "transformers_version": "4.40.1"}
    published = vectors.config | ({} if name in STRICT else foreign)
    shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(published))
    beside = vectors.folder / "generation_config.json"
    if beside.exists():
        shutil.copy(beside, tmp_path)

    imported, params, *_ = import_checkpoint(tmp_path / file.name, tmp_path / "model")
    record = folders.read_config(tmp_path / "model")[1]
    buffers = folders.read_buffers(tmp_path / "model")
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(1.5), params)
    ltsm_jax.save(
        tmp_path / "tuned", imported, moved, provenance=record["provenance"], buffers=buffers
    )
    for source, target in (("model", "back"), ("tuned", "tuned-back")):
        export_checkpoint(tmp_path / source, tmp_path / target / file.name)
        assert json.loads((tmp_path / target / "config.json").read_text()) == published
    before, after = (tmp_path / n / file.name for n in ("back", "tuned-back"))
    assert before.read_bytes() != after.read_bytes(), "trained"


@pytest.mark.slow
def test_every_exported_file_has_the_mode_of_any_new_file(original, tmp_path):
    """Of an export, beside it, and of a capsule; in a child, as the umask is one of the whole
    process.
    """
    command = f"""
import os
from converters import export_checkpoint, import_checkpoint
from ltsm_jax import Forecaster, capsule
os.umask(0o027)
import_checkpoint({str(original)!r}, "model")
export_checkpoint("model", "hub")
export_checkpoint("model", "torch/tuned.bin")
capsule.write(Forecaster.load("model"), "made.capsule", 4)
"""
    subprocess.run([sys.executable, "-c", command], check=True, cwd=tmp_path)
    made = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*")}
    assert {"hub/model.safetensors", "hub/config.json", "torch/tuned.bin"} <= made.keys()
    assert {"torch/config.json", "made.capsule"} <= made.keys()
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in made.items()}
    assert {mode for name, mode in modes.items() if made[name].is_file()} == {0o640}, modes
    assert {mode for name, mode in modes.items() if made[name].is_dir()} == {0o750}, modes


def test_what_was_changed_since_the_import_is_written(original, model, tmp_path):
    """Of a field, also where the original says it deep inside; the others stay."""
    tuned, params = ltsm_jax.load(model)
    record = folders.read_config(model)[1]
    fields = tuned.config_to_dict() | {"start_token": 1}
    other = type(tuned)(type(tuned).config_from_dict(fields))
    ltsm_jax.save(tmp_path / "tuned", other, params, provenance=record["provenance"])
    export_checkpoint(tmp_path / "tuned", tmp_path / "back")
    before = json.loads((original / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert after != before and after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == ["decoder_start_token_id"]
    assert import_checkpoint(tmp_path / "back")[0].config == other.config


def test_fields_that_say_one_thing_twice_do_not_contradict(golden, tmp_path):
    """The original reads the number of layers under two names, of which an export without memory
    writes one.
    """
    from converters import _merged

    told = {"a": 1, "same_as_a": 1, "rest": {"x": 1, "y": 2}}
    meant = {"a": 1, "rest": {"x": 1}, "ours": 5}
    assert _merged(told, meant, meant) == told
    assert _merged(told, meant, meant | {"a": 2}) == told | {"a": 2}
    assert _merged(told, meant, {"a": 1, "rest": {"x": 3}, "ours": 6}) == told | {
        "rest": {"x": 3, "y": 2},
        "ours": 6,
    }


# --- what is never replaced


def targets(folder):
    """Places in a model folder, and its names."""
    inside = (
        ".",
        "params",
        "config",
        "model.safetensors",
        "params/model.safetensors",
        "buffers.safetensors",
    )
    return [folder / name for name in inside]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("i", range(6))
def test_an_export_never_writes_into_its_model_folder(model, tmp_path, i, overwrite, monkeypatch):
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(model)
    for target in (targets(model)[i], targets(tmp_path / "link")[i]):
        with pytest.raises(FileExistsError, match="in the model folder"):
            export_checkpoint(model, target, overwrite=overwrite)
    monkeypatch.chdir(model)
    with pytest.raises(FileExistsError, match="in the model folder"):
        export_checkpoint(".", targets(tmp_path / "model")[i], overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_never_writes_into_another_model_folder(model, tmp_path, overwrite):
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").symlink_to(tmp_path / "other" / "config.json")
    before = contents(tmp_path)
    for target in (tmp_path / "other", tmp_path / "other" / "x.safetensors", tmp_path / "linked"):
        with pytest.raises(FileExistsError, match="config of a model folder"):
            export_checkpoint(model, target, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_an_export_replaces_an_earlier_export_and_nothing_else(model, tmp_path):
    export_checkpoint(model, tmp_path / "out")
    again = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite"):
        export_checkpoint(model, tmp_path / "out")
    export_checkpoint(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == again

    (tmp_path / "letter.safetensors").write_text("Dear all,")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.json").write_text('{"title": "My page", "theme": "dark"}')
    (tmp_path / "folder.safetensors").mkdir()
    before = contents(tmp_path)
    for target, why in (
        ("letter.safetensors", "is no checkpoint"),
        ("site", "is of something else"),
        ("site/a.safetensors", "is of something else"),
        ("folder.safetensors", "is there, and no file"),
    ):
        with pytest.raises(FileExistsError, match=why):
            export_checkpoint(model, tmp_path / target, overwrite=True)
    with pytest.raises(FileExistsError, match="choose another folder"):
        export_checkpoint(model, tmp_path / "site")
    assert contents(tmp_path) == before


def test_an_import_replaces_model_folders_only(original, model, tmp_path, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(original, work)
    before = contents(tmp_path)
    monkeypatch.chdir(work)
    for place in (".", "..", str(work), "../work", "model.safetensors"):
        with pytest.raises(FileExistsError, match="is not replaced"):
            import_checkpoint("model.safetensors", place, overwrite=True)
    assert contents(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    import_checkpoint(work, model, overwrite=True)
    assert contents(model).keys() == {
        name.removeprefix("model/") for name in before if name.startswith("model/")
    } or (ltsm_jax.load(model))
    shutil.move(work / "model.safetensors", model / "params")
    with pytest.raises(FileExistsError):
        import_checkpoint(model / "params" / "model.safetensors", model, overwrite=True)


def test_home_is_where_a_tilde_says(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, tmp_path / "original")
    import_checkpoint("~/original", "~/m", config="~/original/config.json")
    export_checkpoint("~/m", "~/back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m", "original"]
    assert converters.inspect("~/m")["family"] == "chronos_bolt"


def test_an_export_of_what_is_no_model_folder_says_what_to_do(original, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"ltsm convert nothing FOLDER"):
        export_checkpoint("nothing", tmp_path / "x")
    with pytest.raises(storage.DamagedError, match="is not the config of a model folder"):
        export_checkpoint(original, tmp_path / "x")


def test_loading_an_original_says_what_was_assumed(golden, tmp_path, capsys):
    vectors = golden("units")
    shutil.copy(vectors.checkpoint, tmp_path)
    try:
        ltsm_jax.load(tmp_path / vectors.checkpoint.name)
    except ValueError as error:  # a set whose number of heads is not the one that is assumed
        said = str(error)
    else:
        said = capsys.readouterr().err
    assert "config.json" in said and vectors.checkpoint.name in said
    shutil.copy(vectors.folder / "config.json", tmp_path)
    ltsm_jax.load(tmp_path / vectors.checkpoint.name)
    assert not capsys.readouterr().err


# --- the command line


def told(capsys, *arguments):
    """What the command line says of an input at fault."""
    assert main([str(argument) for argument in arguments]) in (2, 3)
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ") and "Traceback" not in streams.err and not streams.out
    assert len(streams.err) <= 2050
    return streams.err


def test_a_damaged_original_is_one_message_with_its_name(original, tmp_path, capsys):
    rng = random.Random(0)
    whole = (original / "model.safetensors").read_bytes()
    config = (original / "config.json").read_text()
    header = int.from_bytes(whole[:8], "little") + 8
    file = tmp_path / "model.safetensors"
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(header)] = rng.randrange(256)
        file.write_bytes(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]))
        (tmp_path / "config.json").write_text(config)
        assert str(tmp_path) in told(capsys, "models", tmp_path)
    file.write_bytes(whole)
    for _ in range(60):
        place = rng.randrange(len(config))
        (tmp_path / "config.json").write_text(
            config[:place]
            + rng.choice(("", "[", "9" * 30, "-1", "null", "1e999"))
            + config[place + 5 :]
        )
        if main(["models", str(tmp_path)]):  # some of these are as good as before
            streams = capsys.readouterr()
            assert "Traceback" not in streams.err and str(tmp_path) in streams.err
        capsys.readouterr()


def test_a_damaged_folder_is_one_message_with_its_name(model, tmp_path, capsys):
    for file in [path for path in model.rglob("*") if path.is_file() and path.stat().st_size]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        for command in (("models", model), ("export", model, tmp_path / "out")):
            assert str(model) in told(capsys, *command)
        file.write_bytes(whole)
    assert main(["models", str(model)]) == 0
    assert "published" not in capsys.readouterr().out


def test_an_error_nobody_thought_of_has_the_name_of_the_file(monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise KeyError("x" * 5000)

    monkeypatch.setattr(converters, "inspect", fail)
    assert f"{tmp_path}: can't be read (KeyError" in told(capsys, "models", tmp_path)


def test_a_full_disk_is_one_line(monkeypatch, capsys, original, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "m"))

    monkeypatch.setattr(storage, "save_tree", full)
    said = told(capsys, "convert", original, tmp_path / "m")
    assert said.count("\n") == 1 and str(tmp_path / "m") in said and "make room" in said


def test_a_round_trip_as_the_help_shows_it(original, tmp_path, capsys):
    assert main(["convert", str(original), str(tmp_path / "my-model")]) == 0
    assert main(["export", str(tmp_path / "my-model"), str(tmp_path / "back.safetensors")]) == 0
    one, other = (
        read_safetensors(path)
        for path in (original / "model.safetensors", tmp_path / "back.safetensors")
    )
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
