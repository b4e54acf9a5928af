"""The online flow: read a context once, keep what the method keeps, and hand back a cache to ask questions of."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.kept import tokens_fingerprint
from headwise.cache.listener import Listener
from headwise.cache.prefill import Prefill
from headwise.errors import BadInput, ShapeMismatch, UnsupportedModel
from headwise.interfaces import Replay
from headwise.methods.keep import Keep
from headwise.methods.method import AUTO, Method
from headwise.models.families import TOO_LONG, ModelView, given, view

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
    progress: Progress | None = None,
    listeners: Sequence[Listener] = (),
) -> RaggedCache:
    """Read a context and keep only what `method` keeps of it, before any question is seen (query-agnostic).

    >>> cache = headwise.compress(model, context_ids, "snapkv+adakv", keep=0.15)
    >>> model.generate(**cache.inputs(question_ids))

    "auto" is the default method of this model (method.choose); `cache.provenance` says which it was.
    A batch of contexts of different lengths is padded on the left, with its `attention_mask`; padding is not stored.
    `prefill_chunk_size` reads the context in pieces of that many tokens: less activation memory, the same selection,
    but every layer stays whole until the last piece. A scorer that repeats the context (KVzip) does so in smaller
    chunks than it asks for where its own would go beyond the model's longest sequence. `progress` is called with
    (tokens read, tokens in all). `listeners` hear what passes through the layers, and go on listening.

    Raises BadInput, ShapeMismatch, UnsupportedModel, BudgetInfeasible, NonFiniteValues.
    """
    model_view = view(model)
    mask = _checked_mask(model_view, input_ids, attention_mask)
    if prefill_chunk_size is not None and prefill_chunk_size < 1:
        raise BadInput(f"prefill_chunk_size={prefill_chunk_size} must be at least 1 token, or None for all at once.")
    length = input_ids.shape[1]
    cache = RaggedCache(model_view, method, keep=keep, prompt_length=length, kernel=kernel, replays=True)
    for listener in listeners:
        cache.listen(listener)
    _fill(cache, model_view, input_ids, mask, prefill_chunk_size or length, progress or _silent)
    cache.tokens_fingerprint = tokens_fingerprint(input_ids, mask)
    return cache


def _silent(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _fill(
    cache: RaggedCache,
    model_view: ModelView,
    input_ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    size: int,
    progress: Progress,
) -> None:
    """Read the context in pieces of `size` tokens, then once more where the scorer replays it."""
    prefill, length = cache.prefill, input_ids.shape[1]
    assert prefill is not None
    replay = _fitting(prefill.replay, model_view.max_positions, int(mask.sum(-1).max()))
    steps = length * (2 if replay else 1)
    for start in range(0, length, size):
        stop = min(length, start + size)
        _forward(model_view.model, input_ids[:, start:stop], mask[:, :stop], cache)
        _require_filled(cache, stop)
        progress(stop, steps)
    if replay is not None:
        with model_view.unchanged():
            _replay(model_view.model, input_ids, mask, cache, prefill, replay, progress)


def _require_filled(cache: RaggedCache, tokens: int) -> None:
    """Raise UnsupportedModel if the model did not put its keys and values into the cache that it was given."""
    if cache.get_seq_length() != tokens:
        raise UnsupportedModel(
            f"the model was given {tokens} tokens and put {cache.get_seq_length()} into the cache: something around it "
            "uses a cache of its own or adds tokens, as prefix and prompt tuning do. Use a model without that."
        )


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: RaggedCache) -> None:
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **given(model, cache),
        use_cache=True,
        logits_to_keep=1,
    )


def _replay(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: RaggedCache,
    prefill: Prefill,
    replay: Replay,
    progress: Progress | None,
) -> None:
    """Let the model repeat the context in chunks, so that the scorer sees what it looks at (KVzip)."""
    length = ids.shape[1]
    for start in range(0, length, replay.chunk_size):
        stop = min(length, start + replay.chunk_size)
        prefix, prefix_mask = _instruction(replay, ids, mask, start)
        prefill.start_replay(start, stop)
        repeated = torch.cat([prefix, ids[:, start:stop]], dim=-1)
        _forward(model, repeated, torch.cat([mask, prefix_mask, mask[:, start:stop]], dim=-1), cache)
        if progress is not None:
            progress(length + stop, 2 * length)
    prefill.finish_replay()


def _fitting(replay: Replay | None, limit: int, tokens: int) -> Replay | None:
    """The replay with chunks so small that context, instruction and chunk stay within the model's positions."""
    if replay is None:
        return None
    room = limit - tokens - replay.overlap - len(replay.instruction)
    if room < 1:
        raise BadInput(
            f"the context has {tokens} tokens and this model was made for {limit}, which leaves no room to repeat it "
            f"after {len(replay.instruction)} tokens of instruction and {replay.overlap} of overlap. {TOO_LONG}"
        )
    return replace(replay, chunk_size=min(replay.chunk_size, room))


def _instruction(replay: Replay, ids: Tensor, mask: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What precedes a repeated chunk: the instruction and the end of the chunk before."""
    words = ids.new_tensor(replay.instruction).expand(ids.shape[0], -1)
    before = slice(max(0, start - replay.overlap), start)
    return (
        torch.cat([words, ids[:, before]], dim=-1),
        torch.cat([torch.ones_like(words, dtype=mask.dtype), mask[:, before]], dim=-1),
    )


def _checked_mask(seen: ModelView, ids: Any, mask: Tensor | None) -> Tensor:
    _require_ids(seen, ids)
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ShapeMismatch(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}.")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise BadInput("attention_mask must be 1 at tokens and 0 at padding; it holds other values.")
    tokens = int(mask.sum(-1).max())
    seen.require_positions(tokens, f"has {tokens} tokens")
    return mask.long()


def _require_ids(seen: ModelView, ids: Any) -> None:
    """Raise BadInput or ShapeMismatch unless these are ids of tokens that the model knows, where the model is."""
    if not isinstance(ids, Tensor):
        raise BadInput(
            f"input_ids is a {type(ids).__name__}; expected a tensor [batch, tokens], such as "
            "tokenizer(text, return_tensors='pt').input_ids."
        )
    if ids.ndim != 2 or ids.shape[0] == 0:
        raise ShapeMismatch(f"input_ids must be [batch, tokens]; got shape {tuple(ids.shape)}.")
    if ids.shape[1] == 0:
        raise BadInput("the context is empty: input_ids has no tokens.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise BadInput(f"input_ids are {ids.dtype}; token ids are int64 or int32.")
    if ids.device != seen.model.device:
        raise BadInput(
            f"input_ids are on {ids.device}, the model is on {seen.model.device}: use input_ids.to(model.device)."
        )
    embedding: Any = seen.model.get_input_embeddings()
    known = embedding.weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= known:
        raise BadInput(
            f"input_ids go from {int(ids.min())} to {int(ids.max())}; this model knows 0 to {known - 1}. Is the "
            "tokenizer that of the model?"
        )
