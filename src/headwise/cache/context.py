"""A context: what it must be, and one pass of the model over a part of it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.errors import BadInput, ShapeMismatch, UnsupportedModel
from headwise.models.families import ModelView, given
from headwise.models.grids import holder_of

NO_IMAGES: Mapping[str, Tensor] = MappingProxyType({})


def forward(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: RaggedCache, images: Mapping[str, Tensor] = NO_IMAGES
) -> None:
    """Let the model read the tokens `ids`, the last ones of those that `mask` covers, and `images`, into `cache`."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    on_grid = images and holder_of(model) is not None  # where the model works positions out itself
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=None if on_grid else positions,
        **images,
        **given(model, cache),
        use_cache=True,
        logits_to_keep=1,
    )


def require_filled(cache: RaggedCache, tokens: int) -> None:
    """Raise UnsupportedModel if the model did not put its keys and values into the cache that it was given."""
    if cache.get_seq_length() != tokens:
        raise UnsupportedModel(
            f"the model was given {tokens} tokens and put {cache.get_seq_length()} into the cache: something around it "
            "uses a cache of its own or adds tokens, as prefix and prompt tuning do. Use a model without that."
        )


def checked_mask(
    model_view: ModelView, ids: Any, mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None
) -> Int[Tensor, "batch tokens"]:
    """The mask of a context, 1 at tokens and 0 at padding; all ones if there is none.

    Raises BadInput or ShapeMismatch unless `ids` and `mask` fit each other and the model.
    """
    _require_ids(model_view, ids)
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ShapeMismatch(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}.")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise BadInput("attention_mask must be 1 at tokens and 0 at padding; it holds other values.")
    tokens = int(mask.sum(-1).max())
    model_view.require_positions(tokens, f"has {tokens} tokens")
    return mask.long()


def _require_ids(model_view: ModelView, ids: Any) -> None:
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
    if ids.device != model_view.device:
        raise BadInput(
            f"input_ids are on {ids.device}, the model takes them on {model_view.device}: use "
            f"input_ids.to({str(model_view.device)!r})."
        )
    embedding: Any = model_view.model.get_input_embeddings()
    known = embedding.weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= known:
        raise BadInput(
            f"input_ids go from {int(ids.min())} to {int(ids.max())}; this model knows 0 to {known - 1}. Is the "
            "tokenizer that of the model?"
        )
