"""headwise: head-wise KV-cache eviction for Hugging Face language models, with memory that is really freed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.artifacts.budget import Budget as Budget
    from headwise.cache.cache import RaggedCache as RaggedCache
    from headwise.cache.cache import load as load
    from headwise.cache.compress import compress as compress
    from headwise.errors import HeadwiseError as HeadwiseError
    from headwise.methods.method import Method as Method
    from headwise.models.attention import enable as enable
    from headwise.tasks.document import prompt as prompt

__version__ = "0.1.0"

_HOME = {
    "Budget": "headwise.artifacts.budget",
    "HeadwiseError": "headwise.errors",
    "Method": "headwise.methods.method",
    "RaggedCache": "headwise.cache.cache",
    "compress": "headwise.cache.compress",
    "enable": "headwise.models.attention",
    "load": "headwise.cache.cache",
    "prompt": "headwise.tasks.document",
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
