"""How many entries every head keeps."""

from headwise.methods.allocate.fixed import Fixed
from headwise.methods.allocate.heuristic import AdaKV, Global, Pyramid, Uniform
from headwise.methods.allocate.learned import LKVH, ShippedContest, ShippedLKVH, contest, learned_budgets
from headwise.methods.allocate.profiled import LUKV, ShippedLUKV

__all__ = [
    "LKVH",
    "LUKV",
    "AdaKV",
    "Fixed",
    "Global",
    "Pyramid",
    "ShippedContest",
    "ShippedLKVH",
    "ShippedLUKV",
    "Uniform",
    "contest",
    "learned_budgets",
]
