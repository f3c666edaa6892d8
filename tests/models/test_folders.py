"""Model folders: what is kept, what is refused, and what is never replaced."""

import copy
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltsm_jax
from ltsm_jax import storage, trees
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import FAMILIES, folders
from ltsm_jax.models.timer import Timer, TimerConfig

MODEL = Timer(TimerConfig(8, 16, 8, equal_layers(2, 2, 8, 24), context_len=32, horizon=8))
WHOLE = {"heads": 2, "qk": 8, "value": 8}
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture
def folder(tmp_path, params):
    return ltsm_jax.save(tmp_path / "m", MODEL, params, buffers={"table": np.ones(3, np.float32)})


def rewrite(folder: Path, change) -> None:
    """Change the record of a folder as somebody does who knows its format."""
    record = storage.read_record(folder / folders.CONFIG)
    change(record)
    storage.write_record(folder / folders.CONFIG, record)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what is kept


@pytest.mark.slow
def test_every_file_has_the_mode_of_any_new_file(tmp_path, params):
    """In a child, as the umask is one of the whole process."""
    command = f"""
import os, jax, numpy as np, ltsm_jax
from converters.torch_files import write_safetensors
from ltsm_jax.models import folders
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.timer import Timer, TimerConfig
os.umask(0o027)
model = Timer(TimerConfig(8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8))
values = {{"table": np.ones(3, np.float32)}}
params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), folders.param_shapes(model))
ltsm_jax.save({str(tmp_path / "m")!r}, model, params, buffers=values)
write_safetensors({str(tmp_path / "x.safetensors")!r}, values)
"""
    subprocess.run([sys.executable, "-c", command], check=True, cwd=ROOT)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}


def test_home_is_where_a_tilde_says(tmp_path, params, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    ltsm_jax.save("~/m", MODEL, params)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert ltsm_jax.load("~/m")[0] == MODEL
    assert ltsm_jax.load(Path("~") / "m")[0] == MODEL
    with pytest.raises(ValueError, match="~nobody-is-called-so"):
        ltsm_jax.load("~nobody-is-called-so/m")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "float64"])
def test_save_refuses_a_dtype_that_load_would_refuse(tmp_path, params, dtype):
    other = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)
    with pytest.raises(ValueError, match=r"embed/kernel is .*\.astype\('float32'\), params\)"):
        ltsm_jax.save(tmp_path / "m", MODEL, other)
    assert not (tmp_path / "m").exists()
    # The advice of the message.
    ltsm_jax.save(tmp_path / "m", MODEL, jax.tree.map(lambda x: x.astype("float32"), other))
    ltsm_jax.load(tmp_path / "m")


@pytest.mark.parametrize(
    "provenance", [{"prefix": 3}, {"copies": {"a": 1}}, {"a": {1, 2}}, {"hub": "x"}]
)
def test_save_refuses_a_provenance_that_load_would_refuse(tmp_path, params, provenance):
    with pytest.raises(ValueError, match="provenance"):
        ltsm_jax.save(tmp_path / "m", MODEL, params, provenance=provenance)


