"""The online flow: read a context once, keep what the method keeps, and hand back a cache to ask questions of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.context import checked_mask
from headwise.cache.kept import tokens_fingerprint
from headwise.cache.listener import Listener
from headwise.cache.replay import fill
from headwise.kernels.quantised import NATIVE
from headwise.methods.keep import Keep
from headwise.methods.method import Method
from headwise.methods.reading import EXACT, piece_size
from headwise.methods.registry import AUTO
from headwise.models.families import ModelView, view
from headwise.models.images import images_in

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
    reading: str = EXACT,
    kernel: str = "auto",
    entries: str = NATIVE,
    progress: Progress | None = None,
    listeners: Sequence[Listener] = (),
    **images: Any,
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
        `scorer+allocator`, a short name, or a Method. "auto" is this model's default; `cache.provenance` names it.
    keep
        A fraction of all entries (0.15), tokens per head ("1024tok") or bytes ("2GiB"; "5%bytes" of what all take).
    attention_mask
        1 at tokens, 0 at padding. None: no padding.
    prefill_chunk_size
        Read the context in pieces of so many tokens, which takes less memory for activations. None: all at once, or
        pieces of 2048 tokens where `reading` is not "exact".
    reading
        "exact": every layer stays whole until the last piece. "evict": after every piece a layer keeps what the budget
        allows and half as much again, and later pieces attend to that; not every scorer can. "offload": exact, but
        layers that are not at work wait outside of memory. See docs/python.md.
    kernel
        What decodes: "auto", or a name that `headwise doctor` lists.
    entries
        How kept entries are stored: "native" in the model's dtype, "int8", "k8v4" (keys in 8 bits, values in 4) or
        "int4"; with "auto" a `lukv` budget chooses for every head. The first 4 tokens and the tail are always native.
    progress
        Called with (tokens read, tokens in all).
    listeners
        They hear what passes through the layers, and go on listening.
    images
        `compress(model, **processor(text=..., images=..., return_tensors="pt"), method=..., keep=...)`, in one piece.

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
    shown = images_in(model_view.model, input_ids, images)
    length = input_ids.shape[1]
    asked = length if shown and prefill_chunk_size is None else prefill_chunk_size
    size = piece_size(reading, asked, length)
    options = {"kernel": kernel, "entries": entries, "reading": reading, "replays": True}
    cache = RaggedCache(model_view, method, keep=keep, prompt_length=length, **options)
    for listener in listeners:
        cache.listen(listener)
    fill(cache, model_view, input_ids, mask, size, progress or (lambda done, total: None), shown)
    cache.tokens_fingerprint = tokens_fingerprint(input_ids, mask, shown)
    return cache
