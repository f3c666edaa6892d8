"""Checkpoints of several files, folders in the form of the hub, nested containers, and hostile ones
of these.
"""

import json
import re
import shutil
import struct

import numpy as np
import pytest
from handmade_files import CONFIG, timer_state

from converters import CheckpointError, export_checkpoint, import_checkpoint, inspect, timer
from converters.torch_files import read_safetensors, read_torch, write_safetensors, write_torch
from ltsm_jax import trees
from ltsm_jax.cli import main
from ltsm_jax.models import folders

PUBLISHED = timer.published(CONFIG)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state():
    return timer_state()


@pytest.fixture(scope="module")
def whole(state, tmp_path_factory):
    """The checkpoint in one file, and what it is."""
    folder = tmp_path_factory.mktemp("whole")
    write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return folder, import_checkpoint(folder, folder / "model")


def sharded(folder, state, *, suffix=".safetensors", change=None, drop=()):
    """Two files and their index, which `change` may rewrite."""
    keys = sorted(state)
    names = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    write = write_safetensors if suffix == ".safetensors" else write_torch
    for name, half in zip(names, (keys[::2], keys[1::2]), strict=True):
        if name not in drop:
            write(folder / name, {key: state[key] for key in half})
    table = {key: names[i % 2] for i, key in enumerate(keys)}
    file = folder / (INDEX if suffix == ".safetensors" else "pytorch_model.bin.index.json")
    file.write_text(json.dumps({"metadata": {}, "weight_map": change(table) if change else table}))
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return file


def require_same(found, wanted):
    assert found[0] == wanted[0]
    one, other = trees.flatten(found[1]), trees.flatten(wanted[1])
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_several_files_and_their_index(tmp_path, state, whole, suffix):
    index = sharded(tmp_path, state, suffix=suffix)
    for source in (index, tmp_path):
        found = import_checkpoint(source)
        require_same(found, whole[1])
    assert set(found[2]["sha256"]) == {f"model-0000{i}-of-00002{suffix}" for i in (1, 2)}
    assert found[2]["source"] == index.name


def moved(table, to):
    return table | {min(table): to}


HOSTILE_INDEX = {
    "another shard": (lambda t: moved(t, t[sorted(t)[1]]), r"in model-00001.*, but the index says"),
    "unknown key": (lambda t: t | {"more.weight": t[min(t)]}, r"'more\.weight': not in"),
    "key not listed": (
        lambda t: {k: v for k, v in t.items() if k != min(t)},
        "but the index says 'None'",
    ),
    "a shard that is not there": (
        lambda t: moved(t, "model-00003-of-00003.safetensors"),
        "not there",
    ),
    "parent": (lambda t: moved(t, "../model.safetensors"), "outside its folder"),
    "absolute": (lambda t: moved(t, "/etc/passwd"), "outside its folder"),
    "parent itself": (lambda t: moved(t, ".."), "hold no tensors|outside its folder"),
    "empty name": (lambda t: moved(t, ""), "outside its folder"),
    "nul": (lambda t: moved(t, "a\0b.safetensors"), "not there"),
    "very long": (lambda t: moved(t, "a" * 5000), "outside its folder"),
    "itself": (lambda t: dict.fromkeys(t, INDEX), "another index"),
    "number": (lambda t: moved(t, 7), "no weight_map"),
    "empty": (lambda t: {}, "no weight_map"),
    "list": (lambda t: sorted(t), "no weight_map"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEX)
def test_an_index_that_does_not_go_with_its_files(tmp_path, state, case):
    change, message = HOSTILE_INDEX[case]
    sharded(tmp_path, state, change=change)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path)


