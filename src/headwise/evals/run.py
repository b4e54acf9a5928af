"""Methods x keeps x tasks on generated samples: accuracy and measured memory, against the full cache.

Evaluation samples come from the split "evaluation" of `mini_ruler.generate`, whose seeds no other split can reach:
neither training nor calibration ever sees them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from headwise.errors import BadInput
from headwise.evals.answers import FULL, Memory, answer, known_methods, read_context, require_possible, room_for_answers
from headwise.evals.document import Tokens, tokenize
from headwise.evals.lexicon import REFERENCE_LEXICON, Lexicon
from headwise.evals.mini_ruler import TASKS, Sample, find_task, generate, score
from headwise.keep import Keep, parse_keep
from headwise.method import Method
from headwise.reading import can_watch, read

SUITE = "mini-ruler"
PROTOCOL = "query-agnostic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One method at one keep on one task; means over samples (and their questions)."""

    method: str
    keep: float | str
    task: str
    length: int
    samples: int
    accuracy: float
    full_accuracy: float
    kv_fraction: float  # measured bytes over the full cache's bytes
    seed: int
    protocol: str = PROTOCOL


def parse_tasks(text: str) -> list[str]:
    """Task names from "mini-ruler" (all) or "mini-ruler:niah_single,vt". Raises BadInput."""
    suite, colon, names = text.partition(":")
    if suite != SUITE:
        raise BadInput(f"tasks={text!r}: the suite is {SUITE!r}; write {SUITE} or {SUITE}:task,task.")
    chosen = [name.strip() for name in names.split(",") if name.strip()] if colon else list(TASKS)
    if not chosen:
        raise BadInput(f"tasks={text!r} names no task; the tasks are {', '.join(TASKS)}.")
    for name in chosen:
        find_task(name)
    return chosen


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    methods: Sequence[str],
    keeps: Sequence[float | str | Keep],
    samples: int,
    seed: int = 0,
    length: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Accuracy of every method at every keep on every task, query-agnostic.

    A sample is read once for all scorers that can watch one prefill. One record for each method, keep and task, however
    often they are named; "full" has one per task, with keep 1. Raises BadInput, and what `require_possible` raises for
    the first sample of any task, before any work.
    """
    _require_sizes(samples=samples, seed=seed, length=length)
    known_methods(methods)
    tasks, parsed = list(dict.fromkeys(tasks)), [parse_keep(keep) for keep in keeps]
    if not tasks or not parsed:
        raise BadInput("there is nothing to evaluate: give at least one task and one keep.")
    lexicon, records = lexicon_for(tokenizer), []
    for task in tasks:
        first = generate(task, lexicon=lexicon, length=length, seed=seed, index=0)
        require_possible(model, methods, parsed, _tokens(model, tokenizer, first))
    pairs = list(dict.fromkeys((m, k) for m in methods for k in ([parse_keep(1.0)] if m == FULL else parsed)))
    for number, task in enumerate(tasks):
        outcomes: dict[tuple[str, Keep], list[tuple[float, float]]] = {pair: [] for pair in pairs}
        full: list[float] = []
        for index in range(samples):
            progress(number * samples + index, len(tasks) * samples)
            sample = generate(task, lexicon=lexicon, length=length, seed=seed, index=index)
            session = _Session(model, tokenizer, sample, [m for m in methods if m != FULL])
            right, full_bytes = session.measure(FULL, parse_keep(1.0))
            full.append(right)
            for method, keep in pairs:
                measured = (right, full_bytes) if method == FULL else session.measure(method, keep)
                outcomes[method, keep].append((measured[0], measured[1] / full_bytes))
        records += [
            Record(
                method=method,
                keep=keep.value,
                task=task,
                length=length,
                samples=samples,
                accuracy=fmean(right for right, _ in found),
                full_accuracy=fmean(full),
                kv_fraction=fmean(fraction for _, fraction in found),
                seed=seed,
            )
            for (method, keep), found in outcomes.items()
        ]
    progress(len(tasks) * samples, len(tasks) * samples)
    return records


def lexicon_for(tokenizer: Any) -> Lexicon:
    """The bundled lexicon, counting tokens as this tokenizer does."""
    return replace(
        REFERENCE_LEXICON,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        num_special_tokens=tokenizer.num_special_tokens_to_add(),
    )


def _require_sizes(*, samples: int, seed: int, length: int) -> None:
    if samples < 1 or length < 1 or seed < 0:
        raise BadInput(f"samples={samples} and length={length} must be at least 1, seed={seed} at least 0.")


def _tokens(model: PreTrainedModel, tokenizer: Any, sample: Sample) -> Tokens:
    prompts = [question.prompt for question in sample.questions]
    tokens = tokenize(tokenizer, sample.context, prompts, device=model.device)
    room_for_answers(model, tokens)
    return tokens


class _Session:
    """One sample, read once for all the methods whose scorers can watch the same prefill."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, sample: Sample, methods: Sequence[str]):
        self.model, self.tokenizer, self.sample = model, tokenizer, sample
        self.tokens = _tokens(model, tokenizer, sample)
        scorers = [Method.parse(method).scorer for method in methods]
        watchers = [scorer for scorer in scorers if can_watch(scorer)]
        self.reading = read(model, self.tokens.context, watchers) if watchers else None

    def measure(self, method: str, keep: Keep) -> tuple[float, int]:
        """Mean score over the sample's questions, and the bytes its context took."""
        memory = self._memory(method, keep)
        kv_bytes, limit = memory.nbytes, self.sample.max_new_tokens
        texts = answer(self.model, self.tokenizer, memory, self.tokens, max_new_tokens=limit)
        return fmean(score(text, asked) for text, asked in zip(texts, self.sample.questions, strict=True)), kv_bytes

    def _memory(self, method: str, keep: Keep) -> Memory:
        if method == FULL or self.reading is None or not can_watch(Method.parse(method).scorer):
            return read_context(self.model, self.tokens.context, method, keep)
        return self.reading.cut(method, keep)
