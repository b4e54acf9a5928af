"""The table of model types: what the census (recipes/model_families.py) has found for each, with which transformers."""

import json
from dataclasses import dataclass, field
from importlib.resources import files

UNTRIED = "the census cannot build a tiny one"
FILE = "families.json"  # beside this module


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A model type. `layers`, of the tiny model that was tried: how many are cut, and what the others are.

    `refused` says why a type is not supported; `without` why single methods do not work.
    """

    type: str
    supported: bool
    layers: str = ""
    methods: tuple[str, ...] = ()  # of those that were tried
    refused: str = ""
    without: dict[str, str] = field(default_factory=dict)

    @property
    def untried(self) -> bool:
        """Whether nothing is known, because no tiny model could be built."""
        return self.refused.startswith(UNTRIED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All model types of a version of transformers, and the methods that were tried on each."""

    transformers: str
    methods: tuple[str, ...]
    families: tuple[Row, ...]

    def row(self, kind: str) -> Row | None:
        """Of a model type; None for one that this version of transformers does not have."""
        return next((row for row in self.families if row.type == kind), None)


def table() -> Table:
    """What comes with headwise."""
    read = json.loads((files("headwise.models") / FILE).read_text(encoding="utf-8"))
    rows = tuple(Row(**{**row, "methods": tuple(row["methods"])}) for row in read["families"])
    return Table(transformers=read["transformers"], methods=tuple(read["methods"]), families=rows)
