"""The benchmark of decoding: what it prints is checked, complete, and about what was asked."""

import pytest
import torch

from headwise import kernels
from headwise.bench import decode
from headwise.bench.decode import Settings, WrongResult, kept_fractions, run
from headwise.errors import BadInput
from headwise.kernels import pages

SMALL = {"tokens": 4096, "rounds": 2, "gigabytes": 0.001}


@pytest.mark.parametrize(("dtype", "batch"), [("float32", 1), ("bfloat16", 2)])
def test_every_candidate_has_a_row(dtype, batch):
    rows = run(Settings(dtype=dtype, batch=batch, **SMALL))
    usable = [name for name in kernels.usable("cpu") if name != "reference"]
    assert "pages" in usable
    assert ("native" in usable) == (kernels.why_not("native") is None)
    assert [row.candidate for row in rows] == ["full", "full, grouped", *usable]
    assert rows[0].speedup_vs_full == 1
    for row in rows:
        assert (row.dtype, row.batch, row.tokens) == (dtype, batch, 4096)
        assert 0 < row.rel_error <= 2 * row.plain_error
        assert row.ms > 0
        assert row.times_floor == pytest.approx(row.ms / row.floor_ms)
    kept, whole = rows[-1].floor_ms, rows[0].floor_ms
    assert kept / whole == pytest.approx((0.2 * 4096 + 64) / (4096 + 64), rel=0.02)  # 64 tokens of tail


def test_quantised_entries_are_rows_beside_the_floor_of_their_own_bytes():
    rows = run(Settings(dtype="bfloat16", entries=("native", "int8", "int4"), **SMALL))
    usable = [name for name in kernels.usable("cpu") if name != "reference"]
    expected = [("full", "native"), ("full, grouped", "native")]
    able = [name for name in usable if kernels.KERNELS[name].quantised]
    expected += [(name, "native") for name in usable]
    expected += [(name, entries) for entries in ("int8", "int4") for name in able]
    assert [(row.candidate, row.entries) for row in rows] == expected
    floors = {row.entries: row.floor_ms for row in rows[2:]}
    entries, tail = round(0.2 * 4096) * 8, 64 * 8 * 512
    assert rows[-1].kv_bytes - tail == pytest.approx(entries * (64 + 64 + 16 + 16), rel=0.1)  # scales, and 4 first ones
    assert floors["int4"] / floors["native"] == pytest.approx(rows[-1].kv_bytes / rows[2].kv_bytes)
    for row in rows:
        assert 0 < row.rel_error <= 2 * row.plain_error


@pytest.mark.parametrize(("entries", "message"), [("native", "pages: 1"), ("int8", "pages of int8: 1")])
def test_a_wrong_kernel_is_not_timed(monkeypatch, entries, message):
    real = pages.attend
    monkeypatch.setattr(pages, "attend", lambda *arguments: 1.01 * real(*arguments))
    monkeypatch.setattr(decode, "_median_seconds", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(WrongResult, match=message):
        run(Settings(dtype="float32", entries=(entries,), **SMALL))


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_kept_fractions_have_the_mean_that_was_asked_for(keep):
    fractions = kept_fractions(Settings(keep=keep))
    assert float(fractions.mean()) == pytest.approx(keep, abs=1e-6)
    assert float(fractions.max()) <= 1
    assert torch.equal(fractions, fractions.sort(descending=True).values)
    assert len(set(kept_fractions(Settings(keep=keep, skewed=False)).tolist())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"batch": 0}, "above 0"),
        ({"entries": ("int2",)}, "entries='int2'"),
        ({"entries": ()}, "at least once"),
    ],
)
def test_what_cannot_be_measured(changes, message):
    with pytest.raises(BadInput, match=message):
        Settings(**changes)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    run(Settings(dtype="float32", threads=2, **SMALL))
    assert torch.get_num_threads() == before
