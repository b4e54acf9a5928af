"""The model that is served: Hugging Face's code, vLLM's layers, our attention."""

from dataclasses import replace
from functools import partial
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.transformers import TransformersForCausalLM

from headwise.models.families import ModelRotary
from headwise.serving.engine.attention import HeadwiseAttention
from headwise.serving.engine.checks import settings_of, tiers_of
from headwise.serving.engine.compaction import Compactor
from headwise.serving.engine.step import Steps
from headwise.serving.settings import resolved


class HeadwiseForCausalLM(TransformersForCausalLM):
    """Any causal model that headwise supports, compressed as its configuration says."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        method, shape = resolved(settings_of(config), config)
        ranks, rank = parallel.tensor_parallel_size, get_tensor_model_parallel_rank()
        local = replace(shape, kv_heads=shape.kv_heads // ranks, query_heads=shape.query_heads // ranks)
        heads = slice(rank * local.kv_heads, (rank + 1) * local.kv_heads)
        method = replace(method, scorer=method.scorer.of_heads(heads))
        longest = vllm_config.model_config.max_model_len
        self._attention = {
            "tiers": tiers_of(config),
            "steps": Steps(),
            "compactor": Compactor(method, local, self._rotary, vllm_config.scheduler_config.max_num_seqs, longest),
        }
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _get_attn_cls(self) -> Any:
        """What vLLM makes for every attention of the model."""
        return partial(HeadwiseAttention, **self._attention)

    def _rotary(self) -> ModelRotary:
        """The rotary embedding of the latest forward pass."""
        decoder = cast(Any, self.model).get_decoder()
        return ModelRotary(
            frequencies=decoder.rotary_emb.inv_freq.detach().float().clone(),
            attention_scaling=float(decoder.rotary_emb.attention_scaling),
            head_dim=self.model_config.get_head_size(),
        )
