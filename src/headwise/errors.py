"""Every exception headwise raises on purpose.

    HeadwiseError
    ├── BadInput (ValueError)             a wrong argument: what was found, what would work
    │   └── ShapeMismatch                 tensors or caches whose sizes do not fit together
    ├── BudgetInfeasible (ValueError)     `keep` cannot be met: below the floors
    ├── UnsupportedModel                  a model family or attention layout we cannot compress
    ├── UnsupportedGeneration             a generation mode or cache operation that cannot work on a ragged cache
    ├── ArtifactMismatch                  a saved file made for another model, shape or format
    ├── NonFiniteValues (ArithmeticError) NaN or infinity in keys, values or scores
    ├── WriteFailed (OSError)             the system failed while a file was written: a full disk, a limit
    └── KernelUnavailable                 a kernel that was asked for cannot be built or run here

Messages say what was found, what was expected and what to do next.
"""


class HeadwiseError(Exception):
    """Base of all headwise errors."""


class BadInput(HeadwiseError, ValueError):
    """An argument is wrong."""


class ShapeMismatch(BadInput):
    """Sizes do not fit together."""


class BudgetInfeasible(HeadwiseError, ValueError):
    """The asked `keep` is below what the method must keep."""


class UnsupportedModel(HeadwiseError):
    """The model cannot be compressed."""


class UnsupportedGeneration(HeadwiseError):
    """The operation cannot work on a ragged cache."""


class ArtifactMismatch(HeadwiseError):
    """A file was made for something else."""


class NonFiniteValues(HeadwiseError, ArithmeticError):
    """NaN or infinity where finite numbers are needed."""


class WriteFailed(HeadwiseError, OSError):
    """The system failed while a file was written."""


class KernelUnavailable(HeadwiseError):
    """The kernel cannot be built or run on this machine."""
