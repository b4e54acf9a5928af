"""The folder of an evaluation: one record per sample, method, keep and entries. A killed run goes on from it.

    OUT/run.json        what was run: model, methods, keeps, tasks, seed, hardware, versions, command
    OUT/records.jsonl   the records; while several processes write, OUT/records.RANK.jsonl until all are done
    OUT/maps.jsonl      which tokens the heads kept, for the first sample of every task; none of short records

A killed run, started again with the same --out, repeats no sample and loses none: the last one is dropped if it is not
complete. Methods, keeps, entries, tasks and samples may be added to a folder; a model, seed, length, protocol or
reading of its own needs another. A folder may be moved and continued on another machine: what counts are the model's
weights, and that a method is still what it was. One run at a time: `locked` keeps a second one out. Lines are JSON in
ASCII, and only a line feed ends them. Imports no torch.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from headwise.errors import BadInput
from headwise.files.locks import SUFFIX, locked
from headwise.files.writing import append, left_of, reason, remove, require_file, require_folder, write_bytes

FORMAT = 1
NATIVE = "native"  # entries: those of all records that say nothing of them
_READ = {"reading": "exact", "prefill_chunk_size": None}  # as in all folders that do not say it
RUN, RECORDS, MAPS = "run.json", "records.jsonl", "maps.jsonl"
_MUST_AGREE = ("format", "config_hash", "dtype", "protocol", "seed", "length", "fidelity", *_READ)
_MAY_GROW = ("tasks", "methods", "keeps", "entries", "samples")
_OUR_FILES = re.compile(r"run\.json|(records|maps)(\.\d+)?\.jsonl")
Unit = tuple[str, int]  # a task and the index of a sample
Setting = tuple[str, str, str]  # a method, a keep and entries


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One method at one keep on one sample, its entries stored in one way. Bytes are of keys and values.

    `kept` are entries per layer and head. `score` is the mean over questions, None where nothing is answered. `kl`
    (nats), `agreement` (share of tokens with the same first choice) and `nll` (nats) are of what the full cache
    answered, see fidelity.py. `sees_answers` is True for the oracle only, which was shown the questions and their
    answers.
    """

    task: str
    index: int
    length: int
    method: str
    keep: str
    entries: str = NATIVE
    protocol: str
    seed: int
    predictions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    scores: tuple[float, ...]
    score: float | None
    kl: float | None
    agreement: float | None
    nll: float | None
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
    kept: tuple[tuple[float, ...], ...]
    versions: dict[str, str]
    sees_answers: bool = False

    @property
    def unit(self) -> Unit:
        """The sample that it is of."""
        return self.task, self.index

    @property
    def setting(self) -> Setting:
        """Method, keep and entries."""
        return self.method, self.keep, self.entries

    @property
    def key(self) -> tuple[Unit, str, str, str]:
        """Sample and setting, of which a folder holds one record."""
        return self.unit, *self.setting

    def shortened(self) -> "Record":
        """Return the record without answers, with six digits, and with counts only if it is a task's first sample."""
        fields = {name: _rounded(value) for name, value in asdict(self).items() if name != "versions"}
        return replace(self, **{**fields, "answers": (), "kept": fields["kept"] if self.index == 0 else ()})


def records_in(file: Path) -> list[Record]:
    """Read the records of a file of lines. Raises BadInput if a line is damaged."""
    return [_record(line, f"{file}, line {number}") for number, line in enumerate(_lines(file), start=1)]


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


def require_place(path: str | os.PathLike[str]) -> None:
    """Raise BadInput unless `path` is a folder of an evaluation, or one can be made there."""
    folder = Path(path)
    require_folder(folder)
    if not folder.is_dir():
        return
    for name in (RUN, RECORDS, MAPS):
        require_file(folder / name)
    try:
        entries = [*folder.iterdir()]
    except OSError as error:
        raise BadInput(f"cannot read {folder}: {reason(error)}. Name another folder with --out.") from error
    foreign = [path.name for path in entries if path.name != SUFFIX and not _is_leftover(path.name)]
    if foreign and not (folder / RUN).is_file():
        raise BadInput(f"{folder} holds other files and no {RUN}; name a new or empty folder with --out.")


