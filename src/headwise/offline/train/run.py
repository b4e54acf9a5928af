"""Train gates (LKV) from a model and texts, and write a Gates file. A killed run goes on where it was."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.artifacts.gates import EntryScores, Gates, HeadBudgets, summary_width
from headwise.artifacts.origin import Origin
from headwise.artifacts.parts import Parts
from headwise.artifacts.tensors import fingerprint, opened, write_tensors
from headwise.cache.reading import can_watch
from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.locks import lock_of, locked
from headwise.files.schema import Numbers, Schema
from headwise.files.writing import reason, remove, remove_leftovers, require_file, write_bytes
from headwise.interfaces import AbstractScorer
from headwise.methods.method import Method
from headwise.models.attention import enable
from headwise.models.families import ModelView, view
from headwise.models.fingerprint import model_fingerprint
from headwise.models.processes import Processes
from headwise.models.room import require_room
from headwise.offline.calibration import Example, encode
from headwise.offline.train.collect import collect
from headwise.offline.train.fit import fit, fit_budgets
from headwise.offline.train.loop import Lesson, Settings, Trainer, prepare
from headwise.offline.train.warm import warm_budgets, warm_scores

Part = Literal["lkv", "lkv-h", "lkv-t"]
SAVE_EVERY = 100  # steps
_SHOWN_KEEP = 0.15  # the keep whose budgets progress tells of
POOL = 4 * 2**30  # bytes of lessons that are kept in memory; others are made anew each time

_RESTART = "remove it to train from the beginning."
_STATE: Mapping[str, strict_json.Check] = {
    "done": strict_json.size,
    "best_loss": strict_json.number,
    "log": strict_json.list_of(strict_json.mapping_of(strict_json.number)),
}


class Lessons(Sequence[Lesson]):
    """Lessons that are made when they are needed, and kept while there is room (bytes)."""

    def __init__(self, make: Callable[[int], Lesson], number: int, room: int = POOL):
        self.make, self.number, self.room = make, number, room
        self.kept: dict[int, Lesson] = {}

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Lesson]:
        return (self[index] for index in range(self.number))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.number))]
        if index not in self.kept:
            lesson = self.make(index)
            if lesson.nbytes > self.room:
                return lesson
            self.room -= lesson.nbytes
            self.kept[index] = lesson
        return self.kept[index]


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    out: str | os.PathLike[str],
    *,
    part: Part = "lkv",
    scorer: str | None = None,
    settings: Settings | None = None,
    processes: Processes | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> None:
    """Train gates (LKV, arXiv 2605.06676), and write them to `out` and a log to OUT.log.jsonl.

    Every tenth example is kept for validation; the gates with the best validation loss are written. A killed run goes
    on where it was.

    Parameters
    ----------
    examples
        What `load_examples` returns; 10 or more.
    out
        The file to write.
    part
        "lkv" trains budgets and scores, "lkv-h" budgets for a fixed `scorer`, "lkv-t" scores with equal budgets.
    scorer
        The name of the fixed scorer; for "lkv-h" only.
    settings
        How gates are trained; None: the defaults.
    processes
        Share the contexts of a step, and `out`. Other runs are kept out.
    progress
        Is called with (steps done, steps in all, how it goes).

    Raises
    ------
    BadInput
        Before any work, if a setting is out of range, there are too few examples, one does not fit the model, or `out`
        cannot be written.
    WriteFailed
        If the disk refuses a file.
    """
    processes = processes or Processes()
    for path in written(out):
        require_file(path)
    Parts(out, "gates").require()
    with nullcontext() if processes.rank > 0 else locked(lock_of(out), out):
        _train(model, tokenizer, examples, out, part, scorer, settings or Settings(), processes, progress)


def written(out: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """Return the paths that training writes: gates, log, and the state that a killed run goes on from."""
    name = os.fspath(out)
    return Path(name), Path(f"{name}.log.jsonl"), Path(f"{name}.state")


def _train(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    out: str | os.PathLike[str],
    part: Part,
    scorer: str | None,
    settings: Settings,
    processes: Processes,
    progress: Callable[[int, int, str], None],
) -> None:
    model_view, (_, log, kept) = view(model), written(out)
    fixed = _fixed_scorer(part, scorer)
    if fixed is not None:
        fixed, settings = _resolve(fixed, model_view, settings)
    training, held_out = [e for n, e in enumerate(examples) if n % 10 != 9], examples[9::10]
    _require(model, tokenizer, examples, settings, training)
    _require_log(log)
    processes.require_equal_shares(settings.contexts_per_step)
    enable(model)
    budgets, scores = _modules(model, part, settings.seed)
    run = _fingerprint(model, examples, settings, part, scorer)
    fitted = scores is not None and settings.fit.steps > 0
    history = _fit(model, tokenizer, examples, Parts(out, "gates"), scores, budgets, settings, processes, progress)
    if not fitted or settings.warm_steps or settings.steps:
        lessons = Lessons(_lesson_maker(model, tokenizer, training, settings, fixed), len(training))
        trainer = Trainer(
            model=model, lessons=lessons, settings=settings, budgets=budgets, scores=scores, processes=processes
        )
        make = _lesson_maker(model, tokenizer, held_out, settings, fixed)
        history += _distil(trainer, make, len(held_out), _State(kept, trainer, run), fitted, progress)
    if processes.rank == 0:
        gates = Gates(
            origin=_origin(model, scorer, fixed, settings, run),
            budgets=budgets,
            scores=scores,
            comparable=fitted and not settings.warm_steps and not settings.steps,
            settings={**asdict(settings), "part": part},
        )
        _save(gates, history, out)


def _save(gates: Gates, history: Sequence[Mapping[str, Any]], out: str | os.PathLike[str]) -> None:
    """Write the log and the gates. Remove what a killed run would go on from."""
    _, log, kept = written(out)
    write_bytes(log, "".join(json.dumps(row) + "\n" for row in history).encode())
    gates.save(out)
    remove(kept)
    Parts(out, "gates").remove()
    for path in written(out):
        remove_leftovers(path)


def _lesson_maker(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: Settings,
    fixed: AbstractScorer | None,
) -> Callable[[int], Lesson]:
    """Return a function that makes the lesson of the example of an index."""
    return lambda index: prepare(model, tokenizer, examples[index], settings, fixed)


def _fingerprint(
    model: PreTrainedModel, examples: Sequence[Example], settings: Settings, part: Part, scorer: str | None
) -> str:
    """Return the fingerprint of all that decides what a run makes."""
    data = fingerprint(repr([asdict(e) for e in examples]))
    return fingerprint(model_fingerprint(model), data, repr((asdict(settings), part, scorer)))


def _resolve(fixed: AbstractScorer, model_view: ModelView, settings: Settings) -> tuple[AbstractScorer, Settings]:
    """Return the scorer for this model, and settings with the protected tokens that inference will have."""
    fixed = fixed.resolve(model_view.shape, model_view.config_hash)
    return fixed, replace(settings, sink=max(settings.sink, fixed.sink), window=max(settings.window, fixed.window))


def _modules(model: PreTrainedModel, part: Part, seed: int) -> tuple[HeadBudgets | None, EntryScores | None]:
    """Return untrained budgets and scores of a part, on the model's device."""
    torch.manual_seed(seed)
    shape = view(model).shape
    budgets = HeadBudgets(shape.num_heads, summary_width(shape)).to(model.device) if part != "lkv-t" else None
    if part == "lkv-h":
        return budgets, None
    return budgets, EntryScores(len(shape.layers), shape.kv_heads, shape.head_dim).to(model.device)


