"""Read and merge what `headwise eval --out DIR` has written: runs, their records, maps of kept tokens.

The first step of `headwise report`; statistics.py goes on from here. No torch: a report needs the files only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.bounded import MOST_BYTES, read_bytes
from headwise.report.draw import fields
from headwise.shapes import ModelShape

FORMAT = 1
FULL = "full"  # the method that keeps everything: the yardstick
ORACLE = "oracle"  # another yardstick: it has seen the questions and the answers
NO_METHODS = (FULL, ORACLE)
NATIVE = "native"  # entries in the model's dtype: those of all files that say nothing of them
RUN = "run.json"
LARGEST_MAP = 2**26  # tokens times heads; those that are written have 2048 tokens at most
RECORDS, MAPS = "records*.jsonl", "maps*.jsonl"  # one of each, but while several processes write


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One call of `headwise eval`: its model, tasks, methods and settings, and the machine."""

    model: str
    config_hash: str | None
    shape: ModelShape
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keeps: tuple[str, ...]
    entries: tuple[str, ...]
    protocol: str
    samples: int
    seed: int
    length: int | None
    dtype: str
    device: str
    hardware: str
    versions: Mapping[str, str]
    command: str
    started: str | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """One method at one keep on one sample, its entries stored in one way."""

    task: str
    index: int
    length: int
    method: str
    keep: str
    entries: str
    protocol: str
    seed: int
    score: float | None  # None where nothing is answered: of a perplexity task
    kl: float | None
    agreement: float | None
    nll: float | None  # nats per token
    context_tokens: int
    kv_bytes: int
    full_kv_bytes: int
    sliding_kv_bytes: int
    peak_kv_bytes: int
    prefill_seconds: float
    prefill_shared_by: int
    decode_seconds: float
    decode_rows: int
    step_ms: float | None
    kept: Float[np.ndarray, "layers kv_heads"]  # entries; means where a sample is read several times; NaN: not known
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenMap:
    """Which tokens of one context every head has kept."""

    task: str
    index: int
    method: str
    keep: str
    entries: str
    tokens: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]  # layer of the model, KV head
    kept: Bool[np.ndarray, "heads tokens"]


class Identity(NamedTuple):
    """Results can be compared if they share all of this."""

    model: str
    config_hash: str | None
    dtype: str
    protocol: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Section:
    """All that is known of one model under one protocol."""

    identity: Identity
    runs: tuple[Run, ...]
    records: tuple[Record, ...]
    maps: tuple[TokenMap, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Results:
    """Everything of all folders, by section. If a record occurs twice, the first one counts."""

    sections: tuple[Section, ...]
    duplicates: int  # records left out


@dataclass(slots=True, eq=False)
class _Merged:
    """A section while folders are read."""

    runs: list[Run] = field(default_factory=list)
    records: dict[tuple[Any, ...], Record] = field(default_factory=dict)
    maps: dict[tuple[Any, ...], TokenMap] = field(default_factory=dict)

    def add(self, run: Run, record: Record) -> bool:
        """Add a record, and return whether it is new."""
        if not self.runs or self.runs[-1] is not run:
            self.runs.append(run)
        key = (record.task, record.index, record.seed, record.length, record.method, record.keep, record.entries)
        return self.records.setdefault(key, record) is record

    def add_map(self, token_map: TokenMap) -> None:
        setting = token_map.method, token_map.keep, token_map.entries
        self.maps.setdefault((token_map.task, token_map.index, *setting, token_map.tokens), token_map)


def load(folders: Sequence[Path]) -> Results:
    """Read and merge folders. Raises BadInput if a file is missing, empty or damaged, naming file and line."""
    if not folders:
        raise BadInput("no folder is named; name some that 'headwise eval --out DIR' has written.")
    merged: dict[Identity, _Merged] = {}
    duplicates = 0
    for folder in dict.fromkeys(folders):
        run, empty = _run(folder), True
        for record in _records(folder, run):
            part = merged.setdefault(Identity(run.model, run.config_hash, run.dtype, record.protocol), _Merged())
            duplicates += not part.add(run, record)
            empty = False
        if empty:
            raise BadInput(f"{folder} holds no record: give 'headwise eval' time to write some, or leave it out.")
        identity = Identity(run.model, run.config_hash, run.dtype, run.protocol)
        for token_map in _maps(folder, run):
            merged.setdefault(identity, _Merged()).add_map(token_map)
    sections = [
        Section(
            identity=identity,
            runs=tuple(part.runs),
            records=tuple(part.records.values()),
            maps=tuple(part.maps.values()),
        )
        for identity, part in merged.items()
        if part.records
    ]
    return Results(sections=tuple(sections), duplicates=duplicates)


def _run(folder: Path) -> Run:
    path = folder / RUN
    try:
        raw = strict_json.loads(read_bytes(path, MOST_BYTES), values=False)
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise BadInput(f"{path}: {reason}; name folders that 'headwise eval --out DIR' has written.") from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); evaluate into a new folder.") from error
    if isinstance(raw, dict):
        if raw.get("format") != FORMAT:
            version = shown(raw.get("format"))
            raise BadInput(f"{path} is of format {version}, expected {FORMAT}: use the headwise that wrote it.")
        raw = {"started": None, "entries": [NATIVE], **raw}
    return Run(**strict_json.checked(raw, fields.RUN, str(path), fields.ADVICE))


