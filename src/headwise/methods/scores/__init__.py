"""Scorers: one method family per module. A scorer says which entries of a head matter; see headwise.interfaces."""

from headwise.methods.scores.expected import ExpectedAttention
from headwise.methods.scores.keys import KeyDiff, Knorm, Random, Streaming
from headwise.methods.scores.learned import LKVT, ShippedLKVT, learned_scorer
from headwise.methods.scores.reconstruct import CriticalKV, KVzip, KVzipL2
from headwise.methods.scores.window import H2O, TOVA, SnapKV

__all__ = [
    "H2O",
    "LKVT",
    "TOVA",
    "CriticalKV",
    "ExpectedAttention",
    "KVzip",
    "KVzipL2",
    "KeyDiff",
    "Knorm",
    "Random",
    "ShippedLKVT",
    "SnapKV",
    "Streaming",
    "learned_scorer",
]
