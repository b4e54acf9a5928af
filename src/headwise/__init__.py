"""headwise: head-wise KV-cache eviction for Hugging Face language models, with memory that is really freed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.artifacts import Budget as Budget
    from headwise.errors import HeadwiseError as HeadwiseError
    from headwise.evals.document import prompt as prompt
    from headwise.hf.attention import enable as enable
    from headwise.method import Method as Method
    from headwise.online import compress as compress
    from headwise.ragged.cache import RaggedCache as RaggedCache
    from headwise.ragged.store import load as load

__version__ = "0.1.0"

_HOME = {
    "Budget": "headwise.artifacts",
    "HeadwiseError": "headwise.errors",
    "Method": "headwise.method",
    "RaggedCache": "headwise.ragged.cache",
    "compress": "headwise.online",
    "enable": "headwise.hf.attention",
    "load": "headwise.ragged.store",
    "prompt": "headwise.evals.document",
}
__all__ = [
    "Budget",
    "HeadwiseError",
    "Method",
    "RaggedCache",
    "__version__",
    "compress",
    "enable",
    "load",
    "prompt",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import headwise` is instant and changes nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
