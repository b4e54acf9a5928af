"""Measure all methods, keeps and kinds of entries on one sample: read once, cut many ways, asked together.

Methods share a reading of the context (reading.py): one for those that read once, one for those that read twice. The
cut caches are continued as one batch (RaggedCache.join), so a sweep costs little more than its slowest answer. The full
cache answers by itself.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.compress import Progress, compress
from headwise.cache.reading import read
from headwise.errors import BadInput
from headwise.evals.answers import (
    FULL,
    FullMemory,
    Memory,
    answer_tokens,
    as_texts,
    room_for_answers,
    time_decoding,
)
from headwise.evals.fidelity import LOGITS_BYTES, Continuations, Fidelity, Yardstick
from headwise.evals.oracle import as_method, foresee
from headwise.interfaces import Replay
from headwise.kernels.quantised import NATIVE
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.methods.reading import EXACT
from headwise.methods.registry import ORACLE
from headwise.models.families import view
from headwise.models.room import require_room
from headwise.tasks.document import Tokens, tokenize
from headwise.tasks.task import Sample

CUT_BYTES = 2 * 2**30  # of caches that are asked together
COMPARED_BYTES = 4 * LOGITS_BYTES  # of the logits of those that are compared together


class Setting(NamedTuple):
    """A method at a keep, and how the entries it keeps are stored."""

    method: str
    keep: Keep
    entries: str = NATIVE

    @property
    def names(self) -> tuple[str, str, str]:
        """As records have them."""
        return self.method, str(self.keep), self.entries


FULL_SETTING = Setting(FULL, parse_keep(1.0))


def every_setting(methods: Sequence[str], keeps: Sequence[Keep], entries: Sequence[str]) -> list[Setting]:
    """Return all combinations, each once; the full cache once, for it has no keep and is native."""
    found = (
        [FULL_SETTING] if method == FULL else [Setting(method, keep, stored) for keep in keeps for stored in entries]
        for method in methods
    )
    return list(dict.fromkeys(chain.from_iterable(found)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was measured of one setting on one sample. Bytes are of keys and values.

    `kept` are entries per layer and head. `prefill_seconds` is the time of the reading that served `prefill_shared_by`
    settings. `decode_seconds` is the time in which `decode_rows` sequences were answered together: by decoding, or by
    one pass over the full cache's answers if a context agrees with all of them. `step_ms`: one decoding step of one
    sequence, if timed.
    """

    predictions: tuple[str, ...]
    fidelity: Fidelity
    context_tokens: int
    kv_bytes: int
    sliding_kv_bytes: int
    peak_kv_bytes: int
    prefill_seconds: float
    prefill_shared_by: int
    decode_seconds: float
    decode_rows: int
    step_ms: float | None
    kept: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """How a sample is put to the model. `rows`: sequences that are decoded together, at most.

    `prefill_chunk_size`, `reading`: contexts are read in pieces of so many tokens, see `compress`. Methods share a
    reading only if it is exact. `yardstick`: whether the full cache is measured, which must fit into memory then; if
    not, nothing is compared with it. `split_special_tokens`: see `tokenize`.
    """

    model: PreTrainedModel
    tokenizer: Any
    query_aware: bool = False
    fidelity: bool = True
    rows: int = 256
    prefill_chunk_size: int | None = None
    reading: str = EXACT
    yardstick: bool = True
    split_special_tokens: bool = False

    def tokens(self, sample: Sample) -> list[Tokens]:
        """Return what is compressed and what is asked then: one for all questions, or one per question if query-aware.

        Query-aware, a question is compressed with the context, but for its last token, which starts the answer. Raises
        BadInput if the model has no room, or if a sample without questions is to be query-aware.
        """
        if sample.continues is not None:
            return [self._continued(sample.continues)]
        require_room(self.tokenizer, sample.context, view(self.model).max_positions)
        tokens = tokenize(
            self.tokenizer,
            sample.context,
            [question.prompt for question in sample.questions],
            device=view(self.model).device,
            separator="" if sample.verbatim else "\n\n",
            prefixes=[question.answer_prefix for question in sample.questions],
            chat=sample.chat,
            split_special_tokens=self.split_special_tokens,
        )
        room_for_answers(self.model, tokens)
        if not self.query_aware:
            return [tokens]
        return [
            Tokens(context=torch.cat([tokens.context, question[None, :-1]], dim=-1), questions=(question[-1:],))
            for question in tokens.questions
        ]

    def _continued(self, ids: tuple[tuple[int, ...], tuple[int, ...]]) -> Tokens:
        if self.query_aware:
            raise BadInput(
                "a text whose end is predicted has no question, so nothing can be query-aware. Measure perplexity with "
                "the protocol query-agnostic."
            )
        device = view(self.model).device
        context, following = (torch.tensor(part, dtype=torch.long, device=device) for part in ids)
        tokens = Tokens(context=context[None], questions=(following,))
        room_for_answers(self.model, tokens)
        return tokens

    def measure(
        self,
        sample: Sample,
        settings: Sequence[Setting],
        *,
        timed: bool = False,
        show: Callable[[Setting, Tokens, RaggedCache], None] = lambda setting, tokens, cache: None,
        progress: Progress = lambda done, total: None,
    ) -> dict[Setting, Outcome]:
        """Return outcomes of all settings, and of the full cache. `show` is given every cut cache of the first reading.

        `progress` is called with (settings measured, settings in all); one counts for every context it is cut from.
        """
        parts, measured = self.tokens(sample), []
        for part, tokens in enumerate(parts):
            first = part == 0
            measurement = _Measurement(self, tokens, sample, timed=timed and first, show=show if first else None)
            measured.append(measurement.measure(settings, _part_progress(progress, part, len(parts))))
        return {setting: _merge([part[setting] for part in measured]) for setting in measured[0]}


