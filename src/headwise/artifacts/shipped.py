"""Budgets and gates that come with headwise. They are found by their headers: no tensor is read to look for one.

reference/budgets, reference/gates    of the bundled model
ready/NAME                            of other models, one folder for each (docs/sharing.md)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from headwise.artifacts.origin import Origin
from headwise.artifacts.tensors import describe
from headwise.errors import ArtifactMismatch, BadInput

PLACES = ("reference/budgets", "reference/gates", "ready/*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """A file, and what it was made for."""

    path: Path
    kind: str
    origin: Origin


def shipped(kind: str, config_hash: str, scorer_parameters: Mapping[str, Any] | None = None) -> tuple[Shipped, ...]:
    """The files of a kind for a model, by the hash of its configuration; of budgets those of one scorer."""
    return fitting(_all(Path(str(files("headwise")))), kind, config_hash, scorer_parameters)


def fitting(
    files: Iterable[Shipped], kind: str, config_hash: str, scorer_parameters: Mapping[str, Any] | None = None
) -> tuple[Shipped, ...]:
    """Those among files."""
    return tuple(
        file
        for file in files
        if file.kind == kind
        and file.origin.config_hash == config_hash
        and (scorer_parameters is None or dict(file.origin.scorer_parameters) == scorer_parameters)
    )


def read_headers(folder: Path) -> tuple[Shipped, ...]:
    """The budgets and gates in a folder; other files are passed over. Raises BadInput where there is no folder."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}.")
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            files.append(_header(path))
        except (BadInput, ArtifactMismatch):  # a model's weights, a saved cache
            continue
    return tuple(file for file in files if file.kind in ("budget", "gates"))


@lru_cache(maxsize=8)
def _all(root: Path) -> tuple[Shipped, ...]:
    paths = [path for place in PLACES for path in sorted(root.glob(f"{place}/*.safetensors"))]
    return tuple(_header(path) for path in paths)


def _header(path: Path) -> Shipped:
    record = describe(path)
    return Shipped(path=path, kind=record["kind"], origin=Origin.parse(record, path))
