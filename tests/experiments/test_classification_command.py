import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

import ltsm_jax
from experiments import classification as command
from ltsm_jax.models.moment import Moment
from ltsm_jax.models.units import Units, UnitsConfig
from ltsm_jax.training import TrainConfig


def ts_file(path, n, seed):
    rng = np.random.default_rng(seed)
    lines = ["@problemName waves", "@classLabel true slow fast", "@data"]
    for i in range(n):
        rows = np.sin(2 * np.pi * np.arange(32) * (1 + i % 2) / 16 + rng.uniform(0, 6, (3, 1)))
        text = ":".join(",".join(f"{x:.4f}" for x in row) for row in rows)
        lines.append(f"{text}:{('slow', 'fast')[i % 2]}")
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("waves")
    ts_file(place / "waves_TRAIN.ts", 24, 0)
    ts_file(place / "waves_TEST.ts", 10, 1)
    return place / "waves_TRAIN.ts"


def models():
    small = Units.small()
    units = UnitsConfig.of(16, 2, 1, small.tasks, patch_len=8, prompt_len=3)
    return {
        "units": Units(dataclasses.replace(units, dataset="b")),
        "moment": Moment(Moment.small()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["units", "moment"])
def test_a_table_of_methods_and_baselines(family, data, tmp_path, capsys):
    model = models()[family]
    ltsm_jax.save(tmp_path / "model", model, jax.jit(model.init)(jax.random.key(0)))
    words = [
        "--data",
        str(data),
        "--model",
        str(tmp_path / "model"),
        "--methods",
        "ff",
        "--epochs",
        "1",
    ]
    words += ["--batch-size", "8", "--out", str(tmp_path / "o")]
    assert command.main(words) == 0
    found = pd.read_csv(tmp_path / "o" / "results.csv").set_index("method")
    assert found.index.tolist() == ["ff", "most_frequent", "random_kernels"]
    assert found.loc["most_frequent", "test_accuracy"] == 0.5
    assert found.loc["random_kernels", "test_accuracy"] == 1 and np.isfinite(
        found.loc["ff", "test_loss"]
    )
    assert (found["examples"] == 10).all() and (found["classes"] == 2).all()
    assert "| random kernels + ridge |" in (tmp_path / "o" / "report.md").read_text()
    capsys.readouterr()
    assert command.main(words) == 0 and "accuracy 1.000" not in capsys.readouterr().out


def test_baselines_of_a_data_set(data, tmp_path):
    """No model is needed for them, so none is compiled."""
    options = command.Options(data=(str(data),), model="m", out=str(tmp_path))
    problem = command.problem_of(str(data))
    c = command.Comparison(options, Units(Units.small()), {}, [problem], TrainConfig(), {})
    assert command.score(c, problem, "random_kernels", 0)["test_accuracy"] == 1
    assert command.score(c, problem, "most_frequent", 0)["test_macro_f1"] == pytest.approx(1 / 3)


def test_the_held_out_fifth_has_every_class_and_leaves_every_class():
    labels = np.array([0] * 10 + [1] * 5 + [2])
    held_out = command.hold_out(labels)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [2, 1, 0]
    assert len(np.unique(held_out)) == 3
    with pytest.raises(ValueError, match="no class has two"):
        command.hold_out(np.arange(3))


def test_refusals(data, tmp_path, capsys):
    assert (
        command.main(["--data", str(data), "--model", "timer-tiny", "--out", str(tmp_path / "o")])
        == 2
    )
    assert "not classification" in capsys.readouterr().err
    assert command.main(["--data", str(tmp_path), "--model", "timer-tiny"]) == 2
    assert "one is needed" in capsys.readouterr().err
