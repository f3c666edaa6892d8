"""What every family costs: at the size of the tests, in this process."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from layer_widths import narrowed

from experiments.benchmarks import families, first_forecast
from ltsm_jax import trees
from ltsm_jax.models import FAMILIES, folders

SMALL = families.Options(only_families=("timer",), size="tests", batch=2)


@pytest.fixture
def quick(monkeypatch):
    """One timed call of each kind, and a small product."""
    monkeypatch.setattr(families, "CALLS", 1)
    monkeypatch.setattr(families, "SIDE", 64)


def test_a_family_gives_every_number(quick):
    line = families.one("timer", "small", SMALL)
    cls = FAMILIES["timer"]
    assert line["parameters"] == trees.count(folders.param_shapes(cls(cls.small())))
    assert line.keys() >= families.UNITS.keys() and "skipped" not in line
    assert all(line[name] > 0 for name in families.UNITS)
    assert line["gigabytes"] >= line["forecast_gigabytes"]


def test_a_family_whose_training_does_not_fit_is_skipped_with_the_reason(quick):
    options = families.Options(only_families=("timer",), size="tests", batch=2, gigabytes=1e-6)
    line = families.one("timer", "small", options)
    assert "is available" in line["skipped"]
    assert not line.keys() & {"step_seconds", "windows_per_second"}


def test_a_call_is_timed_and_its_products_are_counted(quick):
    def f(runtime, state, a):
        return state @ a

    found = families.timed(f, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert found.flops == 2 * 4 * 8 * 8 and found.seconds > 0 and found.compile_seconds > 0


def products_of_a_forecast(model):
    params = folders.param_shapes(model)
    context = jax.ShapeDtypeStruct((1, 1, 32), jnp.float32)

    def predict(runtime, params, context):
        return runtime.call(model.predict, params, context, 8).point

    return families.flops_of(predict, params, context)


def test_an_expert_counts_for_its_own_tokens():
    """With two of four experts left each token goes to two, as before: only the router saves."""
    model = FAMILIES["moirai_moe"](FAMILIES["moirai_moe"].small())
    layers = len(model.config.layers)
    config = model.config
    for i in range(layers):
        config = narrowed(config, i, experts={"ids": (0, 1)})
    half = type(model)(config)
    saved = products_of_a_forecast(model) - products_of_a_forecast(half)
    tokens, fewer = 5, 2  # four of the context, one of the future; centroids that are not compared
    assert 0 < saved <= 2 * tokens * model.config.d_model * fewer * layers


def test_sizes_are_published_presets():
    name = families.preset_of("timer_hf", "smallest")
    counts = first_forecast.published("chronos_bolt")
    assert name == "thuml/timer-base-84m" and families.preset_of("timer", "tests") == "small"
    assert counts[families.preset_of("chronos_bolt", "largest")] == max(counts.values())
    assert families.preset_of("chronos_bolt", "smallest") == first_forecast.smallest("chronos_bolt")


def test_each_family_is_a_process_and_each_number_a_row(monkeypatch, capsys):
    numbers = dict.fromkeys(families.UNITS, 1.0)
    said = {
        "timer": (0, json.dumps({"preset": "A", **numbers}), ""),
        "ttm": (0, json.dumps({"preset": "B", "skipped": "too large"}), ""),
        "moment": (1, "", "Traceback\nValueError: no"),
    }
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, *said[command[command.index("--only-families") + 1]]
        )

    monkeypatch.setattr(subprocess, "run", run)
    found = list(families.measure(None, families.Options(only_families=("timer", "ttm"))))
    assert [(one.what, one.unit) for one in found][:2] == [
        ("A: parameters", "parameters"),
        ("A: forecast compile seconds", "s"),
    ]
    assert len(found) == len(families.UNITS) and len(commands) == 2
    assert "B is skipped: too large" in capsys.readouterr().err
    assert list(families.lines(families.Options(only_families=("moment",)))) == [
        {"family": "moment", "failed": "ValueError: no"}
    ]
    with pytest.raises(ValueError, match="moment failed: ValueError: no"):
        list(families.measure(None, families.Options(only_families=("moment",))))
    assert all(
        command[:3] == [sys.executable, "-m", families.Options.program] for command in commands
    )
