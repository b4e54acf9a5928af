"""What can be used on a model, from its configuration alone: methods that run as they are, files that are there for it.

And of the others what must be made first, and by which command.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig

from headwise.artifacts.origin import config_hash
from headwise.artifacts.shipped import Shipped, fitting, read_headers, shipped
from headwise.errors import HeadwiseError, UnsupportedModel
from headwise.methods.method import Choice, Method, choose
from headwise.methods.names import entries_of
from headwise.methods.registry import ALIASES, ALLOCATORS, SCORERS
from headwise.models.layout import shape_of, text_config
from headwise.models.table import table
from headwise.shapes import ModelShape

LEARNED = "lkv"  # stands in the table for all that reads keys before rotation
State = Literal["ready", "make", "refused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Available:
    """A method on a model. "ready": use `method` as it is written; "make": run `command` first; "refused": see `why`.

    `file` is what it uses, `made_for` the model that the file says it was made for.
    """

    method: str
    state: State
    file: str = ""
    made_for: str = ""
    command: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """The methods of a model, and the default among them."""

    model: str
    config_hash: str
    default: Choice
    methods: tuple[Available, ...]


def overview(model: str, config: PretrainedConfig, folder: Path | None = None) -> Overview:
    """Every short name, and LU-KV's budgets for every scorer, for the model of this name and configuration.

    `folder` is looked through for files besides those that come with headwise. Raises UnsupportedModel, BadInput.
    """
    text = text_config(config)
    refused = _refused(config.model_type, text.model_type)
    target = _Target(model=model, shape=shape_of(text), config_hash=config_hash(text.to_dict()), refused=refused)
    files = () if folder is None else read_headers(folder)
    rows = [row for method in _names() for row in _rows(method, target, files)]
    default = choose(target.shape, target.config_hash)
    return Overview(model=model, config_hash=target.config_hash, default=default, methods=tuple(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    model: str
    shape: ModelShape
    config_hash: str
    refused: Mapping[str, str]  # methods that do not work on models of its type, and why


def _refused(*kinds: str) -> Mapping[str, str]:
    """Of the first of these types that the table has. What no table knows is found when the model is loaded."""
    known = table()
    row = next(filter(None, map(known.row, kinds)), None)
    if row is None or row.untried:
        return {}
    if not row.supported:
        raise UnsupportedModel(f"models of type {row.type!r} are not supported: {row.refused}")
    return row.without


def _names() -> list[str]:
    """Short names, and the scorers that can be profiled (one pass, no file, scores without a budget) with `lukv`."""
    scorers = {name: entry.make() for name, entry in SCORERS.items() if entry.file == "none"}
    solved = [name for name, scorer in scorers.items() if scorer.replay is None and not scorer.needs_budget]
    return [*ALIASES, *(f"{name}+lukv" for name in solved)]


def _rows(method: str, target: _Target, files: Sequence[Shipped]) -> Iterator[Available]:
    """One row; where files are needed, one for each that is there."""
    scorer, allocator = entries_of(method)
    why = target.refused.get(scorer) or target.refused.get(LEARNED if "lkv" in f"{scorer}+{allocator}" else scorer)
    if why:
        yield Available(method=method, state="refused", why=why)
        return
    if SCORERS[scorer].file == ALLOCATORS[allocator].file == "none":
        yield Available(method=method, state="ready")
        return
    kind = "budget" if allocator == "lukv" else "gates"
    parameters = json.loads(json.dumps(SCORERS[scorer].make().provenance())) if kind == "budget" else None
    own = [(method, file) for file in shipped(kind, target.config_hash, parameters)[:1]]
    others = [(f"{method}@{file.path}", file) for file in fitting(files, kind, target.config_hash, parameters)]
    for name, file in [*own, *others]:
        yield _of_file(name, file, target)
    if not own and not others:
        yield Available(method=method, state="make", command=_command(scorer, kind, target.model))


def _of_file(name: str, file: Shipped, target: _Target) -> Available:
    """Whether the file holds what the method needs of it."""
    try:
        Method.parse(name).for_model(target.shape, target.config_hash)
    except HeadwiseError as error:
        return Available(method=name, state="refused", file=str(file.path), why=str(error))
    return Available(method=name, state="ready", file=str(file.path), made_for=file.origin.model)


def _command(scorer: str, kind: str, model: str) -> str:
    """What makes the file. Its name is the one it would be shipped or shared by."""
    quoted = shlex.quote(model)
    if kind == "gates":
        return f"headwise train --model {quoted} --out lkv.safetensors"
    profile = f"headwise profile --model {quoted} --scorer {scorer} --out profile.safetensors"
    return f"{profile} && headwise solve profile.safetensors --scorer {scorer} --out {scorer}.safetensors"