def _origin(
    model: PreTrainedModel, scorer: str | None, fixed: AbstractScorer | None, settings: Settings, run: str
) -> Origin:
    name, model_view = model.config.name_or_path or "", view(model)
    return Origin(
        shape=model_view.shape,
        model=Path(name).name if Path(name).is_dir() else name,  # gates are shared; where a model lay is not
        config_hash=model_view.config_hash,
        scorer=scorer or "",
        scorer_parameters={} if fixed is None else fixed.provenance(),
        sink=settings.sink,
        window=settings.window,
        calibration=run,
    )


def _fit(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    parts: Parts,
    scores: EntryScores | None,
    budgets: HeadBudgets | None,
    settings: Settings,
    processes: Processes,
    progress: Callable[[int, int, str], None],
) -> list[dict[str, Any]]:
    """Do the first stage, if it has steps: fit scores that predict attention, and budgets for them. Return the log.

    Every process ends with the same scores.
    """
    if scores is None or not settings.fit.steps:
        return []
    samples = collect(model, tokenizer, examples, parts, settings.fit, processes, progress)
    training, held_out = [s for n, s in enumerate(samples) if n % 10 != 9], samples[9::10]
    history = fit(scores, training, held_out, settings.fit, progress) if processes.rank == 0 else []
    with torch.no_grad():
        for parameter in scores.parameters():  # on GPUs sums differ between processes
            values = parameter if processes.rank == 0 else torch.zeros_like(parameter)
            parameter.copy_(processes.sum(values.clone()))
    if budgets is not None:
        fit_budgets(budgets, scores, training)
    return history


