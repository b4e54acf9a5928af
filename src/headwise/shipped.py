"""Budgets and gates that come with headwise. They are found by their headers: no tensor is read to look for one.

    reference/budgets, reference/gates    of the bundled model
    ready/NAME                            of other models, one folder for each (docs/sharing.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from headwise.artifacts import Origin, describe

PLACES = ("reference/budgets", "reference/gates", "ready/*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """A file, and what it was made for."""

    path: Path
    kind: str
    origin: Origin


def shipped(
    kind: str, config_hash: str, scorer_parameters: Mapping[str, Any] | None = None
) -> tuple[Shipped, ...]:
    """The files of a kind for a model, by the hash of its configuration; of budgets those of one scorer if given."""
    return tuple(
        file
        for file in _all(Path(str(files("headwise"))))
        if file.kind == kind
        and file.origin.config_hash == config_hash
        and (scorer_parameters is None or dict(file.origin.scorer_parameters) == scorer_parameters)
    )


@lru_cache(maxsize=8)
def _all(root: Path) -> tuple[Shipped, ...]:
    paths = [path for place in PLACES for path in sorted(root.glob(f"{place}/*.safetensors"))]
    return tuple(_header(path) for path in paths)


def _header(path: Path) -> Shipped:
    record = describe(path)
    return Shipped(path=path, kind=record["kind"], origin=Origin.parse(record, path))
