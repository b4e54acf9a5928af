"""What vLLM is told of us."""

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from headwise.serving import ARCHITECTURE
from headwise.serving.engine.checks import ServingConfig
from headwise.serving.engine.groups import TierManager, TierSpec


def register() -> None:
    """Our architecture, its configuration hook and its KV-cache groups."""
    KVCacheSpecRegistry._ensure_registered()  # the built-in kinds first: they are not added once any is there
    KVCacheSpecRegistry.register(TierSpec, TierManager, uniform_type_base_spec=TierSpec)
    ModelRegistry.register_model(ARCHITECTURE, "headwise.serving.engine.model:HeadwiseForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingConfig  # where vLLM looks for it; it has no function to add one
