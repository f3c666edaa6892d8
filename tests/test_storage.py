import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltsm_jax import storage, trees


@pytest.fixture
def tree():
    return {
        "a": {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "scalar": jnp.float32(3)},
        "half": jnp.arange(5, dtype=jnp.bfloat16),
        "steps": np.arange(3, dtype=np.int32),
    }


def same(a, b):
    trees.require_same(a, b, dtypes=True)
    return storage.digests(a) == storage.digests(b)


def test_round_trip_is_bit_equal(tmp_path, tree):
    storage.save_tree(tmp_path / "t", tree)
    assert same(storage.load_tree(tmp_path / "t"), tree)
    shapes = jax.eval_shape(lambda: tree)
    assert same(storage.load_tree(tmp_path / "t", like=shapes), tree)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_threads_save_at_once(tmp_path, tree):
    """As the checkpoints of a run and a model that is saved beside it."""
    many = {f"layer_{i}": tree["a"] for i in range(20)}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: storage.save_tree(tmp_path / str(i), many), range(6)))
    assert all(same(storage.load_tree(tmp_path / str(i)), many) for i in range(6))


def test_restores_into_shards(tmp_path, tree):
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec()
    )
    storage.save_tree(tmp_path / "t", tree)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    got = storage.load_tree(tmp_path / "t", like)
    assert same(got, tree) and all(leaf.sharding == sharding for leaf in jax.tree.leaves(got))


def test_existing_folder_is_kept_unless_asked(tmp_path, tree):
    storage.save_tree(tmp_path / "t", tree)
    with pytest.raises(FileExistsError, match="exists"):
        storage.save_tree(tmp_path / "t", {"a": jnp.zeros(1)})
    storage.save_tree(tmp_path / "t", {"a": jnp.zeros(1)}, overwrite=True)
    assert list(trees.flatten(storage.load_tree(tmp_path / "t"))) == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        storage.save_tree(tmp_path / "t", {"ok": jnp.ones(2), "empty": jnp.zeros((0, 3))})
    with pytest.raises(RuntimeError), storage.atomic_folder(tmp_path / "t") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def damaged(path, how):
    whole = path.read_bytes()
    match how:
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case _:
            where = int(how * len(whole))
            path.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    return whole


@pytest.mark.parametrize("how", ["gone", "empty", "half", 0.0, 0.2, 0.5, 0.8, 0.99])
def test_damage_to_any_file_is_refused_by_name(tmp_path, tree, how):
    folder = tmp_path / "t"
    storage.save_tree(folder, tree)
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    for file in files:
        whole = damaged(file, how)
        with pytest.raises(storage.DamagedError) as info:
            storage.load_tree(folder)
        assert str(folder) in str(info.value) and file.name in str(info.value)
        file.write_bytes(whole)
    assert same(storage.load_tree(folder), tree)


def test_digest_of_other_values_names_the_array(tmp_path, tree):
    storage.save_tree(tmp_path / "t", tree)
    digests = tmp_path / "t" / storage.DIGESTS
    record = storage.read_record(digests)
    record["arrays"]["a/kernel"]["sha256"] = "0" * 64
    storage.write_record(digests, record)
    with pytest.raises(storage.DamagedError, match="a/kernel: the values differ"):
        storage.load_tree(tmp_path / "t")


def test_other_dtype_or_shape_than_the_model_is_refused_by_name(tmp_path, tree):
    storage.save_tree(tmp_path / "t", tree)
    like = jax.eval_shape(lambda: tree)
    like["half"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    like["a"]["kernel"] = jax.ShapeDtypeStruct((64, 31), jnp.float32)
    with pytest.raises(ValueError) as info:
        storage.load_tree(tmp_path / "t", like)
    assert "half: the model float32" in str(info.value) and "a/kernel: the model (64, 31)" in str(
        info.value
    )


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.load_tree(tmp_path / "nothing")


def test_pieces_of_a_save_that_failed_print_nothing_afterwards():
    """asyncio tells of them when they are collected, at times after the message of the error."""
    script = """
import asyncio, gc
from ltsm_jax import storage

async def piece():
    raise ValueError("File too large")

async def save():
    task = asyncio.ensure_future(piece())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task

try:
    with storage._quiet():
        asyncio.run(save())
        raise OSError("full")
except OSError:
    gc.collect()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_still_written_to_is_removed_when_that_has_ended(tmp_path, monkeypatch):
    removed, remove = [], shutil.rmtree

    def refilled(path, **kwargs):
        remove(path, **kwargs)
        removed.append(path)
        if len(removed) < 3:  # a thread has written meanwhile
            path.mkdir()

    monkeypatch.setattr(storage.shutil, "rmtree", refilled)
    (tmp_path / "m").mkdir()
    storage._remove_for_good(tmp_path / "m")
    assert len(removed) == 5 and not (tmp_path / "m").exists(), "looked at until it stays away"


@pytest.fixture
def nothing_kept():
    """JAX without a folder of compiled programs, and afterwards as it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_cache(tmp_path, monkeypatch, nothing_kept):
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path))
    storage.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "compiled")
    assert (tmp_path / "compiled").is_dir()
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "other"))
    storage.keep_compiled()  # what is set stays
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "compiled")


def test_compiled_programs_are_not_kept_where_nothing_can_be_written(
    tmp_path, monkeypatch, nothing_kept
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "file"))
    storage.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_compiled_programs_used_longest_ago_make_room(tmp_path, monkeypatch, nothing_kept):
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path))
    monkeypatch.setattr(storage, "COMPILED", 250)
    (tmp_path / "compiled").mkdir()
    for age, name in enumerate(["new", "middle", "old"]):
        file = tmp_path / "compiled" / name
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    storage.keep_compiled()
    assert {file.name for file in (tmp_path / "compiled").iterdir()} == {"new", "middle"}
