"""Every scorer against its formula, and the properties all scorers share."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_oracles import oracle
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer
from headwise.methods.scores import (
    H2O,
    TOVA,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    Random,
    SnapKV,
    Streaming,
)

WITH_ORACLE = [
    SnapKV(window_size=4, kernel_size=3),
    SnapKV(window_size=7, kernel_size=5, pooling="max"),
    SnapKV(window_size=4, kernel_size=1, aggregate="sum"),
    SnapKV(),  # its window is longer than the rows
    TOVA(),
    H2O(block_size=5),
    H2O(normalise=False),
    Knorm(),
    KeyDiff(),
    Streaming(),
    ExpectedAttention(num_future=16),
    ExpectedAttention(num_future=16, epsilon=0.02, use_covariance=False),
    ExpectedAttention(num_future=16, use_vnorm=False),
]
ONE_PASS = [
    *WITH_ORACLE,
    Random(seed=3),
    CriticalKV(base=SnapKV(window_size=4)),
    CriticalKV(base=H2O()),
    CriticalKV(base=ExpectedAttention(num_future=16, use_vnorm=False), first_stage=0.0),
]


def kept(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` best candidates of every head, ties to the earlier token, [B, H, N]."""
    ranked = scores.masked_fill(~candidates[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return ranked.argsort(dim=-1) < count


@pytest.mark.parametrize("scorer", WITH_ORACLE, ids=repr)
def test_equals_the_formula(scorer: AbstractScorer, make_layer: Any) -> None:
    layer = make_layer()
    scores = scorer.score(layer.observe(scorer))
    candidates = layer.candidates(scorer)
    for row in range(len(scores)):
        alone = layer.row(row)
        expected = oracle(scorer, alone)[:, alone.candidates(scorer)[0]]
        found = scores[row][:, candidates[row]].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scorer", ONE_PASS, ids=repr)
def test_scores_are_finite_float32_for_every_head_and_token(scorer: AbstractScorer, make_layer: Any) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    scores = scorer.score(layer.observe(scorer))
    assert scores.dtype == torch.float32
    assert scores.shape == layer.keys.shape[:3]
    assert scores.movedim(1, -1)[layer.candidates(scorer)].isfinite().all()


@pytest.mark.parametrize("scorer", ONE_PASS, ids=repr)
def test_padding_changes_nothing(scorer: AbstractScorer, make_layer: Any) -> None:
    layer = make_layer(lengths=(40, 5, 23))
    scores = scorer.score(layer.observe(scorer))
    candidates = layer.candidates(scorer)
    for row in range(3):
        alone = layer.row(row)
        found = scores[row][:, candidates[row]]
        expected = scorer.score(alone.observe(scorer))[0][:, alone.candidates(scorer)[0]]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (20,), (3, 4, 22, 39)], ids=str)
@pytest.mark.parametrize("scorer", ONE_PASS, ids=repr)
def test_chunked_prefill_changes_nothing(scorer: AbstractScorer, cuts: tuple[int, ...], make_layer: Any) -> None:
    layer = make_layer(lengths=(40, 23))
    whole = scorer.score(layer.observe(scorer))
    chunked = scorer.score(layer.observe(scorer, cuts))
    candidates = layer.candidates(scorer)
    torch.testing.assert_close(chunked.movedim(1, -1)[candidates], whole.movedim(1, -1)[candidates], rtol=0, atol=1e-6)
    for count in (1, 5, 12):
        assert torch.equal(kept(chunked, candidates, count), kept(whole, candidates, count))


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(4)), seed=st.integers(0, 2**16), index=st.integers(0, len(ONE_PASS) - 1))
def test_heads_can_be_permuted(make_layer: Any, order: list[int], seed: int, index: int) -> None:
    scorer = ONE_PASS[index]
    if isinstance(scorer, Random):  # draws by head number
        return
    layer = make_layer(lengths=(17, 9), kv_heads=4, group=2, seed=seed)
    scores = scorer.score(layer.observe(scorer)).movedim(1, -1)
    permuted = scorer.score(layer.permute(order).observe(scorer)).movedim(1, -1)
    candidates = layer.candidates(scorer)
    torch.testing.assert_close(permuted[candidates], scores[candidates][:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, 23, 1000])
