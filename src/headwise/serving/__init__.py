"""Serving with vLLM: head budgets as KV-cache groups, in vLLM as it is released.

    tiers       head budgets rounded to tiers, and the one formula for freed blocks
    settings    what a server is told, and what follows for a model
    offline     the same for `headwise.compress`: what a server would keep
    engine/     the plugin: what vLLM loads (the only modules that import it)

>>> from vllm import LLM
>>> llm = LLM("meta-llama/Llama-3.1-8B-Instruct", **headwise.serving.vllm_arguments("keydiff+lukv@FILE", keep=0.2))
"""

import json
import shlex
from typing import Any

from headwise.serving.offline import equivalent
from headwise.serving.settings import Served, Settings
from headwise.serving.tiers import Tiers, freed_blocks, quantise

ARCHITECTURE = "HeadwiseForCausalLM"

__all__ = [
    "ARCHITECTURE",
    "Served",
    "Settings",
    "Tiers",
    "command",
    "equivalent",
    "freed_blocks",
    "quantise",
    "vllm_arguments",
]


def vllm_arguments(
    method: str,
    *,
    keep: float | str,
    tiers: int = 8,
    context: int | None = None,
    ranks: int | None = None,
) -> dict[str, Any]:
    """Arguments for `vllm.LLM` (and, as options, for `vllm serve`) that make it compress. See `Settings`.

    Raises BadInput for what cannot be served.
    """
    settings = Settings(method=method, keep=keep, tiers=tiers, context=context, ranks=ranks)
    return {
        "hf_overrides": {"architectures": [ARCHITECTURE], "headwise": settings.as_json()},
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }


def command(model: str, settings: Settings, block_size: int | None = None) -> str:
    """The command that serves a model so, for a shell."""
    overrides = {"architectures": [ARCHITECTURE], "headwise": settings.as_json()}
    words = ["vllm", "serve", model, "--no-enable-prefix-caching", "--enforce-eager"]
    words += [] if block_size is None else ["--block-size", str(block_size)]
    return shlex.join([*words, "--hf-overrides", json.dumps(overrides)])