@pytest.mark.slow
def test_shipped_models_load_and_forecast_in_64_bits():
    """In a child, as the switch is one of the whole process."""
    command = """
import jax, numpy as np, pandas as pd, ltsm_jax
jax.config.update("jax_enable_x64", True)
from ltsm_jax.models import folders
for name in folders.shipped():
    model, params = ltsm_jax.load(name)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    x = np.sin(np.arange(model.context_len))[None, None]
    predict = jax.jit(model.predict, static_argnums=2)
    wide = predict(params, x, 24).point
    stamps = pd.date_range("2024-01-01", periods=800, freq="h")
    table = pd.DataFrame({"date": stamps, "y": np.sin(np.arange(800) / 4)})
    assert np.isfinite(ltsm_jax.forecast(model, params, table, 24)["y"]).all()
    jax.config.update("jax_enable_x64", False)
    plain = predict(params, x.astype(np.float32), 24).point
    jax.config.update("jax_enable_x64", True)
    np.testing.assert_allclose(wide, plain, atol=1e-4)
    print(name)
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == folders.shipped() != []


def test_folders_of_the_first_format_still_load(folder, params):
    record = storage.read_record(folder / folders.CONFIG)
    del record["files"], record["config"]["layers"]
    record["config"] |= {"n_heads": [2, 2], "ffn_dims": [24, 24]}
    (folder / folders.CONFIG).write_text(json.dumps(record | {"format": 1}))
    model, again = ltsm_jax.load(folder)
    assert model == MODEL
    chex.assert_trees_all_equal(again, params)
    np.testing.assert_array_equal(folders.read_buffers(folder)["table"], np.ones(3))


# --- what is refused


def test_a_folder_of_a_later_version_says_so(folder):
    rewrite(folder, lambda record: record.update(format=4))
    with pytest.raises(
        storage.DamagedError, match=r"format 4, and this version of ltsm_jax reads 1 to 3: update"
    ):
        ltsm_jax.load(folder)


def test_a_family_of_another_version_says_so(folder):
    rewrite(folder, lambda record: record.update(family="timer_x"))
    with pytest.raises(
        storage.DamagedError, match=r"knows no family 'timer_x'; did you mean 'timer"
    ):
        ltsm_jax.load(folder)


def test_a_field_of_another_version_says_so(folder):
    rewrite(folder, lambda record: record["config"].update(dropouts=0.5))
    with pytest.raises(
        storage.DamagedError, match=r"dropouts: no such field \(did you mean dropout\?\)"
    ):
        ltsm_jax.load(folder)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("d_model", "16", "d_model: an integer of at most 1,048,576 was expected, got '16'"),
        ("d_model", 16.0, "got 16.0"),
        ("d_model", True, "got True"),
        ("d_model", 10**9, "got 1000000000"),
        ("layers", 2, "layers: a list was expected"),
        ("layers", [2], r"layers\[0\]: fields were expected, got 2"),
        ("layers", [{"attn": WHOLE, "ffn": "2"}], r"layers\[0\].ffn: an integer"),
        ("layers", [{"attn": WHOLE | {"heads": True}, "ffn": 2}], r"attn.heads: an integer"),
        ("layers", [{"attn": WHOLE}], r"layers\[0\].ffn: missing"),
        ("layers", [{"attn": WHOLE | {"qk": 9}, "ffn": 2}], "qk must be a width from 0 to 8"),
        ("dropout", 1.5, "dropout: a number from 0 to 1"),
        ("dropout", float("nan"), "got nan"),
        ("activation", "gelv", "one of 'gelu', 'relu' was expected, got 'gelv'"),
        ("head_dim", 0, "no TimerConfig|every size|positive|DamagedError"),
    ],
)
def test_a_config_is_checked_against_its_types(folder, field, value, said):
    rewrite(folder, lambda record: record["config"].update({field: value}))
    with pytest.raises(storage.DamagedError, match=said) as error:
        ltsm_jax.load(folder)
    assert str(folder / folders.CONFIG) in str(error.value) and len(str(error.value)) < 2000


def test_all_that_is_wrong_is_said_at_once(folder):
    def change(record):
        del record["config"]["patch_len"]
        record["config"] |= {"d_model": None, "horizon": "8"}

    rewrite(folder, change)
    with pytest.raises(storage.DamagedError, match=r"(?s)patch_len: missing.*d_model.*horizon"):
        ltsm_jax.load(folder)


@pytest.mark.parametrize(
    "provenance", [[], "x", None, 3, {"prefix": []}, {"aliases": [1]}, {"hub": []}]
)
def test_a_provenance_is_checked(folder, provenance):
    rewrite(folder, lambda record: record.update(provenance=provenance))
    for read in (ltsm_jax.load, folders.read_config):
        with pytest.raises(storage.DamagedError, match="provenance"):
            read(folder)


@pytest.mark.parametrize("name", [folders.CONFIG, f"{folders.PARAMS}/{storage.DIGESTS}"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a":' * 200 + "1" + "}" * 200]
)
def test_deep_nesting_is_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(
        storage.DamagedError, match=r"nested too deeply|the bytes differ|bytes, \d+ were saved"
    ):
        ltsm_jax.load(folder)
    with pytest.raises(storage.DamagedError, match="nested too deeply"):
        storage.read_record(folder / name)


def test_any_byte_of_any_file_is_looked_at(folder):
    for file in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]:
        whole = file.read_bytes()
        for place in (0, len(whole) // 3, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 4
            file.write_bytes(bytes(damaged))
            with pytest.raises(storage.DamagedError):
                ltsm_jax.load(folder)
        file.write_bytes(whole)
    ltsm_jax.load(folder)


def test_buffers_that_are_gone_or_new_are_told(folder, tmp_path, params):
    file = folder / folders.BUFFERS
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(storage.DamagedError, match=f"{folders.BUFFERS}: missing"):
        ltsm_jax.load(folder)
    other = ltsm_jax.save(tmp_path / "other", MODEL, params)
    (other / folders.BUFFERS).write_bytes(whole)
    with pytest.raises(storage.DamagedError, match="was not saved with it"):
        folders.read_buffers(other)


def test_params_of_another_model_are_told(folder, tmp_path, params):
    """Of the same shapes, so that nothing but the digest knows."""
    other = ltsm_jax.save(tmp_path / "other", MODEL, jax.tree.map(lambda x: x + 1, params))
    shutil.rmtree(folder / folders.PARAMS)
    shutil.copytree(other / folders.PARAMS, folder / folders.PARAMS)
    with pytest.raises(
        storage.DamagedError,
        match=r"params/digests.json: (the bytes differ|\d+ bytes, \d+ were saved)",
    ):
        ltsm_jax.load(folder)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_the_shipped_config_is_believed(tmp_path, step):
    """Every bit of every byte, or of one of thirteen; the rest of the folder plays no part."""
    whole = (folders.SHIPPED / "timer-tiny" / folders.CONFIG).read_bytes()
    read = folders.read_config(folders.SHIPPED / "timer-tiny")[1]
    del read["digest"]
    file = tmp_path / folders.CONFIG
    for place in range(0, len(whole), step):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.unlink(missing_ok=True)  # where a file is replaced, ext4 waits for the disk
            file.write_bytes(bytes(damaged))
            try:
                record = folders.read_config(tmp_path)[1]
            except storage.DamagedError:
                continue
            assert {name: value for name, value in record.items() if name != "digest"} == read


def test_an_array_that_no_file_holds_is_refused(tmp_path):
    """A table and a config that agree with each other, and say a thousand times of what
    there is.
    """
    big = Timer(TimerConfig(8, 16, 8, equal_layers(1, 2, 8, 24), context_len=32, horizon=8))
    folder = ltsm_jax.save(tmp_path / "m", big, big.init(jax.random.key(0)))
    table = folder / folders.PARAMS / storage.DIGESTS
    record = storage.read_record(table)
    record["arrays"]["layer_0/up/kernel"]["shape"] = [16, 1 << 30]
    storage.write_record(table, record)
    with pytest.raises(storage.DamagedError, match=r"bytes of arrays can't come from files of"):
        storage.load_tree(folder / folders.PARAMS)


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero", "a/../../b"])
def test_a_table_names_no_file_outside(folder, name):
    table = folder / folders.PARAMS / storage.DIGESTS
    record = storage.read_record(table)
    record["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    storage.write_record(table, record)
    with pytest.raises(storage.DamagedError, match="is no table of digests"):
        storage.load_tree(folder / folders.PARAMS)


def test_an_adapter_of_peft_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for with_weights in (False, True):
        if with_weights:
            storage.save_tensors(
                tmp_path / "adapter_model.safetensors", {"a.lora_A.weight": np.ones((2, 3))}
            )
        with pytest.raises(ValueError, match="adapter of the PEFT library.*merge_and_unload"):
            ltsm_jax.load(tmp_path)


# --- 3,000 edits of a config.json

VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    513,
    10**5,
    2**31,
    2**63,
    10**30,
    -(10**9),
    0.5,
    -0.5,
    1e-30,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "16",
    "x" * 5000,
    [],
    {},
    [[]],
    [1],
    [None],
    {"a": 1},
    [1, 2, 3],
    ["a"] * 100,
    list(range(3000)),
    [0] * 100_000,
)
DEEP = ("[" * 70 + "]" * 70, "[" * 3000 + "]" * 3000, '{"a":' * 70 + "1" + "}" * 70)


def places(value, path=()):
    """Every place of a JSON value, the outermost left out."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, entry in inner:
        yield (*path, name)
        yield from places(entry, (*path, name))


