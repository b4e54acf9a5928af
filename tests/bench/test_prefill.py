"""What methods add to a prefill: every row is there, and a prefill that is not the full cache's is not timed."""

import pytest

from headwise.bench import prefill
from headwise.bench.measuring import WrongResult
from headwise.bench.models import shape_for
from headwise.bench.prefill import Settings, run
from headwise.cache.layer import FillingLayer, RaggedLayer
from headwise.errors import BadInput

SMALL = {
    "model": "random-narrow",
    "layers": 2,
    "methods": ("lkv", "snapkv+adakv"),
    "keep": 0.25,
    "tokens": 256,
    "batch": 2,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "rounds": 2,
}


def test_every_method_has_a_row_beside_the_full_cache():
    full, *rows = run(Settings(**SMALL))
    assert (full.candidate, full.overhead, full.ours_seconds, full.logits_error) == ("full", 0, None, 0)
    assert [row.candidate for row in rows] == ["lkv", "snapkv+adakv"]
    for row in rows:
        assert row.kv_bytes == pytest.approx(0.25 * full.kv_bytes, rel=0.01)
        assert 0 < row.ours_seconds < row.seconds
        assert row.ours_share == pytest.approx(row.ours_seconds / full.seconds)
        assert row.logits_error < 1e-5
        assert (row.keep, row.threads, row.batch) == (0.25, 1, 2)
    assert full.kv_bytes == 2 * 2 * 256 * 2 * 4 * 64 * 4  # keys and values, batch, tokens, layers, heads, dims, bytes


def test_another_prefill_is_not_timed(monkeypatch):
    update = RaggedLayer.update
    monkeypatch.setattr(RaggedLayer, "update", lambda layer, keys, values, *_, **__: update(layer, keys, 5 * values))
    monkeypatch.setattr(prefill.time, "perf_counter", lambda: pytest.fail("it was timed"))
    with pytest.raises(WrongResult, match="lkv: logits are"):
        run(Settings(**SMALL))


def test_the_observer_is_put_back():
    before = FillingLayer.observe
    run(Settings(**SMALL | {"methods": ("knorm",), "rounds": 1}))
    assert FillingLayer.observe is before


@pytest.mark.parametrize("name", ["random-lama-1b", "random-llama-3b"])
def test_a_slip_in_the_name_of_a_random_model(name):
    with pytest.raises(BadInput, match=f"there is no folder {name}, and the random models are random-llama-1b"):
        shape_for(name, None)
