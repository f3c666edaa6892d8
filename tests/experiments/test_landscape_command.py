"""Surfaces of a pretrained, a random and a mixed model, and curvature along alpha, on a model of
one layer.
"""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import around, curvature, landscape
from experiments.benchmarks import chronos_bolt, newest, train_step
from experiments.benchmarks import landscape as surfaces
from ltsm_jax import training, trees
from ltsm_jax.landscape import grid
from ltsm_jax.methods.starts import start_params
from ltsm_jax.methods.strategies import strategy
from ltsm_jax.tasks import forecasting


@pytest.fixture(scope="module")
def command(micro, waves):
    """The command line of surfaces that take seconds."""

    def command(out, **flags):
        flags = {"points": "5", "windows": "0", "alpha": "0.7"} | flags
        words = ["--data", str(waves), "--model", str(micro), "--out", str(out)]
        return words + [word for name, value in flags.items() for word in (f"--{name}", value)]

    return command


@pytest.fixture(scope="module")
def folder(command, micro, tmp_path_factory):
    """An undisturbed run, with a tuned model."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    model, _ = ltsm_jax.load(micro)
    tuned = ltsm_jax.save(out.with_name("tuned"), model, model.init(jax.random.key(5)))
    assert landscape.main(command(out, tuned=str(tuned))) == 0
    return out


def arrays(folder):
    with np.load(folder / "surface.npz") as file:
        return {name: file[name] for name in file.files}


def test_the_centres_are_the_test_errors_of_the_models(folder, command, micro):
    found = arrays(folder)
    assert set(found) == {"x", "y", "loss_pretrained", "loss_random", "loss_sff"}
    np.testing.assert_array_equal(found["x"], [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_array_equal(found["y"], found["x"])
    w = landscape.resolve(landscape.flags.parse(landscape.Options, command(folder), None))
    model, params = ltsm_jax.load(micro)
    key = training.keys(0)["aux"]
    models = {
        "pretrained": params,
        "random": start_params(strategy("tfs"), model, params, key),
        "sff": start_params(strategy("sff", alpha=0.7), model, params, key),
    }
    rows = pd.read_csv(folder / "results.csv").set_index("name")
    assert list(rows.index) == list(models)
    for name, params in models.items():
        want = forecasting.evaluate(model, params, w.subject.splits.test)["mse"]
        assert found[f"loss_{name}"].shape == (5, 5)
        np.testing.assert_allclose(found[f"loss_{name}"][2, 2], want, rtol=1e-6)
        np.testing.assert_allclose(rows.loc[name, "centre"], want, rtol=1e-6)
    # The top eigenvalue of the pretrained model is the largest of the whole matrix.
    flat, back = jax.flatten_util.ravel_pytree(w.subject.params)
    loss = w.subject.loss(w.options, rows=True)
    matrix = jax.jit(jax.hessian(lambda x: loss(back(x))))(flat)
    np.testing.assert_allclose(
        rows.loc["pretrained", "eigenvalue_1"], np.linalg.eigvalsh(matrix)[-1], rtol=1e-3
    )
    trace, error = rows.loc["pretrained", ["trace", "trace_error"]]
    assert abs(trace - np.trace(matrix)) < 4 * error


def test_the_report_has_numbers_pictures_and_the_command(folder):
    text = (folder / "report.md").read_text()
    assert "| pretrained |" in text and "| mixed (SFF, alpha 0.7) |" in text
    assert "python -m experiments.landscape" in text
    pytest.importorskip("matplotlib")
    for name in ("contours", "hills", "lines", "plane"):
        assert (folder / "plots" / f"{name}.png").is_file() and f"plots/{name}.png" in text


def test_the_plane_goes_through_the_three_models(folder):
    with np.load(folder / "plane.npz") as file:
        assert list(file["names"]) == ["pretrained", "random", "tuned"]
        assert file["loss"].shape == (5, 5) and np.isfinite(file["loss"]).all()
        assert tuple(file["places"][0]) == (0, 0) and file["places"][1][1] == 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(folder, command, tmp_path, monkeypatch, capsys):
    real, computed = grid._losses, []

    def stopping(loss, params, directions, *, counts, **kwargs):
        computed.append(int(counts.sum()))
        if sum(computed) > 25 + 5:  # in the second surface
            raise KeyboardInterrupt
        return real(loss, params, directions, counts=counts, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(grid, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(grid, "_losses", stopping)
    assert landscape.main(command(out, eigenvalues="0")) == 130
    monkeypatch.setattr(grid, "_losses", real)
    assert landscape.main(command(out, eigenvalues="0")) == 0
    assert "pretrained: finished before" in capsys.readouterr().out
    want = arrays(folder)
    for name, values in arrays(out).items():
        np.testing.assert_array_equal(values, want[name], err_msg=name)
    assert landscape.main(command(out, eigenvalues="0", points="7")) == 2
    assert "points: 5 there, 7 now" in capsys.readouterr().err


def test_what_does_not_work_is_said(command, tmp_path, capsys, waves):
    assert landscape.main(command(tmp_path / "a", points="1", part="tst")) == 2
    said = capsys.readouterr().err
    assert "--points" in said and "did you mean test?" in said
    assert landscape.main(command(tmp_path / "b", loss="own")) == 2
    assert "--part train" in capsys.readouterr().err
    assert landscape.main(command(tmp_path / "c", tuned="timer-tiny")) == 2
    assert "--tuned timer-tiny" in capsys.readouterr().err
    assert landscape.main([*command(tmp_path / "d"), "--plan"]) == 0
    assert "5 x 5 points" in capsys.readouterr().out and not (tmp_path / "d").exists()


# --------------------------------------------------------------------------------------------------
# curvature along alpha


def test_the_mix_of_the_losses_has_the_mix_of_the_hessians():
    def loss(params):
        return (params["w"] ** 4).sum()

    one, other = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.5])}
    mixed = jax.tree_util.Partial(
        curvature.mix_of_losses, jax.tree_util.Partial(loss), one, other, jnp.float32(0.25)
    )
    still = jax.tree.map(jnp.zeros_like, one)
    want = 12 * (0.25 * one["w"] ** 2 + 0.75 * other["w"] ** 2)
    found = ltsm_jax.curvature.hvp(mixed, still, {"w": jnp.ones(2)})
    np.testing.assert_allclose(found["w"], want, rtol=1e-6)
    # Hessians are diagonal: signs give the distance without error.
    of = jax.tree_util.Partial(loss)
    far = curvature.distance(of, one, mixed, still, jax.random.key(0), None)
    want_far = np.linalg.norm(12 * one["w"] ** 2 - want) / np.linalg.norm(want)
    assert far == pytest.approx(want_far, rel=1e-5)
    assert curvature.distance(mixed, still, mixed, still, jax.random.key(0), None) == 0


@pytest.mark.slow
def test_curvature_along_alpha(micro, waves, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        jax, "clear_caches", lambda: None
    )  # the second command below compiles nothing
    out = tmp_path / "out"
    words = ["--data", str(waves), "--models", str(micro), "--alpha", "0,1", "--windows", "16"]
    words += ["--samples", "6", "--out", str(out)]
    assert curvature.main(words) == 0
    rows = pd.read_csv(out / "results.csv")
    assert list(rows.alpha) == [0, 1]
    # At the ends the mix is one of the two.
    np.testing.assert_allclose(rows.top_eigenvalue, rows.mixed_top_eigenvalue, rtol=1e-3)
    np.testing.assert_allclose(rows.trace, rows.mixed_trace, rtol=1e-3)
    assert (rows.distance < 1e-3).all()

    capsys.readouterr()
    words[words.index("0,1")] = "0,0.5,1"  # another alpha joins those that are there
    assert curvature.main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    rows = pd.read_csv(out / "results.csv")
    assert list(rows.alpha) == [0, 0.5, 1]
    assert rows.distance[1] > 1e-3
    assert "micro: the top eigenvalue of the mixed model is" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_family_stands_for_its_small_size_trained_here(waves, tmp_path, monkeypatch):
    options = dataclasses.replace(
        curvature.Options(), data=str(waves), out=str(tmp_path), horizon=8
    )
    found = around.subject(options, "timer", train=1)
    fresh = found.model.init(training.keys(0)["init"])
    assert not np.array_equal(
        trees.flatten(found.params)["head/kernel"], trees.flatten(fresh)["head/kernel"]
    )
    monkeypatch.setattr(around.run, "run", None)  # the second time it is read
    again = around.subject(options, "timer", train=1)
    chex.assert_trees_all_equal(found.params, again.params)
    with pytest.raises(around.UsageError, match="timer"):
        around.subject(options, "timer")


def test_names_that_would_share_a_folder_are_refused(tmp_path, capsys):
    assert curvature.main(["--models", "a/m,b/m", "--out", str(tmp_path / "out")]) == 2
    assert "would be called m" in capsys.readouterr().err


def test_tables_that_a_family_keeps_do_not_move(micro, waves):
    options = landscape.flags.parse(
        landscape.Options, ["--data", str(waves), "--model", str(micro)], None
    )
    found = around.subject(options, str(micro))
    assert found.moves("head/kernel")


def test_benchmarks_read_what_they_give_their_own_launches():
    for benchmark, words in (
        (train_step, ["--side", "--batch", "4"]),
        (chronos_bolt, ["--side"]),
        (newest, newest.programs("ttm_r3", "train", Path("place"), None)["jax"][3:]),
        (surfaces, ["--file", "windows.npz", "--points", "5"]),
    ):
        assert landscape.flags.parse(benchmark.Options, words, None)