def edited(rng: random.Random, record: dict) -> str:
    """The text of a config.json after one to three edits, with a digest that is right or the
    former.
    """
    record = copy.deepcopy(record)
    deep = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(record)))
        holder = record
        for name in path[:-1]:
            holder = holder[name]
        old = holder[path[-1]]
        match rng.randrange(6):
            case 0 | 1:
                holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                del holder[path[-1]]
            case 3 if isinstance(old, int | float):
                holder[path[-1]] = rng.choice(
                    (old + 1, old - 1, old * 2, -old, old * 1000, float(old), str(old))
                )
            case 3 if isinstance(old, list):
                holder[path[-1]] = old * rng.choice((2, 10, 1000))
            case 4:
                holder[path[-1]] = "DEEP"
                deep = rng.choice(DEEP)
            case _:
                if isinstance(holder, dict):
                    holder[rng.choice(("x", "family", path[-1].upper()))] = old
                else:
                    holder.append(old)
    plain = {name: value for name, value in record.items() if name != "digest"}
    if rng.random() < 0.9 and deep is None:
        text = json.dumps({"digest": storage._text_digest(plain), **plain})
    else:
        text = json.dumps(record)
    text = text.replace('"DEEP"', deep) if deep else text
    if rng.random() < 0.1:
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice(("", chr(ord(text[place]) ^ 1 << rng.randrange(7))))
            + text[place + 1 :]
        )
    return text