def _distil(
    trainer: Trainer,
    make: Callable[[int], Lesson],
    number_held_out: int,
    state: "_State",
    fitted: bool,
    progress: Callable[[int, int, str], None],
) -> list[dict[str, Any]]:
    """Do the other stages: every head alone, LU-KV's budgets, then both jointly. Return the log."""
    settings, main, tests = trainer.settings, trainer.processes.rank == 0, Lessons(make, number_held_out)
    start = state.restore()
    if start is None:
        start = 0
        _begin(trainer, fitted, progress)
        trainer.mean = [parameter.detach().clone() for parameter in trainer.parameters()]
        state.best_loss, agree = trainer.validate(tests)
        state.best = [mean.clone() for mean in trainer.mean]
        state.log.append({"step": -1, "validation": state.best_loss, "validation_agreement": agree})
        if main:
            state.save(0)
    for number in range(start, settings.steps):
        loss, agree = trainer.step(number)
        state.log.append({"step": number, "loss": loss, "agreement": agree})
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == settings.steps:
            validation_loss, agree_held_out = trainer.validate(tests)
            state.log[-1] |= {"validation": validation_loss, "validation_agreement": agree_held_out}
            if validation_loss < state.best_loss:
                state.best_loss, state.best = validation_loss, [mean.clone() for mean in trainer.mean]
            if main:
                state.save(number + 1)
        progress(number + 1, settings.steps, _progress_text(loss, agree, trainer, state))
    trainer.put(state.best)
    return state.log


def _begin(trainer: Trainer, fitted: bool, progress: Callable[[int, int, str], None]) -> None:
    """Do the stages before joint training."""
    settings, scores, budgets = trainer.settings, trainer.scores, trainer.budgets

    def report(number: int, change: float) -> None:
        progress(number, settings.warm_steps, f"every head alone: {change:.3f} of its output changed")

    if scores is not None and settings.warm_steps:
        warm_scores(trainer.lessons, scores, settings, trainer.processes, report)
    if budgets is not None and (not fitted or settings.warm_steps):
        warm_budgets(trainer.model, trainer.lessons, scores, budgets, settings, trainer.processes)


