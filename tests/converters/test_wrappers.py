"""One rule for what programs put around a state dict, for every family: nests, prefixes, wrappers,
copies, adapters.
"""

import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import CheckpointError, import_checkpoint, originals, wrappers
from converters.tables import same_bytes
from converters.torch_files import read_safetensors, read_torch, write_safetensors, write_torch
from ltsm_jax.models import FAMILIES
from ltsm_jax.models.units import UnitsConfig

GOLDEN = Path(__file__).parent.parent / "golden"
SOURCES = {
    "timer": "timer/Timer_forecast_1.0.ckpt",
    "timer_xl": "timer_xl/checkpoint.pth",
    "units": "units/checkpoint.pth",
    "timesfm_1": "timesfm_1/torch_model.ckpt",
    "ttm": "ttm/model.safetensors",
}
SOURCES = {family: SOURCES.get(family, f"{family}/model.safetensors") for family in FAMILIES}
SOURCES |= {
    "timesfm_1 of transformers": "timesfm_1/hf/model.safetensors",
    "ttm_r2": "ttm_r2/model.safetensors",
}
SOURCES |= {"timesfm_2p5 of transformers": "timesfm_2p5/hf/model.safetensors"}

PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.model.",
    "net.inner.",
)
NESTS = (
    (),
    ("state_dict",),
    ("model",),
    ("model_state_dict",),
    ("student",),
    ("module",),
    ("state_dict", "model"),
    ("model", "model_state_dict"),
    ("weights of mine",),
)


