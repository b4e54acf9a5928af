"""How many entries every head keeps."""

from headwise.allocate.fixed import Fixed
from headwise.allocate.heuristic import AdaKV, Global, Pyramid, Uniform
from headwise.allocate.profiled import LUKV, ShippedLUKV

__all__ = ["LUKV", "AdaKV", "Fixed", "Global", "Pyramid", "ShippedLUKV", "Uniform"]
