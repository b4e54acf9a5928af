"""What the model really looks at: the importance of every context entry for answers decoded from the full cache.

LU-KV (arXiv 2602.08585), the long-horizon utility of entry j of a KV head:

    I[j] = max over later decoding steps k and the query heads of the group of  A[k, j] * ||v_j W_O||_2

with A the softmax attention over everything in the cache at step k. Only true decoding steps count; the tokens of the
question are no future queries. Attention is never made for the whole context: one row per step, memory O(context).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.errors import BadInput
from headwise.layout import Segments
from headwise.ragged.cache import RaggedCache

Normalization = Literal["layer", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are decoded: greedily, or sampled at a temperature (the paper: 0.7) with a seed."""

    temperature: float = 0.0
    seed: int = 0


class Importance:
    """Collects the importance of one context's entries while questions on it are answered."""

    def __init__(self, whole: RaggedCache, normalization: Normalization = "layer"):
        layers = whole.ragged_layers
        if any(layer.segments is None or layer.segments.batch != 1 for layer in layers):
            raise BadInput("the importance of entries is measured on one context at a time, read and kept whole.")
        self.whole = whole
        self.norms = [_written_norms(whole, index, normalization) for index in range(len(layers))]  # [H, G, N]
        self.recording = False
        self.active: Tensor | None = None
        self.found: list[Tensor] = []  # per layer [questions, H, N]

    def fork(self, questions: int) -> RaggedCache:
        """A cache that answers `questions` questions side by side, and starts new records for them."""
        cache = self.whole.fork(copies=questions)
        heads, _, tokens = self.norms[0].shape
        device = self.norms[0].device
        self.found = [torch.zeros(questions, heads, tokens, device=device) for _ in self.norms]
        for layer in cache.ragged_layers:
            layer.kernel = partial(self._attend, layer.index, layer.kernel)
        return cache

    def _attend(
        self,
        layer: int,
        kernel: object,
        query: Float[Tensor, "batch kv_heads group queries head_dim"],
        segments: Segments,
        rows: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The layer's own attention; at a decoding step its weights on the context are noted as well."""
        assert callable(kernel)
        if self.recording:
            assert query.shape[3] == 1
            logits = torch.cat(
                [
                    torch.einsum(
                        "bhgd,hnd->bhgn", query[:, :, :, 0].float(), _by_head(segments.keys, segments).float()
                    ),
                    torch.einsum("bhgd,bhnd->bhgn", query[:, :, :, 0].float(), tail_keys.float()),
                ],
                dim=-1,
            )
            if mask is not None:
                hidden = ~mask[:, -1]
                logits[..., -mask.shape[-1] :].masked_fill_(hidden[:, None, None], -torch.inf)
            weights = (logits * scaling).softmax(-1)[..., : self.norms[layer].shape[-1]]
            useful = (weights * self.norms[layer]).amax(2)  # [batch, H, N]
            if self.active is not None:
                useful = useful * self.active[:, None, None]
            self.found[layer] = torch.maximum(self.found[layer], useful)
        return kernel(query, segments, rows, tail_keys, tail_values, mask, scaling)


@torch.no_grad()
def entry_importance(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " question_tokens"]],
    *,
    steps: int = 64,
    normalization: Normalization = "layer",
    sampling: Sampling | None = None,
    batch_size: int = 16,
) -> Float[Tensor, "questions layers kv_heads tokens"]:
    """Importance of every entry of a wholly kept context for every question, float32.

    Each question is read, then up to `steps` tokens are decoded from the full cache (fewer where the model ends its
    answer); only those steps count. "layer" divides ||v W_O|| by its sum over the layer, as the authors' code does;
    "none" is the formula of the paper. Raises BadInput.
    """
    if steps < 1 or not questions or any(len(q) == 0 for q in questions):
        raise BadInput("the oracle needs at least one step and one question, and no question may be empty.")
    recorder, sampling, found = Importance(whole, normalization), sampling or Sampling(), []
    generator = torch.Generator().manual_seed(sampling.seed)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        _decode(model, recorder, batch, steps, sampling, generator)
        found.append(torch.stack(recorder.found, dim=1))
    return torch.cat(found)


def _decode(
    model: PreTrainedModel,
    recorder: Importance,
    questions: Sequence[Tensor],
    steps: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> None:
    seen, longest = recorder.whole.get_seq_length(), max(len(q) for q in questions)
    ids = questions[0].new_zeros(len(questions), longest)
    mask = ids.new_ones(len(questions), seen + longest)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = question
        mask[row, seen : seen + longest - len(question)] = 0
    cache = recorder.fork(len(questions))
    recorder.recording, recorder.active = False, torch.ones(len(questions), device=ids.device)
    ends = _end_tokens(model, ids.device)
    for _ in range(steps + 1):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        ids = _next(logits, sampling, generator)
        recorder.recording = True
        recorder.active = recorder.active * ~torch.isin(ids[:, 0], ends)
        if not bool(recorder.active.any()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    recorder.recording = False


def _next(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    weights = (logits.float() / sampling.temperature).softmax(-1).cpu()
    return torch.multinomial(weights, 1, generator=generator).to(logits.device)


def _end_tokens(model: PreTrainedModel, device: torch.device) -> Tensor:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return torch.tensor([ends] if isinstance(ends, int) else (ends or []), dtype=torch.long, device=device)


def _by_head(states: Tensor, segments: Segments) -> Tensor:
    return states.view(segments.kv_heads, -1, states.shape[-1])


def _written_norms(
    whole: RaggedCache, layer: int, normalization: Normalization
) -> Float[Tensor, "kv_heads group tokens"]:
    """||v W_O||_2 of every entry for every query head that shares it."""
    segments = whole.ragged_layers[layer].segments
    assert segments is not None
    values = _by_head(segments.values, segments).float()  # [H, N, D]
    weight = whole.view.output_weight(layer).float().unflatten(0, (segments.kv_heads, -1))  # [H, G, D, hidden]
    gram = weight @ weight.transpose(-1, -2)  # [H, G, D, D]
    norms = torch.einsum("hnd,hgde,hne->hgn", values, gram, values).clamp(min=0).sqrt()
    return norms / norms.sum() if normalization == "layer" else norms
