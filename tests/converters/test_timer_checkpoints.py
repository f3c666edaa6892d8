"""Timer checkpoints in and out: every layout the original writes, round trips byte for byte, the
command line.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from handmade_files import CONFIG, timer_state
from layer_widths import narrowed, widths

import converters
import ltsm_jax
from converters import CheckpointError, export_checkpoint, import_checkpoint, inspect, timer
from converters.torch_files import read_torch, write_torch
from ltsm_jax import trees
from ltsm_jax.cli import main
from ltsm_jax.layers.dims import equal_layers
from ltsm_jax.models import folders
from ltsm_jax.models.timer import PRESETS, Timer, TimerConfig

PUBLISHED = timer.published(CONFIG)


def tensors(file) -> dict[str, np.ndarray]:
    content = read_torch(file).content
    return content.get("state_dict", content)


def require_same_bytes(a: dict, b: dict):
    assert set(a) == set(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype and value.shape == b[key].shape, key
        assert value.tobytes() == b[key].tobytes(), key


def require_same_params(a, b):
    trees.require_same(a, b, dtypes=True)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# --- the recorded checkpoint


def test_golden_timer_round_trip_is_byte_equal(golden, tmp_path):
    g = golden("timer")
    model, params, provenance, buffers = import_checkpoint(g.checkpoint, tmp_path / "model")
    assert model.config == TimerConfig.from_published(g.config)
    original = read_torch(g.checkpoint).content["state_dict"]
    assert trees.count(params) + sum(b.size for b in buffers.values()) == sum(
        v.size for v in original.values()
    )
    assert provenance["container"] == "lightning" and len(provenance["prefix"]) == 6
    loaded_model, loaded = ltsm_jax.load(tmp_path / "model")
    assert loaded_model == model
    require_same_params(params, loaded)

    export_checkpoint(tmp_path / "model", tmp_path / "out" / "again.ckpt")
    require_same_bytes(tensors(tmp_path / "out" / "again.ckpt"), original)
    n = len(provenance["prefix"])
    export_checkpoint(tmp_path / "model", tmp_path / "bare" / "again.pth")
    require_same_bytes(
        tensors(tmp_path / "bare" / "again.pth"),
        {key[n:]: value for key, value in original.items()},
    )
    for again in (
        "out/again.ckpt",
        "bare/again.pth",
    ):  # the exported files say all that is needed to read them
        same_model, same, *_ = import_checkpoint(tmp_path / again)
        assert same_model == model
        require_same_params(params, same)


def test_golden_timer_is_loaded_straight_from_the_file(golden):
    g = golden("timer")
    model, params = ltsm_jax.load(g.checkpoint)
    trees.require_same(folders.param_shapes(model), params)
    rules = timer.keys(model.config)
    state = read_torch(g.checkpoint).content["state_dict"]
    prefix = timer.recognise(state).prefix
    for path, leaf in trees.flatten(params).items():
        key, transform = converters.tables.key_of(rules, path)
        assert np.array_equal(transform.inverse(np.asarray(leaf)), state[prefix + key]), path


def test_golden_timer_inspect(golden, capsys):
    g = golden("timer")
    facts = inspect(g.checkpoint)
    assert facts["family"] == "timer" and facts["dtype"] == "float32" and len(facts["sha256"]) == 64
    assert any(
        key.endswith(timer.TABLE) and "sinusoid" in why for key, why in facts["dropped"].items()
    )
    assert main(["models", str(g.checkpoint)]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in ("timer", f"{facts['parameters']:,}", facts["sha256"], "d_model", timer.TABLE)
    )


# --- layouts


@pytest.mark.parametrize(
    "prefix", ["", "model.", "netwrk", "module.", "backbone.", "model.backbone."]
)
@pytest.mark.parametrize("suffix", [".ckpt", ".pth"])
def test_any_prefix_in_both_containers(tmp_path, prefix, suffix):
    state = {prefix + key: value for key, value in timer_state().items()}
    write_torch(
        tmp_path / f"a{suffix}", {"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state
    )
    _, _, provenance, _ = import_checkpoint(
        tmp_path / f"a{suffix}", tmp_path / "model", config=PUBLISHED
    )
    assert provenance["prefix"] == prefix
    export_checkpoint(tmp_path / "model", tmp_path / f"b{suffix}")
    require_same_bytes(tensors(tmp_path / f"b{suffix}"), state)
    if suffix == ".ckpt":
        assert read_torch(tmp_path / "b.ckpt").content["epoch"] == 3


def doubled(state: dict, outer: str = "") -> dict:
    """The state dict of the original's `Model`, which registers its modules twice."""
    out = {f"{outer}backbone.{key}": value for key, value in state.items()}
    names = {"decoder.": "decoder.", "proj.": "proj.", "patch_embedding.": "enc_embedding."}
    for ours, alias in names.items():
        out |= {
            outer + alias + k.removeprefix(ours): v for k, v in state.items() if k.startswith(ours)
        }
    return out