def test_h2o_block_size_changes_nothing(block_size: int, make_layer: Any) -> None:
    layer = make_layer()
    expected = H2O(block_size=64).score(layer.observe(H2O()))
    found = H2O(block_size=block_size).score(layer.observe(H2O(block_size=block_size)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "scorer"),
    [("expected._BLOCK", ExpectedAttention(num_future=16)), ("reconstruct._TOKEN_BLOCK", CriticalKV(base=H2O()))],
)
def test_blocks_change_nothing(
    name: str, scorer: AbstractScorer, make_layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(lengths=(23,))
    whole = scorer.score(layer.observe(scorer))
    monkeypatch.setattr(f"headwise.methods.scores.{name}", 5)
    for cuts in [(), (8,)]:
        torch.testing.assert_close(scorer.score(layer.observe(scorer, cuts)), whole, rtol=1e-5, atol=1e-6)


def test_h2o_raw_sums_add_up_to_one_per_query(make_layer: Any) -> None:
    layer = make_layer(lengths=(23, 14))
    scores = H2O(normalise=False).score(layer.observe(H2O(normalise=False)))
    torch.testing.assert_close(scores.sum(-1), torch.tensor([[23.0, 23.0], [14.0, 14.0]]))


def test_random_depends_on_seed_layer_and_head_only(make_layer: Any) -> None:
    layer, other = make_layer(lengths=(30, 12)), make_layer(lengths=(30, 12), seed=9)
    scores = Random(seed=1).score(layer.observe(Random()))
    assert torch.equal(scores, Random(seed=1).score(other.observe(Random())))
    assert not torch.equal(scores, Random(seed=2).score(layer.observe(Random())))
    assert not torch.equal(scores, Random(seed=1).score(replace(layer, layer=2).observe(Random())))
    assert not torch.equal(scores[:, 0], scores[:, 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(scores, Random(seed=1).score(layer.observe(Random())))
    finally:
        torch.set_num_threads(threads)


def test_protection_is_the_papers() -> None:
    protection = {type(s).__name__: (s.sink, s.window) for s in ONE_PASS if not isinstance(s, SnapKV | CriticalKV)}
    assert protection == {
        "TOVA": (0, 1),
        "H2O": (0, 0),
        "Knorm": (0, 0),
        "KeyDiff": (0, 0),
        "Streaming": (4, 0),
        "ExpectedAttention": (4, 0),
        "Random": (0, 0),
    }
    assert (SnapKV().sink, SnapKV().window, SnapKV().query_window) == (0, 32, 32)
    assert (CriticalKV(base=Streaming()).sink, CriticalKV(base=SnapKV(window_size=8)).window) == (4, 8)
    assert (KVzip().sink, KVzip().window) == (4, 0)


def test_fields_are_frozen_and_are_the_provenance() -> None:
    snapkv = {"name": "SnapKV", "window_size": 32, "kernel_size": 5, "pooling": "avg", "aggregate": "mean"}
    assert SnapKV().provenance() == snapkv
    assert CriticalKV().provenance() == {"name": "CriticalKV", "base": snapkv, "first_stage": 0.5, "epsilon": 1e-4}
    with pytest.raises(FrozenInstanceError):
        SnapKV().window_size = 8  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "build",
    [
        lambda: SnapKV(window_size=0),
        lambda: SnapKV(kernel_size=4),
        lambda: H2O(block_size=0),
        lambda: ExpectedAttention(num_future=0),
        lambda: ExpectedAttention(epsilon=-1.0),
        lambda: CriticalKV(first_stage=1.5),
        lambda: CriticalKV(base=KVzip()),
        lambda: KVzip(chunk_size=0),
        lambda: KVzip(overlap=-1),
    ],
)
def test_wrong_parameters_are_refused(build: Any) -> None:
    with pytest.raises(BadInput):
        build()
