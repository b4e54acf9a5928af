"""Scorers about what the model would lose: its attention's output (CriticalKV) or the context itself (KVzip)."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import BadInput
from headwise.interfaces import AbstractScorer, Chunk, Follow, Observation, Provenance, Replay, Statistics
from headwise.methods.scores.attention import attention, weighting
from headwise.methods.scores.window import SnapKV
from headwise.methods.select import protected_mask

INSTRUCTION = "Repeat the previous context exactly."
_TOKEN_BLOCK = 1024  # values projected at once: the projection is hidden_size wide
_QUERY_BLOCK = 128  # replay queries whose attention is computed at once: larger blocks leave the cache of a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticalKV(AbstractScorer):
    """Another scorer's choice for half of the budget; for the rest, weighted by what the entry writes to the output.

    Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
    arXiv 2502.03805.

        s[j] = (base[j] + epsilon) * mean over the group of ||v_j W_O||_1

    and the `first_stage` share of a head's budget goes to the best base scores first. A head's budget is not known
    before scores are, so the even share (total / number of heads) stands in for it; protected tokens count in that
    first share, as in kvpress. Differs: entries of the first stage keep their order of base score above all others
    (kvpress makes them equal), so smaller budgets keep the best of them.
    """

    needs_budget: ClassVar[bool] = True  # half of it is the base's choice

    base: AbstractScorer = field(default_factory=SnapKV)
    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.first_stage <= 1:
            raise BadInput(f"CriticalKV: first_stage={self.first_stage}; it is a share of the budget, in [0, 1].")
        if self.base.replay is not None:
            raise BadInput(f"CriticalKV: {type(self.base).__name__} reads the context twice; wrap a one-pass scorer.")

    @property
    def sink(self) -> int:
        """The base's."""
        return self.base.sink

    @property
    def window(self) -> int:
        """The base's."""
        return self.base.window

    @property
    def query_window(self) -> int:
        """The base's."""
        return self.base.query_window

    @property
    def needs(self) -> frozenset[str]:
        """The output projection, and what the base needs."""
        return self.base.needs | {"output"}

    def provenance(self) -> Provenance:
        """Name and parameters, the base's under `base`."""
        parameters = {"first_stage": self.first_stage, "epsilon": self.epsilon}
        return {"name": type(self).__name__, "base": self.base.provenance(), **parameters}

    def accumulate(self, statistics: Statistics, chunk: Chunk) -> Statistics:
        """Gather what the base gathers."""
        return self.base.accumulate(statistics, chunk)

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score by the base, then by the projected values; the first stage's choice on top."""
        base = self.base.score(observation)
        if bool((base < 0).logical_and(observation.valid.unsqueeze(1)).any()):
            raise BadInput(
                f"CriticalKV multiplies scores, and those of {type(self.base).__name__} can be negative: choose a base "
                "that scores by attention, such as SnapKV."
            )
        scores = (base + self.epsilon) * projected_norms(observation.values, observation.output_weight)
        pinned = protected_mask(observation.valid, self.sink, self.window).unsqueeze(1)
        ranked = base.masked_fill(pinned, torch.inf).masked_fill(~observation.valid.unsqueeze(1), -torch.inf)
        ranks = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        size = self._first_stage_sizes(observation).view(-1, 1, 1)
        ceiling = scores.masked_fill(pinned | ~observation.valid.unsqueeze(1), 0.0).amax((1, 2), keepdim=True)
        return torch.where(ranks < size, ceiling + (size - ranks), scores)

    def _first_stage_sizes(self, observation: Observation) -> Int[Tensor, " batch"]:
        shares = [total // observation.shape.num_heads for total in observation.totals]
        sizes = [max(1, int(share * self.first_stage)) if self.first_stage > 0 else 0 for share in shares]
        return torch.tensor(sizes, device=observation.keys.device, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class KVzip(AbstractScorer):
    """What the model looks at while it repeats the context: the entries needed to reconstruct it.

    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.

        s[j] = max over the group and the replay's queries t of  A[t, j]

    The context is replayed `chunk_size` tokens at a time, each piece after `instruction` (token ids, such as those of
    "Repeat the previous context exactly.") and, from the second on, the last `overlap` tokens of the piece before. The
    softmax sees the first 4 tokens, the piece's entries in the cache and the replay itself (causally), as in kvpress;
    the maximum runs over the instruction's queries too. Costs a second pass over the context and more: a quality
    ceiling rather than a fast method. Where there is a tokenizer (commands, evaluations) the instruction is the
    authors', as a message in the chat template that ends where the model's turn begins. Differs: later pieces follow
    the same instruction, and their overlap begins the model's turn (the authors ask there to start with the overlap's
    words); a batch may be padded.
    """

    chunk_size: int = 2048
    instruction: tuple[int, ...] = ()
    overlap: int = 8

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.overlap < 0:
            raise BadInput(
                f"KVzip: chunk_size={self.chunk_size}, overlap={self.overlap}; use chunk_size >= 1 and overlap >= 0."
            )

    @property
    def sink(self) -> int:
        """The first tokens draw attention whatever they say."""
        return 4

    @property
    def replay(self) -> Replay:
        """The context in chunks, each after the instruction and the end of the chunk before."""
        return Replay(chunk_size=self.chunk_size, overlap=self.overlap, instruction=self.instruction)

    def instructed(self, follow: Follow) -> "KVzip":
        """With the authors' instruction, unless it has one already."""
        return self if self.instruction else replace(self, instruction=follow(INSTRUCTION))

    def accumulate(self, statistics: Statistics, chunk: Chunk) -> Statistics:
        """Record the attention that a replay pays the tokens it repeats; the first reading leaves no trace."""
        if chunk.repeats is None:
            return statistics
        start, end = chunk.repeats
        received = statistics.get("received", chunk.keys.new_zeros(*chunk.keys.shape[:2], chunk.offset).float()).clone()
        received[..., start:end] = self._join(received[..., start:end], self._replay_attention(chunk, start, end))
        return {"received": received}

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """What two groups of queries pay together."""
        return torch.maximum(first, second)

    def _paid(self, weights: Float[Tensor, "batch kv_heads group queries n"]) -> Float[Tensor, "batch kv_heads n"]:
        """What some queries pay."""
        return weights.amax((2, 3))

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the recorded maxima."""
        return observation.statistics["received"]

    def _replay_attention(self, chunk: Chunk, start: int, end: int) -> Float[Tensor, "batch kv_heads replayed"]:
        columns, present = _replay_columns(chunk, start, end, self.sink)
        index = columns[:, None, :, None].expand(-1, chunk.keys.shape[1], -1, chunk.keys.shape[3])
        keys = chunk.keys.gather(2, index)
        paid = chunk.keys.new_zeros(*chunk.keys.shape[:2], end - start).float()
        tokens = chunk.keys.shape[2]
        for first in range(chunk.offset, tokens, _QUERY_BLOCK):
            stop = min(tokens, first + _QUERY_BLOCK)
            rows = torch.arange(first, stop, device=columns.device, dtype=torch.int64)
            queries = chunk.queries[:, :, first - chunk.offset : stop - chunk.offset]
            known = columns.shape[1] - (tokens - stop)  # the replay's later tokens apart
            visible = (
                present[:, None, :known] & chunk.valid[:, rows, None] & (columns[:, None, :known] <= rows[:, None])
            )
            weights = attention(queries, keys[:, :, :known], visible, **weighting(chunk))
            paid = self._join(paid, self._paid(weights[..., self.sink : self.sink + end - start]))
        return paid


@dataclass(frozen=True, kw_only=True, slots=True)
class KVzipL2(KVzip):
    """As KVzip, but by the root of the squared attention that all queries pay an entry, not by the largest.

        s[j] = sqrt(sum over the group and the replay's queries t of  A[t, j]^2)

    Ours. How much a head's output changes without an entry, squared and summed over queries, grows with these squares.
    The largest of a thousand numbers is a matter of chance: on SmolLM2-135M the sum keeps text closer to the full
    cache's at every keep, and loses no more needles (docs/lkv.md).
    """

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the root of the recorded sums."""
        return observation.statistics["received"].sqrt()

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    def _paid(self, weights: Float[Tensor, "batch kv_heads group queries n"]) -> Float[Tensor, "batch kv_heads n"]:
        return weights.square().sum((2, 3))


def projected_norms(
    values: Float[Tensor, "batch kv_heads tokens head_dim"],
    output_weight: Float[Tensor, "query_heads head_dim hidden"],
) -> Float[Tensor, "batch kv_heads tokens"]:
    """Return ||v W_O||_1 averaged over the query heads that share the value (float32)."""
    grouped = output_weight.float().unflatten(0, (values.shape[1], -1))  # [H, G, D, hidden]
    blocks = [
        torch.stack([(block @ weight).abs().sum(-1) for weight in grouped.unbind(1)]).mean(0)
        for block in values.float().split(_TOKEN_BLOCK, dim=2)
    ]
    return torch.cat(blocks, dim=-1)


def _replay_columns(
    chunk: Chunk, start: int, end: int, sink: int
) -> tuple[Int[Tensor, "batch columns"], Bool[Tensor, "batch columns"]]:
    """Indices of the keys a replay sees, sinks first, and which of them are really there.

    A row's sinks are its first tokens after the padding; those inside the replayed range are not taken twice.
    """
    tokens = torch.arange(chunk.keys.shape[2], device=chunk.keys.device, dtype=torch.int64)
    first = chunk.valid.long().argmax(-1, keepdim=True)
    sinks = (first + torch.arange(sink, device=tokens.device, dtype=torch.int64)).clamp(max=len(tokens) - 1)
    others = torch.cat([tokens[start:end], tokens[chunk.offset :]]).expand(len(sinks), -1)
    present = torch.cat([sinks < start, chunk.valid.gather(1, others)], dim=1)
    return torch.cat([sinks, others], dim=1), present