def _is_leftover(name: str) -> bool:
    """Return whether a killed process was writing the file or folder of this name, perhaps an older headwise."""
    goal = left_of(name) or (name.removesuffix(".new") if name.endswith(".new") else "")
    return _OUR_FILES.fullmatch(goal) is not None


class RunFolder:
    """The folder of an evaluation. Raises BadInput if it cannot be written, or holds another evaluation."""

    def __init__(self, path: str | os.PathLike[str], manifest: dict[str, Any], *, rank: int | None = None):
        self.path, self.part = Path(path), "" if rank is None else f".{rank}"
        self.manifest = {"format": FORMAT, **manifest}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it. Raises BadInput if one is at work there."""
        self._make()
        with locked(self.path / SUFFIX, self.path):
            yield

    def open(self) -> None:
        """Make or check the folder, write run.json, and merge what processes of a killed run left.

        The caller must hold `locked`.
        """
        self._make()
        earlier = self._earlier_manifest()
        grown = self._merged_manifest(earlier)
        self._clear()
        if earlier is not None:
            latest = [(*setting, NATIVE)[:3] for setting in earlier["latest"]]  # of older runs without entries
            self._drop_unfinished(latest)
            self._drop_maps()
        self.manifest = grown
        _write(self.path / RUN, [json.dumps(self.manifest, indent=1) + "\n"])
        self.merge()

    def records(self) -> list[Record]:
        """Read everything that was written so far, each once. Raises BadInput if a line is damaged."""
        return list({record.key: record for file in self._files() for record in records_in(file)}.values())

    def append(self, records: Sequence[Record], maps: Sequence[dict[str, Any]] = ()) -> None:
        """Append the maps and records of one sample. Raises WriteFailed.

        Records come last: a sample that has them has everything.
        """
        for name, lines in (("maps", [*map(json.dumps, maps)]), ("records", [*map(_line, records)])):
            if lines:
                append(self.path / f"{name}{self.part}.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def merge(self) -> None:
        """Write one file of what all processes wrote, in the order of tasks and samples."""
        order = {task: place for place, task in enumerate(self.manifest["tasks"])}
        parts = [*self.path.glob("records.*.jsonl"), *self.path.glob("maps.*.jsonl")]
        if not parts:
            return
        records = sorted(self.records(), key=lambda r: (order.get(r.task, len(order)), r.index))
        _write(self.path / RECORDS, [_line(record) + "\n" for record in records])
        maps = [line for file in sorted(self.path.glob("maps*.jsonl")) for line in _lines(file)]
        _write(self.path / MAPS, dict.fromkeys(maps))
        for part in parts:
            remove(part)

    def _make(self) -> None:
        require_place(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write to {self.path}: {reason(error)}. Name a folder with --out.") from error

    def _clear(self) -> None:
        """Remove what killed processes were writing."""
        for file in self.path.iterdir():
            if _is_leftover(file.name):
                remove(file)

    def _drop_maps(self) -> None:
        """Drop maps without a record: a run was killed before it wrote that, and what it measures again has them."""
        keys = {record.key for record in self.records()}
        for file in self.path.glob("maps*.jsonl"):
            lines = [(line, f"{file}, line {number}") for number, line in enumerate(_lines(file), start=1)]
            _write(file, dict.fromkeys(line for line, where in lines if _key_of_map(line, where) in keys))

    def _drop_unfinished(self, settings: Iterable[tuple[str, ...]]) -> None:
        """Drop the sample that a killed run was writing, unless all of these settings have a record.

        A record that is there twice, because two older processes shared a folder, stays once.
        """
        wanted, records, written = set(settings), self.records(), set[Any]()
        for file in self._files():
            lines = list(zip(_lines(file), records_in(file), strict=True))
            last = lines[-1][1].unit if lines else None
            complete = wanted <= {record.setting for record in records if record.unit == last}
            while not complete and lines and lines[-1][1].unit == last and lines[-1][1].setting in wanted:
                lines.pop()
            kept = [(line, record.key) for line, record in lines if record.key not in written]
            once = {key: line for line, key in reversed(kept)}
            written |= once.keys()
            _write(file, reversed(once.values()))

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("records*.jsonl"))

    def _earlier_manifest(self) -> dict[str, Any] | None:
        file = self.path / RUN
        if not file.is_file():
            return None
        try:
            earlier = {"entries": [NATIVE], **_READ, **json.loads(_content(file).decode())}
            return {name: earlier[name] for name in ("latest", *_MAY_GROW)} | earlier
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{file} is damaged: {error}. Name another folder with --out.") from error

    def _merged_manifest(self, earlier: dict[str, Any] | None) -> dict[str, Any]:
        """Return what was run here before and now. Raises BadInput if the two are not one evaluation."""
        if earlier is None:
            return self.manifest
        self._require_same_model(earlier)
        self._require_same_methods(earlier)
        for name in _MUST_AGREE:
            if earlier.get(name) != (_READ | self.manifest)[name]:
                raise BadInput(
                    f"{self.path} holds an evaluation with {name}={earlier.get(name)!r}, this one has "
                    f"{(_READ | self.manifest)[name]!r}: name another folder with --out."
                )
        grown = self.manifest | {"made_of": earlier.get("made_of", {}) | self.manifest.get("made_of", {})}
        for name in _MAY_GROW:
            old, new = earlier[name], grown[name]
            grown[name] = max(old, new) if name == "samples" else list(dict.fromkeys([*old, *new]))
        return grown

    def _require_same_model(self, earlier: dict[str, Any]) -> None:
        """Compare the weights, or the name where an older headwise has not noted the weights."""
        name = "weights" if "weights" in earlier and "weights" in self.manifest else "model"
        if earlier.get(name) != self.manifest[name]:
            raise BadInput(
                f"{self.path} holds an evaluation with {name}={earlier.get(name)!r}, this one has "
                f"{self.manifest[name]!r}: name another folder with --out."
            )

    def _require_same_methods(self, earlier: dict[str, Any]) -> None:
        """Compare the methods' hashes: a method whose file or parameters have changed is another one."""
        old, new = earlier.get("made_of", {}), self.manifest.get("made_of", {})
        changed = [method for method in new if old.get(method, new[method]) != new[method]]
        if changed:
            raise BadInput(
                f"{self.path} was measured with another {changed[0]}: its file or its parameters have changed since. "
                "Name another folder with --out."
            )


def _line(record: Record) -> str:
    return json.dumps(asdict(record))


def _lines(file: Path) -> list[str]:
    """Read the complete lines. A killed run may have left the last one half-written, even within a character."""
    complete, end, _ = _content(file).rpartition(b"\n")
    try:
        return [f"{line}\n" for line in complete.decode().split("\n")] if end else []
    except UnicodeDecodeError as error:
        number = complete.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{file}, line {number} is not UTF-8. Remove the line.") from error


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {file}: {reason(error)}. Name another folder with --out.") from error


def _record(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
        for name in ("answers", "kept"):
            fields[name] = tuple(map(tuple, fields[name]))
        return Record(**{**fields, "predictions": tuple(fields["predictions"]), "scores": tuple(fields["scores"])})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{where} is no record: {error}. Remove the line, or name another folder with --out.") from error


def _key_of_map(line: str, where: str) -> tuple[Unit, str, str, str]:
    try:
        fields = json.loads(line)
        unit = fields["task"], fields["index"]
        return unit, fields["method"], fields["keep"], fields.get("entries", NATIVE)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{where} is no map: {error}. Remove the line, or name another folder with --out.") from error


def _write(path: Path, lines: Iterable[str]) -> None:
    write_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))