class _State:
    """The file that a resumed run needs: gates, their average, the best so far, the optimizer, the log."""

    def __init__(self, path: Path, trainer: Trainer, run: str):
        self.path, self.trainer, self.run = path, trainer, run
        self.log: list[dict[str, float]] = []
        self.best_loss, self.best = float("inf"), [mean.clone() for mean in trainer.mean]

    def save(self, done: int) -> None:
        """Write everything after `done` steps, at once or not at all."""
        groups = {"now": self.trainer.parameters(), "mean": self.trainer.mean, "best": self.best}
        tensors = {f"{name}.{n}": t.detach().clone() for name, ts in groups.items() for n, t in enumerate(ts)}
        for number, state in self.trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor.clone() for name, tensor in state.items()}
        if self.trainer.budgets is not None:
            tensors |= {f"buffer.{name}": buffer.clone() for name, buffer in self.trainer.budgets.named_buffers()}
        metadata = {"run": self.run, "done": done, "best_loss": self.best_loss, "log": self.log}
        write_tensors(self.path, "training", tensors, metadata)

    def restore(self) -> int | None:
        """Read the file, and return the steps already done; None if there is no file, or it is of another run.

        Raises BadInput if it is damaged.
        """
        if not self.path.is_file():
            return None
        place = f"{self.path}: the state"
        with opened(self.path, "training") as file:
            if strict_json.checked(file.metadata, {"run": strict_json.text}, place, _RESTART)["run"] != self.run:
                return None
            metadata = strict_json.checked(file.metadata, _STATE, place, _RESTART)
            self._require_log(metadata["log"], metadata["done"])
            tensors = file.read(self._schema(file.headers))
        device, count = self.trainer.model.device, len(self.trainer.mean)

        def group(name: str) -> list[Tensor]:
            return [tensors[f"{name}.{n}"].to(device) for n in range(count)]

        self.trainer.put(group("now"))
        self.trainer.mean, self.best = group("mean"), group("best")
        if self.trainer.budgets is not None:
            for name, buffer in self.trainer.budgets.named_buffers():
                buffer.copy_(tensors[f"buffer.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        groups = self.trainer.optimizer.state_dict()["param_groups"]
        self.trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.log, self.best_loss = list(metadata["log"]), metadata["best_loss"]
        return metadata["done"]

    def _require_log(self, log: Sequence[Mapping[str, float]], done: int) -> None:
        """Raise BadInput unless the log has a validation, and no more steps are done than there are."""
        validated = [row for row in log if "validation" in row]
        if done > self.trainer.settings.steps or not validated or "validation_agreement" not in validated[-1]:
            raise BadInput(f"{self.path}: the state is damaged: {done} steps, {len(log)} rows of its log; {_RESTART}")

    def _schema(self, names: Collection[str]) -> Schema:
        """Return what the file must hold: the optimizer's tensors are there as soon as it has made a step."""
        table: dict[str, Numbers] = {}
        started = any(name.startswith("optimizer.") for name in names)
        for n, parameter in enumerate(self.trainer.parameters()):
            numbers = Numbers(shape=tuple(parameter.shape))
            table |= {f"{group}.{n}": numbers for group in ("now", "mean", "best")}
            if started:
                table[f"optimizer.{n}.step"] = Numbers(shape=(), low=0.0)
                table[f"optimizer.{n}.exp_avg"] = numbers
                table[f"optimizer.{n}.exp_avg_sq"] = Numbers(shape=tuple(parameter.shape), low=0.0)
        if self.trainer.budgets is not None:
            buffers = self.trainer.budgets.named_buffers()
            table |= {f"buffer.{name}": Numbers(shape=tuple(buffer.shape)) for name, buffer in buffers}
        return Schema(table=table, advice=_RESTART.capitalize())


@torch.no_grad()
def _progress_text(loss: float, agree: float, trainer: Trainer, state: _State) -> str:
    """Return how a step went, the last validation, and how different heads are, as a line."""
    fractions = trainer.fractions(_SHOWN_KEEP)
    validation = next(row["validation_agreement"] for row in reversed(state.log) if "validation" in row)
    low, high = float(fractions.min()), float(fractions.max())
    return (
        f"loss {loss:.3f}, agreement {agree:.3f} (held out {validation:.3f}), "
        f"heads keep {low:.3f} to {high:.3f} at {_SHOWN_KEEP}"
    )


def _fixed_scorer(part: Part, scorer: str | None) -> AbstractScorer | None:
    if part != "lkv-h":
        if scorer is not None:
            raise BadInput(f"scorer={scorer!r}: only budgets alone (lkv-h) are trained for a fixed scorer.")
        return None
    if scorer is None:
        raise BadInput("budgets alone (lkv-h) are trained for a fixed scorer: name one, such as keydiff.")
    fixed = Method.parse(f"{scorer}+uniform").scorer
    if not can_watch(fixed):
        raise BadInput(
            f"{scorer} cannot be trained with: it reads the context twice, or its scores depend on the keep."
        )
    return fixed


def _require(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: Settings,
    training: Sequence[Example],
) -> None:
    if not 0 <= settings.seed < 2**63:
        raise BadInput("the seed is out of range: choose one from 0 to 2**63 - 1.")
    low, high = settings.keeps
    numbers = {name: getattr(settings, name) for name in ("contexts_per_step", "questions", "answer_tokens")}
    stages = {"fit steps": settings.fit.steps, "warm_steps": settings.warm_steps, "steps": settings.steps}
    if min(stages.values()) < 0 or max(stages.values()) == 0:
        listed = ", ".join(f"{name}={value}" for name, value in stages.items())
        raise BadInput(f"{listed}: 0 leaves a stage out, and at least one must have steps.")
    if not (0 < low <= high < 1 and min(numbers.values()) > 0):
        listed = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise BadInput(f"{listed} and keeps={low, high}: at least 1 of each, and keeps in (0, 1).")
    if len(examples) < 10 or len(training) < settings.contexts_per_step:
        raise BadInput(
            f"{len(examples)} examples are too few: every tenth is kept for validation, and a step takes "
            f"{settings.contexts_per_step} contexts; give 10 or more."
        )
    view(model).require_weights_together("headwise train")
    limit = view(model).max_positions
    for example in examples:
        require_room(tokenizer, example.context, limit)
        context, questions = encode(tokenizer, example, device="cpu")
        tokens = context.shape[1] + max(len(q) for q in questions) + settings.answer_tokens
        if tokens > limit:
            raise BadInput(
                f"a context of {context.shape[1]} tokens, its longest question and {settings.answer_tokens} tokens of "
                f"answer need {tokens} positions, but this model was made for {limit}: {example.context[:40]!r}."
            )
        if context.shape[1] <= settings.sink + settings.window:
            raise BadInput(
                f"a context of {context.shape[1]} tokens is no longer than the {settings.sink + settings.window} that "
                f"are protected: {example.context[:40]!r}."
            )


def _require_log(log: Path) -> None:
    """Raise BadInput if the file is no log of a training: it would be lost."""
    if not log.exists():
        return
    try:
        with log.open("rb") as file:
            line = file.readline()
        if line:
            float(json.loads(line)["step"])
    except OSError as error:
        raise BadInput(f"cannot read {log}: {reason(error)}. Move it away, or name another --out.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{log} is no log of a training. Move it away, or name another --out.") from error
