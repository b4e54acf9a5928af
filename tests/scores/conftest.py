"""Random layers for the scorers: `make_layer` builds one, `Layer` turns it into Chunks and an Observation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from headwise.interfaces import AbstractScorer, Chunk, Observation, Statistics
from headwise.shapes import ModelShape

LAYERS = 3  # of the model this layer is part of: only `totals` notices


@dataclass(frozen=True)
class HalfRotary:
    """Rotate-half RoPE in double precision, by rotation matrices built pair by pair."""

    theta: float = 100.0

    def matrices(self, positions: Tensor, head_dim: int) -> Tensor:
        half = head_dim // 2
        angles = positions.double()[..., None] * self.theta ** (-torch.arange(half).double() / half)
        matrices = torch.zeros(*positions.shape, head_dim, head_dim, dtype=torch.float64)
        for i in range(half):
            matrices[..., i, i] = matrices[..., i + half, i + half] = angles[..., i].cos()
            matrices[..., i + half, i] = angles[..., i].sin()
            matrices[..., i, i + half] = -angles[..., i].sin()
        return matrices

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        turned = self.matrices(positions, states.shape[-1])[:, None] @ states.double()[..., None]
        return turned.squeeze(-1).float()

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        turned = self.matrices(positions, states.shape[-1]).mT[:, None] @ states.double()[..., None]
        return turned.squeeze(-1).float()

    def mean_rotation(self, positions: Tensor) -> Tensor:
        return self.matrices(positions, self.head_dim).mean(1).float()

    head_dim: int = 8


@dataclass(frozen=True)
class Layer:
    """The queries, keys and values of one layer over a batch padded on the left."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    positions: Tensor
    output_weight: Tensor
    rotary: HalfRotary
    scaling: float = 0.3
    layer: int = 1

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            num_layers=LAYERS,
            layers=tuple(range(LAYERS)),
            kv_heads=self.keys.shape[1],
            query_heads=self.queries.shape[1],
            head_dim=self.keys.shape[3],
        )

    def chunk(self, start: int, end: int) -> Chunk:
        return Chunk(
            queries=self.queries[:, :, start:end],
            keys=self.keys[:, :, :end],
            valid=self.valid[:, :end],
            positions=self.positions[:, :end],
            offset=start,
            scaling=self.scaling,
            rotary=self.rotary,
        )

    def statistics(self, scorer: AbstractScorer, cuts: Iterable[int] = ()) -> Statistics:
        edges = [0, *cuts, self.keys.shape[2]]
        statistics: Statistics = {}
        for start, end in pairwise(edges):
            statistics = scorer.accumulate(statistics, self.chunk(start, end))
        return statistics

    def observe(self, scorer: AbstractScorer, cuts: Iterable[int] = (), keep: float = 0.5) -> Observation:
        first = max(0, self.keys.shape[2] - scorer.query_window)
        return Observation(
            shape=self.shape,
            layer=self.layer,
            keys=self.keys,
            values=self.values,
            queries=self.queries[:, :, first:],
            valid=self.valid,
            positions=self.positions,
            project=lambda: self.output_weight,
            scaling=self.scaling,
            rotary=self.rotary,
            statistics=self.statistics(scorer, cuts),
            totals=tuple(int(keep * n) * self.shape.num_heads for n in self.valid.sum(-1).tolist()),
        )

    def candidates(self, scorer: AbstractScorer) -> Tensor:
        """Tokens whose score counts: neither padding nor protected, [B, N]."""
        ranks = self.valid.cumsum(-1) - 1
        return self.valid & (ranks >= scorer.sink) & (ranks < self.valid.sum(-1, keepdim=True) - scorer.window)

    def row(self, index: int) -> "Layer":
        """One row of the batch alone, without its padding."""
        tokens = self.valid[index].nonzero().squeeze(-1)
        return replace(
            self,
            queries=self.queries[index : index + 1, :, tokens],
            keys=self.keys[index : index + 1, :, tokens],
            values=self.values[index : index + 1, :, tokens],
            valid=self.valid[index : index + 1, tokens],
            positions=self.positions[index : index + 1, tokens],
        )

    def permute(self, order: list[int]) -> "Layer":
        """The same layer with its KV heads, and the query heads of each, in another order."""
        group = self.queries.shape[1] // self.keys.shape[1]
        queries = [head * group + i for head in order for i in range(group)]
        return replace(
            self,
            queries=self.queries[:, queries],
            keys=self.keys[:, order],
            values=self.values[:, order],
            output_weight=self.output_weight[queries],
        )


def random_layer(
    lengths: tuple[int, ...] = (23, 14),
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 8,
    hidden: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """A layer whose padding is filled with NaN: whatever leaks from it shows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(lengths)
    valid = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    rotary = HalfRotary(head_dim=head_dim)

    def states(heads: int) -> Tensor:
        drift = torch.randn(1, heads, 1, head_dim, generator=generator)
        drawn = drift + torch.randn(len(lengths), heads, tokens, head_dim, generator=generator)
        return drawn.masked_fill(~valid[:, None, :, None], torch.nan)

    return Layer(
        queries=rotary.rotate(states(kv_heads * group), positions).to(dtype),
        keys=rotary.rotate(states(kv_heads), positions).to(dtype),
        values=states(kv_heads).to(dtype),
        valid=valid,
        positions=positions,
        output_weight=torch.randn(kv_heads * group, head_dim, hidden, generator=generator).to(dtype),
        rotary=rotary,
    )


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    return random_layer
