"""How many entries every head keeps."""

from headwise.allocate.fixed import Fixed
from headwise.allocate.heuristic import AdaKV, Global, Pyramid, Uniform

__all__ = ["AdaKV", "Fixed", "Global", "Pyramid", "Uniform"]
