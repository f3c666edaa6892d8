"""Who reads files of the originals, and what is said where nobody does."""

import importlib.metadata

import numpy as np
import pytest

import converters
import ltsm_jax
from ltsm_jax import original_files


@pytest.fixture
def nobody(monkeypatch):
    """As in a checkout that was never installed."""
    original_files.find_converters.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    yield
    original_files.find_converters.cache_clear()


def test_the_converters_are_found():
    found = original_files.find_converters()
    assert found is converters
    for name in original_files.Converters.__annotations__:
        assert callable(getattr(found, name))
    assert converters.CheckpointError is original_files.CheckpointError


def test_where_nobody_reads_originals_that_is_said(nobody, tmp_path):
    np.savez(tmp_path / "model.npz")
    file = (tmp_path / "model.npz").rename(tmp_path / "model.pth")
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \. in a checkout"):
        ltsm_jax.load(file)


def test_model_folders_need_nobody(nobody):
    model, _ = ltsm_jax.load("timer-tiny")
    assert model.family == "timer"


def test_long_errors_are_cut():
    error = original_files.CheckpointError(3000 * "x")
    assert len(str(error)) == original_files.MAX_MESSAGE and str(error).endswith("(cut)")
