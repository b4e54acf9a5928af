"""The entry point: vLLM calls `register` in every process it starts. Nothing changes for models that are not ours."""

import vllm
from vllm.logger import init_logger

TESTED = "0.32"


def register() -> None:
    """Make vLLM know our architecture, its configuration and its KV-cache groups. May be called again.

    With another vLLM than the one that was tested it says so and does nothing: what we build on is not all public.
    """
    if not vllm.__version__.startswith(f"{TESTED}."):
        init_logger("vllm.headwise").warning(
            "headwise was tested with vLLM %s, and this is %s: it is not there. Install 'headwise[vllm]' to use it.",
            TESTED,
            vllm.__version__,
        )
        return
    from headwise.serving.engine import registration

    registration.register()
