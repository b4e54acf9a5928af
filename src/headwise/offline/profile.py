"""The first half of LU-KV (arXiv 2602.08585): measure what every head gains by how much it keeps.

For every calibration context there is one prefill, in which the scorers see the context only. Then later queries show
what each head would lose if it had kept only its best entries by a scorer (losses.py). Later queries come from one or
more futures:

    answers    every decoding step of every answer to its questions, from the full cache: LU-KV's
    repeat     the model reads the context again after an instruction to repeat it, as KVzip (arXiv 2505.23416) does:
               every entry is asked for once, for the cost of one pass
    following  the model reads the text that really comes next

Futures and questions are POOLED before anything is solved: importance by its maximum, changes of the output by their
sum. Averaging solutions per question, as published, underfunds the heads that few questions need; `published` records
those too. Memory: the full cache of one context and a few numbers per entry, O(context).

Every context is measured into a file of its own beside the profile, which is why a killed run goes on where it was, why
several processes can share the work, and why neither changes the result: the parts are merged in the data's order.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.artifacts.contents import LOSSES, part_table, sizes_of
from headwise.artifacts.origin import Origin
from headwise.artifacts.parts import Parts
from headwise.artifacts.profile import Profile
from headwise.artifacts.tensors import fingerprint, opened, write_tensors
from headwise.cache.cache import RaggedCache
from headwise.cache.reading import can_watch, read
from headwise.errors import BadInput
from headwise.files.locks import lock_of, locked
from headwise.files.schema import Schema
from headwise.files.writing import remove_leftovers, require_file
from headwise.interfaces import AbstractScorer
from headwise.kernels.quantised import ENTRIES, NATIVE, Bits, parse_entries
from headwise.methods.allocate.profiled import published_counts
from headwise.methods.method import Method
from headwise.methods.scores.reconstruct import INSTRUCTION
from headwise.models.families import view
from headwise.models.fingerprint import model_fingerprint
from headwise.models.processes import Processes
from headwise.models.room import require_room
from headwise.offline.calibration import Example, encode
from headwise.offline.losses import PER_OCTAVE, RANKS, OutputLoss, Stored, keeping_order, marginal_utility
from headwise.offline.watch import Importance, Reader, Sampling, Written, decode, follow
from headwise.tasks.seams import following_ids

CURVES = (*LOSSES, "ideal")  # besides, one for every kind of entries in fewer bits that is asked for
FUTURES = ("answers", "repeat", "following")
PIECE, OVERLAP = 1024, 8  # tokens of a text that are read in one pass, and of the piece before that come first


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How losses are measured; part of the profile's provenance.

    Attributes
    ----------
    steps
        Tokens of an answer that are decoded.
    sampling
        How answers are decoded.
    sink, window
        First and last tokens that every head keeps first, more where the scorer protects more. How many of
        them a head gets is solved.
    published
        Whether every question is solved by itself, too.
    futures
        What later queries come from, of FUTURES.
    queries
        How many evenly spread queries count, of every 1,024 tokens that are read as a future.
    entries
        Kinds of entries whose changes of the output are measured: "native", which always is, "int8", "k8v4", "int4".

    Raises
    ------
    BadInput
        If a future or a kind of entries is unknown or there is none, or a number is out of range.
    """

    steps: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    sink: int = 4
    window: int = 32
    published: bool = False
    futures: tuple[str, ...] = ("answers",)
    queries: int = 128
    entries: tuple[str, ...] = (NATIVE,)

    def __post_init__(self) -> None:
        unknown = [future for future in self.futures if future not in FUTURES]
        if unknown or not self.futures:
            raise BadInput(f"future={','.join(self.futures)!r}: choose one or more of {', '.join(FUTURES)}.")
        for kind in self.entries:
            parse_entries(kind)
        if self.queries < 1:
            raise BadInput(f"queries={self.queries}: at least one query of a text must count.")
        if self.published and "answers" not in self.futures:
            raise BadInput("published solves every question by itself: it needs the future 'answers'.")

    @property
    def kinds(self) -> dict[str, Bits]:
        """Return the kinds of entries in fewer bits, always in one order."""
        return {kind: bits for kind, bits in ENTRIES.items() if kind in self.entries}

    @property
    def curves(self) -> tuple[str, ...]:
        """Return the names of a scorer's curves."""
        return (*CURVES, *self.kinds)

    def protection(self, scorer: AbstractScorer) -> tuple[int, int]:
        """Return sink and window of a scorer, in tokens."""
        return max(self.sink, scorer.sink), max(self.window, scorer.window)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FutureText:
    """A text that the model reads after the context, in one pass; the queries of its own tokens count."""

    opening: Int[Tensor, " _"]  # comes before it and does not count, but for its last token
    text: Int[Tensor, " _"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lesson:
    """An example as tokens: a context, and its futures."""

    context: Int[Tensor, "1 tokens"]
    questions: tuple[Int[Tensor, " _"], ...]  # to be answered; none where answers do not count
    texts: tuple[FutureText, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, which tell it from other lessons."""
        texts = (part for future in self.texts for part in (future.opening, future.text))
        return (self.context, *self.questions, *texts)


def default_futures(tokenizer: Any, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the futures to use: answers alone for the bundled model's language, else all that the examples have."""
    if not _knows_english(tokenizer):
        return ("answers",)
    has_following = any(getattr(example, "following", "") for example in examples)
    return FUTURES if has_following else ("answers", "repeat")


def default_steps(futures: Sequence[str]) -> int:
    """Return how many tokens to decode per question: as published for answers alone, fewer if texts count, too."""
    return 64 if tuple(futures) == ("answers",) else 8


def _knows_english(tokenizer: Any) -> bool:
    ids = tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def profile(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    scorers: Sequence[str],
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    processes: Processes | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> None:
    """Measure every example for every scorer, and write the Profile `out` (LU-KV, arXiv 2602.08585).

    Every example is written to a part beside `out`, so a killed run goes on where it was. Parts of another model, other
    settings or other scorers are not used.

    Parameters
    ----------
    examples
        What `load_examples` returns.
    scorers
        Names of scorers.
    out
        The file to write.
    settings
        How losses are measured; None: the defaults.
    processes
        Share the examples and `out`. Other runs are kept out.
    progress
        Is called with (contexts done, contexts in all) of this process.

    Raises
    ------
    BadInput
        Before any work, if there is no example or scorer, a scorer cannot be profiled, an example does not fit the
        model, or `out` cannot be written. Later, if a part is damaged.
    ArtifactMismatch
        If a part is no part.
    WriteFailed
        If the disk refuses a file.
    """
    settings, parts = settings or Settings(), Parts(out, "a profile")
    scorers_by_name = _scorers(scorers)
    if not examples:
        raise BadInput("there is nothing to profile: give at least one example.")
    require_file(out)
    processes = processes or Processes()
    with nullcontext() if processes.rank > 0 else locked(lock_of(out), out):
        if processes.rank == 0:
            parts.require()
        _profile(model, tokenizer, examples, scorers_by_name, out, parts, settings, processes, progress)


def _profile(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    scorers: dict[str, AbstractScorer],
    out: str | os.PathLike[str],
    parts: Parts,
    settings: Settings,
    processes: Processes,
    progress: Callable[[float, int], None],
) -> None:
    lessons = _lessons(model, tokenizer, examples, list(scorers.values()), settings)
    parameters = sorted((name, repr(scorer.provenance())) for name, scorer in scorers.items())
    run = fingerprint(model_fingerprint(model), repr((asdict(settings), parameters, RANKS, PER_OCTAVE)))
    files = [parts.file(run, *lesson.tensors()) for lesson in lessons]
    parts.make()

    def measure_part(index: int, report: Callable[[float], None]) -> None:
        metadata = {"run": run, "domain": examples[index].domain}
        _measure_part(model, lessons[index], scorers, settings, report, files[index], metadata)

    _measure_missing(files, processes.share(len(examples)), measure_part, progress)
    processes.catch_up()
    processes.wait()
    if processes.rank == 0:
        origin = _origin(model, run, files)
        _merge(files, [e.domain for e in examples], scorers, origin, settings, run).save(out)
        parts.remove()
        remove_leftovers(out)
    processes.wait()


def _measure_missing(
    files: Sequence[Path],
    share: Sequence[int],
    measure_part: Callable[[int, Callable[[float], None]], None],
    progress: Callable[[float, int], None],
) -> None:
    """Measure the examples that have no file yet; the others count as done at once."""
    share = sorted(share, key=lambda index: not files[index].is_file())
    for done, index in enumerate(share):
        if not files[index].is_file():
            progress(done, len(share))
            measure_part(index, partial(_report_progress, progress, done, len(share)))
    progress(len(share), len(share))


def _report_progress(progress: Callable[[float, int], None], done: int, total: int, fraction: float) -> None:
    progress(done + fraction, total)


def _measure_part(
    model: PreTrainedModel,
    lesson: Lesson,
    scorers: Mapping[str, AbstractScorer],
    settings: Settings,
    report: Callable[[float], None],
    file: Path,
    metadata: Mapping[str, str],
) -> None:
    """Measure one context and write it to a file of its own."""
    measured = measure(model, lesson, list(scorers.values()), settings, report)
    tensors = {f"{n}.{k}": t.float() for n, s in scorers.items() for k, t in measured[s].items()}
    write_tensors(file, "part", tensors, metadata)


def measure(
    model: PreTrainedModel,
    lesson: Lesson,
    scorers: Sequence[AbstractScorer],
    settings: Settings,
    report: Callable[[float], None] = lambda part: None,
) -> dict[AbstractScorer, dict[str, Tensor]]:
    """Return the curves of one context for every scorer [layers, kv_heads, sink + window + RANKS], float64.

    They are those of settings.curves; over all heads each of CURVES sums to 1, and that of a kind of entries has the
    unit of "output". If settings.published, also "published" [99, layers,
    kv_heads]: the kept fractions of the questions, each solved by itself, averaged. `report` is called with the share
    of the work that is done.
    """
    reading = read(model, lesson.context, scorers)
    protected = {scorer: sum(settings.protection(scorer)) for scorer in scorers}
    orders = {s: keeping_order(reading.scores[s][:, 0], *settings.protection(s)) for s in scorers}
    written = Written(reading.whole)
    importance = Importance(reading.whole, written)
    stored = {kind: Stored(reading.whole, bits, written) for kind, bits in settings.kinds.items()}
    outputs = {s: OutputLoss(reading.whole, orders[s], protected[s], written=written, stored=stored) for s in scorers}
    scale = importance.scale[:, None, None]
    pooled, solved = torch.zeros_like(scale), {scorer: [] for scorer in scorers}
    for questions in _futures(model, lesson, reading.whole, [importance, *outputs.values()], settings, report):
        importances = importance.take()
        pooled = torch.maximum(pooled, importances.amax(0))
        if settings.published and questions:
            for scorer in scorers:
                curves = marginal_utility(importances / scale, orders[scorer].expand_as(importances), protected[scorer])
                solved[scorer] += [published_counts(c, protected[scorer], lesson.context.shape[1]) for c in curves]
    measured: dict[AbstractScorer, dict[str, Tensor]] = {}
    for scorer in scorers:
        ideal = keeping_order(pooled, *settings.protection(scorer))
        curves = {
            "output": outputs[scorer].marginal(),
            "normalised": marginal_utility(pooled / scale, orders[scorer], protected[scorer]),
            "raw": marginal_utility(pooled, orders[scorer], protected[scorer]),
            "ideal": marginal_utility(pooled, ideal, protected[scorer]),
        }
        measured[scorer] = {name: _normalise(curve, curve) for name, curve in curves.items()}
        for kind in stored:
            measured[scorer][kind] = _normalise(outputs[scorer].marginal(kind), curves["output"])
        if settings.published:
            measured[scorer]["published"] = torch.stack(solved[scorer]).double().mean(0) / lesson.context.shape[1]
    return measured


def _futures(
    model: PreTrainedModel,
    lesson: Lesson,
    whole: RaggedCache,
    readers: Sequence[Reader],
    settings: Settings,
    report: Callable[[float], None],
) -> Iterator[bool]:
    """Show all futures to the readers. Yields after some questions (True) or a text (False)."""
    costs = [len(question) + settings.steps for question in lesson.questions]
    sizes = [len(future.opening) + len(future.text) for future in lesson.texts]
    done, work = lesson.context.shape[1], lesson.context.shape[1] + sum(costs) + sum(sizes)
    report(done / work)
    if lesson.questions:
        options = {"steps": settings.steps, "sampling": settings.sampling}
        for answered in decode(model, whole, lesson.questions, readers, **options):
            yield True
            done += sum(costs[answered.start : answered.stop])
            report(done / work)
    for future, size in zip(lesson.texts, sizes, strict=True):
        follow(model, whole, future.opening, future.text, readers, queries=settings.queries)
        yield False
        done += size
        report(done / work)


def _normalise(
    curve: Float[Tensor, "layers kv_heads steps"], whole: Float[Tensor, "layers kv_heads steps"]
) -> Float[Tensor, "layers kv_heads steps"]:
    """Return the curve as shares of all that can be gained, on the curve `whole`; zeros if nothing can."""
    total = whole.sum()
    return curve / total if total > 0 else torch.zeros_like(curve)


def _scorers(names: Sequence[str]) -> dict[str, AbstractScorer]:
    """Return scorers by name. Raises BadInput if there is none, or one is unknown or cannot watch a prefill."""
    scorers = {name: Method.parse(f"{name}+uniform").scorer for name in dict.fromkeys(names)}
    if not scorers:
        raise BadInput("there is nothing to profile: give at least one scorer.")
    for name, scorer in scorers.items():
        if not can_watch(scorer):
            raise BadInput(f"{name} cannot be profiled: it reads the context twice, or its scores depend on the keep.")
    return scorers


def _lessons(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    scorers: Sequence[AbstractScorer],
    settings: Settings,
) -> list[Lesson]:
    """Return the examples as tokens. Raises BadInput if one has no future, or does not fit the model."""
    if settings.steps < 1:
        raise BadInput("the oracle needs at least one step.")
    lessons = [_lesson(model, tokenizer, example, scorers, settings) for example in examples]
    for example, lesson in zip(examples, lessons, strict=True):
        if not lesson.questions and not lesson.texts:
            raise BadInput(
                f"nothing says what follows the context {example.context[:40]!r}: give it a text under 'following', or "
                "name another future."
            )
    return lessons


def _lesson(
    model: PreTrainedModel, tokenizer: Any, example: Example, scorers: Sequence[AbstractScorer], settings: Settings
) -> Lesson:
    """Return an example as tokens. Raises BadInput if they are too many for the model or too few for a scorer."""
    view(model).require_weights_together("headwise profile")
    limit = view(model).max_positions
    require_room(tokenizer, example.context, limit)
    context, questions = encode(tokenizer, example, device=model.device)
    answered = questions if "answers" in settings.futures else ()
    tokens = context.shape[1] + (max(len(q) for q in answered) + settings.steps if answered else 0)
    if tokens > limit:
        raise BadInput(
            f"a calibration context of {context.shape[1]} tokens, its longest question and {settings.steps} decoded "
            f"tokens need {tokens} positions, but this model was made for {limit}: {example.context[:40]!r}."
        )
    protected = max(sum(settings.protection(scorer)) for scorer in scorers)
    if context.shape[1] <= protected:
        raise BadInput(
            f"a calibration context of {context.shape[1]} tokens is no longer than the {protected} that are "
            f"protected: {example.context[:40]!r}."
        )
    texts = [
        piece
        for opening, text in _texts(tokenizer, example, context, questions, settings)
        for piece in _pieces(opening, text, limit - context.shape[1], example)
    ]
    return Lesson(context=context, questions=answered, texts=tuple(texts))


def _texts(
    tokenizer: Any,
    example: Example,
    context: Int[Tensor, "1 tokens"],
    questions: Sequence[Int[Tensor, " _"]],
    settings: Settings,
) -> Iterator[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]]:
    """Yield the opening and the text of everything that the model reads after the context."""
    if "repeat" in settings.futures:
        yield _instruction(tokenizer, example, context), context[0]
    following = getattr(example, "following", "") if "following" in settings.futures else ""
    if following:  # encode() takes the last token of a context without questions for a question
        opening = context[0, :0] if example.questions else questions[0]
        yield opening, context.new_tensor(following_ids(tokenizer, following, verbose=False))


def _pieces(opening: Int[Tensor, " _"], text: Int[Tensor, " _"], room: int, example: Example) -> Iterator[FutureText]:
    """Yield a text in pieces of equal size, each after the opening and the end of the piece before, as in KVzip.

    Raises BadInput if `room` tokens are too few.
    """
    largest = min(PIECE, room - len(opening) - OVERLAP)
    if largest < 2:
        raise BadInput(
            "a calibration context leaves no room to read a text after it; give the model a shorter one, or name "
            f"another future: {example.context[:40]!r}."
        )
    size = -(-len(text) // -(-len(text) // largest))
    for start in range(0, len(text), size):
        before = text[max(0, start - OVERLAP) : start]
        yield FutureText(opening=torch.cat([opening, before]), text=text[start : start + size])


def _instruction(tokenizer: Any, example: Example, context: Int[Tensor, "1 tokens"]) -> Int[Tensor, " _"]:
    """Return tokens that ask to repeat the context; none if the tokenizer does not know the words."""
    if not _knows_english(tokenizer):
        return context[0, :0]
    if example.questions:
        return encode(tokenizer, replace(example, questions=(INSTRUCTION,)), device=context.device)[1][0]
    return context.new_tensor(following_ids(tokenizer, f"\n\n{INSTRUCTION}\n\n"))


def _origin(model: PreTrainedModel, run: str, files: Sequence[Path]) -> Origin:
    model_view, name = view(model), model.config.name_or_path or ""
    return Origin(
        shape=model_view.shape,
        model=Path(name).name if Path(name).is_dir() else name,  # profiles are shared; where a model lay is not
        config_hash=model_view.config_hash,
        calibration=fingerprint(run, *(file.stem for file in files)),
    )


def _merge(
    files: Sequence[Path],
    domains: Sequence[str],
    scorers: dict[str, AbstractScorer],
    origin: Origin,
    settings: Settings,
    run: str,
) -> Profile:
    """Return the profile of all parts: mean curves per scorer and domain, summed in the order of the data."""
    schema = _part_schema(scorers, settings, origin)
    names, counts = list(dict.fromkeys(domains)), dict.fromkeys(domains, 0)
    total: dict[tuple[str, str], Tensor] = {}
    for file, domain in zip(files, domains, strict=True):
        with opened(file, "part") as part:
            if part.metadata.get("run") != run or part.metadata.get("domain") != domain:
                raise BadInput(f"{file} is damaged: it is not of this run and domain. {schema.advice}")
            tensors = part.read(schema)
        counts[domain] += 1
        for key, tensor in tensors.items():
            total[key, domain] = total[key, domain] + tensor if (key, domain) in total else tensor.double()

    def mean(key: str) -> Tensor:
        return torch.stack([total[key, d] / counts[d] for d in names]).float()

    return Profile(
        curves={name: {curve: mean(f"{name}.{curve}") for curve in settings.curves} for name in scorers},
        domains=tuple(names),
        contexts=tuple(counts[d] for d in names),
        protection={name: settings.protection(scorer) for name, scorer in scorers.items()},
        parameters={name: scorer.provenance() for name, scorer in scorers.items()},
        settings=asdict(settings),
        origin=origin,
        published={name: mean(f"{name}.published") for name in scorers if settings.published},
    )


def _part_schema(scorers: Mapping[str, AbstractScorer], settings: Settings, origin: Origin) -> Schema:
    """Return what the file of one context must hold."""
    ranks = {name: sum(settings.protection(scorer)) + RANKS for name, scorer in scorers.items()}
    return Schema(
        table=part_table(ranks, settings.curves, settings.published),
        sizes=sizes_of(origin.shape),
        advice="Remove it, and it is measured again.",
    )
