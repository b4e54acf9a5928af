"""Collect samples for LKV-T's first stage, one file per context: a killed run goes on, and processes share."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headwise.artifacts.gates import PLACE_FEATURES, summary_width
from headwise.artifacts.parts import Parts
from headwise.artifacts.tensors import fingerprint, opened, write_tensors
from headwise.errors import BadInput
from headwise.files.schema import Numbers, Schema
from headwise.models.families import view
from headwise.models.fingerprint import model_fingerprint
from headwise.models.processes import Processes
from headwise.offline.calibration import Example
from headwise.offline.train.fit import FitSettings, Sampled, sample
from headwise.shapes import ModelShape

_ADVICE = "Remove it, and it is made again."


def collect(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    parts: Parts,
    settings: FitSettings,
    processes: Processes,
    progress: Callable[[int, int, str], None],
) -> list[Sampled]:
    """Sample the examples of this process, and return the samples of all examples, in their order.

    Any run that would make the same file uses it: steps, weights of futures, and other examples do not matter. Raises
    BadInput if a file is damaged.
    """
    if processes.rank == 0:
        parts.make()
    processes.wait()
    drawn = replace(settings, steps=0, following_weight=0.0, answer_weight=0.0, lr=0.0, weight_decay=0.0)
    run = fingerprint(model_fingerprint(model), repr(asdict(drawn)))
    files = [parts.file(run, str(number), repr(asdict(example))) for number, example in enumerate(examples)]
    mine = processes.share(len(examples))
    for done, number in enumerate(mine):
        if not files[number].is_file():
            draw = torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % 2**63)
            _write(files[number], sample(model, tokenizer, examples[number], settings, draw), run)
        progress(done + 1, len(mine), f"contexts and what follows them: {examples[number].domain}")
    processes.catch_up()
    processes.wait()
    return [_read(file, run, view(model).shape) for file in files]


def _write(file: Path, sampled: Sampled, run: str) -> None:
    write_tensors(file, "part", {field.name: getattr(sampled, field.name) for field in fields(sampled)}, {"run": run})


def _read(file: Path, run: str, shape: ModelShape) -> Sampled:
    width = 2 * shape.head_dim + 2 + PLACE_FEATURES
    paid = Numbers(shape=(shape.num_heads, "entries"), low=0.0)
    table = {
        "features": Numbers(shape=(shape.num_heads, "entries", width)),
        "again": paid,
        "following": paid,
        "answers": paid,
        "summary": Numbers(shape=(summary_width(shape),)),
    }
    with opened(file, "part") as part:
        if part.metadata.get("run") != run:
            raise BadInput(f"{file} is damaged: it is not of this run. {_ADVICE}")
        return Sampled(**part.read(Schema(table=table, advice=_ADVICE)))
