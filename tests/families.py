"""Tiny random models that differ in what matters: on every one of them all invariants run. The census has all types."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["sliding_attention", "full_attention", "full_attention"]
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "phi3": lambda: Phi3Config(
        **COMMON,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        sliding_window=None,
    ),
    # As Phi-4-mini: a window longer than any sequence, which is none, and frequencies for short and long sequences.
    "phi4_mini": lambda: Phi3Config(
        **COMMON,
        original_max_position_embeddings=512,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 512,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
        sliding_window=2048,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **COMMON,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    # Soft-capped attention; attention sinks and experts; a gated linear attention in every other layer.
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        attn_logit_softcapping=5.0,
        layer_types=KINDS,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON,
        head_dim=16,
        sliding_window=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=KINDS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **COMMON,
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}
FAMILIES = sorted(CONFIGS)
WITH_EXPERTS = ("gpt_oss", "qwen3_next")  # PyTorch multiplies groups of matrices in no float64
WITHOUT_SDPA = ("gemma2", "gpt_oss")  # SDPA does neither soft caps nor sinks


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model; weights large enough that its attention is not uniform."""
    if family == "qwen3_next" and not hasattr(Cache, "has_previous_state"):
        pytest.skip("this version of transformers keeps linear attention in a cache of another kind; it is refused")
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    attention = "eager" if family in WITHOUT_SDPA else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_()
            elif weight.ndim == 2 and "norm" not in name:
                weight.normal_(std=2.0 * weight.shape[1] ** -0.5 if "proj" in name else 1.0)
    return model.to(dtype).eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids without special ones."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_ids(lengths):
    """Random contexts of these lengths, padded on the left, and their mask."""
    longest = max(lengths)
    ids, mask = random_ids(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask
