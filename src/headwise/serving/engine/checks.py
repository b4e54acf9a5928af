"""The configuration hook of our architecture: where an engine starts, settings become tiers, or an error of ours."""

from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from headwise.errors import BadInput, HeadwiseError
from headwise.serving.settings import Served, Settings
from headwise.serving.tiers import Tiers

# vLLM hands the prompts' lengths to attention backends of models that have this window; no token is beyond it.
UNLIMITED = 1 << 30
REFUSED = (
    # (what is found in vLLM's configuration, what it is, why not, what to do)
    (
        lambda c: c.cache_config.enable_prefix_caching,
        "prefix caching",
        "prompts share blocks by it, and compression rewrites and frees a prompt's blocks",
        "--no-enable-prefix-caching",
    ),
    (
        lambda c: c.speculative_config is not None,
        "speculative decoding",
        "rejected tokens would have to be taken back",
        "no --speculative-config",
    ),
    (
        lambda c: c.kv_transfer_config is not None or c.cache_config.kv_offloading_size is not None,
        "a KV connector or KV offloading",
        "it moves blocks as the tokens they were written for, and compressed blocks hold others",
        "no --kv-transfer-config and no --kv-offloading-size",
    ),
    (
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1 or c.parallel_config.prefill_context_parallel_size > 1
        ),
        "context parallelism",
        "a head's entries must be in one place to be compared",
        "--tensor-parallel-size instead",
    ),
    (
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "pipeline parallelism",
        "it was not tested",
        "--tensor-parallel-size instead",
    ),
    (
        lambda c: c.model_config.get_total_num_kv_heads() % c.parallel_config.tensor_parallel_size != 0,
        "more ranks than KV heads, or a number that does not divide them",
        "every rank needs whole heads of its own",
        "a --tensor-parallel-size that divides the model's KV heads",
    ),
    (
        lambda c: c.parallel_config.use_ubatching,
        "dual-batch overlap",
        "it was not tested",
        "no --enable-dbo",
    ),
    (
        lambda c: c.scheduler_config.disable_hybrid_kv_cache_manager,
        "one KV-cache group for all layers",
        "tiers of heads are groups",
        "no --disable-hybrid-kv-cache-manager",
    ),
    (
        lambda c: c.cache_config.cache_dtype not in ("auto", str(c.model_config.dtype).removeprefix("torch.")),
        "a KV cache of another precision than the model's",
        "our kernels read keys and values as they were computed",
        "--kv-cache-dtype auto",
    ),
)


class ServingConfig(VerifyAndUpdateConfig):
    """What vLLM calls for models of our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Have vLLM tell attention the prompts' lengths, and run eagerly."""
        model_config.hf_config.rswa_window = UNLIMITED
        model_config.model_arch_config = model_config.get_model_arch_config()
        if not model_config.enforce_eager:
            init_logger(__name__).warning("headwise runs without torch.compile and CUDA graphs, as --enforce-eager.")
            model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot work; solve the tiers and keep them in the model's configuration, which is everywhere."""
        for is_set, what, why, instead in REFUSED:
            if is_set(vllm_config):
                raise BadInput(f"headwise: {what} cannot be used: {why}. Use {instead}.")
        model_config, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
        config = model_config.hf_config
        try:
            settings = Settings.parse(getattr(config, "headwise", None))
            tiers = Served.of(settings, config, model_config.max_model_len, ranks).tiers
        except HeadwiseError as error:  # among vLLM's own messages, ours say who speaks
            raise type(error)(f"headwise: {error}") from error
        config.headwise_tiers = {"keeps": [list(row) for row in tiers.keeps], "floor": tiers.floor}


def settings_of(config: Any) -> Settings:
    """From a configuration that went through the hook."""
    return Settings.parse(config.headwise)


def tiers_of(config: Any) -> Tiers:
    """From a configuration that went through the hook."""
    tiers = config.headwise_tiers
    return Tiers(keeps=tuple(tuple(row) for row in tiers["keeps"]), floor=tiers["floor"])