@pytest.mark.parametrize("outer", ["", "model."])
def test_modules_registered_twice(tmp_path, outer):
    state = doubled(timer_state(), outer)
    write_torch(tmp_path / "a.pth", state)
    _, _, provenance, _ = import_checkpoint(
        tmp_path / "a.pth", tmp_path / "model", config=PUBLISHED
    )
    why = provenance["dropped"][f"{outer}decoder.norm.weight"]
    assert why == f"the same tensor as {outer}backbone.decoder.norm.weight, byte for byte"
    export_checkpoint(tmp_path / "model", tmp_path / "b.pth")
    require_same_bytes(tensors(tmp_path / "b.pth"), state)


def test_copies_that_differ_are_refused(tmp_path):
    state = doubled(timer_state())
    state["proj.bias"] = state["proj.bias"] + 1
    state["enc_embedding.surplus"] = state["proj.bias"]
    state["stray"] = state["proj.bias"]
    write_torch(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(tmp_path / "a.pth", config=PUBLISHED)
    assert "'proj.bias': differs from 'backbone.proj.bias'" in str(error.value)
    assert "'enc_embedding.surplus': differs from 'backbone.patch_embedding.surplus'" in str(
        error.value
    )
    assert "'stray': no rule matches" in str(error.value)


# --- config


def test_config_from_the_presets_the_file_beside_and_the_hyper_parameters(tmp_path):
    state = timer_state()
    write_torch(tmp_path / "a.ckpt", {"state_dict": state})
    other = dataclasses.replace(
        CONFIG, layers=equal_layers(1, 8, 1, CONFIG.layers[0].ffn), head_dim=1
    )
    assert import_checkpoint(tmp_path / "a.ckpt")[0].config == other  # the published 8 heads
    assert any("n_heads=8" in note for note in inspect(tmp_path / "a.ckpt")["notes"])
    write_torch(tmp_path / "b.ckpt", {"state_dict": state, "hyper_parameters": PUBLISHED})
    assert import_checkpoint(tmp_path / "b.ckpt")[0].config == CONFIG
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert import_checkpoint(tmp_path / "a.ckpt")[0].config == CONFIG
    found, *_ = import_checkpoint(tmp_path / "a.ckpt", config={**PUBLISHED, "n_heads": 4})
    assert widths(found.config, "attn.heads") == (4,)
    assert (
        import_checkpoint(tmp_path / "a.ckpt", config=tmp_path / "config.json")[0].config == CONFIG
    )


def test_published_sizes_are_recognised_without_a_config():
    """Of presets with the same sizes, the first: what they are for does not show in the weights."""
    first = {}
    for name, preset in PRESETS.items():
        name = first.setdefault((preset.patch_len, preset.d_model, widths(preset, "ffn")), name)
        state = {
            timer.EMBED: np.empty((preset.d_model, preset.patch_len), np.float32),
            **{
                f"decoder.attn_layers.{i}.conv1.weight": np.empty(
                    (f, preset.d_model, 1), np.float32
                )
                for i, f in enumerate(widths(preset, "ffn"))
            },
        }
        config, notes = timer.configure(state, None, "file")
        assert config == PRESETS[name] and name in notes[0]
    assert {"Timer_forecast_1.0", "Timer_imputation_1.0", "Timer_anomaly_detection_1.0"} <= set(
        first.values()
    )


CONTRADICTIONS = {
    "sizes": (
        {"patch_len": 8, "d_model": 16, "d_ff": 7, "e_layers": 2},
        "patch_len: the config says 8, the weights 4",
    ),
    "missing": ({"n_heads": None}, "n_heads: not an integer from 1 to 16777216: NoneType"),
    "text": ({"d_model": "8"}, "d_model: not an integer from 1 to 16777216: '8'"),
    "bool": ({"e_layers": True}, "e_layers: not an integer from 1 to 128"),
    "heads": ({"n_heads": 3}, "must be a multiple of the number of heads"),
    "negative": ({"d_ff": -6}, "d_ff: not an integer from 1"),
    "million layers": ({"e_layers": 10**6}, "e_layers: not an integer from 1 to 128"),
    "huge": ({"seq_len": -(10**5000)}, "seq_len: not an integer"),
    "half": ({"pred_len": 1.5}, "pred_len: not an integer"),
    "context": ({"seq_len": 2}, "context"),
    "dropout": ({"dropout": "much"}, "does not go with the weights"),
    "task": ({"task_name": "juggling"}, "juggling"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, case):
    change, expected = CONTRADICTIONS[case]
    write_torch(tmp_path / "a.pth", timer_state())
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(tmp_path / "a.pth", config={**PUBLISHED, **change})
    assert expected in str(error.value) and "a.pth" in str(error.value)
    if case == "sizes":
        assert all(f"{name}: the config says" in str(error.value) for name in change)


def test_a_damaged_config_beside_the_file(tmp_path):
    write_torch(tmp_path / "a.pth", timer_state())
    for text in ("", "[]", "{", "[" * 100_000, '"x"', "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config"):
            import_checkpoint(tmp_path / "a.pth")


# --- tensors


def test_the_sinusoid_table_is_checked_and_kept(tmp_path):
    state = timer_state()
    table = state[timer.TABLE]
    slack = (np.arange(table.shape[1]) * 1e-7).astype(np.float32)[None, :, None]
    for name, wrong in {
        "cosine first": np.roll(table, 1, axis=2),
        "learned": table + np.float32(1e-3),
        "short": table[:, :4999],
        "nan": np.where(np.arange(5000)[:, None] == 7, np.nan, table).astype(np.float32),
        "zero": np.zeros_like(table),
        "one row": np.where(np.arange(5000)[:, None] == 3, table + 1e-4, table).astype(np.float32),
    }.items():
        write_torch(tmp_path / "a.pth", state | {timer.TABLE: wrong}, overwrite=True)
        with pytest.raises(CheckpointError, match=r"position_embedding\.pe") as error:
            import_checkpoint(tmp_path / "a.pth", config=PUBLISHED)
        assert name and str(error.value).count("position_embedding.pe") >= 1
    drifted = (
        table + slack
    )  # another float32 exponential: the original's own table on another machine
    write_torch(tmp_path / "b.pth", state | {timer.TABLE: drifted})
    import_checkpoint(tmp_path / "b.pth", tmp_path / "model", config=PUBLISHED)
    export_checkpoint(tmp_path / "model", tmp_path / "c.pth")
    assert tensors(tmp_path / "c.pth")[timer.TABLE].tobytes() == drifted.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_round_trip(tmp_path, dtype):
    state = {key: value.astype(dtype) for key, value in timer_state().items()}
    write_torch(tmp_path / "a.pth", state)
    _, params, provenance, _ = import_checkpoint(
        tmp_path / "a.pth", tmp_path / "model", config=PUBLISHED
    )
    assert provenance["dtype"] == np.dtype(dtype).name
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert not [
        n for n in export_checkpoint(tmp_path / "model", tmp_path / "b.pth") if "float32" in n
    ]
    require_same_bytes(tensors(tmp_path / "b.pth"), state)
    trained = trees.unflatten({k: v + 1e-6 for k, v in trees.flatten(params).items()})
    folders.save(tmp_path / "tuned", Timer(CONFIG), trained, provenance=provenance)
    assert any(
        "stays float32" in note
        for note in export_checkpoint(tmp_path / "tuned", tmp_path / "c.pth")
    )
    assert tensors(tmp_path / "c.pth")["proj.bias"].dtype == np.float32


def test_float64_needs_leave_and_goes_back(tmp_path):
    state = {key: value.astype(np.float64) for key, value in timer_state().items()}
    write_torch(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=r"proj\.bias': float64 would be rounded"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "model", config=PUBLISHED)
    assert not (tmp_path / "model").exists()
    assert inspect(tmp_path / "a.pth", config=PUBLISHED)["dtype"] == "float64"
    import_checkpoint(tmp_path / "a.pth", tmp_path / "model", config=PUBLISHED, allow_cast=True)
    export_checkpoint(tmp_path / "model", tmp_path / "b.pth")
    require_same_bytes(tensors(tmp_path / "b.pth"), state)  # these values were float32 before


def test_models_of_this_library_go_out(tmp_path):
    model = Timer(CONFIG)
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32), folders.param_shapes(model)
    )
    folders.save(tmp_path / "model", model, params)
    export_checkpoint(tmp_path / "model", tmp_path / "a.ckpt")
    found, same, provenance, _ = import_checkpoint(tmp_path / "a.ckpt")
    assert found == model and provenance["prefix"] == "model."
    require_same_params(params, same)
    with pytest.raises(ValueError, match="suffix"):
        export_checkpoint(tmp_path / "model", tmp_path / "a.txt")
    with pytest.raises(FileExistsError):
        export_checkpoint(tmp_path / "model", tmp_path / "a.ckpt")
    pruned = Timer(narrowed(CONFIG, 0, attn={"heads": 1}))
    halves = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32), folders.param_shapes(pruned)
    )
    folders.save(tmp_path / "pruned", pruned, halves)
    with pytest.raises(ValueError, match="pruned model can't be exported"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


# --- the command line


def test_command_line(tmp_path, capsys):
    write_torch(
        tmp_path / "a.ckpt", {"state_dict": {f"model.{k}": v for k, v in timer_state().items()}}
    )
    (tmp_path / "options.json").write_text(json.dumps(PUBLISHED))
    source, model = str(tmp_path / "a.ckpt"), str(tmp_path / "model")
    assert main(["convert", source, model, "--config", str(tmp_path / "options.json")]) == 0
    assert main(["models", model]) == 0
    assert main(["export", model, str(tmp_path / "b.ckpt")]) == 0
    require_same_bytes(tensors(tmp_path / "b.ckpt"), tensors(source))
    capsys.readouterr()
    for wrong in (
        ["convert", source, model],
        ["export", model, str(tmp_path / "b.ckpt")],
        ["export", str(tmp_path / "none"), str(tmp_path / "c.ckpt")],
        ["models", str(tmp_path / "none")],
        ["models", str(tmp_path)],
        ["convert", str(tmp_path / "options.json"), str(tmp_path / "m2")],
    ):
        assert main(wrong) in (2, 3)
        streams = capsys.readouterr()
        assert (
            streams.err.startswith("error: ") and "Traceback" not in streams.err and not streams.out
        )
    assert main(["convert", source, model, "--overwrite"]) == 0
    assert not (tmp_path / "m2").exists() and not (tmp_path / "c.ckpt").exists()


def test_command_line_of_the_module(tmp_path):
    command = [sys.executable, "-m", "ltsm_jax", "models", str(tmp_path / "missing.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and "missing.ckpt" in done.stderr
    )
