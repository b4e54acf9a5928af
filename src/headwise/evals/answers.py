"""Answer questions from a cache: ours, or transformers' own, which is the yardstick called "full"."""

import copy
import time
from collections.abc import Sequence
from itertools import product
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from headwise.cache.compress import Progress, compress
from headwise.cache.prefill import make_plan
from headwise.cache.states import held_by
from headwise.cache.ways import how
from headwise.errors import BadInput, BudgetInfeasible
from headwise.evals.oracle import as_method
from headwise.kernels.quantised import NATIVE
from headwise.methods.keep import Keep, parse_keep
from headwise.methods.method import Method
from headwise.methods.names import require_names
from headwise.methods.reading import EXACT
from headwise.methods.registry import FULL as FULL
from headwise.methods.registry import ORACLE
from headwise.models.families import end_tokens, given, view
from headwise.tasks.document import Tokens

TIMED_STEPS = 24
COPIED_BYTES = 2**30  # copies of a full cache that answer() makes at a time


@runtime_checkable
class Memory(Protocol):
    """A context that has been read, and can be continued any number of times."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in storage."""
        ...

    @property
    def sliding_nbytes(self) -> int:
        """Bytes of the sliding-window layers, which are left whole."""
        ...

    @property
    def peak_nbytes(self) -> int:
        """Most bytes of keys and values held at once so far."""
        ...

    def fork(self, copies: int = 1) -> Cache:
        """Return a transformers cache that continues from here on its own."""
        ...


class FullMemory:
    """The full cache: transformers' DynamicCache, with the model's own attention.

    Where attention goes through headwise already, it is transformers' SDPA, as for any cache that is not ours.
    """

    def __init__(self, model: PreTrainedModel, context: Int[Tensor, "1 tokens"], chunk_size: int | None = None):
        self.cache, self.device = DynamicCache(config=model.config), context.device
        with torch.no_grad():
            for piece in context.split(chunk_size or context.shape[1], dim=-1):
                model(piece, **given(model, self.cache), use_cache=True, logits_to_keep=1)
        layers: Any = self.cache.layers
        for layer in layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # not views of larger tensors
        sizes = [sum(x.untyped_storage().nbytes() for x in held_by(layer)) for layer in layers]
        self.nbytes = self.peak_nbytes = sum(sizes)
        self.sliding_nbytes = self.nbytes - sum(sizes[i] for i in view(model).shape.layers)

    def fork(self, copies: int = 1) -> Cache:
        """Return a copy. Layers replace keys and values when they grow, so copies may share them; not so states."""
        cache = copy.copy(self.cache)
        cache.layers = [
            copy.copy(layer) if hasattr(layer, "keys") else copy.deepcopy(layer) for layer in self.cache.layers
        ]
        if copies > 1:
            first: Any = torch.zeros(copies, dtype=torch.int64, device=self.device)
            cache.reorder_cache(first)  # states cannot be repeated in another way
        return cache


def known_methods(methods: Sequence[str], *, oracle: bool = False) -> None:
    """Raise BadInput unless there are methods, and each is "full" or can be parsed. `oracle`: allow "oracle", too."""
    require_names(methods, oracle=oracle)
    for method in methods:
        if method != FULL and not (oracle and method == ORACLE):
            Method.parse(method)


def require_possible(
    model: PreTrainedModel,
    methods: Sequence[str],
    keeps: Sequence[float | str | Keep],
    tokens: Tokens,
    *,
    entries: Sequence[str] = (NATIVE,),
    reading: str = EXACT,
    oracle: bool = False,
) -> None:
    """Raise an error if one of the methods could not compress the context at one of the keeps. Reads nothing.

    `oracle`: allow "oracle" among the methods. Raises BadInput, ArtifactMismatch, UnsupportedModel or BudgetInfeasible.
    """
    known_methods(methods, oracle=oracle and reading == EXACT)
    model_view, length = view(model), tokens.context.shape[1]
    for name in methods:
        if name == FULL:
            continue
        method = as_method(name).for_model(model_view.shape, model_view.config_hash)
        model_view.require_parts(method.scorer, method.allocator)
        how(reading)[0].require(method.scorer)
        for keep, stored in product(keeps, entries):
            try:
                make_plan(
                    method,
                    parse_keep(keep),
                    shape=model_view.shape,
                    itemsize=model.dtype.itemsize,
                    entries=stored,
                    valid=torch.ones(1, length, dtype=torch.bool, device="cpu"),
                    positions=torch.arange(length, dtype=torch.int64, device="cpu")[None],
                )
            except BudgetInfeasible as error:
                asked = f"keep={keep}" if stored == NATIVE else f"keep={keep}, entries={stored}"
                raise BudgetInfeasible(f"{name} cannot work with {asked}: {error}") from error


