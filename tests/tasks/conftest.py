"""Tests of the tasks: small programs, each run a few times."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def quickly(compile_quickly):
    """All of them."""
