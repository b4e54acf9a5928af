"""The format of every file that outlives a run: safetensors, its metadata JSON under the key "headwise"; never pickle.

    kind      class    made by                       used by
    profile   Profile  profile                       solve
    budget    Budget   solve, train, importers       allocate
    gates     Gates    train                         scores, allocate
    cache     Kept     RaggedCache.save              headwise.load

`write_tensors`, `opened` and `describe` serve every kind; `fingerprint` names what a file was made from.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headwise.artifacts.contents import (
    ADVICE,
)
from headwise.errors import ArtifactMismatch, BadInput, WriteFailed
from headwise.files import strict_json
from headwise.files.schema import Header, Schema
from headwise.files.writing import replacing

METADATA_KEY = "headwise"
FORMAT_VERSIONS = {"budget": 2, "cache": 1, "profile": 2, "part": 2, "gates": 2, "training": 1}
_HEADER = ("kind", "format_version", "library_version")
_MAKERS = {
    "budget": "'headwise solve' makes one of a profile",
    "cache": "RaggedCache.save() writes one",
    "profile": "'headwise profile' makes one",
    "gates": "'headwise train' makes one",
}
_RECORD: Mapping[str, strict_json.Check] = {"kind": strict_json.text, "format_version": strict_json.whole}


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a safetensors file of a kind of FORMAT_VERSIONS; a reader sees the old file or the new one, never half.

    `metadata` must be JSON and leave the names kind, format_version and library_version alone. Raises BadInput where no
    file can be written, WriteFailed where writing fails.
    """
    assert not set(_HEADER) & metadata.keys(), f"metadata may not hold {_HEADER}"
    header = dict(zip(_HEADER, (kind, FORMAT_VERSIONS[kind], _library_version()), strict=True))
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = {METADATA_KEY: json.dumps({**header, **metadata})}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, text)
    except SafetensorError as error:  # where the disk is full, too
        raise WriteFailed(f"cannot write {path}: {error}. What was there before is unchanged.") from error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opened:
    """A file whose kind has been checked, of which no tensor has been read yet."""

    path: Path
    metadata: Mapping[str, Any]
    headers: Mapping[str, Header]
    file: Any

    def read(self, schema: Schema) -> dict[str, Tensor]:
        """Its tensors, on the CPU, if they are what they must be. Raises BadInput before any is read, if it can."""
        schema.require(self.headers, f"{self.path} is damaged")
        tensors = self.copies()
        schema.require_values(tensors, f"{self.path} is damaged")
        return tensors

    def copies(self) -> dict[str, Tensor]:
        """Its tensors, whatever they are: copies, because what safetensors gives changes when the file does."""
        return {name: self.file.get_tensor(name).clone() for name in self.headers}


@contextmanager
def opened(path: str | os.PathLike[str], kind: str) -> Iterator[Opened]:
    """A file that `write_tensors` wrote, to be looked at before it is read.

    Raises BadInput if the file is missing or damaged, ArtifactMismatch if it is no headwise file or of another kind or
    format version.
    """
    with _open(Path(path)) as file:
        record = _record(file.metadata(), path)
        _require_kind(record, kind, path)
        metadata = {name: value for name, value in record.items() if name not in _HEADER}
        yield Opened(path=Path(path), metadata=metadata, headers=_headers(file), file=file)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors (on the CPU) and metadata, whatever they are. Raises as `opened`, which readers of a kind use."""
    with opened(path, kind) as file:
        return file.copies(), dict(file.metadata)


def _require_kind(record: Mapping[str, Any], kind: str, path: str | os.PathLike[str]) -> None:
    written = (record["kind"], record["format_version"])
    if written == (kind, FORMAT_VERSIONS[kind]):
        return
    message = (
        f"{path} is a {written[0]:.40} of format {written[1]}, expected a {kind} of format {FORMAT_VERSIONS[kind]}"
    )
    if written[0] != kind:
        raise ArtifactMismatch(f"{message}. Give a {kind}{': ' if kind in _MAKERS else ''}{_MAKERS.get(kind, '')}.")
    writer, reader = shown(record.get("library_version")).strip("'"), _library_version()
    writer_note = "" if writer == reader else f" It was written by headwise {writer}, this is {reader}."
    raise ArtifactMismatch(f"{message}.{writer_note} Use the headwise that wrote it, or make the file again.")


def _headers(file: Any) -> dict[str, Header]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return {name: Header(dtype=part.get_dtype(), shape=tuple(part.get_shape())) for name, part in slices.items()}


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Kind, versions, metadata and tensor sizes of any headwise file, whatever its version, without reading tensors."""
    with _open(Path(path)) as file:
        record = _record(file.metadata(), path)
        sizes = {name: {"dtype": header.dtype, "shape": list(header.shape)} for name, header in _headers(file).items()}
    return {**record, "tensors": sizes}


def fingerprint(*parts: Tensor | bytes | str) -> str:
    """SHA-256 (hex) of tensors with their dtype and shape, bytes or text, in this order; the same in every process."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            label, content = f"{part.dtype} {list(part.shape)}", part.detach().cpu().contiguous().reshape(-1)
            data = content.view(torch.uint8).numpy().data
        else:
            label, data = type(part).__name__, part.encode() if isinstance(part, str) else part
        digest.update(f"{label} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _library_version() -> str:
    try:
        return version("headwise")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise BadInput(f"{path} is not a file; check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged or no safetensors file ({error!s:.200}); get or make it again.") from error


def _record(metadata: Mapping[str, str] | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise ArtifactMismatch(f"{path} is a safetensors file, but headwise did not write it.")
    try:
        record = strict_json.loads((metadata or {})[METADATA_KEY])
    except ValueError as error:
        raise BadInput(f"{path}: the metadata is damaged ({error}); {ADVICE}") from error
    strict_json.checked(record, _RECORD, f"{path}: the metadata", ADVICE)
    return record


def group_of(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Tensors named "group.name", by name."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
