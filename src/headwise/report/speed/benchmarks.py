"""Read what `headwise bench ... --json` has written: rows, by benchmark and machine.

The first step of `headwise report` of such files; curves.py and speed.py go on from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.bounded import MOST_BYTES, read_bytes
from headwise.files.strict_json import checked
from headwise.report.draw.fields import BENCHMARKS

Row = dict[str, Any]  # fields.BENCHMARKS says of what
ADVICE = "measure again."
NATIVE = "native"  # entries in the model's dtype: those of rows that do not say how they are stored, too
TITLES = {
    "decode": "A decoding step of one layer",
    "prefill": "Reading a context",
    "generate": "Reading a context and decoding",
    "memory": "Memory while reading and decoding",
}
# What older files lack, or files of other versions.
_MODEL: Row = dict.fromkeys(("attention_ms", "logits_error", "rel_error", "plain_error", "entries"))
DEFAULTS: Mapping[str, Row] = {
    "decode": {"skewed": True, "entries": None, "kv_bytes": None},
    "prefill": dict.fromkeys(("ours_share", "kv_bytes", "logits_error")),
    "generate": _MODEL,
    "memory": _MODEL,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One benchmark on one machine. Its rows can be compared."""

    benchmark: str
    hardware: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """A name that no other section has."""
        return f"{TITLES[self.benchmark]}: {self.hardware}"

    @property
    def versions(self) -> list[str]:
        """All versions that were used."""
        return list(dict.fromkeys(versions_text(row) for row in self.rows))

    @property
    def commands(self) -> list[str]:
        """All commands that were run."""
        return list(dict.fromkeys(row["command"] for row in self.rows))


def versions_text(row: Row) -> str:
    """Return the versions of a row in one line."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items())


def load(files: Sequence[Path]) -> list[Section]:
    """Read files. Raises BadInput if one is missing, empty or damaged, naming file and row."""
    rows_by_section: dict[tuple[str, str], list[Row]] = {}
    for path in dict.fromkeys(files):
        for row in _rows(path):
            rows_by_section.setdefault((row["benchmark"], row["hardware"]), []).append(row)
    return [
        Section(benchmark=name, hardware=where, rows=tuple(rows)) for (name, where), rows in rows_by_section.items()
    ]


def _rows(path: Path) -> list[Row]:
    expected = "name files that 'headwise bench ... --json' has written, or folders of 'headwise eval --out DIR'."
    try:
        raw = strict_json.loads(read_bytes(path, MOST_BYTES), values=False)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or 'unreadable'}; {expected}") from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); {ADVICE}") from error
    if not isinstance(raw, list) or not raw:
        raise BadInput(f"{path} holds no list of rows; {expected}")
    return [_row(row, f"{path}, row {number}") for number, row in enumerate(raw, start=1)]


def _row(raw: Any, place: str) -> Row:
    if isinstance(raw, dict):
        raw = {"benchmark": "decode", **raw}  # once the only one
    benchmark = checked(raw, {"benchmark": _benchmark_name}, place, ADVICE)["benchmark"]
    return checked({**DEFAULTS[benchmark], **raw}, BENCHMARKS[benchmark], place, ADVICE)


def _benchmark_name(benchmark: Any) -> str:
    if strict_json.text(benchmark) not in BENCHMARKS:
        raise ValueError
    return benchmark
