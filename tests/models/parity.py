"""What the golden tests of every family do alike: gradients under the checkpoint's keys, round
trips, init.
"""

import os
import re

import jax
import numpy as np

from converters import converter, export_checkpoint, import_checkpoint, tables
from converters.torch_files import read_safetensors, read_torch
from ltsm_jax import trees
from ltsm_jax.models import folders

SHARES: dict[
    str, float
] = {}  # family -> largest error found so far, as a share of what the recorded tolerance allows


def note(error, allowed):
    """Keep the largest share of the allowed error, by the family of the running test
    (`pytest --parity` prints it).
    """
    running = os.environ.get("PYTEST_CURRENT_TEST", "")
    family = re.search(r"test_(\w+)_golden\.py", running)
    error, allowed = np.broadcast_arrays(
        np.asarray(error, np.float64), np.asarray(allowed, np.float64)
    )
    usable = np.isfinite(error) & np.isfinite(allowed) & (allowed > 0)
    if family and usable.any():
        share = float((error[usable] / allowed[usable]).max())
        SHARES[family[1]] = max(SHARES.get(family[1], 0.0), share)


def load(vectors):
    """(model, params) of a recorded checkpoint, read as a user's would be: the folder, with the
    config.json in it.
    """
    model, params, *_ = import_checkpoint(vectors.folder)
    return model, params


def close(got, want, *, rtol=1e-4, atol=2e-5, what=""):
    """Equal shapes, and equal within the recorded tolerance; NaN where the original has NaN."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=what)


def recorded_gradients(vectors, model, prefix="grad/", name="grads.npz"):
    """Gradients recorded for a loss as {our path: array}, through the converter's table. Keys the
    table drops are left out; a key recorded for a part of a tensor, or for no parameter, is an
    error.
    """
    stored = {
        k.removeprefix(prefix): v for k, v in vectors.arrays(name).items() if k.startswith(prefix)
    }
    assert stored, f"nothing recorded under {prefix!r}"
    family = converter(model.family)
    layout = family.recognise(stored)
    stripped, _, problems = layout.strip(stored)
    assert not problems, problems
    rules = [
        (pattern, tables.DROP, "no parameter")
        if target in (tables.BUFFER, tables.COPY)
        else (pattern, target, how)
        for pattern, target, how in family.keys(model.config)
    ]
    return trees.flatten(
        tables.to_params(rules, stripped, folders.param_shapes(model), what=prefix).params
    )


def check_gradients(loss, params, want, *, rel=1e-3, floor=1e-6, only=None):
    """Compare d loss / d params with recorded gradients, see `check_gradient`, and return
    the loss.
    """
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    got = trees.flatten(gradients)
    assert got.keys() == want.keys(), "of every parameter"
    for path, leaf in want.items():
        if only is None or re.search(only, path):
            check_gradient(got[path], leaf, path, rel=rel, floor=floor)
    return value


def check_gradient(got, want, path, *, rel=1e-3, floor=1e-6):
    """|difference| <= rel * max|gradient of that tensor| + floor."""
    worst, largest = np.abs(np.asarray(got) - want).max(), np.abs(want).max()
    note(worst, rel * largest + floor)
    assert worst <= rel * largest + floor, f"{path}: {worst} of {largest}"


def tensors(path):
    """The state dict of a checkpoint file, as it stands there."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_torch(path).content
    return content.get("state_dict", content)


def check_round_trip(checkpoint, tmp_path, suffix=None):
    """import -> export gives every tensor back: same keys, dtypes and bytes. Returns the exported
    file.
    """
    import_checkpoint(checkpoint, tmp_path / "model")
    out = tmp_path / f"again{suffix or checkpoint.suffix}"
    export_checkpoint(tmp_path / "model", out)
    before, after = tensors(checkpoint), tensors(out)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert tables.same_bytes(value, after[key]), key
    return out


def check_initialisation(model, stats, *, key=None, expected=None):
    """A fresh draw of `model` against recorded statistics {checkpoint key: {shape, mean, std, min,
    max, ...}}.

    Two samples of n values of one distribution differ in their means by less than 5 s sqrt(2/n), in
    their standard deviations by less than 5 s/sqrt(n) (for the normal; uniform is narrower): a
    wrong scheme is off by far more. A tensor recorded as constant must be that constant.
    `expected`: true standard deviations by key, where known.
    """
    family = converter(model.family)
    drawn, _ = tables.to_state(
        family.keys(model.config), jax.jit(model.init)(jax.random.key(20) if key is None else key)
    )
    compared = 0
    for name, entry in stats.items():
        if name not in drawn:
            continue
        compared += 1
        x = np.asarray(drawn[name], np.float64)
        assert list(x.shape) == list(entry["shape"]), name
        if x.size == 1 and "bound" in entry:  # one number has no spread to compare
            assert np.abs(x).max() <= entry["bound"] * (1 + 1e-6), name
            continue
        if entry["std"] == 0:
            np.testing.assert_array_equal(x, np.float32(entry["mean"]), err_msg=name)
            continue
        s, n = (expected or {}).get(name, entry.get("expected_std", entry["std"])), x.size
        assert abs(x.mean() - entry["mean"]) <= 5 * s * np.sqrt(2 / n), (
            f"{name}: mean {x.mean()}, {entry['mean']}"
        )
        assert abs(x.std() - s) <= 5 * s / np.sqrt(n) * np.sqrt(2), (
            f"{name}: std {x.std()}, recorded {s}"
        )
        if "bound" in entry:
            assert np.abs(x).max() <= entry["bound"] * (1 + 1e-6), name
    assert compared, "no recorded tensor is a parameter"
    return compared
