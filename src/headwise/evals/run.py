"""Evaluate methods at keeps on tasks: what each answers, what it holds, how faithful it is to the full cache.

Samples are the same for all methods, and a sample is read once for all that can share a reading (session.py). Samples
of generated tasks come from the split "evaluation", whose seeds no other split can reach: neither training nor
calibration ever sees them.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from itertools import count
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from headwise.artifacts.tensors import fingerprint
from headwise.cache.cache import RaggedCache
from headwise.errors import BadInput
from headwise.evals.answers import FULL, known_methods, require_possible
from headwise.evals.records import Record, RunFolder
from headwise.evals.session import FULL_SETTING, Outcome, Session, Setting, every_setting
from headwise.kernels import fastest
from headwise.kernels.quantised import NATIVE, require_entries
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.methods.reading import EXACT, piece_size
from headwise.methods.registry import ORACLE
from headwise.models.devices import at_hand
from headwise.models.families import view
from headwise.models.processes import Processes
from headwise.tasks.document import Tokens
from headwise.tasks.seams import token_texts
from headwise.tasks.task import Sample, Task, require_protocol

MAX_MAP_TOKENS = 2048  # tokens of a context that is drawn
HASHED_NUMBERS = 1024  # first numbers of every weight that tell a model from another


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One method at one keep on one task, its entries stored in one way; means over samples (and their questions)."""

    method: str
    keep: float | str
    entries: str
    task: str
    length: int
    samples: int
    scores: tuple[float, ...]  # of every sample
    accuracy: float | None
    full_accuracy: float | None
    kl: float | None
    agreement: float | None
    nll: float | None
    kv_fraction: float  # measured bytes over the full cache's bytes
    seed: int
    protocol: str
    sees_answers: bool  # True for the oracle only


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What to measure, and how.

    Attributes
    ----------
    tasks, methods, keeps, entries
        Every method is measured at every keep with every kind of entries on every sample of every task.
    seed
        What the samples were made with, from 0 on.
    protocol
        "query-agnostic" or "query-aware".
    fidelity
        Whether KL and agreement are measured.
    timed
        How many samples of every task have single decoding steps timed.
    rows
        Sequences that are decoded together, at most.
    prefill_chunk_size, reading
        How contexts are read, see `compress`. There is no oracle where the reading is not exact.
    brief
        Whether records are short and no maps are made, for a folder that is kept in a repository.

    Raises
    ------
    BadInput
        If a method or a kind of entries is unknown, a number is out of range, or there is no task, keep or entries.
    """

    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    keeps: tuple[Keep, ...]
    entries: tuple[str, ...] = (NATIVE,)
    seed: int = 0
    protocol: str = "query-agnostic"
    fidelity: bool = True
    timed: int = 1
    rows: int = 256
    prefill_chunk_size: int | None = None
    reading: str = EXACT
    brief: bool = False

    def __post_init__(self) -> None:
        if not (self.tasks and self.keeps and self.entries):
            raise BadInput("there is nothing to evaluate: give at least one task, one keep and one kind of entries.")
        for stored in self.entries:
            require_entries(stored)
        require_protocol(self.protocol)
        if abs(self.seed) >= 2**63:
            raise BadInput("the seed is out of range: choose one from 0 to 2**63 - 1.")
        if min(self.rows, self.timed + 1, self.seed + 1) < 1:
            raise BadInput(f"rows={self.rows} must be at least 1, timed={self.timed} and seed={self.seed} at least 0.")
        piece_size(self.reading, self.prefill_chunk_size, 1)
        known_methods(self.methods, oracle=self.reading == EXACT)

    @property
    def settings(self) -> list[Setting]:
        """The full cache, which is always measured, then every method at every keep with every kind of entries."""
        return list(dict.fromkeys([FULL_SETTING, *every_setting(self.methods, self.keeps, self.entries)]))

    @property
    def units(self) -> list[tuple[Task, int]]:
        """Every sample of every task."""
        return [(task, index) for task in self.tasks for index in range(task.num_samples)]


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    evaluation: Evaluation,
    *,
    folder: RunFolder | None = None,
    processes: Processes | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> list[Record]:
    """Measure what `folder` does not hold yet, and return all records of the evaluation.

    Parameters
    ----------
    evaluation
        What to measure.
    folder
        Where records are written and read; None: nowhere.
    processes
        Share the samples and the folder. The first one keeps other runs out of the folder.
    progress
        Is called with (samples done, samples in all) of this process.

    Returns
    -------
    list of Record
        One per sample, method, keep and entries, in the order of the tasks and their samples.

    Raises
    ------
    BadInput
        If a context is too long for the model, or the folder is of another evaluation.
    BudgetInfeasible, ArtifactMismatch, UnsupportedModel
        If a method cannot run on the first sample of a task. These errors come before any work.
    """
    processes = processes or Processes()
    session = Session(
        model=model,
        tokenizer=tokenizer,
        query_aware=evaluation.protocol == "query-aware",
        fidelity=evaluation.fidelity,
        rows=evaluation.rows,
        prefill_chunk_size=evaluation.prefill_chunk_size,
        reading=evaluation.reading,
    )
    for task in evaluation.tasks:
        for tokens in session.tokens(task.sample(0)):
            require_possible(
                model,
                evaluation.methods,
                evaluation.keeps,
                tokens,
                entries=evaluation.entries,
                reading=evaluation.reading,
                oracle=True,
            )
    with nullcontext() if folder is None or processes.rank > 0 else folder.locked():
        return _select(_measure_all(session, evaluation, folder, processes, progress), evaluation)


def _measure_all(
    session: Session,
    evaluation: Evaluation,
    folder: RunFolder | None,
    processes: Processes,
    progress: Callable[[float, int], None],
) -> list[Record]:
    """Return the records that the folder holds, and measure those that it lacks."""
    records = list(_open_folder(folder, evaluation, processes))
    recorded = {record.key for record in records}
    units, share = evaluation.units, processes.share(len(evaluation.units))
    for done, (task, index) in enumerate(units[i] for i in share):
        progress(done, len(share))
        lacking = [setting for setting in evaluation.settings if ((task.name, index), *setting.names) not in recorded]
        if lacking:
            report = partial(_report_progress, progress, done, len(share))
            measured, maps = _measure(session, task, index, lacking, evaluation, report)
            records += measured
            if folder is not None:
                folder.append(measured, maps)
    progress(len(share), len(share))
    processes.catch_up()
    processes.wait()
    if folder is not None:
        if processes.rank == 0:
            folder.merge()
        processes.wait()
        records = folder.records()
    return records


def _report_progress(progress: Callable[[float, int], None], done: int, total: int, fraction: float) -> None:
    progress(done + fraction, total)


def _open_folder(folder: RunFolder | None, evaluation: Evaluation, processes: Processes) -> list[Record]:
    """Return what earlier runs have written."""
    if folder is None:
        return []
    if processes.rank == 0:
        folder.open()
    processes.wait()
    records = folder.records()
    processes.wait()  # nobody writes before all have read
    return records


def _measure(
    session: Session,
    task: Task,
    index: int,
    settings: Sequence[Setting],
    evaluation: Evaluation,
    report: Callable[[float], None],
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Return one sample's records for these settings, and maps of what heads kept if it is a task's first sample.

    `report` is called with the share of the settings that has been cut.
    """
    sample, collector = task.sample(index), _MapCollector(task, index, session.tokenizer, evaluation.keeps)
    cut = count(1)

    def note(setting: Setting, tokens: Tokens, cache: RaggedCache) -> None:
        collector.note(setting, tokens, cache)
        report(next(cut) / (len(settings) + 1))

    outcomes = session.measure(sample, settings, timed=index < evaluation.timed, show=note)
    full_bytes = outcomes[FULL_SETTING].kv_bytes
    records = [_record(task, index, sample, one, outcomes[one], full_bytes, evaluation) for one in settings]
    return ([record.shortened() for record in records], []) if evaluation.brief else (records, collector.maps)


