"""Expected attention: how much the queries still to come will look at an entry, from the queries already seen."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer, Chunk, Observation, Statistics
from headwise.methods.scores.attention import token_ranks

_BLOCK = 4096  # query tokens turned into float64 at once


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedAttention(AbstractScorer):
    """Attention expected from future queries, times the size of the value it would fetch.

    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    arXiv 2510.00636. Queries before rotation are taken as Gaussian, with the mean m and covariance C of each query head
    over the context; R is the rotation averaged over the next `num_future` positions:

        z[j] = (R m) . k_j * scaling + k_j' (R C R') k_j * scaling^2 / 2
        s[j] = (epsilon + mean over the group of softmax over j of z[j]) * ||v_j||_2

    The first 4 tokens, whose queries are outliers, enter neither the moments nor the softmax, and are kept. Differs:
    moments are gathered in float64 over the chunks of prefill, so chunked prefill sees the whole context; the future
    starts where each row ends. `epsilon` is 0 in the formula and in kvpress; LU-KV uses 0.02.
    """

    num_future: int = 512
    epsilon: float = 0.0
    use_covariance: bool = True
    use_vnorm: bool = True

    def __post_init__(self) -> None:
        if self.num_future < 1:
            raise BadInput(f"ExpectedAttention: num_future={self.num_future}; it averages over at least 1 position.")
        if self.epsilon < 0:
            raise BadInput(f"ExpectedAttention: epsilon={self.epsilon}; use 0 or a small positive number.")

    @property
    def sink(self) -> int:
        """The first tokens draw attention whatever they say."""
        return 4

    @property
    def needs(self) -> frozenset[str]:
        """Queries are turned back, and on to later positions."""
        return frozenset({"rotation", "queries"})

    def accumulate(self, statistics: Statistics, chunk: Chunk) -> Statistics:
        """Add the chunk's pre-RoPE queries to the moments; padding and the first 4 tokens are left out."""
        end = chunk.offset + chunk.queries.shape[2]
        counted = _past_sink(chunk.valid, self.sink)
        for start in range(chunk.offset, end, _BLOCK):
            columns = slice(start, min(start + _BLOCK, end))
            queries = chunk.queries[:, :, columns.start - chunk.offset : columns.stop - chunk.offset]
            queries = chunk.rotary.unrotate(queries, chunk.positions[:, columns]).double()
            queries = queries.masked_fill(~counted[:, None, columns, None], 0.0)
            statistics = _add(statistics, self._moments(queries, counted[:, columns]))
        return statistics

    def _moments(self, queries: Tensor, counted: Tensor) -> Statistics:
        moments = {"query_count": counted.sum(-1), "query_sum": queries.sum(2)}
        if self.use_covariance:
            moments["query_outer"] = queries.transpose(-1, -2) @ queries
        return moments

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token by its expected attention, weighted by the norm of its value."""
        logits = self._expected_logits(observation)
        counted = _past_sink(observation.valid, self.sink)[:, None, None]
        weights = logits.masked_fill(~counted, -torch.inf).softmax(-1).masked_fill(~counted, 0.0)
        scores = weights.mean(2)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * observation.values.float().norm(dim=-1)
        return scores

    def _expected_logits(self, observation: Observation) -> Float[Tensor, "batch kv_heads group tokens"]:
        statistics, scaling = observation.statistics, observation.scaling
        batch, kv_heads, _, head_dim = observation.keys.shape
        keys = observation.keys.float()
        rotation = self._future_rotation(observation)  # [B, 1, D, D]
        count = statistics["query_count"].clamp(min=1).view(batch, 1, 1)
        mean = statistics["query_sum"] / count  # [B, H * G, D]
        rotated = (rotation @ mean.unsqueeze(-1)).float().view(batch, kv_heads, -1, head_dim)
        logits = scaling * (rotated @ keys.transpose(-1, -2))
        if self.use_covariance:
            covariance = statistics["query_outer"] / count.unsqueeze(-1) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
            covariance = rotation @ covariance @ rotation.transpose(-1, -2)
            logits += scaling**2 / 2 * _quadratic(keys, covariance.float())
        return logits

    def _future_rotation(self, observation: Observation) -> Float[Tensor, "batch 1 head_dim head_dim"]:
        ahead = torch.arange(1, self.num_future + 1, device=observation.positions.device, dtype=torch.int64)
        future = observation.positions[:, -1:] + ahead  # rows are padded on the left: the last token is never padding
        return observation.rotary.mean_rotation(future).double().unsqueeze(1)


def _past_sink(valid: Bool[Tensor, "batch tokens"], sink: int) -> Bool[Tensor, "batch tokens"]:
    return valid & (token_ranks(valid) >= sink)


def _add(statistics: Statistics, moments: Statistics) -> Statistics:
    return {**statistics, **{name: statistics.get(name, 0) + moment for name, moment in moments.items()}}


def _quadratic(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    matrices: Float[Tensor, "batch query_heads head_dim head_dim"],
) -> Float[Tensor, "batch kv_heads group tokens"]:
    grouped = matrices.unflatten(1, (keys.shape[1], -1))  # [B, H, G, D, D]
    # One query head of each group at a time: all at once would take G times the memory of the keys.
    return torch.stack([(keys @ matrix * keys).sum(-1) for matrix in grouped.unbind(2)], dim=2)
