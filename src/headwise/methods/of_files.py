"""Scorers and allocators that are described by a file, or, without a path, by one that comes with headwise."""

from dataclasses import replace
from pathlib import Path

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import load_gates
from headwise.interfaces import AbstractAllocator, AbstractScorer
from headwise.methods import allocate, scores


def learned_scores(path: Path | None = None, source: str = "") -> AbstractScorer:
    """LKV-T of a file of gates."""
    return scores.ShippedLKVT() if path is None else scores.learned_scorer(load_gates(path, source))


def learned_budgets(path: Path | None = None, source: str = "") -> AbstractAllocator:
    """LKV-H of a file of gates."""
    return allocate.ShippedLKVH() if path is None else allocate.learned_budgets(load_gates(path, source))


def contest(path: Path | None = None, source: str = "") -> AbstractAllocator:
    """What suits the scores of a file of gates."""
    return allocate.ShippedContest() if path is None else allocate.contest(load_gates(path, source))


def solved(path: Path | None = None, source: str = "") -> AbstractAllocator:
    """LU-KV of a budget."""
    return allocate.ShippedLUKV() if path is None else allocate.LUKV(budget=_budget(path, source))


def fixed(path: Path, source: str = "") -> AbstractAllocator:
    """The fractions of a budget."""
    return allocate.Fixed(budget=_budget(path, source))


def _budget(path: Path, source: str) -> Budget:
    return replace(Budget.load(path), source=source)
