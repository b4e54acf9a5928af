"""What the hub's config.json of two models says (facts), and what transformers reads out of GGUF files of the same."""

import numpy as np

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN_CODER = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
READ_OUT = ("hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads")
READ_OUT += ("num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings")


def from_gguf(config):
    """What transformers makes of a GGUF file's metadata, whose real numbers are float32.

    It reads the size of a head for Llama alone; the publisher of Qwen's file wrote the embeddings twice.
    """
    noisy = {name: float(np.float32(config[name])) for name in ("rms_norm_eps", "rope_theta")}
    only = {"head_dim": 64} if config["model_type"] == "llama" else {"tie_word_embeddings": False}
    return {**{name: config[name] for name in READ_OUT}, **noisy, **only, "_model_name_or_path": "A B C"}