def load_edited(folder: Path, seed: int, n: int) -> int:
    """Load a folder after each of n edits of its config.json; how many of them were believed.

    A subset of the errors that `load` documents, 2 s of the processor and 300 MB are allowed.
    """
    file = folder / folders.CONFIG
    whole = file.read_text()
    record = json.loads(whole)
    rng = random.Random(seed)
    believed = 0
    try:
        folders.load_folder(folder)
        for i in range(n):
            text = edited(rng, record)
            file.unlink()  # where a file is replaced, ext4 waits for the disk
            file.write_text(text)
            said = ""
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.process_time()
            try:
                folders.load_folder(folder)
                believed += 1
            except (ValueError, FileNotFoundError) as error:
                said = str(error)
            took = time.process_time() - began
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
            assert len(said) < 2000, f"{seed} {i}: {text[:300]}"
            assert took < 2, f"{seed} {i} took {took:.1f} s: {text[:3000]}"
            assert grown < 300, f"{seed} {i} took {grown:.0f} MB: {text[:3000]}"
    finally:
        file.write_text(whole)
    return believed


def any_params(model):
    """Parameters without the time of an initialisation."""
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), folders.param_shapes(model)
    )


@pytest.mark.parametrize(
    "name", ["timer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ttm", "chronos_bolt"))]
)
def test_a_hundred_edits_of_a_config_are_refused_or_right(tmp_path, name):
    model = FAMILIES[name](FAMILIES[name].small())
    folder = ltsm_jax.save(
        tmp_path / name, model, any_params(model), provenance={"source": "x", "prefix": "a."}
    )
    assert load_edited(folder, seed=0, n=100) < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_edits_of_a_config_are_refused_or_right(tmp_path, name):
    """3,000 in all, over the sixteen families."""
    model = FAMILIES[name](FAMILIES[name].small())
    folder = ltsm_jax.save(
        tmp_path / name, model, any_params(model), provenance={"source": "x", "prefix": "a."}
    )
    load_edited(folder, seed=1, n=190)


def test_edits_of_a_table_of_digests_are_refused_or_right(folder, params):
    table = folder / folders.PARAMS / storage.DIGESTS
    record = json.loads(table.read_text())
    rng = random.Random(2)
    for i in range(150):
        table.write_text(edited(rng, record))
        began = time.process_time()
        try:
            found = storage.load_tree(folder / folders.PARAMS, folders.param_shapes(MODEL))
        except (ValueError, FileNotFoundError):
            continue
        finally:
            assert time.process_time() - began < 2, i
        for path, leaf in trees.flatten(found).items():
            np.testing.assert_array_equal(leaf, trees.flatten(params)[path])


# --- what is never replaced


