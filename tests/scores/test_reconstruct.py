"""CriticalKV's two stages and KVzip's replays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from score_oracles import critical, group_of
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import Chunk, Replay, Statistics
from headwise.methods.scores import H2O, CriticalKV, ExpectedAttention, KeyDiff, KVzip, KVzipL2, SnapKV

CRITICAL = [
    CriticalKV(base=SnapKV(window_size=4)),
    CriticalKV(base=H2O(), first_stage=0.3),
    CriticalKV(base=H2O(), first_stage=0.0),
    CriticalKV(base=ExpectedAttention(num_future=8, use_vnorm=False), epsilon=0.01),
]


@pytest.mark.parametrize("scorer", CRITICAL, ids=repr)
def test_critical_equals_the_formula(scorer: CriticalKV, make_layer: Any) -> None:
    layer = make_layer(lengths=(23, 14))
    scores = scorer.score(layer.observe(scorer, keep=0.6))
    for row, length in enumerate((23, 14)):
        expected = critical(scorer, layer.row(row), int(0.6 * length))
        found = scores[row, :, -length:].double()
        rest = expected.isfinite()
        torch.testing.assert_close(found[rest], expected[rest], rtol=1e-5, atol=1e-6)
        assert found[~rest].isfinite().all()
        if not rest.all():
            assert found[~rest].min() > found[rest].max()


def test_critical_keeps_the_first_stage_in_the_order_of_the_base(make_layer: Any) -> None:
    layer, scorer = make_layer(lengths=(23,)), CriticalKV(base=H2O())
    scores = scorer.score(layer.observe(scorer, keep=0.6))
    base = H2O().score(layer.observe(H2O()))
    first = int(0.6 * 23) // 2
    assert torch.equal(scores.topk(first).indices, base.topk(first).indices)


def replay_chunk(context: Any, replay: Any) -> Chunk:
    """What KVzip sees of a replay: keys of the context and of the replay, queries of the replay."""
    joined = [torch.cat([getattr(context, name), getattr(replay, name)], dim=-1) for name in ("valid", "positions")]
    return Chunk(
        queries=replay.queries,
        keys=torch.cat([context.keys, replay.keys], dim=2),
        valid=joined[0],
        positions=joined[1],
        offset=context.keys.shape[2],
        scaling=context.scaling,
        rotary=context.rotary,
    )


def replayed(scorer: KVzip, context: Any, replays: list[tuple[Any, int, int]]) -> Statistics:
    statistics: Statistics = {}
    for replay, start, end in replays:
        statistics = scorer.accumulate(statistics, replace(replay_chunk(context, replay), repeats=(start, end)))
    return statistics


def kvzip(
    context: Any, replay: Any, start: int, end: int, join: Callable[[Tensor, Tensor], Tensor] = torch.maximum
) -> Tensor:
    """Largest weight each of the tokens [start, end) gets from the replay, [H, end - start], by loops."""
    sinks = range(min(4, start))
    best = torch.zeros(context.keys.shape[1], end - start, dtype=torch.float64)
    for head in range(context.keys.shape[1]):
        cached = [context.keys[0, head, j].double() for j in (*sinks, *range(start, end))]
        for query_head in group_of(context, head):
            for t in range(replay.keys.shape[2]):
                keys = cached + [key.double() for key in replay.keys[0, head, : t + 1]]
                query = replay.queries[0, query_head, t].double()
                weights = torch.stack([context.scaling * query.dot(key) for key in keys]).softmax(0)
                best[head] = join(best[head], weights[len(sinks) : len(sinks) + end - start])
    return best


def test_kvzip_equals_the_formula(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.methods.scores.reconstruct._QUERY_BLOCK", 5)
    context = make_layer(lengths=(23,))
    replays = [(make_layer(lengths=(12,), seed=1), 0, 3), (make_layer(lengths=(12,), seed=2), 3, 23)]
    scorer = KVzip()
    observation = context.observe(scorer)
    observation.statistics.update(replayed(scorer, context, replays))
    expected = torch.cat([kvzip(context, *replay) for replay in replays], dim=-1)
    torch.testing.assert_close(scorer.score(observation)[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_kvzip_l2_equals_the_formula(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.methods.scores.reconstruct._QUERY_BLOCK", 5)
    context = make_layer(lengths=(23,))
    replays = [(make_layer(lengths=(12,), seed=1), 0, 15), (make_layer(lengths=(12,), seed=2), 10, 23)]
    scorer = KVzipL2()
    observation = context.observe(scorer)
    observation.statistics.update(replayed(scorer, context, replays))
    expected = torch.zeros(context.keys.shape[1], 23, dtype=torch.float64)
    for replay, start, end in replays:
        expected[:, start:end] += kvzip(context, replay, start, end, lambda one, other: one + other.square())
    torch.testing.assert_close(scorer.score(observation)[0].double(), expected.sqrt(), rtol=1e-5, atol=1e-6)


def test_kvzip_keeps_the_largest_when_ranges_overlap(make_layer: Any) -> None:
    context, scorer = make_layer(lengths=(23,)), KVzip()
    replays = [(make_layer(lengths=(9,), seed=1), 0, 15), (make_layer(lengths=(9,), seed=2), 10, 23)]
    both = replayed(scorer, context, replays)["received"]
    alone = [replayed(scorer, context, [replay])["received"] for replay in replays]
    assert torch.equal(both, torch.maximum(*alone))


def test_kvzip_padding_changes_nothing(make_layer: Any) -> None:
    context, replay, scorer = make_layer(lengths=(23, 14)), make_layer(lengths=(9, 6), seed=1), KVzip()
    scores = replayed(scorer, context, [(replay, 12, 23)])["received"][1, :, 12:]
    alone = replayed(scorer, context.row(1), [(replay.row(1), 3, 14)])["received"][0, :, 3:]
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)


def test_kvzip_of_a_context_shorter_than_its_sinks(make_layer: Any) -> None:
    context, replay = make_layer(lengths=(2,)), make_layer(lengths=(1,), seed=1)
    received = replayed(KVzip(), context, [(replay, 0, 2)])["received"]
    torch.testing.assert_close(received[0].double(), kvzip(context, replay, 0, 2), rtol=1e-5, atol=1e-6)


def test_kvzip_does_nothing_during_prefill(make_layer: Any) -> None:
    assert make_layer().statistics(KVzip(), cuts=(10,)) == {}


def test_kvzip_asks_for_a_replay() -> None:
    assert KVzip(chunk_size=16, instruction=(7, 8)).replay == Replay(chunk_size=16, overlap=8, instruction=(7, 8))
    assert CriticalKV().replay is None


def test_critical_refuses_a_base_with_negative_scores(make_layer: Any) -> None:
    """Weighting them would turn the order of large values round."""
    layer = make_layer(lengths=(23,))
    scorer = CriticalKV(base=KeyDiff())
    with pytest.raises(BadInput, match="negative"):
        scorer.score(layer.observe(scorer))
