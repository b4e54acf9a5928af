"""The scorers' formulas, written as loops in double precision over one row without padding. Slow and obvious."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.methods.scores import (
    H2O,
    TOVA,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    SnapKV,
    Streaming,
)


def attend(layer: Any, query_head: int, t: int) -> Tensor:
    """Attention of query t over its tokens, zero afterwards, [N]."""
    kv_head = query_head // (layer.queries.shape[1] // layer.keys.shape[1])
    query, keys = layer.queries[0, query_head, t].double(), layer.keys[0, kv_head].double()
    exponents = torch.stack([layer.scaling * query.dot(key) for key in keys[: t + 1]]).exp()
    return torch.cat([exponents / exponents.sum(), torch.zeros(len(keys) - t - 1, dtype=torch.float64)])


def group_of(layer: Any, kv_head: int) -> range:
    group = layer.queries.shape[1] // layer.keys.shape[1]
    return range(kv_head * group, (kv_head + 1) * group)


def per_head(layer: Any, score: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([score(head) for head in range(layer.keys.shape[1])])


def snapkv(scorer: SnapKV, layer: Any) -> Tensor:
    tokens = layer.keys.shape[2]
    window = range(max(0, tokens - scorer.window_size), tokens)
    reach = scorer.kernel_size // 2

    def pooled(query_head: int) -> Tensor:
        received = sum((attend(layer, query_head, t) for t in window), torch.zeros(tokens, dtype=torch.float64))
        received[window.start :] = 0
        if scorer.aggregate == "mean":
            received = received / len(window)
        near = [received[max(0, j - reach) : j + reach + 1] for j in range(tokens)]
        smooth = [x.sum() / scorer.kernel_size if scorer.pooling == "avg" else x.max() for x in near]
        return torch.stack(smooth)

    return per_head(layer, lambda head: torch.stack([pooled(q) for q in group_of(layer, head)]).mean(0))


def tova(scorer: TOVA, layer: Any) -> Tensor:
    last = layer.keys.shape[2] - 1
    mean = torch.stack([attend(layer, q, last) for q in range(layer.queries.shape[1])]).mean(0)
    return per_head(layer, lambda head: mean)


def h2o(scorer: H2O, layer: Any) -> Tensor:
    tokens = layer.keys.shape[2]

    def received(head: int) -> Tensor:
        rows = [torch.stack([attend(layer, q, t) for t in range(tokens)]).sum(0) for q in group_of(layer, head)]
        total = torch.stack(rows).mean(0)
        return total / torch.arange(tokens, 0, -1) if scorer.normalise else total

    return per_head(layer, received)


def knorm(scorer: Knorm, layer: Any) -> Tensor:
    return -layer.keys[0].double().square().sum(-1).sqrt()


def keydiff(scorer: KeyDiff, layer: Any) -> Tensor:
    def distinct(head: int) -> Tensor:
        units = [key / key.dot(key).sqrt() for key in layer.keys[0, head].double()]
        mean = torch.stack(units).mean(0)
        return torch.stack([-unit.dot(mean) / mean.dot(mean).sqrt() for unit in units])

    return per_head(layer, distinct)


def streaming(scorer: Streaming, layer: Any) -> Tensor:
    return per_head(layer, lambda head: torch.arange(layer.keys.shape[2]).double())


def expected(scorer: ExpectedAttention, layer: Any) -> Tensor:
    tokens, head_dim = layer.keys.shape[2:]
    now = layer.rotary.matrices(torch.arange(tokens), head_dim)
    future = layer.rotary.matrices(torch.arange(tokens, tokens + scorer.num_future), head_dim).mean(0)

    def expectation(query_head: int, kv_head: int) -> Tensor:
        states = [now[t].T @ layer.queries[0, query_head, t].double() for t in range(4, tokens)]
        mean = torch.stack(states).mean(0)
        spread = torch.stack([torch.outer(x - mean, x - mean) for x in states]).mean(0)
        mean, spread = future @ mean, future @ spread @ future.T
        logits = []
        for key in layer.keys[0, kv_head, 4:].double():
            quadratic = key.dot(spread @ key) / 2 if scorer.use_covariance else 0.0
            logits.append(layer.scaling * mean.dot(key) + layer.scaling**2 * quadratic)
        return torch.cat([torch.zeros(4, dtype=torch.float64), torch.stack(logits).softmax(0)])

    def score(head: int) -> Tensor:
        weights = torch.stack([expectation(q, head) for q in group_of(layer, head)]).mean(0)
        norms = layer.values[0, head].double().square().sum(-1).sqrt()
        return (weights + scorer.epsilon) * norms if scorer.use_vnorm else weights

    return per_head(layer, score)


def critical(scorer: CriticalKV, layer: Any, budget: int) -> Tensor:
    """`budget` is the head's even share; entries chosen in the first stage are returned as infinity."""
    base = oracle(scorer.base, layer)
    tokens = layer.keys.shape[2]
    first = max(1, int(budget * scorer.first_stage)) if scorer.first_stage > 0 else 0

    def score(head: int) -> Tensor:
        scores = torch.zeros(tokens, dtype=torch.float64)
        for j in range(tokens):
            value = layer.values[0, head, j].double()
            writes = [value @ layer.output_weight[q].double() for q in group_of(layer, head)]
            scores[j] = (base[head, j] + scorer.epsilon) * torch.stack([w.abs().sum() for w in writes]).mean()
        pinned = [j for j in range(tokens) if j < scorer.sink or j >= tokens - scorer.window]
        others = [j for j in range(tokens) if j not in pinned]
        order = pinned + sorted(others, key=lambda j: -base[head, j].item())
        scores[order[:first]] = torch.inf
        return scores

    return per_head(layer, score)


ORACLES: dict[type, Callable[[Any, Any], Tensor]] = {
    SnapKV: snapkv,
    TOVA: tova,
    H2O: h2o,
    Knorm: knorm,
    KeyDiff: keydiff,
    Streaming: streaming,
    ExpectedAttention: expected,
}


def oracle(scorer: Any, layer: Any) -> Tensor:
    """Scores of one row without padding, [H, N]."""
    return ORACLES[type(scorer)](scorer, layer)