def _record(
    task: Task, index: int, sample: Sample, setting: Setting, outcome: Outcome, full_bytes: int, evaluation: Evaluation
) -> Record:
    judge, scores = task.judge, ()
    if judge is not None:
        scores = tuple(judge(p, q) for p, q in zip(outcome.predictions, sample.questions, strict=True))
    return Record(
        task=task.name,
        index=index,
        length=task.length,
        method=setting.method,
        keep=str(setting.keep),
        entries=setting.entries,
        protocol=evaluation.protocol,
        seed=evaluation.seed,
        predictions=outcome.predictions if judge is not None else (),
        answers=tuple(question.answers for question in sample.questions),
        scores=scores,
        score=fmean(scores) if scores else None,
        kl=outcome.fidelity.kl,
        agreement=outcome.fidelity.agreement,
        nll=outcome.fidelity.nll,
        context_tokens=outcome.context_tokens,
        kv_bytes=outcome.kv_bytes,
        full_kv_bytes=full_bytes,
        sliding_kv_bytes=outcome.sliding_kv_bytes,
        peak_kv_bytes=outcome.peak_kv_bytes,
        prefill_seconds=outcome.prefill_seconds,
        prefill_shared_by=outcome.prefill_shared_by,
        decode_seconds=outcome.decode_seconds,
        decode_rows=outcome.decode_rows,
        step_ms=outcome.step_ms,
        kept=outcome.kept,
        versions=versions(),
        sees_answers=setting.method == ORACLE,
    )


