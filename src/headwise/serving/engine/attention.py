"""Attention of one layer: all its KV heads at once, each with the block table of its tier's KV-cache group.

vLLM sees every KV head as a layer of its own (`HeadCache`). All of them lie in one allocation, region after region, so
page `region * num_blocks + block` of the whole is a block of any head, and one call reads the pages of all heads.
"""

from collections.abc import Sequence
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend

from headwise.errors import UnsupportedModel
from headwise.kernels import paged_attention
from headwise.kernels.paged import Sequences
from headwise.serving.engine.backend import HeadBackend
from headwise.serving.engine.compaction import Compactor
from headwise.serving.engine.groups import TierSpec
from headwise.serving.engine.pool import Pool, whole
from headwise.serving.engine.step import GroupStep, Part, Steps, Views
from headwise.serving.tiers import Tiers


class HeadCache(AttentionLayerBase):
    """The KV cache of one KV head of one layer: what vLLM takes for a layer."""

    def __init__(self, name: str, head_dim: int, dtype: torch.dtype, keep: int, floor: int):
        self.layer_name = name
        self.head_dim, self.dtype, self.keep, self.floor = head_dim, dtype, keep, floor
        self.kv_cache = torch.tensor(
            [], dtype=torch.float32, device="cpu"
        )  # [blocks, 1, block, 2 D], once vLLM has bound it
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"there are two layers called {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Whatever --attention-backend says: no other can read single heads."""
        return HeadBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> TierSpec:
        """One head of its tier."""
        return TierSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_dim,
            dtype=self.dtype,
            keep=self.keep,
            floor=self.floor,
        )


class HeadwiseAttention(nn.Module):
    """What the model's attention calls in place of vLLM's: same arguments, same result."""

    has_sink = False

    def __init__(
        self,
        *,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        prefix: str,
        tiers: Tiers,
        compactor: Compactor,
        steps: Steps,
        cache_config: Any = None,
        quant_config: Any = None,
        logits_soft_cap: float | None = None,
        **others: Any,
    ):
        super().__init__()
        if logits_soft_cap or others:
            raise UnsupportedModel(
                f"headwise: attention with {'soft-capped logits' if logits_soft_cap else ', '.join(others)} cannot be "
                "compressed."
            )
        config = get_current_vllm_config()
        self.layer = extract_layer_index(prefix)
        self.head_dim, self.scaling, self.compactor, self.steps = head_size, scale, compactor, steps
        first = get_tensor_model_parallel_rank() * num_kv_heads
        keeps = tiers.keeps[self.layer][first : first + num_kv_heads]
        # The head's number in the model names its cache: two ranks must not call different heads the same.
        self.heads = [
            HeadCache(f"{prefix}.head{first + h}", head_size, config.model_config.dtype, keep, tiers.floor)
            for h, keep in enumerate(keeps)
        ]
        self._seen: ref[Tensor] | None = None  # the first head's cache, of which the regions are known
        self._regions: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, Hq * D], [T, H * D] twice -> [T, Hq * D]."""
        metadata = get_forward_context().attn_metadata
        out = torch.zeros_like(query)
        if metadata is None:  # vLLM measures the memory of a forward pass
            if self.layer == 0:
                self.compactor.rehearse(query)
            return out
        by_head = cast(dict[str, GroupStep], metadata)
        step = self.steps.of(by_head)
        count = step.num_queries
        if count == 0:
            return out
        groups = [by_head[head.layer_name] for head in self.heads]
        pool = self._bound()
        queries = query[:count].view(count, -1, self.head_dim)
        self._write(key[:count], value[:count], groups, pool)
        attended = out[:count].view_as(queries)
        self._attend(attended, queries, step.now, [step.now_of(group) for group in groups], pool)
        self.compactor.cut(self.layer, step, groups, queries, self.scaling, pool)
        if step.after is not None:
            self._attend(attended, queries, step.after, [step.after_of(group) for group in groups], pool)
        return out

    def _write(self, key: Tensor, value: Tensor, groups: Sequence[GroupStep], pool: Pool) -> None:
        """Store the new tokens where vLLM says."""
        slots = torch.stack([group.common.slot_mapping[: len(key)] for group in groups], dim=1)  # [T, H]
        states = [x.view(len(key), len(self.heads), self.head_dim) for x in (key, value)]
        pool.entries[slots + pool.regions * pool.block] = torch.cat(states, dim=-1).to(pool.entries.dtype)

    def _attend(self, out: Tensor, queries: Tensor, part: Part, views: Sequence[Views], pool: Pool) -> None:
        sequences = Sequences(
            tables=torch.stack([view.tables for view in views], dim=1) + pool.regions[:, None],
            lengths=torch.stack([view.lengths for view in views], dim=1),
            query_starts=part.starts,
        )
        wanted = slice(None) if part.queries is None else part.queries
        out[wanted] = paged_attention(queries.device)(queries[wanted], pool.pages, sequences, self.scaling)

    def _bound(self) -> Pool:
        """Of the caches at hand. vLLM may bind others, and give back the memory of those: we do not hold on to them."""
        first = self.heads[0].kv_cache
        if self._seen is None or self._seen() is not first:
            self._regions = Pool.of([head.kv_cache for head in self.heads]).regions
            self._seen = ref(first)
        assert self._regions is not None
        return Pool(pages=whole(first), regions=self._regions)