def test_only_a_model_folder_is_replaced(tmp_path, folder, params, monkeypatch):
    ltsm_jax.save(folder, MODEL, params, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    (folder / "notes.txt").write_text("x")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "file").write_text("x")
    kept = contents(tmp_path)
    for place, why in (
        (mine, "it is no model folder, but holds thesis.tex"),
        (folder, "it is no model folder, but holds notes.txt"),
        (tmp_path / "hub", "it is no model folder"),
        (tmp_path, "it is no model folder, but holds"),
        (tmp_path / "file", "it is a file"),
    ):
        with pytest.raises(FileExistsError, match=why):
            ltsm_jax.save(place, MODEL, params, overwrite=True)
    (folder / "notes.txt").unlink()
    monkeypatch.chdir(folder / folders.PARAMS)
    for place in (".", "..", folder, Path("../../m")):
        with pytest.raises(FileExistsError, match="the working directory is in it"):
            ltsm_jax.save(place, MODEL, params, overwrite=True)
    kept.pop("m/notes.txt")
    assert contents(tmp_path) == kept


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, folder, params):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "home").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "letter").write_text("x")
    other = jax.tree.map(lambda x: x + 1, params)
    ltsm_jax.save(tmp_path / "link", MODEL, other, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    chex.assert_trees_all_equal(ltsm_jax.load(folder)[1], other)
    with pytest.raises(FileExistsError, match="letter"):
        ltsm_jax.save(tmp_path / "home", MODEL, params, overwrite=True)


def test_a_damaged_model_folder_is_replaced(folder, params):
    (folder / folders.CONFIG).write_text("{")
    ltsm_jax.save(folder, MODEL, params, overwrite=True)
    ltsm_jax.load(folder)


KILLED = """
import os, signal, sys, jax, numpy as np, ltsm_jax
from ltsm_jax import storage
from ltsm_jax.models import folders
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.timer import Timer, TimerConfig
place, after, exchange = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    storage._exchange = lambda a, b: False
rename, renames = os.rename, []
def counted(a, b):
    if place in map(str, (a, b)):
        if len(renames) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        renames.append(a)
    rename(a, b)
os.rename = counted
removed = storage.shutil.rmtree
def killed(path, *args, **kwargs):
    if os.path.dirname(path) == os.path.dirname(place):
        os.kill(os.getpid(), signal.SIGKILL)
    removed(path, *args, **kwargs)
storage.shutil.rmtree = killed
model = Timer(TimerConfig(8, 16, 8, equal_layers(2, 2, 8, 24), context_len=32, horizon=8))
params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), folders.param_shapes(model))
ltsm_jax.save(place, model, params, overwrite=True)
"""


@pytest.mark.parametrize(
    "after, exchange",
    [
        (0, "renames"),
        pytest.param(1, "renames", marks=pytest.mark.slow),
        pytest.param(2, "renames", marks=pytest.mark.slow),
        (0, "exchange"),
    ],
)
def test_a_kill_leaves_a_whole_model_and_the_next_start_removes_the_scrap(
    folder, params, after, exchange
):
    command = [sys.executable, "-c", KILLED, str(folder), str(after), exchange]
    done = subprocess.run(command, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.parent.iterdir())) > 1
    new = jax.tree.map(np.ones_like, params)
    expected = new if (after, exchange) in ((2, "renames"), (0, "exchange")) else params
    model, found = ltsm_jax.load(folder)
    assert model == MODEL
    chex.assert_trees_all_equal(found, expected)
    ltsm_jax.save(folder, MODEL, params, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_scrap_of_a_process_that_runs_is_left_alone(tmp_path, folder, params):
    stem = f".m.{storage._this_machine()}-{os.getppid()}.{'0' * 32}"
    (tmp_path / f"{stem}.tmp").mkdir()
    (tmp_path / f".m.{'0' * 8}-1.{'0' * 32}.tmp").mkdir()  # of another machine, and not a day old
    ltsm_jax.save(folder, MODEL, params, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 3


FULL = """
import os, resource, signal, sys, jax, numpy as np, ltsm_jax
from ltsm_jax.models import folders
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models.timer import Timer, TimerConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = Timer(TimerConfig(8, 64, 8, equal_layers(2, 2, 8, 512), context_len=32, horizon=8))
params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), folders.param_shapes(model))
for size in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    try:
        ltsm_jax.save(sys.argv[1], model, params, buffers={"a": np.ones(100_000, np.float32)})
    except OSError as error:
        print(error)
    print("left:", os.listdir(os.path.dirname(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line(tmp_path):
    """A limit of the process stands for it: it is met by the same calls."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "m"), "100", "60000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1::2] == ["left: []"] * 2
    assert len(lines[::2]) == 2
    for line in lines[::2]:
        assert str(tmp_path) in line and ("No space left" in line or "File too large" in line)
    assert list(tmp_path.iterdir()) == []