def _records(folder: Path, run: Run) -> Iterator[Record]:
    expected = (len(run.shape.layers), run.shape.kv_heads)
    for place, raw in _lines(folder, RECORDS):
        values = strict_json.checked(raw, fields.RECORD, place, fields.ADVICE)
        if values["versions"] == run.versions:
            values["versions"] = run.versions  # one for thousands of records
        if not values["kept"].size:
            values["kept"] = np.full(expected, np.nan, dtype=np.float32)  # a short record
        record = Record(**values)
        if record.kept.shape != expected:
            raise BadInput(f"{place}: 'kept' has shape {record.kept.shape}; by {RUN} it must be {expected}.")
        if record.score is None and record.nll is None:
            raise BadInput(f"{place} has neither 'score' nor 'nll'; remove it, or evaluate into a new folder.")
        yield record


def _maps(folder: Path, run: Run) -> Iterator[TokenMap]:
    layers = run.shape.layers
    for place, raw in _lines(folder, MAPS):
        values = strict_json.checked(raw, fields.TOKEN_MAP, place, fields.ADVICE)
        by_head, tokens = values.pop("kept"), len(values["tokens"])
        if len(by_head) * tokens > LARGEST_MAP:
            raise BadInput(f"{place} maps {tokens} tokens of {len(by_head)} heads, which is no map; {fields.ADVICE}")
        kept = np.zeros((len(by_head), tokens), dtype=bool)
        for row, ((layer, head), indices) in zip(kept, by_head.items(), strict=True):
            if layer >= len(layers) or head >= run.shape.kv_heads or max(indices, default=-1) >= tokens:
                raise BadInput(f"{place}: head {layer},{head} is none of the model's, or keeps more than the context.")
            row[indices] = True
        heads = tuple((layers[layer], head) for layer, head in by_head)
        yield TokenMap(**values, heads=heads, kept=kept)


def _lines(folder: Path, names: str) -> Iterator[tuple[str, Any]]:
    """Yield place and content of every line, but for a last one that a killed run left half-written.

    Lines of earlier versions name no entries.
    """
    for path in sorted(folder.glob(names)):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                try:
                    content = strict_json.loads(line, values=False) if line.strip() else None
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        break
                    raise BadInput(
                        f"{place} is damaged ({error}); remove it, or evaluate into a new folder."
                    ) from error
                if content is not None:
                    yield place, {"entries": NATIVE, **content} if isinstance(content, dict) else content
