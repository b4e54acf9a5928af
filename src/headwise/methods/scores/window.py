"""Scorers that read attention weights: of the last queries (SnapKV, TOVA) or of all of them (H2O)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer, Chunk, Observation, Statistics, WhileReading
from headwise.methods.scores.attention import attention, causal_mask, weighting, window_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapKV(AbstractScorer):
    """Attention received from the last tokens of the context, smoothed along the tokens.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.

        s[j] = mean over the group of  pool_5( mean over the last W queries t of  A[t, j] )

    Differs from the authors' code: scores are averaged over the query heads of a KV head (theirs keeps one cache per
    query head), and the window is averaged, not summed (`aggregate="sum"` is theirs). Their LongBench settings use
    `pooling="max", kernel_size=7`. The softmax runs over the window too, then the window's own keys are left out of
    the pooling; pooling counts the zeros beyond both ends. kvpress does the same with W = 64.
    """

    while_reading: ClassVar[WhileReading] = "anew"

    window_size: int = 32
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"
    aggregate: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise BadInput(f"SnapKV: window_size={self.window_size}; it looks through at least 1 query.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise BadInput(f"SnapKV: kernel_size={self.kernel_size}; pooling is centred, so use an odd number >= 1.")

    @property
    def window(self) -> int:
        """The observation window, which SnapKV never evicts."""
        return self.window_size

    @property
    def query_window(self) -> int:
        """The queries of the observation window."""
        return self.window_size

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token before the window by the attention the window pays it."""
        weights = window_attention(observation)  # [B, H, G, W, N]
        batch, kv_heads, group, num_queries, tokens = weights.shape
        weights[..., tokens - num_queries :] = 0.0
        received = weights.sum(3)
        if self.aggregate == "mean":
            num_valid = observation.valid[:, tokens - num_queries :].sum(-1).clamp(min=1)
            received = received / num_valid.view(batch, 1, 1, 1)
        pooled = self._pool(received.view(batch * kv_heads, group, tokens))
        return pooled.view(batch, kv_heads, group, tokens).mean(2)

    def _pool(self, received: Tensor) -> Tensor:
        pool = functional.avg_pool1d if self.pooling == "avg" else functional.max_pool1d
        return pool(received, self.kernel_size, stride=1, padding=self.kernel_size // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TOVA(AbstractScorer):
    """Attention received from the last token, the same for all heads of a layer.

    Oren et al., "Transformers are Multi-State RNNs" (Token Omission Via Attention), arXiv 2401.06104.

        s[j] = mean over all query heads of  A[N - 1, j]

    Differs: the paper drops one token at each step, prefill included; we score once, when the context has passed, and
    keep the last token itself whatever its weight. kvpress does the same.
    """

    @property
    def window(self) -> int:
        """The last token."""
        return 1

    @property
    def query_window(self) -> int:
        """The last token's query."""
        return 1

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token by the last token's attention, averaged over heads."""
        received = window_attention(observation).mean((1, 2, 3))  # [B, N]
        return received.unsqueeze(1).repeat(1, observation.keys.shape[1], 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class H2O(AbstractScorer):
    """Attention received from all tokens of the context: the heavy hitters.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arXiv 2306.14048.

        s[j] = mean over the group of  sum over t >= j of  A[t, j] / (number of queries t >= j)

    Differs: the paper accumulates the raw sum (`normalise=False`), which favours early tokens because more queries see
    them, and gives half of the budget to recent tokens; we follow kvpress (ObservedAttention): the mean, and no recent
    tokens unless the method protects a window. Attention is computed `block_size` queries at a time, so memory is
    O(block_size * N) and never N * N; sums are float64, so neither blocks nor prefill chunks change the result.
    """

    normalise: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise BadInput(f"H2O: block_size={self.block_size}; use at least 1 query per block.")

    def accumulate(self, statistics: Statistics, chunk: Chunk) -> Statistics:
        """Add the attention that the chunk's queries pay to every token so far."""
        batch, kv_heads, tokens, _ = chunk.keys.shape
        received = torch.zeros(batch, kv_heads, tokens, dtype=torch.float64, device=chunk.keys.device)
        if "received" in statistics:
            earlier = statistics["received"]
            received[..., : earlier.shape[-1]] = earlier
        for start in range(0, chunk.queries.shape[2], self.block_size):
            weights = _block_attention(chunk, start, self.block_size)
            received[..., : weights.shape[-1]] += weights.sum(3, dtype=torch.float64).mean(2)
        return {**statistics, "received": received, **_beyond(statistics, chunk)}

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token by the attention accumulated over the context."""
        received = observation.statistics["received"]
        if self.normalise:
            num_seeing = observation.valid.long().flip(-1).cumsum(-1).flip(-1).clamp(min=1)  # [B, N]
            if "beyond" in observation.statistics:
                num_seeing = num_seeing + observation.statistics["beyond"]
            received = received / num_seeing.unsqueeze(1)
        return received.float()


def _block_attention(chunk: Chunk, start: int, size: int) -> Float[Tensor, "batch kv_heads group block tokens"]:
    queries = chunk.queries[:, :, start : start + size]
    offset = chunk.offset + start
    until = None if chunk.until is None else chunk.until[:, start : start + size]
    end = chunk.keys.shape[2] if until is not None else offset + queries.shape[2]  # nothing later is visible
    visible = causal_mask(chunk.valid[:, :end], offset=offset, num_queries=queries.shape[2], until=until)
    return attention(queries, chunk.keys[:, :, :end], visible, **weighting(chunk))


def _beyond(statistics: Statistics, chunk: Chunk) -> Statistics:
    """How many queries see each token before it comes, where tokens of an image see one another."""
    if chunk.until is None:
        return {}
    earlier, new = statistics.get("beyond"), chunk.queries.shape[2]
    steps = torch.zeros(len(chunk.until), chunk.offset + new + 1, dtype=torch.int64, device=chunk.until.device)
    after = torch.arange(chunk.offset + 1, chunk.offset + new + 1, dtype=torch.int64, device=steps.device)
    steps[:, after] += 1
    steps.scatter_add_(1, chunk.until + 1, -torch.ones_like(chunk.until))
    beyond = steps.cumsum(-1)[:, :-1]
    return {"beyond": beyond if earlier is None else beyond + functional.pad(earlier, (0, new))}
