"""Attention of one layer: all its KV heads at once, each with the block table of its tier's KV-cache group.

vLLM sees every KV head as a layer of its own (`HeadCache`). All of them lie in one allocation, region after region, so
page `region * num_blocks + block` of the whole is a block of any head, and one call reads the pages of all heads.
"""

from collections.abc import Sequence
from typing import Any, cast

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
from headwise.serving.engine.step import GroupStep, Part, Steps, Views
from headwise.serving.tiers import Tiers


class HeadCache(AttentionLayerBase):
    """The KV cache of one KV head of one layer: what vLLM takes for a layer."""

    def __init__(self, name: str, head_dim: int, dtype: torch.dtype, keep: int, floor: int):
        self.layer_name = name
        self.head_dim, self.dtype, self.keep, self.floor = head_dim, dtype, keep, floor
        self.kv_cache = torch.tensor([])  # [blocks, 1, block, 2 D], once vLLM has bound it
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
        self._pool: Tensor | None = None
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
        pool, regions = self._bound()
        queries = query[:count].view(count, -1, self.head_dim)
        self._write(key[:count], value[:count], groups, pool, regions)
        attended = out[:count].view_as(queries)
        self._attend(attended, queries, step.now, [step.now_of(group) for group in groups])
        self.compactor.cut(self.layer, step, groups, queries, self.scaling, pool, regions)
        if step.after is not None:
            self._attend(attended, queries, step.after, [step.after_of(group) for group in groups])
        return out

    def _write(self, key: Tensor, value: Tensor, groups: Sequence[GroupStep], pool: Tensor, regions: Tensor) -> None:
        """Store the new tokens where vLLM says."""
        block, heads = pool.shape[1], len(self.heads)
        slots = torch.stack([group.common.slot_mapping[: len(key)] for group in groups], dim=1)  # [T, H]
        states = [x.view(len(key), heads, self.head_dim) for x in (key, value)]
        pool.view(-1, pool.shape[2])[slots + regions * block] = torch.cat(states, dim=-1).to(pool.dtype)

    def _attend(self, out: Tensor, queries: Tensor, part: Part, views: Sequence[Views]) -> None:
        pool, regions = self._bound()
        sequences = Sequences(
            tables=torch.stack([view.tables for view in views], dim=1) + regions[:, None],
            lengths=torch.stack([view.lengths for view in views], dim=1),
            query_starts=part.starts,
        )
        wanted = slice(None) if part.queries is None else part.queries
        attend = paged_attention(queries.device)
        out[wanted] = attend(queries[wanted], pool, sequences, self.scaling)

    def _bound(self) -> tuple[Tensor, Tensor]:
        """The whole pool [pages, block, 2 D], and the first page of every head's region [H]."""
        caches = [head.kv_cache for head in self.heads]
        if self._pool is None or self._pool.untyped_storage().data_ptr() != caches[0].untyped_storage().data_ptr():
            self._pool, regions = whole_pool(caches)
            self._regions = torch.tensor(regions, device=caches[0].device)
        assert self._regions is not None
        return self._pool, self._regions


def whole_pool(caches: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """One view of the allocation that all caches lie in, as pages, and the number of each cache's first page."""
    first = caches[0]
    block, width = first.shape[2:]
    page = block * width
    storage = first.untyped_storage()
    for cache in caches:
        shared = cache.untyped_storage().data_ptr() == storage.data_ptr()
        whole = cache.storage_offset() % page == 0 and cache[0].is_contiguous() and cache.stride(0) == page
        assert shared and whole, "the heads' KV caches are not regions of one allocation"
    pages = storage.nbytes() // first.element_size() // page
    pool = first.as_strided((pages, block, width), (page, width, 1), 0)
    return pool, [cache.storage_offset() // page for cache in caches]