def test_an_index_of_an_index(tmp_path, state):
    sharded(tmp_path, state, change=lambda t: dict.fromkeys(t, "other.safetensors.index.json"))
    shutil.copy(tmp_path / INDEX, tmp_path / "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match="another index"):
        import_checkpoint(tmp_path / INDEX)


def test_an_index_that_is_no_index_and_a_missing_part(tmp_path, state):
    sharded(tmp_path, state, drop=("model-00002-of-00002.safetensors",))
    with pytest.raises(
        CheckpointError, match=r"'model-00002-of-00002\.safetensors' not there\. Fetch all 2 files"
    ):
        import_checkpoint(tmp_path)
    for text in ("", "[]", "7", "{}", "[" * 100_000, '{"weight_map": null}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            import_checkpoint(tmp_path)


def test_a_state_dict_nested_under_student(tmp_path, state, whole):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    write_torch(tmp_path / "a.pth", {"student": state, "epoch": 3, "optimizer": {"lr": 0.1}})
    found = import_checkpoint(tmp_path / "a.pth", tmp_path / "model")
    require_same(found, whole[1])
    assert found[2]["container"] == "student" and found[2]["extras"] == {"epoch": 3}
    assert found[2]["ignored"] == ["optimizer"]
    export_checkpoint(tmp_path / "model", tmp_path / "b.pth")
    back = read_torch(tmp_path / "b.pth").content
    assert back.keys() == state.keys() and all(
        back[k].tobytes() == state[k].tobytes() for k in state
    )
    for wrong in ({"student": [1, 2]}, {"student": {}}, {"student": {1: state["proj.bias"]}}):
        write_torch(tmp_path / "c.pth", wrong, overwrite=True)
        with pytest.raises(CheckpointError, match=r"c\.pth"):
            import_checkpoint(tmp_path / "c.pth")


@pytest.fixture
def any_suffix(monkeypatch):
    monkeypatch.delattr(timer, "SUFFIXES")


def test_export_in_the_form_of_the_hub(tmp_path, state, whole, any_suffix):
    model = whole[0] / "model"
    export_checkpoint(model, tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    require_same(import_checkpoint(tmp_path / "folder"), whole[1])
    back = read_safetensors(tmp_path / "folder" / "model.safetensors")
    assert back.keys() == state.keys() and all(
        back[k].tobytes() == state[k].tobytes() for k in state
    )
    with pytest.raises(FileExistsError):
        export_checkpoint(model, tmp_path / "folder")
    export_checkpoint(model, tmp_path / "folder", overwrite=True)
    for name in ("a.safetensors", "a.bin"):
        export_checkpoint(model, tmp_path / name)
        require_same(import_checkpoint(tmp_path / name), whole[1])


def test_a_config_of_another_model_beside_the_export_stays(tmp_path, whole, any_suffix):
    other = json.dumps({"another": "model"})
    (tmp_path / "config.json").write_text(other)
    (note,) = [
        n for n in export_checkpoint(whole[0] / "model", tmp_path / "a.bin") if "config.json" in n
    ]
    assert "another model's" in note and '"d_model"' in note
    assert (tmp_path / "config.json").read_text() == other
    with pytest.raises(FileExistsError, match="is of something else, and is not replaced"):
        export_checkpoint(whole[0] / "model", tmp_path / "a.bin", overwrite=True)
    assert (tmp_path / "config.json").read_text() == other


def header(text: str | bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HOSTILE_SAFETENSORS = {
    "empty": b"",
    "cut length": b"\x08\0\0",
    "huge length": header("{}", length=1 << 62),
    "length over the end": header("{}", length=100),
    "no json": header("{" * 1000),
    "deep": header("[" * 100_000),
    "list": header("[]"),
    "same key twice, overlapping": header(f'{{"a":{TENSOR},"b":{TENSOR}}}'),
    "overlap": header(
        f'{{"a":{TENSOR},"b":{{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}}}',
    ),
    "gap": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
    "over the end": header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "backwards": header('{"a":{"dtype":"F32","shape":[0],"data_offsets":[8,0]}}'),
    "negative": header('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'),
    "other size": header('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'),
    "overflow": header(
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'
    ),
    "unknown type": header('{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}'),
    "data behind": header(f'{{"a":{TENSOR}}}', b"\0" * 9),
    "not text": header(b'{"\xff":1}'),
}


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused(tmp_path, case):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE_SAFETENSORS[case])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: not a readable safetensors file"
    ):
        import_checkpoint(tmp_path)


def test_a_key_that_stands_twice_in_a_safetensors_header(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header(f'{{"a":{TENSOR},"a":{TENSOR}}}'))
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path)


def test_command_line_takes_folders_and_indexes(tmp_path, state, capsys):
    index = sharded(tmp_path, state)
    for source, target in ((tmp_path, "m1"), (index, "m2")):
        assert main(["models", str(source)]) == 0
        assert re.search(r"^family +timer$", capsys.readouterr().out, re.MULTILINE)
        assert main(["convert", str(source), str(tmp_path / target)]) == 0
        assert inspect(tmp_path / target)["source"] == INDEX
        capsys.readouterr()
    index.write_text("{}")
    assert main(["models", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error: ")
    assert folders.read_config(tmp_path / "m1")[0].config == CONFIG
