"""Importance of every entry for every question, by what profiles are made with; compared with the paper's formula."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.whole import require_whole
from headwise.offline.watch import Importance, Sampling, decode


def entry_importance(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " _"]],
    *,
    steps: int = 64,
    normalization: Literal["layer", "none"] = "layer",
    sampling: Sampling | None = None,
    batch_size: int = 8,
) -> Float[Tensor, "questions layers kv_heads tokens"]:
    """Importance of every entry of a wholly kept context for every question, float32.

    "layer" divides ||v W_O|| by its sum over the layer, as the authors' code does; "none" is the formula of the paper.
    Raises BadInput.
    """
    require_whole(whole)
    importance = Importance(whole)
    answered = decode(model, whole, questions, [importance], steps=steps, sampling=sampling, batch_size=batch_size)
    found = torch.cat([importance.take() for _ in answered])
    return found / importance.scale[:, None, None] if normalization == "layer" else found
