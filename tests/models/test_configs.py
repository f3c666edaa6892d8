"""Published configs: what they lack is told with its place."""

import pytest

from ltsm_jax.models.configs import require_fields

INNER = {"stack": ("depth", "layer"), "stack.layer": ("width",)}


def test_a_whole_config_is_taken():
    require_fields("T", {"size": 1, "stack": {"depth": 2, "layer": {"width": 3}}}, ["size"], INNER)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "size, stack.depth, stack.layer, stack.layer.width"),
        ({"size": 1, "stack": {"depth": 2}}, "stack.layer, stack.layer.width"),
        ({"size": 1, "stack": {"depth": 2, "layer": {}}}, "stack.layer.width"),
        ({"size": 1, "stack": None}, "stack.depth, stack.layer, stack.layer.width"),
        ({"size": 1, "stack": {"depth": 2, "layer": "width"}}, "stack.layer.width"),
    ],
)
def test_what_it_lacks_is_told_with_its_place(fields, said):
    with pytest.raises(ValueError) as info:
        require_fields("T", fields, ["size"], INNER)
    assert str(info.value) == f"the config of a T checkpoint lacks {said}"
