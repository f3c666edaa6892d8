"""Models by their names on the hub, against a stand-in on loopback."""

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import time

import chex
import huggingface_hub
import jax
import numpy as np
import pytest
import yaml
from hub_stand_in import TOKEN, Hub, Repository
from huggingface_hub import constants

import converters
import ltsm_jax
from converters.torch_files import read_safetensors, write_safetensors, write_torch
from ltsm_jax import hub, loading, storage
from ltsm_jax.cli import main
from ltsm_jax.models import FAMILIES, folders

NAME = "someone/a-model"


@pytest.fixture(scope="module")
def vectors(golden):
    """A checkpoint as the hub has them: one safetensors file with its config.json."""
    for family in FAMILIES:
        try:
            found = golden(family)
        except pytest.skip.Exception:
            continue
        if (found.folder / "model.safetensors").is_file():
            return found.folder
    pytest.skip("no vectors in the form of the hub")


@pytest.fixture(scope="module")
def files(vectors):
    names = ("model.safetensors", "config.json", "generation_config.json")
    return {n: (vectors / n).read_bytes() for n in names if (vectors / n).is_file()} | {
        "README.md": b"# A model"
    }


@pytest.fixture(scope="module")
def expected(vectors):
    return converters.import_checkpoint(vectors / "model.safetensors")[:2]


