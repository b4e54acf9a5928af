"""How many entries every head keeps."""

from headwise.allocate.fixed import Fixed
from headwise.allocate.heuristic import AdaKV, Global, Pyramid, Uniform
from headwise.allocate.learned import LKVH, ShippedLKVH, learned_budgets
from headwise.allocate.profiled import LUKV, ShippedLUKV

__all__ = [
    "LKVH",
    "LUKV",
    "AdaKV",
    "Fixed",
    "Global",
    "Pyramid",
    "ShippedLKVH",
    "ShippedLUKV",
    "Uniform",
    "learned_budgets",
]
