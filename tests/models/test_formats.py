"""Model folders of format 2, whose configs had a list for each width.

`configs_of_format_2.json` was recorded before format 3: of each family a small model, whole and
after a removal that left layers of different widths, with a digest of its parameters' shapes and
the beginning of a forecast.
"""

import hashlib
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltsm_jax
from ltsm_jax import storage, trees
from ltsm_jax.models import FAMILIES, folders, formats

RECORDED = json.loads((Path(__file__).parent / "configs_of_format_2.json").read_text())
CASES = {f"{case['family']}-{case['kind']}": case for case in RECORDED}


def model_of(case):
    family = FAMILIES[case["family"]]
    return family(family.config_from_dict(formats.current(case["family"], case["config"], 2)))


def parameters(model):
    """Parameters that depend on nothing but their paths and shapes."""
    found = {}
    for i, (path, leaf) in enumerate(sorted(trees.flatten(folders.param_shapes(model)).items())):
        numbers = np.arange(int(np.prod(leaf.shape)))
        found[path] = (0.1 * np.sin(0.7 * numbers + i)).reshape(leaf.shape).astype(np.float32)
    return trees.unflatten(found)


def test_every_family_is_recorded():
    assert {case["family"] for case in RECORDED} == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_config_is_read_as_the_same_model(name):
    case = CASES[name]
    model = model_of(case)
    flat = sorted(trees.flatten(folders.param_shapes(model)).items())
    told = "\n".join(f"{path} {list(leaf.shape)}" for path, leaf in flat)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == case["shapes"]
    # And written in the form of today.
    again = json.loads(json.dumps(model.config_to_dict()))
    assert type(model).config_from_dict(formats.current(model.family, again, 3)) == model.config


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_model_forecasts_what_it_did(name):
    case = CASES[name]
    model = model_of(case)
    t = np.arange(2 * model.context_len, dtype=np.float32).reshape(1, 2, -1)
    context = jnp.asarray(np.sin(t / 3) + t / 100)
    predict = jax.jit(lambda params, x: model.predict(params, x, model.horizon).point)
    found = np.asarray(predict(parameters(model), context)).reshape(-1)
    np.testing.assert_allclose(found[:6], case["forecast"], rtol=1e-4, atol=1e-5)


def test_a_folder_of_format_2_is_loaded(tmp_path):
    """With what it was pruned from, which is of the same format."""
    case, whole = CASES["timer-pruned"], CASES["timer-whole"]
    model, params = model_of(case), parameters(model_of(case))
    folder = ltsm_jax.save(tmp_path / "model", model, params)
    record = json.loads((folder / folders.CONFIG).read_text())
    record |= {"format": 2, "config": case["config"]}
    record["provenance"] = {"pruned_from": whole["config"]}
    del record["digest"]
    storage.write_record(folder / folders.CONFIG, record)
    again, read = ltsm_jax.load(folder)
    assert again == model
    chex.assert_trees_all_equal(read, params)
    told = folders.read_config(folder)[1]["provenance"]["pruned_from"]
    assert type(model).config_from_dict(told) == model_of(whole).config


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("timer", {"n_heads": 2}, "n_heads: a list was expected, got 2"),
        ("timer", {"n_heads": [2]}, r"n_heads \(1\).*must name the same layers"),
        ("timer", {"ffn_dims": []}, "ffn_dims: missing, or without any layer"),
        ("timer", {"n_heads": [2, "2"]}, r"layers\[1\].attn.heads: an integer"),
        ("timer", {"value_dims": [9, 8]}, "value must be a width from 0 to 8"),
        ("timer_hf", {"rotary_pairs": [3, 4]}, r"layers\[0\].attn.pairs: a list was expected"),
        ("moment", {"n_heads": [2, 1]}, "bias_columns must say how"),
        ("ttm", {"encoder": [[1, 2]]}, "encoder: hidden widths"),
    ],
)
def test_what_does_not_make_layers_is_refused(family, changes, said):
    case = CASES[f"{family}-whole"]
    with pytest.raises(ValueError, match=said):
        model_of(case | {"config": case["config"] | changes})
