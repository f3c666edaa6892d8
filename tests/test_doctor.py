"""The doctor: forecasts that are the stored ones, and faults that are found and named."""

import json

import numpy as np
import pytest

from ltsm_jax import doctor
from ltsm_jax.models import FAMILIES

QUICK = ("timer", "moment", "chronos_bolt")


@pytest.fixture
def answering(monkeypatch):
    """Give the doctor a forecast in place of one that it computes."""

    def answer(found):
        monkeypatch.setattr(doctor, "fixed_forecast", lambda family: found)

    return answer


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]
)
def test_a_family_forecasts_what_is_stored(family):
    """Compiled otherwise than the stored forecasts were, which is as much of another machine as
    there is here.
    """
    check = doctor.examine_family(family)
    assert not check.problem
    assert check.difference < check.tolerance / 10


def test_every_family_has_an_answer_that_is_no_trifle():
    stored = doctor.answers()
    assert stored.keys() == FAMILIES.keys()
    for family, arrays in stored.items():
        assert arrays["point"].shape[-1] == doctor.HORIZON
        for array in arrays.values():
            assert np.isfinite(array).all() and array.std() > 0.05, family


def test_faults_are_found_and_named(answering, monkeypatch):
    stored = doctor.answers()["timer"]
    answering(stored)
    assert not doctor.examine_family("timer").problem

    answering({"point": stored["point"] + 3e-4})
    check = doctor.examine_family("timer")
    assert check.difference == pytest.approx(3e-4)
    assert "3.0e-04 off, 2e-04 is allowed; reinstall" in check.problem
    assert str(check).startswith("timer          FAULT")

    answering({"point": stored["point"] * np.nan})
    assert "not finite" in doctor.examine_family("timer").problem

    answering({"point": stored["point"][:, :3]})
    assert "another shape" in doctor.examine_family("timer").problem

    def fails(family):
        raise RuntimeError("no such\ndevice")

    monkeypatch.setattr(doctor, "fixed_forecast", fails)
    (check,) = doctor.examine(["timer"])
    assert "no forecast: RuntimeError: no such device" in check.problem
    assert np.isnan(check.difference)


def test_accelerators_are_allowed_more_and_get_other_advice(answering, monkeypatch):
    answering({"point": doctor.answers()["timer"]["point"] + 1e-3})
    monkeypatch.setattr(doctor.jax, "default_backend", lambda: "gpu")
    assert not doctor.examine_family("timer").problem
    answering({"point": doctor.answers()["timer"]["point"] + 3e-3})
    assert "try JAX_PLATFORMS=cpu ltsm doctor" in doctor.examine_family("timer").problem


def test_weights_go_by_the_name_alone():
    """Values of NumPy's frozen generator: another recipe would make every stored answer wrong."""
    assert doctor.fixed_weights("head/bias", (2,)).tolist() == pytest.approx(
        [-0.009756282064685779, -0.20183457311634148]
    )
    assert doctor.fixed_weights("norm/scale", (1,))[0] == pytest.approx(
        np.float64(0.895018387739457)
    )
    # Of a unit-scaled model it is the forward pass that keeps the variance.
    np.testing.assert_allclose(
        doctor.fixed_weights("head/kernel", (400, 50), True).std(), 1, rtol=0.05
    )
    kernel = doctor.fixed_weights("head/kernel", (400, 50))
    assert kernel.std() == pytest.approx(1 / 20, rel=0.02)
    assert not np.array_equal(
        doctor.fixed_weights("a/kernel", (2, 2)), doctor.fixed_weights("b/kernel", (2, 2))
    )


def test_the_environment_says_what_a_report_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "not" / "there"))
    found = doctor.environment()
    assert {"jax", "jaxlib", "numpy", "pandas", "flax", "optax", "orbax-checkpoint"} <= found[
        "versions"
    ].keys()
    assert found["backend"] == "cpu" and found["devices"]
    assert found["caches"]["models"]["free"] > 0
    assert not any(cache["problem"] for cache in found["caches"].values())
    assert json.loads(json.dumps(found)) == found

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "file"))
    assert "is no folder: set LTSM_CACHE" in doctor.environment()["caches"]["data"]["problem"]


def test_recording_one_family_keeps_the_answers_of_the_others(tmp_path, answering):
    answering({"point": np.array([[1.0, 2.0]])})
    doctor.record(tmp_path / "answers.json", families=["timer"])
    before, after = (
        json.loads(file.read_text())["families"]
        for file in (doctor.ANSWERS, tmp_path / "answers.json")
    )
    assert after["timer"] == {"point": [[1.0, 2.0]]}
    assert {name: after[name] for name in after if name != "timer"} == {
        name: before[name] for name in before if name != "timer"
    }


def test_recording_gives_the_answers_that_are_read(tmp_path, monkeypatch, answering):
    answering({"point": np.array([[1.23456789123, -2e-9]])})
    doctor.record(tmp_path / "answers.json")
    monkeypatch.setattr(doctor, "ANSWERS", tmp_path / "answers.json")
    doctor.answers.cache_clear()
    try:
        assert doctor.answers()["timer"]["point"].tolist() == [[1.2345679, -2e-9]]
    finally:
        doctor.answers.cache_clear()
