"""headwise: head-wise KV-cache eviction for Hugging Face language models, with memory that is really freed.

Public are the names in `__all__`, what the documentation imports from the modules in PUBLIC, the command line, and file
formats. Everything else may move.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.artifacts.budget import Budget as Budget
    from headwise.artifacts.gates import Gates as Gates
    from headwise.artifacts.profile import Profile as Profile
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
    "Gates": "headwise.artifacts.gates",
    "HeadwiseError": "headwise.errors",
    "Method": "headwise.methods.method",
    "Profile": "headwise.artifacts.profile",
    "RaggedCache": "headwise.cache.cache",
    "compress": "headwise.cache.compress",
    "enable": "headwise.models.attention",
    "load": "headwise.cache.cache",
    "prompt": "headwise.tasks.document",
}
__all__ = [
    "Budget",
    "Gates",
    "HeadwiseError",
    "Method",
    "Profile",
    "RaggedCache",
    "__version__",
    "compress",
    "enable",
    "load",
    "prompt",
]

PUBLIC = (
    "headwise.errors",
    "headwise.evals.compare",
    "headwise.evals.lm_eval",
    "headwise.evals.run",
    "headwise.interfaces",
    "headwise.kernels.arguments",
    "headwise.kernels.segments",
    "headwise.methods.allocate",
    "headwise.methods.allocate.apportion",
    "headwise.methods.keep",
    "headwise.methods.method",
    "headwise.methods.scores",
    "headwise.models.families",
    "headwise.models.loading",
    "headwise.models.plan",
    "headwise.offline.calibration",
    "headwise.offline.profile",
    "headwise.offline.solve",
    "headwise.offline.train.loop",
    "headwise.offline.train.run",
    "headwise.serving",
    "headwise.tasks.document",
    "headwise.tasks.suites",
    "headwise.tasks.task",
)


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import headwise` is instant and changes nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