def read_context(
    model: PreTrainedModel,
    context: Int[Tensor, "1 tokens"],
    method: str | Method,
    keep: float | str | Keep,
    *,
    entries: str = NATIVE,
    prefill_chunk_size: int | None = None,
    reading: str = EXACT,
    progress: Progress | None = None,
) -> Memory:
    """Read a context and return its cache, compressed by a method, or full for "full", whatever the reading."""
    if method == FULL:
        return FullMemory(model, context, prefill_chunk_size)
    return compress(
        model,
        context,
        method,
        keep=keep,
        entries=entries,
        prefill_chunk_size=prefill_chunk_size,
        reading=reading,
        progress=progress,
    )


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: Memory,
    tokens: Tokens,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    streamer: Any = None,
) -> list[str]:
    """Return greedy answers to every question, as texts; see `answer_tokens` and `as_texts`."""
    (answers,) = answer_tokens(
        model, tokenizer, memory, tokens, max_new_tokens=max_new_tokens, batch_size=batch_size, streamer=streamer
    )
    return as_texts(tokenizer, answers)


def answer_tokens(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: Memory,
    tokens: Tokens,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    contexts: int = 1,
    streamer: Any = None,
) -> list[list[Int[Tensor, " _"]]]:
    """Return greedy answers to every question, by context and question. Each is asked right after the context.

    `memory` may join several `contexts`, which are all asked the same. At most `batch_size` questions are asked
    together. They share the compressed context; only what comes after it is stored per question. (The full cache is
    copied for each question, so COPIED_BYTES limit the batch.) On a model with sliding-window layers only questions of
    one length are asked together: padding would push tokens of the context out of the window. An answer ends with its
    end token, or at the model's last position. Raises BadInput if a question leaves no room for an answer.
    """
    max_new_tokens = min(max_new_tokens, room_for_answers(model, tokens))
    batch_size = min(batch_size, COPIED_BYTES // memory.nbytes) if isinstance(memory, FullMemory) else batch_size
    pad, ends = padding_token(tokenizer), end_tokens(model)
    answers: list[dict[int, Tensor]] = [{} for _ in range(contexts)]
    for batch in question_batches(model, tokens, max(1, batch_size // contexts)):
        ids, mask = follow(tokens.context, [tokens.questions[i] for i in batch], pad)
        generated = cast(Any, model).generate(
            ids.repeat(contexts, 1),
            attention_mask=mask.repeat(contexts, 1),
            **given(model, memory.fork(copies=len(batch))),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            streamer=streamer,
        )
        rows = [_until_end(row, ends) for row in generated[:, ids.shape[1] :]]
        for number, context_answers in enumerate(answers):
            context_answers |= zip(batch, rows[number * len(batch) :], strict=False)
    return [[context_answers[i] for i in range(len(tokens.questions))] for context_answers in answers]


def as_texts(tokenizer: Any, answers: Sequence[Int[Tensor, " _"]]) -> list[str]:
    """Return the answers as texts without special tokens. Spaces around them stay: code begins with indentation."""
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def _until_end(ids: Int[Tensor, " new"], ends: Sequence[int]) -> Int[Tensor, " _"]:
    """Return the ids up to the first end token, which is included."""
    stops = torch.isin(ids, torch.tensor(ends, device=ids.device, dtype=torch.int64)).nonzero()
    return ids[: int(stops[0]) + 1] if len(stops) else ids


def room_for_answers(model: PreTrainedModel, tokens: Tokens) -> int:
    """Return how many tokens fit between the longest question and the model's last position.

    Raises BadInput if none does.
    """
    limit, context = view(model).max_positions, tokens.context.shape[1]
    question = max(len(question) for question in tokens.questions)
    if context + question >= limit:
        raise BadInput(
            f"the context has {context} tokens and the longest question {question}, but this model was made for "
            f"{limit}, the answer included. Shorten the context, or configure rope scaling on the model."
        )
    return limit - context - question


@torch.no_grad()
def time_decoding(model: PreTrainedModel, memory: Memory, tokens: Tokens) -> float:
    """Return the median milliseconds of a decoding step of one sequence, after the first question."""
    cache, ids = memory.fork(), tokens.questions[0][None]
    times = []
    for _ in range(TIMED_STEPS):
        _synchronize(model)
        start = time.perf_counter()
        logits = model(ids, **given(model, cache), use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        _synchronize(model)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[2:])[len(times[2:]) // 2]  # the question and a warm-up step apart


def question_batches(model: PreTrainedModel, tokens: Tokens, batch_size: int) -> list[list[int]]:
    """Return batches of the numbers of questions that are asked together."""
    shape = view(model).shape
    groups: dict[int, list[int]] = {}
    for i, question in enumerate(tokens.questions):
        groups.setdefault(len(question) if len(shape.layers) < shape.num_layers else 0, []).append(i)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def padding_token(tokenizer: Any) -> int:
    """Return the token to fill rows with. It is masked before a question, and not shown after an answer."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def follow(context: Tensor, questions: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return the ids [context | padding | question] of every question, and their attention mask."""
    longest = max(len(question) for question in questions)
    ids = context.new_full((len(questions), longest), pad)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = question
        mask[row, longest - len(question) :] = 1
    contexts = context.expand(len(questions), -1)
    return torch.cat([contexts, ids], dim=-1), torch.cat([torch.ones_like(contexts), mask], dim=-1)


def _synchronize(model: PreTrainedModel) -> None:
    device = view(model).device  # where logits come out, which wait for all others
    if device.type == "cuda":
        torch.cuda.synchronize(device)
