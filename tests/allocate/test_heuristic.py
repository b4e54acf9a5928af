"""The heuristic allocators against their papers' formulas, kvpress' conventions and naive contests."""

import pytest
import torch

from headwise.errors import BadInput
from headwise.interfaces import Demand
from headwise.methods.allocate.heuristic import AdaKV, Global, Pyramid, Uniform
from headwise.shapes import ModelShape


def model(num_layers, kv_heads):
    layers = tuple(range(num_layers))
    return ModelShape(num_layers=num_layers, layers=layers, kv_heads=kv_heads, query_heads=kv_heads, head_dim=8)


def one_row(shape, *, tokens, total, floor=1):
    return Demand(shape=shape, tokens=(tokens,), totals=(total,), floors=(floor,), protected=(0,))


def counts_by_layer(allocator, demand):
    """Counts [L, H] of an allocator that does not look at scores."""
    scores, candidates = torch.zeros(1, 1, demand.shape.kv_heads, 1), torch.ones(1, 1, dtype=torch.bool)
    layers = range(len(demand.shape.layers))
    return torch.cat([allocator.allocate(scores, candidates, [at], demand) for at in layers])[:, 0]


def test_uniform_gives_the_remainder_to_the_first_heads_of_the_first_layers():
    demand = one_row(model(2, 3), tokens=10, total=27)
    assert counts_by_layer(Uniform(), demand).tolist() == [[5, 5, 4], [5, 4, 4]]


def test_pyramid_is_the_papers_line_above_the_floors():
    # a = 100 above the floor of 20: last layer 100 / 20 = 5, first 200 - 5 = 195, and a straight line between.
    demand = one_row(model(3, 2), tokens=4096, total=3 * 2 * 120, floor=20)
    assert counts_by_layer(Pyramid(), demand).tolist() == [[215, 215], [120, 120], [25, 25]]


def test_pyramid_raises_the_last_layer_when_the_first_is_whole():
    # a = 60 of 100: the first layer would get 117, is capped at 100 - 20 = 80, and the last takes 120 - 80 = 40.
    demand = one_row(model(3, 2), tokens=100, total=3 * 2 * 80, floor=20)
    assert counts_by_layer(Pyramid(), demand).tolist() == [[100, 100], [80, 80], [60, 60]]


def test_pyramid_of_one_layer_is_uniform():
    demand = one_row(model(1, 2), tokens=100, total=51)
    assert counts_by_layer(Pyramid(), demand).tolist() == [[26, 25]]


def test_pyramid_is_flat_at_beta_one():
    demand = one_row(model(4, 2), tokens=100, total=4 * 2 * 30, floor=5)
    assert counts_by_layer(Pyramid(beta=1.0), demand).unique().tolist() == [30]


@pytest.mark.parametrize(("removed", "falls_back"), [(0.6, False), (0.7, True), (0.8, True), (0.9, True)])
def test_pyramid_falls_back_to_uniform_where_kvpress_does(removed, falls_back):
    """At 4k tokens and a window of 64 kvpress' PyramidKV is uniform from 70% removed on (design/methods.md)."""
    shape, tokens, window = model(32, 8), 4000, 64
    average = round(tokens * (1 - removed))
    demand = one_row(shape, tokens=tokens, total=average * shape.num_heads, floor=window)
    per_layer = counts_by_layer(Pyramid(uniform_fallback=True), demand)[:, 0].tolist()
    largest, smallest = 2 * average - average / 20, average / 20
    line = [round(largest - layer * (largest - smallest) / 31) for layer in range(32)]
    assert smallest >= window or falls_back
    assert per_layer == pytest.approx([average] * 32 if falls_back else line, abs=1)


def naive_contest(scores, *, safe, total):
    """Counts of each head when the best `safe` of each are in and the others compete one by one."""
    kept = [safe] * len(scores)
    ranked = [sorted(head, reverse=True) for head in scores]
    while sum(kept) < total:
        rivals = [head for head in range(len(scores)) if kept[head] < len(ranked[head])]
        best = max(rivals, key=lambda head: (ranked[head][kept[head]], -kept[head], -head))
        kept[best] += 1
    return kept


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_adakv_is_the_naive_contest(seed, ties):
    scores = torch.randn(1, 1, 4, 30, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    candidates = (torch.arange(30) < 24)[None]
    demand = one_row(model(1, 4), tokens=30, total=60, floor=6)
    pool = scores[0, 0, :, :24].tolist()
    inside = AdaKV(pool_protected=True, safeguard=0.6).allocate(scores, candidates, [0], demand)
    outside = AdaKV(safeguard=0.5).allocate(scores, candidates, [0], demand)
    # Above the 6 protected, 36 entries compete. Safe outside the pool: half of 36 / 4; inside: 0.6 * 60 / 4 less 6.
    assert outside[0, 0].tolist() == [6 + kept for kept in naive_contest(pool, safe=4, total=36)]
    assert inside[0, 0].tolist() == [6 + kept for kept in naive_contest(pool, safe=3, total=36)]


@pytest.mark.parametrize("seed", range(5))
def test_global_is_the_naive_contest(seed):
    scores = torch.randn(3, 1, 2, 20, generator=torch.Generator().manual_seed(seed))
    candidates = (torch.arange(20) >= 2)[None]
    demand = one_row(model(3, 2), tokens=20, total=50, floor=2)
    pool = scores[:, 0, :, 2:].flatten(0, 1).tolist()
    counts = Global().allocate(scores, candidates, range(3), demand)
    assert counts[:, 0].flatten().tolist() == [2 + kept for kept in naive_contest(pool, safe=0, total=38)]


@pytest.mark.parametrize("allocator", [AdaKV(), Global()], ids=["adakv", "global"])
def test_equal_scores_are_shared_equally(allocator):
    demand = one_row(model(1, 4), tokens=16, total=42)
    counts = allocator.allocate(torch.zeros(1, 1, 4, 16), torch.ones(1, 16, dtype=torch.bool), [0], demand)
    assert counts.tolist() == [[[11, 11, 10, 10]]]


def test_adakv_keeps_the_safe_share_of_a_head_without_any_high_score():
    scores = torch.stack([torch.zeros(100), torch.ones(100)])[None, None]
    demand = one_row(model(1, 2), tokens=100, total=100)
    counts = AdaKV(safeguard=0.2).allocate(scores, torch.ones(1, 100, dtype=torch.bool), [0], demand)
    assert counts.tolist() == [[[10, 90]]]


def test_every_head_keeps_an_entry_without_protection():
    scores = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, 8)
    demand = one_row(model(3, 1), tokens=8, total=10)
    counts = Global().allocate(scores, torch.ones(1, 8, dtype=torch.bool), range(3), demand)
    assert counts.flatten().tolist() == [1, 1, 8]


def test_senseless_parameters_are_refused():
    with pytest.raises(BadInput, match=r"beta=0\.5"):
        Pyramid(beta=0.5)
    with pytest.raises(BadInput, match=r"safeguard=1\.5"):
        AdaKV(safeguard=1.5)
