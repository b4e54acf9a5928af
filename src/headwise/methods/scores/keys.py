"""Scorers that need no queries: they read the keys (Knorm, KeyDiff) or nothing at all (Streaming, Random)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from headwise.interfaces import AbstractScorer, Observation, WhileReading


@dataclass(frozen=True, kw_only=True, slots=True)
class Knorm(AbstractScorer):
    """Small keys first: entries with a small key norm tend to receive much attention.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.

        s[j] = -||k_j||_2

    Differs: the authors leave the first layers whole; here every layer is scored, and the allocator decides.
    """

    while_reading: ClassVar[WhileReading] = "once"

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token by minus the norm of its key."""
        return -observation.keys.float().norm(dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyDiff(AbstractScorer):
    """Distinctive keys first: entries whose key points away from the average key.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", arXiv 2504.15364.

        s[j] = -cos(k_j, mean over tokens i of k_i / ||k_i||)

    Differs: the paper evicts block by block as the prompt comes in, with the mean of the keys still cached; we score
    once, with the mean over the whole context (padding excluded). With reading="evict" we do as the paper.
    """

    while_reading: ClassVar[WhileReading] = "anew"

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token by minus the cosine between its rotated key and the mean direction."""
        valid = observation.valid[:, None, :, None]
        directions = functional.normalize(observation.keys.float(), dim=-1)
        anchor = directions.masked_fill(~valid, 0.0).sum(2, keepdim=True)  # its length does not matter
        return -(directions * functional.normalize(anchor, dim=-1)).sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming(AbstractScorer):
    """The first tokens (attention sinks) and the most recent ones.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

        s[j] = j

    Differs: the paper renumbers the positions of what is kept; here kept keys stay where they were rotated to.
    """

    while_reading: ClassVar[WhileReading] = "once"

    @property
    def sink(self) -> int:
        """The first tokens draw attention whatever they say."""
        return 4

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Score every token by its distance from the first one of its row."""
        place = (observation.positions - observation.span[:, :1]).float()
        return place.unsqueeze(1).repeat(1, observation.keys.shape[1], 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Random(AbstractScorer):
    """Uniform random scores: the floor that every method must beat.

    They depend on the seed, the layer, the head and the row's own length only: not on the device, the number of
    threads, the padding or the other rows. Two rows of the same length therefore get the same scores.
    """

    seed: int = 0

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """Draw one score in [0, 1) for every head and valid token; padding gets 0."""
        valid = observation.valid.cpu()
        scores = torch.zeros(observation.keys.shape[:3], dtype=torch.float32, device="cpu")
        for row in range(len(valid)):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + observation.layer)
            drawn = torch.rand(
                scores.shape[1], int(valid[row].sum()), generator=generator, dtype=torch.float32, device="cpu"
            )
            scores[row][:, valid[row]] = drawn
        return scores.to(observation.keys.device)
