"""Whole models, each candidate in a process of its own: what is measured, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headwise.bench import candidates
from headwise.bench.candidates import Settings, default_methods, run
from headwise.bench.measuring import WrongResult, checked
from headwise.errors import BadInput, HeadwiseError
from headwise.kernels import pages
from headwise.kernels.segments import Segments

SMALL = {
    "model": "random-narrow",
    "layers": 8,
    "methods": ("keydiff",),
    "keep": 0.15,
    "tokens": 2048,
    "new_tokens": 4,
    "batch": 1,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "kvpress": None,
}
MIB = 2**20


@pytest.fixture(scope="module")
def rows():
    return run("memory", Settings(**SMALL))


def test_a_row_for_the_full_cache_and_every_method(rows):
    assert [(row.benchmark, row.candidate, row.keep) for row in rows] == [
        ("memory", "full", 1.0),
        ("memory", "keydiff", 0.15),
    ]
    full, ours = rows
    assert full.speedup_vs_full == 1
    assert (full.saved_bytes, full.claimed_saved_bytes, full.rel_error) == (None, None, None)
    assert full.kv_bytes == 32 * MIB
    assert ours.kv_bytes == pytest.approx(0.15 * 32 * MIB, rel=0.01)
    assert ours.logits_error < 1e-5
    assert 0 < ours.rel_error < 1e-6
    for row in rows:
        assert 0 < row.attention_share < 1
        assert row.peak_bytes == max(row.peak_prefill_bytes, row.peak_decode_bytes)
        assert row.ms_per_token > 0


def test_the_process_holds_less_by_what_we_claim(rows):
    ours = rows[1]
    assert ours.claimed_saved_bytes > 23 * MIB
    assert ours.saved_bytes == pytest.approx(ours.claimed_saved_bytes, abs=4 * MIB)


def test_the_process_holds_less_by_what_we_claim_of_quantised_entries():
    """Half of the entries in 4 bits: 32 MiB become 2.5, scales included."""
    full, ours = run("memory", Settings(**{**SMALL, "keep": 0.5, "entries": "int4"}))
    assert (full.entries, ours.entries) == ("native", "int4")
    assert ours.kv_bytes == pytest.approx(0.5 * 32 * MIB * 5 / 32, rel=0.05)
    assert ours.claimed_saved_bytes > 23 * MIB
    assert ours.saved_bytes == pytest.approx(ours.claimed_saved_bytes, abs=4 * MIB)
    assert 0 < ours.rel_error <= 2 * ours.plain_error


def made_up(method):
    """What a worker finds."""
    kept = 1.0 if method == "full" else 0.15
    return {
        "prefill_s": 2.0,
        "ms_per_token": 100 * kept,
        "attention_ms": 1.0,
        "attention_share": 0.1,
        "kv_bytes": int(1000 * kept),
        "claimed_bytes": int(1000 * kept),
        "peak_prefill_bytes": int(5000 * kept),
        "peak_decode_bytes": 10,
        "logits": [[1.0, 2.0]],
        "kernel_errors": None if method == "full" else [(1e-7, 1e-7), (1.5e-7, 1e-7)],
        "threads": 1,
        "hardware": "cpu",
        "versions": {},
    }


def test_savings_and_speed_are_against_the_full_cache(monkeypatch):
    monkeypatch.setattr(candidates, "in_worker", lambda name, job, python: made_up(name))
    _, ours = run("generate", Settings(**SMALL))
    assert (ours.saved_bytes, ours.claimed_saved_bytes) == (4250, 850)
    assert ours.speedup_vs_full == pytest.approx(100 / 15)
    assert (ours.rel_error, ours.plain_error) == (1.5e-7, 1e-7)  # of the worst layer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": [[1.0, 2.01]]}, "keydiff: logits after the prefill are 4.5e-03"),
        ({"logits": [[float("nan"), 2.0]]}, "keydiff: logits after the prefill are nan"),
        ({"kernel_errors": [(1e-7, 1e-7), (2.1e-7, 1e-7)]}, "keydiff: attention is 2.1e-07"),
        ({"kernel_errors": [(float("nan"), 1e-7)]}, "keydiff: attention is nan"),
        ({"kernel_errors": []}, "keydiff: no attention of its cache was seen"),
    ],
)
def test_wrong_results_are_not_shown(monkeypatch, wrong, message):
    monkeypatch.setattr(
        candidates, "in_worker", lambda name, job, python: made_up(name) | (wrong if name == "keydiff" else {})
    )
    with pytest.raises(WrongResult, match=message):
        run("generate", Settings(**SMALL))


@pytest.mark.parametrize("wrong", [1.0, 1.01])
def test_a_kernel_is_not_compared_with_itself(wrong):
    """Pages too, where there is no compiler."""
    generator = torch.Generator().manual_seed(0)
    query, tail_keys, tail_values = (
        torch.randn(1, 2, n, m, 16, generator=generator) for n, m in ((2, 1), (1, 3), (1, 3))
    )
    keys, values = (torch.randn(90, 16, generator=generator) for _ in range(2))
    segments = Segments(keys=keys, values=values, positions=torch.arange(90), lengths=(70, 20), kv_heads=2)
    errors = []
    attend = checked(lambda *arguments: wrong * pages.attend(*arguments), errors)
    attend(query, segments, torch.tensor([0]), tail_keys[:, :, 0], tail_values[:, :, 0], None, 0.25)
    ((found, plain),) = errors
    assert 0 < plain < 1e-6
    assert (found <= 2 * plain) == (wrong == 1)


def test_a_process_that_fails_says_why(monkeypatch):
    measure = candidates.in_worker
    monkeypatch.setattr(
        candidates, "in_worker", lambda name, *rest: made_up(name) if name == "full" else measure(name, *rest)
    )
    with pytest.raises(
        HeadwiseError, match=r"kvzip could not be measured: .*KVzip has the model read the context twice"
    ):
        run("memory", Settings(**SMALL | {"methods": ("kvzip",), "tokens": 64, "layers": 1}))


def test_kvpress_runs_in_the_environment_that_was_named(monkeypatch):
    asked = []
    monkeypatch.setattr(candidates, "require_kvpress", asked.append)
    monkeypatch.setattr(
        candidates, "in_worker", lambda name, job, python: asked.append((name, python)) or made_up(name)
    )
    python = Path("env/bin/python")
    run("generate", Settings(**SMALL | {"methods": ("keydiff", "kvpress:adakv"), "kvpress": python}))
    assert asked == [python, ("full", None), ("keydiff", None), ("kvpress:adakv", python)]


def test_an_environment_without_kvpress_is_refused():
    if subprocess.run([sys.executable, "-c", "import kvpress"], capture_output=True).returncode == 0:
        pytest.skip("kvpress is installed here")
    with pytest.raises(BadInput, match=r"has no kvpress: .*No module named 'kvpress'"):
        run("generate", Settings(**SMALL | {"kvpress": Path(sys.executable)}))


def test_peaks_need_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(candidates, "PEAKS", tmp_path / "nowhere")
    with pytest.raises(BadInput, match="on Linux only"):
        run("memory", Settings(**SMALL))


def test_kvpress_is_among_the_candidates_where_it_is_there():
    python = Path("env/bin/python")
    assert default_methods(["lkv"], None) == ("lkv",)
    assert default_methods(["lkv"], python) == ("lkv", "kvpress:adakv")
    assert default_methods(["kvpress:snapkv"], python) == ("kvpress:snapkv",)
