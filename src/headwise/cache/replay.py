"""Reading a context, and a second time where a scorer asks for it: the model repeats the context (KVzip)."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.cache.cache import RaggedCache
from headwise.cache.context import NO_IMAGES, forward, require_filled
from headwise.cache.prefill import Prefill
from headwise.errors import BadInput
from headwise.interfaces import Replay
from headwise.models.families import TOO_LONG, ModelView


def fill(
    cache: RaggedCache,
    model_view: ModelView,
    input_ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"],
    size: int,
    progress: Callable[[int, int], None],
    images: Mapping[str, Tensor] = NO_IMAGES,
) -> None:
    """Read the context in pieces of `size` tokens, then once more where a scorer asks for it.

    Raises BadInput for pieces of a context with images.
    """
    prefill, length = cache.prefill, input_ids.shape[1]
    if images and size < length:
        raise BadInput(
            f"a context with images is read in one piece, and prefill_chunk_size={size} is less than its {length} "
            "tokens: leave prefill_chunk_size out."
        )
    assert prefill is not None
    replay = fitting(prefill.replay, model_view.max_positions, int(mask.sum(-1).max()))
    for start in range(0, length, size):
        stop = min(length, start + size)
        forward(model_view.model, input_ids[:, start:stop], mask[:, :stop], cache, images)
        require_filled(cache, stop)
        progress(stop, length * (2 if replay else 1))
    if replay is not None:
        repeat(model_view, input_ids, mask, cache, prefill, replay, progress)


def repeat(
    model_view: ModelView,
    ids: Tensor,
    mask: Tensor,
    cache: RaggedCache,
    prefill: Prefill,
    replay: Replay,
    progress: Callable[[int, int], None],
) -> None:
    """Let the model repeat the context chunk by chunk, then have the cache cut."""
    length = ids.shape[1]
    with model_view.unchanged():
        for start in range(0, length, replay.chunk_size):
            stop = min(length, start + replay.chunk_size)
            prefix, prefix_mask = _instruction(replay, ids, mask, start)
            prefill.start_replay(start, stop)
            repeated = torch.cat([prefix, ids[:, start:stop]], dim=-1)
            visible = torch.cat([mask, prefix_mask, mask[:, start:stop]], dim=-1)
            with cache.aside():
                forward(model_view.model, repeated, visible, cache)
            progress(length + stop, 2 * length)
        prefill.finish_replay()


def fitting(replay: Replay | None, limit: int, tokens: int) -> Replay | None:
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