class _MapCollector:
    """Collects which tokens of a task's first context each head kept, at the keep in the middle."""

    def __init__(self, task: Task, index: int, tokenizer: Any, keeps: Sequence[Keep]):
        self.task, self.index, self.tokenizer = task.name, index, tokenizer
        self.keep, self.maps = keeps[len(keeps) // 2], []

    def note(self, setting: Setting, tokens: Tokens, cache: RaggedCache) -> None:
        """Add what a cut cache holds, if the sample and the keep are those to map."""
        if self.index > 0 or setting.keep != self.keep or tokens.context.shape[1] > MAX_MAP_TOKENS:
            return
        shape = cache.view.shape
        kept = {
            f"{layer},{head}": cache.positions(layer, 0, head).tolist()
            for layer in range(len(shape.layers))
            for head in range(shape.kv_heads)
        }
        texts = token_texts(self.tokenizer, tokens.context[0].tolist())
        named = dict(zip(("method", "keep", "entries"), setting.names, strict=True))
        self.maps.append({"task": self.task, "index": self.index, **named, "tokens": texts, "kept": kept})


def _select(records: Sequence[Record], evaluation: Evaluation) -> list[Record]:
    """Return the records of this evaluation: a folder may hold more."""
    units = {(task.name, index): place for place, (task, index) in enumerate(evaluation.units)}
    places = {setting.names: place for place, setting in enumerate(evaluation.settings)}
    selected = [record for record in records if record.unit in units and record.setting in places]
    return sorted(selected, key=lambda record: (units[record.unit], places[record.setting]))


def summarise(records: Sequence[Record]) -> Iterator[Summary]:
    """Yield means over samples, one summary per task, method, keep and entries, in the order of the records.

    Every task must have records of the full cache, as those of `evaluate` have.
    """
    grouped: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.task, *record.setting), []).append(record)
    for (task, method, keep, entries), group in grouped.items():
        full = grouped[task, *FULL_SETTING.names]
        yield Summary(
            method=method,
            keep=parse_keep(keep).value,
            entries=entries,
            task=task,
            length=group[0].length,
            samples=len(group),
            scores=tuple(record.score for record in group if record.score is not None),
            accuracy=_mean([record.score for record in group]),
            full_accuracy=_mean([record.score for record in full]),
            kl=_mean([record.kl for record in group]),
            agreement=_mean([record.agreement for record in group]),
            nll=_mean([record.nll for record in group]),
            kv_fraction=fmean(record.kv_bytes / record.full_kv_bytes for record in group),
            seed=group[0].seed,
            protocol=group[0].protocol,
            sees_answers=group[0].sees_answers,
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def manifest(model: PreTrainedModel, name: str, evaluation: Evaluation, length: int, command: str) -> dict[str, Any]:
    """Return what run.json says of an evaluation."""
    model_view = view(model)
    shape = model_view.shape
    weights = (at_hand(model, name, weight) for name, weight in model.named_parameters())
    return {
        "model": name,
        "config_hash": model_view.config_hash,
        "weights": fingerprint(*(weight.detach().reshape(-1)[:HASHED_NUMBERS].cpu() for weight in weights)),
        "shape": {
            "num_layers": shape.num_layers,
            "layers": list(shape.layers),
            "kv_heads": shape.kv_heads,
            "query_heads": shape.query_heads,
            "head_dim": shape.head_dim,
        },
        "tasks": [task.name for task in evaluation.tasks],
        "methods": list(dict.fromkeys([FULL, *evaluation.methods])),
        "made_of": _method_hashes(model, evaluation.methods),
        "keeps": [str(keep) for keep in dict.fromkeys(evaluation.keeps)],
        "entries": list(dict.fromkeys(evaluation.entries)),
        "samples": max(task.num_samples for task in evaluation.tasks),
        "latest": [list(setting.names) for setting in evaluation.settings],
        "protocol": evaluation.protocol,
        "fidelity": evaluation.fidelity,
        "reading": evaluation.reading,
        "prefill_chunk_size": evaluation.prefill_chunk_size,
        "seed": evaluation.seed,
        "length": length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model_view.device.type,
        "hardware": hardware(model_view.device),
        "kernel": fastest(model_view.device),
        "versions": versions(),
        "command": command,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _method_hashes(model: PreTrainedModel, methods: Sequence[str]) -> dict[str, str]:
    """Return a hash of each method's parameters and file, which tells it from another method of the same name."""
    model_view = view(model)
    named = [name for name in dict.fromkeys(methods) if name not in (FULL, ORACLE)]
    methods_of_model = {name: Method.parse(name).for_model(model_view.shape, model_view.config_hash) for name in named}
    texts = {name: json.dumps(method.provenance(), sort_keys=True) for name, method in methods_of_model.items()}
    return {name: sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


@cache
def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {name: version(name) for name in ("headwise", "torch", "transformers")} | {
        "python": platform.python_version()
    }


def hardware(device: torch.device) -> str:
    """Return the name of the machine that the model runs on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