def bare_state(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a golden checkpoint, without a prefix that it has itself."""
    state = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file).content
    state = state.get("state_dict", state)
    own = "module." if all(key.startswith("module.") for key in state) else ""
    own = "model." if all(key.startswith("model.") for key in state) else own
    return {key.removeprefix(own): value for key, value in state.items()}


@functools.cache
def golden(name: str):
    """(folder, bare state dict, model, params) of a golden checkpoint."""
    file = GOLDEN / SOURCES[name]
    model, params, *_ = import_checkpoint(file)
    return file.parent, bare_state(file), model, params


def written(tmp_path: Path, name: str, prefix: str, nest: tuple[str, ...], **beside) -> Path:
    """A golden checkpoint written again with a prefix and a nest, and with its JSON files beside
    it.
    """
    folder, state, *_ = golden(name)
    content = {prefix + key: value for key, value in state.items()}
    for key in reversed(nest):
        content = {"epoch": 3, key: content}
    file = tmp_path / "wrapped.pth"
    write_torch(file, content | beside, overwrite=True)
    for beside_it in ("config.json", "generation_config.json"):
        if (folder / beside_it).exists():
            shutil.copy(folder / beside_it, tmp_path / beside_it)
    return file


def require_same(name: str, file: Path) -> dict:
    """The provenance of `file`, whose import gives the golden model and parameters."""
    _, _, model, params = golden(name)
    found, same, provenance, _ = import_checkpoint(file)
    assert found == model
    assert jax.tree.structure(same) == jax.tree.structure(params)
    for one, two in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)
    return provenance


QUICK = ("timer", "ttm", "chronos_2", "time_moe")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SOURCES]
)
def test_every_family_takes_every_prefix_and_nest(tmp_path, name):
    _, state, model, _ = golden(name)
    # Each prefix once and each nest once: they are found one after the other.
    for prefix, nest in itertools.zip_longest(PREFIXES, NESTS, fillvalue=""):
        original = originals.read_original(written(tmp_path, name, prefix, tuple(nest)))
        family, layout, original = originals.family_of(original)
        stripped, copies, problems = layout.strip(original.state)
        assert (family.MODEL, layout.prefix, problems) == (type(model), prefix, [])
        assert stripped.keys() | copies.keys() == state.keys()
        assert all(same_bytes(value, state[key]) for key, value in stripped.items())
        notes = "\n".join(original.notes)
        assert (f"taken off before every key: {prefix!r}" in notes) == bool(prefix)
        assert ("the state dict was found under" in notes) == bool(nest)
        assert all(part in notes for part in nest)
    provenance = require_same(
        name, written(tmp_path, name, "module.model._orig_mod.", ("model", "state_dict"))
    )
    assert provenance["prefix"] == "module.model._orig_mod."
    assert "the state dict was found under 'model.state_dict'" in provenance["notes"]


# a module in the middle of a model that was compiled, or put on several devices, by itself
INSIDE = {
    "timer_hf": ("model.layers.0.", "model.layers.0._orig_mod."),
    "units": ("blocks.0.", "blocks.0.module._orig_mod."),
    "ttm": ("backbone.", "backbone._fsdp_wrapped_module._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("name", INSIDE)
def test_wrappers_inside_the_keys_are_taken_out(tmp_path, name):
    file = written(tmp_path, name, "", ())
    old, new = INSIDE[name]
    state = {
        (new + key.removeprefix(old) if key.startswith(old) else key): v
        for key, v in golden(name)[1].items()
    }
    assert any(key.startswith(new) for key in state)
    write_torch(file, state, overwrite=True)
    notes = require_same(name, file)["notes"]
    assert any(note.startswith("taken out of the keys") for note in notes)
    twice = next(key for key in state if key.startswith(new))
    write_torch(file, state | {old + twice.removeprefix(new): state[twice]}, overwrite=True)
    with pytest.raises(CheckpointError, match="duplicate key .*, with and without"):
        import_checkpoint(file)


def test_what_else_holds_tensors_is_named(tmp_path):
    _, state, *_ = golden("timer_hf")
    moments = {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": [{"lr": 1e-3}]}
    file = written(
        tmp_path, "timer_hf", "module.", ("model",), optimizer=moments, mean=np.ones(3, np.float32)
    )
    require_same("timer_hf", file)
    file = written(
        tmp_path, "timer_hf", "", ("state_dict",), ema={k: v + 1 for k, v in state.items()}
    )
    notes = require_same("timer_hf", file)["notes"]  # of two, the one under a usual name
    assert "not read, though they hold tensors too: 'ema'" in notes


@pytest.mark.parametrize(
    "nests", [("model", "student"), ("mine", "yours"), ("state_dict", "model_state_dict")]
)
def test_two_state_dicts_are_refused_by_name(tmp_path, nests):
    _, state, *_ = golden("sundial")
    file = written(tmp_path, "sundial", "", ())
    write_torch(file, dict.fromkeys(nests, state), overwrite=True)
    with pytest.raises(
        CheckpointError, match=f"wrapped.pth: holds 2 state dicts, under '{nests[0]}', '{nests[1]}'"
    ):
        import_checkpoint(file)


@pytest.mark.parametrize("name", ["time_moe", "timer", "timer_xl", "chronos_bolt", "moirai_2"])
def test_two_models_in_one_state_dict_are_refused_by_name(tmp_path, name):
    _, state, *_ = golden(name)
    file = written(tmp_path, name, "", ())
    both = {
        f"{prefix}.{key}": value for prefix in ("online", "target") for key, value in state.items()
    }
    write_torch(file, both, overwrite=True)
    with pytest.raises(
        CheckpointError, match=r"holds 2 models, whose keys begin with 'online\.', 'target\.'"
    ):
        import_checkpoint(file)


@pytest.mark.parametrize("name", ["time_moe", "ttm", "moment"])
def test_strange_keys_beside_a_prefixed_model_are_listed(tmp_path, name):
    _, state, *_ = golden(name)
    file = written(tmp_path, name, "", ())
    mixed = {f"model.{key}": value for key, value in state.items()} | {
        "loss.weight": np.ones(2, np.float32)
    }
    write_torch(file, mixed, overwrite=True)
    with pytest.raises(CheckpointError, match=r"'loss\.weight': no rule matches"):
        import_checkpoint(file)


@pytest.mark.parametrize("whole", [False, True], ids=["adapters alone", "with the model's weights"])
def test_adapters_are_called_so(tmp_path, whole):
    _, state, *_ = golden("timer_hf")
    target = "model.layers.0.self_attn.q_proj"
    adapted = {
        f"base_model.model.{target}.lora_{x}.weight": np.ones((2, 8), np.float32) for x in "AB"
    }
    if whole:
        adapted |= {
            f"base_model.model.{key.replace(target, target + '.base_layer')}": v
            for key, v in state.items()
        }
    write_safetensors(tmp_path / "adapter_model.safetensors", adapted)
    with pytest.raises(
        CheckpointError, match=r"an adapter of the PEFT library.*merge_and_unload\(\)"
    ):
        import_checkpoint(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"an adapter of the PEFT library.*merge_and_unload\(\)"
    ):
        import_checkpoint(tmp_path)


def test_units_without_a_config_says_what_to_write(tmp_path):
    """The message's own example is taken as a config of the sizes that it shows."""
    _, state, *_ = golden("units")
    file = tmp_path / "units.pth"
    write_torch(
        file, {key: value for key, value in state.items() if not key.startswith("prompt_tokens.")}
    )
    with pytest.raises(
        CheckpointError, match=r"units\.pth: the sizes .* write a config\.json beside the file"
    ) as error:
        import_checkpoint(file)
    example = json.loads(str(error.value).partition("as JSON: ")[2])
    found = UnitsConfig.from_published(example)
    assert found == UnitsConfig.of(64, 8, 3, found.tasks) and found.tasks[0].dataset == "ETTh1"
    write_torch(file, state, overwrite=True)
    assert (
        "If the file was trained otherwise: UniTS' own files"
        in import_checkpoint(file)[2]["notes"][0]
    )
    write_torch(
        file,
        {key: value for key, value in state.items() if "forecast_head" not in key},
        overwrite=True,
    )
    with pytest.raises(
        CheckpointError, match=r"no config\.json beside it; what the tensors do not say is assumed"
    ):
        import_checkpoint(file)


def test_common_prefix_is_of_whole_parts():
    assert wrappers.common_prefix({"a.b.c": 0, "a.b.d": 0}) == ["a", "b"]
    assert wrappers.common_prefix({"a.b.c": 0, "a.bc.d": 0}) == ["a"]
    assert wrappers.common_prefix({"ab.c": 0, "a.c": 0}) == []
    assert wrappers.common_prefix({"a.b": 0}) == ["a"]