_Cut = tuple[Setting, Memory, float, int]  # its cache, the seconds of its reading, the settings which that served


@dataclass(frozen=True, slots=True)
class _Answers:
    """Answers of one context, the seconds of the passes they came from, and how many contexts shared those."""

    answers: Sequence[torch.Tensor]
    seconds: float
    contexts: int
    fidelity: Fidelity = field(default_factory=Fidelity)


class _Measurement:
    """Measures one context and its questions."""

    def __init__(
        self,
        session: Session,
        tokens: Tokens,
        sample: Sample,
        timed: bool,
        show: Callable[[Setting, Tokens, RaggedCache], None] | None,
    ):
        self.session, self.tokens, self.timed, self.show = session, tokens, timed, show
        self.model, self.tokenizer = session.model, session.tokenizer
        self.limit, self.chat = sample.max_new_tokens, sample.chat
        self.targets = None if sample.continues is None else [question[1:] for question in tokens.questions]
        self.continuations: Continuations | None = None  # each question with the full cache's answer, or what follows
        self.yardstick: Yardstick | None = None

    def measure(self, settings: Sequence[Setting], progress: Progress) -> dict[Setting, Outcome]:
        """Return the outcomes. The full cache comes first: the others are compared with what it answers."""
        cut = [setting for setting in dict.fromkeys(settings) if setting.method != FULL]
        total = self.session.yardstick + len(cut)
        progress(0, total)
        outcomes, full_bytes = self._full() if self.session.yardstick else ({}, 0)
        progress(len(outcomes), total)
        for group in self._groups(cut, full_bytes):
            outcomes |= zip([setting for setting, *_ in group], self._outcomes(group), strict=True)
            progress(len(outcomes), total)
        return outcomes

    def _full(self) -> tuple[dict[Setting, Outcome], int]:
        """Return what was measured of the full cache, and its bytes."""
        start = time.perf_counter()
        full = FullMemory(self.model, self.tokens.context, self.session.prefill_chunk_size)
        (outcome,) = self._outcomes([(FULL_SETTING, full, time.perf_counter() - start, 1)])
        return {FULL_SETTING: outcome}, full.nbytes

    def _groups(self, settings: Sequence[Setting], full_bytes: int) -> Iterator[list[_Cut]]:
        """Yield cut caches, as many at a time as may be asked together. Their entries are stored alike."""
        group: list[_Cut] = []
        group_size = max(1, self.session.rows // len(self.tokens.questions))
        for cut in self._cuts(settings):
            if group and group[0][0].entries != cut[0].entries:
                yield group
                group = []
            group.append(cut)
            if len(group) == group_size or sum(memory.nbytes for _, memory, *_ in group) + full_bytes > CUT_BYTES:
                yield group
                group = []
        if group:
            yield group

    def _cuts(self, settings: Sequence[Setting]) -> Iterator[_Cut]:
        """Yield every setting's cache, the seconds its reading took, and how many settings that reading serves."""
        by_reading: dict[Replay | None, list[Setting]] = {}
        methods = {one.method: as_method(one.method, self.tokenizer, chat=self.chat) for one in settings}
        if self.session.reading != EXACT:
            yield from self._read_apart(settings, methods)
            return
        for setting in settings:
            by_reading.setdefault(methods[setting.method].scorer.replay, []).append(setting)
        for served in by_reading.values():
            scorers = list(dict.fromkeys(methods[one.method].scorer for one in served if one.method != ORACLE))
            start = time.perf_counter()
            chunk_size = self.session.prefill_chunk_size
            reading = read(self.model, self.tokens.context, scorers, prefill_chunk_size=chunk_size)
            seconds = time.perf_counter() - start
            if self.continuations is not None and any(setting.method == ORACLE for setting in served):
                reading = foresee(self.model, reading, self.continuations.questions, self.continuations.texts)
            for setting in sorted(served, key=lambda setting: setting.entries):  # alike ones are asked together
                cache = reading.cut(methods[setting.method], setting.keep, entries=setting.entries)
                yield setting, cache, seconds, len(served)

    def _read_apart(self, settings: Sequence[Setting], methods: Mapping[str, Method]) -> Iterator[_Cut]:
        """Yield every setting's cache from a reading of its own: what it keeps decides what is read after it."""
        for setting in sorted(settings, key=lambda setting: setting.entries):
            start = time.perf_counter()
            cache = compress(
                self.model,
                self.tokens.context,
                methods[setting.method],
                keep=setting.keep,
                prefill_chunk_size=self.session.prefill_chunk_size,
                reading=self.session.reading,
                entries=setting.entries,
            )
            yield setting, cache, time.perf_counter() - start, 1

    def _outcomes(self, group: Sequence[_Cut]) -> list[Outcome]:
        memories = [memory for _, memory, *_ in group]
        answers = self._answer(memories)
        outcomes: list[Outcome] = []
        for (setting, memory, prefill_seconds, shared), answer in zip(group, answers, strict=True):
            if self.show is not None and isinstance(memory, RaggedCache):
                self.show(setting, self.tokens, memory)
            outcome = Outcome(
                predictions=tuple(as_texts(self.tokenizer, answer.answers)),
                fidelity=answer.fidelity,
                context_tokens=self.tokens.context.shape[1],
                kv_bytes=memory.nbytes,
                sliding_kv_bytes=memory.sliding_nbytes,
                peak_kv_bytes=memory.peak_nbytes,
                prefill_seconds=prefill_seconds,
                prefill_shared_by=shared,
                decode_seconds=answer.seconds,
                decode_rows=answer.contexts * len(self.tokens.questions),
                step_ms=time_decoding(self.model, memory, self.tokens) if self.timed else None,
                kept=self._kept_entries(memory),
            )
            outcomes.append(outcome)
        return outcomes

    def _answer(self, memories: Sequence[Memory]) -> list[_Answers]:
        """Return what each context answers, and how faithful it is.

        They are compared first: a context that agrees with all of an answer gives that answer, and need not decode.
        """
        if self.targets is not None or self.yardstick is None:
            answers = self._decode(memories)
            self.continuations = self.continuations or self._continuations(answers[0].answers)
            if self.targets is None and not (self.session.fidelity and self.session.yardstick):
                return answers
            if self.yardstick is None:
                full, context = memories[0], self.tokens.context
                self.yardstick = Yardstick(self.model, self.tokenizer, full, context, self.continuations)
            faithful = self._fidelity(self.yardstick, memories)
            return [replace(answer, fidelity=fidelity) for answer, fidelity in zip(answers, faithful, strict=True)]
        start = time.perf_counter()
        faithful = self._fidelity(self.yardstick, memories)
        yardstick_answers = _Answers(self.yardstick.texts, time.perf_counter() - start, len(memories))
        differing = [i for i, fidelity in enumerate(faithful) if not self.yardstick.is_repeated_by(fidelity)]
        decoded = dict(zip(differing, self._decode([memories[i] for i in differing]), strict=True))
        return [replace(decoded.get(i, yardstick_answers), fidelity=fidelity) for i, fidelity in enumerate(faithful)]

    def _fidelity(self, yardstick: Yardstick, memories: Sequence[Memory]) -> list[Fidelity]:
        """Return the fidelity of each; as many are compared at a time as logits have room for."""
        longest = max(map(len, yardstick.texts), default=1)
        logits_bytes = 4 * longest * self.model.config.get_text_config().vocab_size
        batch_size = max(1, COMPARED_BYTES // logits_bytes)
        parts = [memories[start : start + batch_size] for start in range(0, len(memories), batch_size)]
        return [fidelity for part in parts for fidelity in yardstick.measure(_join(part), len(part))]

    def _decode(self, memories: Sequence[Memory]) -> list[_Answers]:
        """Return token ids per question, decoded together; none where the text that follows is given."""
        if self.targets is not None or not memories:
            return [_Answers([], 0.0, len(memories)) for _ in memories]
        start = time.perf_counter()
        answers = answer_tokens(
            self.model,
            self.tokenizer,
            _join(memories),
            self.tokens,
            max_new_tokens=self.limit,
            batch_size=self.session.rows,
            contexts=len(memories),
        )
        seconds = time.perf_counter() - start
        return [_Answers(answer, seconds, len(memories)) for answer in answers]

    def _continuations(self, answers: Sequence[torch.Tensor]) -> Continuations:
        """Return the questions with the full cache's answers, or with the text that is given."""
        texts = self.targets if self.targets is not None else answers
        questions = [q[:1] for q in self.tokens.questions] if self.targets is not None else self.tokens.questions
        return Continuations.of(questions, texts)

    def _kept_entries(self, memory: Memory) -> tuple[tuple[float, ...], ...]:
        shape = view(self.model).shape
        if isinstance(memory, RaggedCache):
            return tuple(tuple(float(count) for count in layer) for layer in memory.lengths[:, 0].tolist())
        return ((float(self.tokens.context.shape[1]),) * shape.kv_heads,) * len(shape.layers)


def _join(memories: Sequence[Memory]) -> Memory:
    return memories[0] if len(memories) == 1 else RaggedCache.join(cast(list[RaggedCache], memories))


def _part_progress(progress: Progress, part: int, parts: int) -> Progress:
    """Return the progress of one of several parts, all of one size."""
    return lambda done, total: progress(part * total + done, parts * total)


def _merge(parts: Sequence[Outcome]) -> Outcome:
    """Return one outcome of a sample whose questions were compressed one by one: means, and sums of seconds."""
    if len(parts) == 1:
        return parts[0]
    layers = zip(*(part.kept for part in parts), strict=True)
    return replace(
        parts[0],
        predictions=tuple(text for part in parts for text in part.predictions),
        fidelity=Fidelity.mean([part.fidelity for part in parts]),
        context_tokens=round(fmean(part.context_tokens for part in parts)),
        kv_bytes=round(fmean(part.kv_bytes for part in parts)),
        peak_kv_bytes=max(part.peak_kv_bytes for part in parts),
        prefill_seconds=sum(part.prefill_seconds for part in parts),
        decode_seconds=sum(part.decode_seconds for part in parts),
        kept=tuple(tuple(map(fmean, zip(*layer, strict=True))) for layer in layers),
    )
