"""What an evaluation writes: one record per sample, method and keep, in a folder that a killed run goes on from.

    OUT/run.json        what was run: model, methods, keeps, tasks, seed, hardware, versions, command
    OUT/records.jsonl   the records; while several processes write, OUT/records.RANK.jsonl until all are done
    OUT/maps.jsonl      which tokens the heads kept, for the first sample of every task

A killed run, started again with the same --out, repeats no sample and loses none: the last one is dropped if it is not
complete. Methods, keeps, tasks and samples may be added to a folder; a model, seed, length or protocol of its own
needs another. Imports no torch.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.errors import BadInput

FORMAT = 1
_SAME = ("format", "model", "config_hash", "dtype", "protocol", "seed", "length", "fidelity")
_GROW = ("tasks", "methods", "keeps", "samples")
Unit = tuple[str, int]  # a task and the index of a sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One method at one keep on one sample. Bytes are of keys and values; `kept` are entries per layer and head.

    `score` is the mean over questions, None where nothing is answered. `kl` (nats), `agreement` (share of tokens with
    the same first choice) and `nll` are of what the full cache answered, see fidelity.py.
    """

    task: str
    index: int
    length: int
    method: str
    keep: str
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

    @property
    def unit(self) -> Unit:
        """The sample it is of."""
        return self.task, self.index


class RunFolder:
    """The folder of an evaluation. Raises BadInput if it cannot be written, or is of another evaluation."""

    def __init__(self, path: str | os.PathLike[str], manifest: dict[str, Any], *, rank: int | None = None):
        self.path, self.part = Path(path), "" if rank is None else f".{rank}"
        self.manifest = {"format": FORMAT, **manifest}

    def open(self) -> None:
        """Make or check the folder, note what is run, and put together what processes of a killed run left."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write to {self.path}: {error.strerror}. Name a folder with --out.") from error
        known = self._known()
        if known is None and any(self.path.iterdir()):
            raise BadInput(f"{self.path} holds other files and no run.json; name a new or empty folder with --out.")
        grown = self._grown(known)
        if known is not None:
            self._drop_unfinished([tuple(pair) for pair in known["latest"]])
        self.manifest = grown
        _write(self.path / "run.json", json.dumps(self.manifest, indent=1) + "\n")
        self.merge()

    def records(self) -> list[Record]:
        """Everything that was written so far. Raises BadInput for a damaged line."""
        return [record for file in self._files() for record in _read(file)]

    def _drop_unfinished(self, pairs: Iterable[tuple[str, ...]]) -> None:
        """Forget the sample that a killed run was writing, if not all of these (method, keep) have a record."""
        wanted, records = set(pairs), self.records()
        for file in self._files():
            lines = _lines(file)
            found = [_record(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
            last = found[-1].unit if found else None
            whole = wanted <= {(record.method, record.keep) for record in records if record.unit == last}
            while not whole and found and found[-1].unit == last and (found[-1].method, found[-1].keep) in wanted:
                found.pop()
            _write(file, "".join(lines[: len(found)]))  # and without a torn line

    def append(self, records: Sequence[Record], maps: Sequence[dict[str, Any]] = ()) -> None:
        """Add what one sample gave."""
        for name, lines in (("records", map(_line, records)), ("maps", (json.dumps(one) + "\n" for one in maps))):
            text = "".join(lines)
            if text:
                with (self.path / f"{name}{self.part}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(text)

    def merge(self) -> None:
        """One file of what all processes wrote, in the order of tasks and samples."""
        order = {task: at for at, task in enumerate(self.manifest["tasks"])}
        parts = [*self.path.glob("records.*.jsonl"), *self.path.glob("maps.*.jsonl")]
        if not parts:
            return
        found = sorted(self.records(), key=lambda r: (order.get(r.task, len(order)), r.index))
        _write(self.path / "records.jsonl", "".join(map(_line, found)))
        maps = [line for file in sorted(self.path.glob("maps*.jsonl")) for line in _lines(file)]
        _write(self.path / "maps.jsonl", "".join(dict.fromkeys(maps)))
        for part in parts:
            part.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("records*.jsonl"))

    def _known(self) -> dict[str, Any] | None:
        file = self.path / "run.json"
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{file} is damaged: {error}. Name another folder with --out.") from error

    def _grown(self, known: dict[str, Any] | None) -> dict[str, Any]:
        """What was run here before and now. Raises BadInput where the two are not one evaluation."""
        if known is None:
            return self.manifest
        for name in _SAME:
            if known.get(name) != self.manifest[name]:
                raise BadInput(
                    f"{self.path} holds an evaluation with {name}={known.get(name)!r}, this one has "
                    f"{self.manifest[name]!r}: name another folder with --out."
                )
        grown = dict(self.manifest)
        for name in _GROW:
            old, new = known[name], grown[name]
            grown[name] = max(old, new) if name == "samples" else list(dict.fromkeys([*old, *new]))
        return grown


def _line(record: Record) -> str:
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def _lines(file: Path) -> list[str]:
    """Complete lines; a killed run may have left the last one half-written."""
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _read(file: Path) -> list[Record]:
    return [_record(line, f"{file}, line {number}") for number, line in enumerate(_lines(file), start=1)]


def _record(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
        for name in ("answers", "kept"):
            fields[name] = tuple(map(tuple, fields[name]))
        return Record(**{**fields, "predictions": tuple(fields["predictions"]), "scores": tuple(fields["scores"])})
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{where} is no record: {error}. Remove the line, or name another folder with --out.") from error


def _write(path: Path, text: str) -> None:
    """At once or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
