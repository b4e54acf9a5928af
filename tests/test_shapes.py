"""Sizes of a model: what no model has is refused, and two are told apart in words."""

from dataclasses import replace

import pytest

from headwise.errors import BadInput
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=24, layers=tuple(range(24)), kv_heads=2, query_heads=14, head_dim=64)


@pytest.mark.parametrize("name", ["num_layers", "kv_heads", "query_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, True, 10**9, 10**30])
def test_a_size_is_a_whole_number_within_reason(name, value):
    with pytest.raises(BadInput, match=f"{name}=.* must be a whole number from 1 to"):
        replace(SHAPE, **{name: value})


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (24,), (-1,), (True,), tuple(range(5000))])
def test_layers_ascend_within_the_model(layers):
    with pytest.raises(BadInput, match="must be indices of layers that ascend"):
        replace(SHAPE, layers=layers)


def test_query_heads_are_shared_out_evenly():
    with pytest.raises(BadInput, match="query_heads=14 must be a multiple of kv_heads=4"):
        replace(SHAPE, kv_heads=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 4, "layers": (0, 1, 2, 3), "kv_heads": 7}, "4 layers of 7 KV heads"),
        ({"query_heads": 28}, "24 layers of 2 KV heads, 28 query heads"),
        ({"head_dim": 128}, "24 layers of 2 KV heads, heads of size 128"),
        ({"num_layers": 25}, "24 layers of 2 KV heads, 25 layers in all"),
        ({"num_layers": 3, "layers": (0, 2)}, "2 layers of 2 KV heads, 3 layers in all"),
    ],
)
def test_what_differs_is_told_in_words(change, said):
    other = replace(SHAPE, **change)
    assert other.told_beside(SHAPE) == said
    assert SHAPE.told_beside(other).startswith("24 layers of 2 KV heads")
