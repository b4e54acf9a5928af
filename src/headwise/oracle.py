"""What the model really looks at: the importance of every context entry for answers decoded from the full cache.

LU-KV (arXiv 2602.08585), the long-horizon utility of entry j of a KV head:

    I[j] = max over later decoding steps k and the query heads of the group of  A[k, j] * ||v_j W_O||_2

with A the softmax attention over everything in the cache at step k. Only decoding steps count: queries whose output is
a generated token. The other tokens of a question are no future queries. Attention is never made for the whole context:
one row per step, memory O(context). Ours differs from the authors' code in that the last token of the question counts:
it decodes the first token of the answer, which in a short answer is where the looking up is done.
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
from headwise.kernels import Kernel
from headwise.layout import Segments
from headwise.ragged.cache import RaggedCache

Normalization = Literal["layer", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are decoded: greedily, or sampled at a temperature (the paper: 0.7) with a seed."""

    temperature: float = 0.0
    seed: int = 0


@torch.no_grad()
def entry_importance(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " _"]],
    *,
    steps: int = 64,
    normalization: Normalization = "layer",
    sampling: Sampling | None = None,
    batch_size: int = 8,
) -> Float[Tensor, "questions layers kv_heads tokens"]:
    """Importance of every entry of a wholly kept context for every question, float32.

    Each question is read, then up to `steps` tokens are decoded from the full cache (fewer where the model ends its
    answer); only those steps count. "layer" divides ||v W_O|| by its sum over the layer, as the authors' code does;
    "none" is the formula of the paper. Raises BadInput.
    """
    if steps < 1 or not questions or any(len(q) == 0 for q in questions):
        raise BadInput("the oracle needs at least one step and one question, and no question may be empty.")
    sampling, found = sampling or Sampling(), []
    norms = [_written_norms(whole, layer, normalization) for layer in range(len(whole.ragged_layers))]
    generator = torch.Generator().manual_seed(sampling.seed)
    for start in range(0, len(questions), batch_size):
        recorder = _Recorder(norms, len(questions[start : start + batch_size]))
        _decode(model, whole, recorder, questions[start : start + batch_size], steps, sampling, generator)
        found.append(torch.stack(recorder.found, dim=1))
    return torch.cat(found)


class _Recorder:
    """Notes, at each decoding step of a batch of questions, how much every context entry contributes."""

    def __init__(self, norms: list[Tensor], num_questions: int):
        self.norms = norms  # per layer [H, G, N]
        heads, _, tokens = norms[0].shape
        self.found = [norm.new_zeros(num_questions, heads, tokens) for norm in norms]
        self.answering = norms[0].new_ones(num_questions)  # 0 once a question's answer has ended
        self.recording = False

    def listen(self, cache: RaggedCache) -> None:
        """Have every layer of `cache` tell us its queries before it computes its attention."""
        for layer in cache.ragged_layers:
            layer.kernel = partial(self._attend, layer.index, layer.kernel)

    def _attend(
        self,
        layer: int,
        kernel: Kernel,
        query: Tensor,
        segments: Segments,
        rows: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        if self.recording:
            weights = _step_attention(query[:, :, :, 0], segments, tail_keys, mask, scaling)  # [B, H, G, N]
            useful = (weights * self.norms[layer]).amax(2) * self.answering[:, None, None]
            self.found[layer] = torch.maximum(self.found[layer], useful)
        return kernel(query, segments, rows, tail_keys, tail_values, mask, scaling)


def _step_attention(
    query: Float[Tensor, "batch kv_heads group head_dim"],
    segments: Segments,
    tail_keys: Float[Tensor, "batch kv_heads tail head_dim"],
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch kv_heads group tokens"]:
    """One step's attention weights on the context, softmax over context and tail."""
    query = query.float() * scaling
    context = torch.einsum("bhgd,hnd->bhgn", query, _by_head(segments.keys, segments.kv_heads).float())
    tail = torch.einsum("bhgd,bhnd->bhgn", query, tail_keys.float())
    if mask is not None:
        tail = tail.masked_fill(~mask[:, None, -1:], -torch.inf)
    return torch.cat([context, tail], dim=-1).softmax(-1)[..., : context.shape[-1]]


def _decode(
    model: PreTrainedModel,
    whole: RaggedCache,
    recorder: _Recorder,
    questions: Sequence[Tensor],
    steps: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> None:
    """Answer a batch of questions from the full cache; record while decoding, not while reading the question."""
    seen, longest = whole.get_seq_length(), max(len(q) for q in questions)
    ids = questions[0].new_zeros(len(questions), longest)
    mask = ids.new_ones(len(questions), seen + longest)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = question
        mask[row, seen : seen + longest - len(question)] = 0
    cache, ends = whole.fork(copies=len(questions)), _end_tokens(model, ids.device)
    recorder.listen(cache)
    if longest > 1:
        _forward(model, cache, ids[:, :-1], mask[:, :-1])
    recorder.recording, ids = True, ids[:, -1:]
    for _ in range(steps):
        ids = _next(_forward(model, cache, ids, mask), sampling, generator)
        recorder.answering = recorder.answering * ~torch.isin(ids[:, 0], ends)
        if not bool(recorder.answering.any()):
            return
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)


def _forward(
    model: PreTrainedModel, cache: RaggedCache, ids: Tensor, mask: Tensor
) -> Float[Tensor, "batch vocabulary"]:
    positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :].clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    return out.logits[:, -1]


def _next(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    weights = (logits.float() / sampling.temperature).softmax(-1).cpu()
    return torch.multinomial(weights, 1, generator=generator).to(logits.device)


def _end_tokens(model: PreTrainedModel, device: torch.device) -> Tensor:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return torch.tensor([ends] if isinstance(ends, int) else (ends or []), dtype=torch.long, device=device)


def _by_head(states: Tensor, heads: int) -> Tensor:
    """Flat storage of one wholly kept context as [H, N, D]."""
    return states.view(heads, -1, states.shape[-1])


def _written_norms(
    whole: RaggedCache, layer: int, normalization: Normalization
) -> Float[Tensor, "kv_heads group tokens"]:
    """||v W_O||_2 of every entry for every query head that shares it."""
    segments = whole.ragged_layers[layer].segments
    if segments is None or segments.batch != 1 or len(set(segments.lengths)) > 1:
        raise BadInput("the importance of entries is measured on one context at a time, read and kept whole.")
    values = _by_head(segments.values, segments.kv_heads).float()
    weight = whole.view.output_weight(layer).float().unflatten(0, (segments.kv_heads, -1))  # [H, G, D, hidden]
    gram = weight @ weight.transpose(-1, -2)
    norms = torch.einsum("hnd,hgde,hne->hgn", values, gram, values).clamp(min=0).sqrt()
    return norms / norms.sum() if normalization == "layer" else norms