@pytest.fixture
def site(monkeypatch, tmp_path, files):
    """A hub with one repository, and empty caches."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", hub.ACCEPT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "ltsm"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_said", set())
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()
    with Hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        served.repositories[NAME] = Repository()
        served.repositories[NAME].put(files)
        yield served
        huggingface_hub.close_session()


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def require_same(loaded, expected):
    assert loaded[0] == expected[0]
    chex.assert_trees_all_equal(loaded[1], expected[1])


def copies(tmp_path):
    """Everything in the store of converted models, hidden folders included."""
    store = tmp_path / "ltsm" / "models" / hub.STORE / NAME.replace("/", "--")
    return sorted(p.name for p in store.iterdir() if p.name != "refs") if store.is_dir() else []


def test_a_name_is_fetched_and_converted_once(site, expected, tmp_path, monkeypatch, capsys):
    require_same(ltsm_jax.load(NAME), expected)
    commit = site.repositories[NAME].revisions["main"]
    assert copies(tmp_path) == [commit]
    assert "model.safetensors" in site.fetched() and "README.md" not in site.fetched()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "licence apache-2.0" in said and commit[:7] in said

    record = folders.read_config(
        tmp_path / "ltsm/models" / hub.STORE / "someone--a-model" / commit
    )[1]["provenance"]
    assert record["licence"] == "apache-2.0"
    facts = record["hub"]
    assert (facts["repo"], facts["revision"], facts["commit"]) == (NAME, "main", commit)
    assert (
        facts["files"]["model.safetensors"] == record["sha256"] and "config.json" in facts["files"]
    )

    site.requests.clear()
    monkeypatch.setattr(loading, "_converted", None)  # not converted again
    require_same(ltsm_jax.load(NAME), expected)
    assert not site.fetched() and len(site.requests) == 1
    require_same(ltsm_jax.load(f"{NAME}@{commit}"), expected)
    assert len(site.requests) == 1  # a commit can't change: nobody is asked
    assert not capsys.readouterr().err

    shutil.rmtree(tmp_path / "hf")  # the copy is all that is needed
    offline(monkeypatch)
    require_same(ltsm_jax.load(NAME), expected)
    assert "offline mode is on" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    site.down = True
    require_same(ltsm_jax.load(NAME), expected)
    assert "503" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    require_same(ltsm_jax.load(NAME), expected)
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err


def test_revisions(site, files, expected, tmp_path):
    repository = site.repositories[NAME]
    first = repository.revisions["main"]
    state = read_of(files["model.safetensors"], tmp_path)
    doubled = {key: (value * 2).astype(value.dtype) for key, value in state.items()}
    second = repository.put(
        files | {"model.safetensors": bytes_of(doubled, tmp_path)}, "512-96-r2", "pr/1"
    )

    def first_leaf(loaded):
        return np.asarray(jax.tree.leaves(loaded[1])[0])

    want = first_leaf(expected)
    np.testing.assert_array_equal(first_leaf(ltsm_jax.load(NAME, revision="512-96-r2")), 2 * want)
    np.testing.assert_array_equal(first_leaf(ltsm_jax.load(f"{NAME}@pr/1")), 2 * want)
    np.testing.assert_array_equal(first_leaf(ltsm_jax.load(f"{NAME}@{second}")), 2 * want)
    assert copies(tmp_path) == [second]
    np.testing.assert_array_equal(first_leaf(ltsm_jax.load(NAME)), want)
    assert copies(tmp_path) == sorted([first, second])
    repository.revisions["main"] = second  # the branch moves on
    np.testing.assert_array_equal(first_leaf(ltsm_jax.load(NAME)), 2 * want)
    with pytest.raises(ValueError, match="names the revision 'a', the argument 'b'"):
        ltsm_jax.load(f"{NAME}@a", revision="b")
    with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
        ltsm_jax.load(NAME, revision="v9")
    with pytest.raises(FileNotFoundError, match="a revision is for names of the hub"):
        ltsm_jax.load("timer-tiny", revision="v9")


def read_of(data, tmp_path):
    (tmp_path / "read.safetensors").write_bytes(data)
    return read_safetensors(tmp_path / "read.safetensors")


def in_shards(state, shards, tmp_path):
    """The files of a checkpoint in several safetensors files, and the index of its keys. shards:
    keys by file name.
    """
    files, where = {}, {}
    for name, keys in shards.items():
        files[name] = bytes_of({key: state[key] for key in keys}, tmp_path)
        where |= dict.fromkeys(keys, name)
    index = {"metadata": {}, "weight_map": where}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def bytes_of(state, tmp_path, write=write_safetensors):
    write(tmp_path / "written", state, overwrite=True)
    return (tmp_path / "written").read_bytes()


def test_private_and_gated_repositories(site, expected, tmp_path, monkeypatch):
    repository = site.repositories[NAME]
    repository.token = TOKEN
    with pytest.raises(FileNotFoundError, match=r"or it is private[\s\S]*HF_TOKEN"):
        ltsm_jax.load(NAME)
    with pytest.raises(PermissionError, match=r"token is missing, wrong[\s\S]*settings/tokens"):
        ltsm_jax.load(NAME, token="hf_wrong")
    repository.gated = True
    with pytest.raises(
        PermissionError, match=rf"gated[\s\S]*{site.address}/{NAME}, then set HF_TOKEN"
    ):
        ltsm_jax.load(NAME)
    assert copies(tmp_path) == []
    require_same(ltsm_jax.load(NAME, token=TOKEN), expected)
    shutil.rmtree(tmp_path / "ltsm")
    shutil.rmtree(tmp_path / "hf")
    repository.gated = False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    require_same(ltsm_jax.load(NAME), expected)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written and not any(TOKEN.encode() in p.read_bytes() for p in written)


def test_what_is_not_there_says_what_was_tried_and_what_to_do(site, tmp_path, monkeypatch):
    known = next(n for family in FAMILIES.values() for n in family.presets() if "/" in n)
    with pytest.raises(FileNotFoundError) as error:
        ltsm_jax.load(known + "q")
    told = str(error.value)
    assert f"Did you mean {known!r}" in told and "401" in told and str(tmp_path / "ltsm") in told
    with pytest.raises(FileNotFoundError, match=rf"Did you mean .*'{known}'"):
        ltsm_jax.load(known.partition("/")[2].partition("@")[0])
    with pytest.raises(ValueError, match=rf"did you mean '{known}'"):
        ltsm_jax.preset(known + "q")
    offline(monkeypatch)
    with pytest.raises(FileNotFoundError) as error:
        ltsm_jax.load(known)
    told = str(error.value)
    for part in (
        "HF_HUB_OFFLINE",
        str(tmp_path / "hf"),
        hub.STORE,
        site.address,
        "ltsm_jax.preset(",
        "Go online",
    ):
        assert part in told
    assert not [path for path in (tmp_path / "ltsm").rglob("*") if path.is_file()]


def test_files_of_another_program_will_do_offline(site, expected, tmp_path, monkeypatch, capsys):
    huggingface_hub.snapshot_download(NAME, endpoint=site.address)
    offline(monkeypatch)
    require_same(ltsm_jax.load(NAME), expected)
    assert copies(tmp_path) and "offline" in capsys.readouterr().err
    require_same(ltsm_jax.load(NAME), expected)


def test_files_put_into_the_cache_by_hand(site, files, expected, tmp_path):
    place = tmp_path / "ltsm" / "models" / "nobody" / "else"
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    require_same(ltsm_jax.load("nobody/else"), expected)
    assert not site.requests


def test_an_interrupted_transfer_goes_on(site, expected, tmp_path):
    site.cut = 2
    require_same(ltsm_jax.load(NAME), expected)
    assert len(site.fetched()) > len(set(site.fetched()))


def test_a_transfer_that_never_ends_leaves_nothing_behind(site, expected, tmp_path):
    site.cut = 10**6
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        ltsm_jax.load(NAME)
    assert copies(tmp_path) == []
    site.cut = 0
    require_same(ltsm_jax.load(NAME), expected)


def test_bytes_that_are_not_what_the_hub_says(site, expected, tmp_path, capsys):
    site.altered = 10**6
    with pytest.raises(storage.DamagedError, match=r"digest .* the hub says"):
        ltsm_jax.load(NAME)
    assert copies(tmp_path) == []
    site.altered = 0
    require_same(
        ltsm_jax.load(NAME), expected
    )  # fetched again, though a damaged file is in the cache
    shutil.rmtree(tmp_path / "ltsm")
    (blob,) = (tmp_path / "hf").rglob("model.safetensors")
    blob.resolve().write_bytes(b"cut")
    require_same(ltsm_jax.load(NAME), expected)


def code_in_a_pickle(tmp_path):
    import pickle
    import zipfile

    with zipfile.ZipFile(tmp_path / "hostile", "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({"a": os.getcwd}, 2))
        zipped.writestr("archive/version", "3\n")
    return (tmp_path / "hostile").read_bytes()


def test_a_hostile_download_is_refused(site, files, tmp_path):
    repository = site.repositories[NAME]
    config = files["config.json"]
    outside = {
        "metadata": {},
        "weight_map": {"a.weight": "../../../../etc/passwd", "b": "sub/c.safetensors"},
    }
    for number, (wrong, message) in enumerate(
        (
            ({"model.safetensors": b"<html>not found</html>"}, "not a readable safetensors file"),
            (
                {"model.safetensors": files["model.safetensors"][:-9]},
                "not a readable safetensors file",
            ),
            (
                {"pytorch_model.bin": code_in_a_pickle(tmp_path)},
                "getcwd|not a tensor|no known model",
            ),
            ({"model.safetensors.index.json": json.dumps(outside).encode()}, "outside its folder"),
            ({"model.safetensors.index.json": b"[" * 10**5}, "not readable JSON"),
            (
                {"model.safetensors": files["model.safetensors"], "config.json": b"{"},
                "not readable JSON",
            ),
        )
    ):
        repository.put({"config.json": config} | wrong, f"r{number}")
        with pytest.raises(converters.CheckpointError, match=message) as error:
            ltsm_jax.load(f"{NAME}@r{number}")
        assert f"files of {NAME}@r{number} on the hub" in str(error.value)
    repository.put(files | {"config.json": b" " * (2 << 20)}, "huge")
    with pytest.raises(ValueError, match="which no config needs"):
        ltsm_jax.load(f"{NAME}@huge")
    assert copies(tmp_path) == [] and not any(
        "passwd" in path or "c.safe" in path for _, path in site.requests
    )


def test_which_files_are_taken(site, files, expected, tmp_path):
    repository = site.repositories[NAME]
    config = {n: data for n, data in files.items() if n.endswith(".json")}
    weights = files["model.safetensors"]
    state = dict(read_of(weights, tmp_path))
    torch = bytes_of(state, tmp_path, write_torch)
    keys = sorted(state)
    halves = {
        "model-00001-of-00002.safetensors": keys[::2],
        "model-00002-of-00002.safetensors": keys[1::2],
    }
    parts = in_shards(state, halves, tmp_path)
    for revision, there, taken in (
        (
            "both",
            {"model.safetensors": weights, "pytorch_model.bin": b"not looked at"},
            {"model.safetensors"},
        ),
        (
            "bin",
            {"pytorch_model.bin": torch, "training_args.bin": b"", "optimizer.pt": b""},
            {"pytorch_model.bin"},
        ),
        ("ckpt", {"torch_model.ckpt": torch, "sub/model.safetensors": b""}, {"torch_model.ckpt"}),
        ("sharded", parts | {"model-00003-of-00003.safetensors": b"of another index"}, set(parts)),
        ("pth", {"checkpoint.pth": torch}, {"checkpoint.pth"}),
    ):
        repository.put(config | there, revision)
        site.requests.clear()
        require_same(ltsm_jax.load(NAME, revision=revision), expected)
        assert site.asked() - set(config) == taken, revision
    parts.pop("model-00002-of-00002.safetensors")
    repository.put(config | parts, "missing")
    with pytest.raises(
        converters.CheckpointError, match=r"model-00002-of-00002.safetensors.*not there"
    ):
        ltsm_jax.load(NAME, revision="missing")
    repository.put(config | {"a.ckpt": torch, "b.ckpt": torch}, "two")
    with pytest.raises(ValueError, match=r"a\.ckpt, b\.ckpt\. Download the right one"):
        ltsm_jax.load(NAME, revision="two")
    repository.put(config, "none")
    with pytest.raises(ValueError, match=r"no checkpoint of PyTorch.*config\.json"):
        ltsm_jax.load(NAME, revision="none")


@dataclasses.dataclass(frozen=True)
class Published:
    """A repository as a family publishes it.

    golden: folder of the vectors whose files stand for its own. older: a pickle, and the config in
    YAML. sharded: the weights in two files and an index.
    """

    name: str
    golden: str
    card: dict
    gated: bool = False
    older: bool = False
    sharded: bool = False


TIMESFM_3 = {"license": "other", "license_name": "timesfm-non-commercial-license-v1.0"}
APACHE = {"license": "apache-2.0"}
PUBLISHED = (
    Published("google/timesfm-3.0-pytorch", "timesfm_3", TIMESFM_3),
    Published("Datadog/Toto-2.0-22m", "toto_2", APACHE),
    Published("Datadog/Toto-2.0-2.5B", "toto_2", APACHE, sharded=True),
    Published("NX-AI/TiRex-2", "tirex_2", APACHE, gated=True),
    Published("NX-AI/TiRex-2-fevbench", "tirex_2", APACHE, gated=True, older=True),
    Published("ibm-granite/granite-timeseries-ttm-r3@52-16-dec-52-r3", "ttm_r3", APACHE),
)


def files_of(published, folder, tmp_path):
    """What lies in the repository, beside what nobody asks for."""
    state = read_safetensors(folder / "model.safetensors")
    config = (folder / "config.json").read_bytes()
    rest = {".gitattributes": b"*.safetensors filter=lfs", "README.md": b"# A model"}
    if published.older:
        told = yaml.safe_dump(json.loads(config)).encode()
        torch = bytes_of({"state_dict": state}, tmp_path, write_torch)
        return rest | {"model-config.yaml": told, "model.ckpt": torch}
    if published.sharded:
        keys, names = sorted(state), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
        halves = dict(zip(names, (keys[::2], keys[1::2]), strict=True))
        return rest | in_shards(state, halves, tmp_path) | {"config.json": config}
    return rest | {"config.json": config, "model.safetensors": bytes_of(state, tmp_path)}


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda one: one.name)
def test_published_repositories_load_by_their_names(published, site, golden, tmp_path, monkeypatch):
    assert any(published.name in family.presets() for family in FAMILIES.values())
    folder = golden(published.golden).folder
    expected = converters.import_checkpoint(folder / "model.safetensors")
    files = files_of(published, folder, tmp_path)
    repo, _, revision = published.name.partition("@")
    site.repositories[repo] = repository = Repository(card=published.card)
    repository.put(files, *([revision] if revision else []))
    if published.gated:
        repository.token, repository.gated = TOKEN, True
        with pytest.raises(PermissionError, match="gated"):
            ltsm_jax.load(published.name)
    accept = hub.is_non_commercial(published.card.get("license_name", ""))
    if accept:
        with pytest.raises(hub.LicenceError, match="timesfm-non-commercial"):
            ltsm_jax.load(published.name, token=TOKEN)
        assert not site.asked()
    require_same(ltsm_jax.load(published.name, token=TOKEN, accept_license=accept), expected)
    assert site.asked() == set(files) - {".gitattributes", "README.md"}

    # From files that another program has fetched, without the hub: the config is among them.
    shutil.rmtree(tmp_path / "ltsm" / "models")
    told = {"revision": revision or None, "token": TOKEN, "endpoint": site.address}
    huggingface_hub.snapshot_download(repo, **told)
    offline(monkeypatch)
    require_same(ltsm_jax.load(published.name, accept_license=accept), expected)


def test_a_yaml_file_beside_a_config_is_not_asked_for(site, files, expected):
    site.repositories[NAME].put(files | {"dvc.yaml": b"stages: {}"}, "more")
    require_same(ltsm_jax.load(NAME, revision="more"), expected)
    assert "dvc.yaml" not in site.asked()


def test_several_at_once(site, expected, tmp_path):
    # or each thread makes one, and huggingface_hub 1.0 forgets to close them
    huggingface_hub.utils.get_session()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for loaded in list(pool.map(lambda _: ltsm_jax.load(NAME), range(4))):
            require_same(loaded, expected)
    assert len(copies(tmp_path)) == 1


def test_another_process_was_quicker(site, expected, tmp_path, monkeypatch):
    convert = loading._converted

    def slow(path, of):
        result = convert(path, of)
        folders.save(
            tmp_path / "ltsm/models" / hub.STORE / "someone--a-model" / path.parent.name,
            *result[:2],
        )
        return result

    monkeypatch.setattr(loading, "_converted", slow)
    require_same(ltsm_jax.load(NAME), expected)
    assert len(copies(tmp_path)) == 1
    monkeypatch.setattr(loading, "_converted", None)
    require_same(ltsm_jax.load(NAME), expected)


def test_a_killed_conversion(site, expected, tmp_path):
    store = tmp_path / "ltsm/models" / hub.STORE / "someone--a-model"
    commit = site.repositories[NAME].revisions["main"]
    old, young = (store / f".{commit}.{end}.tmp" for end in ("a", "b"))
    for folder in (old, young):
        (folder / "params").mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    require_same(ltsm_jax.load(NAME), expected)
    assert not old.exists() and young.exists()  # the young one may be of a process that is at it


def test_a_damaged_copy_is_made_again(site, expected, tmp_path, capsys):
    ltsm_jax.load(NAME)
    (commit,) = copies(tmp_path)
    folder = tmp_path / "ltsm/models" / hub.STORE / "someone--a-model" / commit
    array = max(
        (folder / "params" / "arrays").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    array.write_bytes(array.read_bytes()[:-1])
    capsys.readouterr()
    for source in (NAME, f"{NAME}@{commit}"):
        require_same(ltsm_jax.load(source), expected)
    assert capsys.readouterr().err.count("converting") == 1
    (folder / "config.json").write_text('{"family": "of another version"}')
    require_same(ltsm_jax.load(f"{NAME}@{commit}"), expected)
    assert copies(tmp_path) == [commit]


def test_a_cache_that_cannot_be_written(site, expected, tmp_path, capsys):
    (tmp_path / "ltsm").write_text("a file where the folder should be")
    require_same(ltsm_jax.load(NAME), expected)
    assert "can't be kept" in capsys.readouterr().err


def test_licences_are_said_once_and_forbidding_ones_stand_out(site, files, tmp_path, capsys):
    repository = site.repositories[NAME]
    repository.card = {"license": "cc-by-nc-4.0"}
    ltsm_jax.load(NAME, accept_license=True)
    assert "licence cc-by-nc-4.0 -- NON-COMMERCIAL USE ONLY" in capsys.readouterr().err
    ltsm_jax.load(NAME)
    assert not capsys.readouterr().err
    for number, (card, told) in enumerate(
        (
            ({}, "not stated by the repository"),
            ({"license": "other", "license_name": "my-non-commercial\nlicense"}, "NON-COMMERCIAL"),
            ({"license": "mit"}, "licence mit\n"),
        )
    ):
        site.repositories["a/b"] = Repository(card=card)
        site.repositories["a/b"].put(files | {f"{number}.txt": b""})
        ltsm_jax.load("a/b", accept_license=True)
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1


def test_non_commercial_weights_ask_once_before_anything_is_fetched(
    site, expected, tmp_path, capsys, monkeypatch
):
    repository = site.repositories[NAME]
    repository.card = {"license": "cc-by-nc-4.0"}
    for _ in range(2):
        with pytest.raises(PermissionError) as error:
            ltsm_jax.load(NAME)
        told = str(error.value)
        for part in ("cc-by-nc-4.0", NAME, "accept_license=True", "--accept-license", hub.ACCEPT):
            assert part in told
    assert not site.asked() and copies(tmp_path) == [] and not capsys.readouterr().err

    require_same(ltsm_jax.load(NAME, accept_license=True), expected)
    require_same(ltsm_jax.load(NAME), expected)
    offline(monkeypatch)
    require_same(ltsm_jax.load(NAME), expected)

    # A converted copy alone is no answer: it may come from another user of a shared folder.
    shutil.rmtree(tmp_path / "ltsm" / "licences")
    with pytest.raises(hub.LicenceError, match=r"cc-by-nc-4\.0"):
        ltsm_jax.load(NAME)
    require_same(ltsm_jax.load(NAME, accept_license=True), expected)


def test_another_licence_or_repository_asks_again(site, files, expected, tmp_path):
    repository = site.repositories[NAME]
    repository.card = {"license": "cc-by-nc-4.0"}
    ltsm_jax.load(NAME, accept_license=True)
    repository.card = {"license": "cc-by-nc-sa-4.0"}
    repository.put(files | {"new.txt": b""})
    with pytest.raises(hub.LicenceError, match="cc-by-nc-sa-4.0"):
        ltsm_jax.load(NAME)

    site.repositories["a/b"] = Repository(card={"license": "cc-by-nc-4.0"})
    site.repositories["a/b"].put(files)
    with pytest.raises(hub.LicenceError, match="weights of a/b"):
        ltsm_jax.load("a/b")


@pytest.mark.parametrize("named", ["cc-by-nc-4.0", f"mit, {NAME}", "CC-BY-NC-4.0"])
def test_an_environment_may_accept(site, expected, monkeypatch, tmp_path, named):
    site.repositories[NAME].card = {"license": "cc-by-nc-4.0"}
    monkeypatch.setenv(hub.ACCEPT, "mit")
    with pytest.raises(hub.LicenceError):
        ltsm_jax.load(NAME)
    monkeypatch.setenv(hub.ACCEPT, named)
    require_same(ltsm_jax.load(NAME), expected)
    assert not (
        tmp_path / "ltsm" / "licences"
    ).exists()  # what the environment says holds as long as it says so


def test_a_licence_is_known_where_the_repository_is_silent(site, files, tmp_path, monkeypatch):
    """By the preset of the name before the files come, else by the family of the weights after."""
    (name,) = [n for n in FAMILIES["moirai_2"].presets() if "small" in n][:1]
    site.repositories[name] = Repository(card={})
    site.repositories[name].put(files)
    with pytest.raises(hub.LicenceError, match="CC-BY-NC"):
        ltsm_jax.load(name)
    assert not site.asked()

    original = loading._converted

    def of_another_family(path, of=""):
        model, params, provenance, buffers = original(path, of)
        return model, params, provenance | {"licence": FAMILIES["moirai"].licence}, buffers

    monkeypatch.setattr(loading, "_converted", of_another_family)
    site.repositories[NAME].card = {}
    with pytest.raises(hub.LicenceError, match="CC-BY-NC-4.0"):
        ltsm_jax.load(NAME)
    assert copies(tmp_path) == []


def test_conversion_by_hand_asks_as_well(site, tmp_path):
    site.repositories[NAME].card = {"license": "cc-by-nc-4.0"}
    with pytest.raises(hub.LicenceError):
        converters.import_checkpoint(NAME, tmp_path / "model")
    with pytest.raises(hub.LicenceError):
        converters.inspect(NAME)
    converters.import_checkpoint(NAME, tmp_path / "model", accept_license=True)
    assert converters.inspect(NAME)["licence"] == "cc-by-nc-4.0"


def test_files_of_ones_own_are_not_asked_about(site, tmp_path, capsys):
    """It is said, once, and that is all."""
    site.repositories[NAME].card = {"license": "cc-by-nc-4.0"}
    converters.import_checkpoint(NAME, tmp_path / "model", accept_license=True)
    shutil.rmtree(tmp_path / "ltsm" / "licences")
    for _ in range(2):
        ltsm_jax.load(tmp_path / "model")
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "NON-COMMERCIAL USE ONLY" in said
        and str(tmp_path / "model") in said
    )


def test_command_line(site, expected, tmp_path, capsys):
    commit = site.repositories[NAME].revisions["main"]
    assert main(["models", NAME]) == 0
    assert commit in capsys.readouterr().out
    assert main(["convert", f"{NAME}@{commit}", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert f"repo {NAME}; revision {commit}" in " ".join(out.split())
    assert re.search(r"^licence +apache-2.0$", out, re.MULTILINE)
    require_same(ltsm_jax.load(tmp_path / "model"), expected)
    assert main(["models", "someone/nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: no model 'someone/nothing'")


@pytest.mark.parametrize(
    "text",
    [
        "timer-tiny",
        "a/b/c",
        "../a",
        "/a/b",
        "a/b.ckpt",
        "a/b@",
        "a/..b",
        "a--b/c",
        "a/b c",
        "@/a",
        "a/b@../c",
    ],
)
def test_what_is_no_hub_name(text):
    assert hub.parse_name(text) is None


def test_hub_names():
    assert str(hub.parse_name("a/b")) == "a/b" and hub.parse_name("a/b") == hub.Name("a/b", "main")
    assert (
        hub.parse_name("a/b@v1.0")
        == hub.Name("a/b", "v1.0")
        == hub.parse_name("a/b", "v1.0")
        == hub.parse_name("a/b@v1.0", "v1.0")
    )
    assert str(hub.parse_name("a/b@refs/pr/1")) == "a/b@refs/pr/1"
