"""The online flow: read a context once, keep what the method keeps, and hand back a cache to ask questions of."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.context import checked_mask, forward, require_filled
from headwise.cache.kept import tokens_fingerprint
from headwise.cache.listener import Listener
from headwise.cache.replay import fitting, repeat
from headwise.errors import BadInput
from headwise.kernels.quantised import NATIVE
from headwise.methods.keep import Keep
from headwise.methods.method import Method
from headwise.methods.registry import AUTO
from headwise.models.families import ModelView, view

Progress = Callable[[int, int], None]


@torch.no_grad()
def compress(
    model: PreTrainedModel | ModelView,
    input_ids: Int[Tensor, "batch tokens"],
    method: str | Method = AUTO,
    *,
    keep: float | str | Keep,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    prefill_chunk_size: int | None = None,
    kernel: str = "auto",
    entries: str = NATIVE,
    progress: Progress | None = None,
    listeners: Sequence[Listener] = (),
) -> RaggedCache:
    """Read a context and keep only what `method` keeps of it, before any question is seen (query-agnostic).

    >>> cache = headwise.compress(model, context_ids, "snapkv+adakv", keep=0.15)
    >>> model.generate(**cache.inputs(question_ids))

    Parameters
    ----------
    model
        A causal language model of transformers.
    input_ids
        Token ids of the contexts. Shorter rows of a batch are padded on the left; padding is not stored.
    method
        `scorer+allocator`, a short name, or a Method. "auto" is the default of this model; `cache.provenance` says
        which it was.
    keep
        What is kept of all entries: a fraction (0.15), tokens per head ("1024tok"), or bytes ("2GiB"; "5%bytes" of what
        all entries take in the model's dtype).
    attention_mask
        1 at tokens, 0 at padding. None: no padding.
    prefill_chunk_size
        Read the context in pieces of so many tokens. That takes less memory for activations and keeps the same
        entries, but every layer stays whole until the last piece. None: all at once.
    kernel
        What decodes: "auto", or a name that `headwise doctor` lists.
    entries
        How kept entries are stored: "native" in the model's dtype, "int8", "k8v4" (keys in 8 bits, values in 4) or
        "int4"; with "auto" a `lukv` budget chooses for every head. The first 4 tokens and the tail are always native.
    progress
        Called with (tokens read, tokens in all).
    listeners
        They hear what passes through the layers, and go on listening.

    Returns
    -------
    RaggedCache
        To be continued by `generate`; `fork()` it for every question.

    Raises
    ------
    BadInput, ShapeMismatch
        What was given does not fit the model, or a method does not exist.
    UnsupportedModel, UnsupportedGeneration
        The model cannot be served, or its context cannot be read as the method needs it.
    BudgetInfeasible
        `keep` is less than every head must keep.
    NonFiniteValues
        Keys, values or scores are not finite.
    """
    model_view = view(model)
    mask = checked_mask(model_view, input_ids, attention_mask)
    if prefill_chunk_size is not None and prefill_chunk_size < 1:
        raise BadInput(f"prefill_chunk_size={prefill_chunk_size} must be at least 1 token, or None for all at once.")
    length = input_ids.shape[1]
    cache = RaggedCache(
        model_view, method, keep=keep, prompt_length=length, kernel=kernel, entries=entries, replays=True
    )
    for listener in listeners:
        cache.listen(listener)
    _fill(cache, model_view, input_ids, mask, prefill_chunk_size or length, progress or (lambda done, total: None))
    cache.tokens_fingerprint = tokens_fingerprint(input_ids, mask)
    return cache


def _fill(
    cache: RaggedCache,
    model_view: ModelView,
    input_ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"],
    size: int,
    progress: Progress,
) -> None:
    """Read the context in pieces of `size` tokens, then once more where a scorer asks for it."""
    prefill, length = cache.prefill, input_ids.shape[1]
    assert prefill is not None
    replay = fitting(prefill.replay, model_view.max_positions, int(mask.sum(-1).max()))
    for start in range(0, length, size):
        stop = min(length, start + size)
        forward(model_view.model, input_ids[:, start:stop], mask[:, :stop], cache)
        require_filled(cache, stop)
        progress(stop, length * (2 if replay else 1))
    if replay is not None:
        repeat(model_view, input_ids, mask, cache, prefill, replay, progress)
