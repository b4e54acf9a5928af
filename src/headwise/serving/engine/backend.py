"""What vLLM asks of an attention backend. Ours computes nothing by itself: `attention` does a whole layer at once."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from headwise.serving.engine.groups import TierSpec
from headwise.serving.engine.step import GroupStep


class HeadBackend(AttentionBackend):
    """A KV cache of one head in blocks of any size; keys and values of an entry side by side."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows for backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Never made."""
        return AttentionImpl

    @staticmethod
    def get_builder_cls() -> type["StepBuilder"]:
        """What is told of every step."""
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """Any: blocks are never split."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Region after region, one for every head of a group, each of all blocks."""
        return (KVCacheLayout.LBHNC,)


class StepBuilder(AttentionMetadataBuilder[GroupStep]):
    """Hands on what vLLM says of a step; `step` makes sense of it once for all groups."""

    def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> GroupStep:
        """Of one group."""
        assert isinstance(self.kv_cache_spec, TierSpec)
        return GroupStep(spec=self.kv_cache_spec, common=common_attn_metadata)
