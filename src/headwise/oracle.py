"""What the model really looks at: every question answered from the full cache, and who wants to know may listen.

`decode` answers questions on a wholly kept context and hands every decoding step to its listeners. `Importance` is the
listener that LU-KV (arXiv 2602.08585) defines; the long-horizon utility of entry j of a KV head is

    I[j] = max over later decoding steps k and the query heads of the group of  A[k, j] * ||v_j W_O||_2

with A the softmax attention over everything in the cache at step k. Only decoding steps count: queries whose output is
a generated token. The other tokens of a question are no future queries. Attention is never made for the whole context:
one row per step, memory O(context). Ours differs from the authors' code in that the last token of the question counts:
it decodes the first token of the answer, which in a short answer is where the looking up is done.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.errors import BadInput
from headwise.hf.families import given
from headwise.kernels import Kernel
from headwise.layout import Segments
from headwise.ragged.cache import RaggedCache

Normalization = Literal["layer", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are decoded: greedily, or sampled at a temperature (the paper: 0.7) with a seed."""

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise BadInput("the seed is out of range: choose one from 0 to 2**63 - 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One decoding step of a batch of questions in one layer. Logits are float32, before the softmax."""

    layer: int
    context: Float[Tensor, "batch kv_heads group tokens"]  # logits at the context's entries
    tail: Float[Tensor, "batch kv_heads group tail"]  # at the question and what was decoded; -inf where not seen
    tail_values: Float[Tensor, "batch kv_heads tail head_dim"]
    answering: Bool[Tensor, " batch"]  # False once a question's answer has ended

    def weights(self) -> Float[Tensor, "batch kv_heads group tokens"]:
        """Attention on the context's entries: a softmax over context and tail."""
        return torch.cat([self.context, self.tail], dim=-1).softmax(-1)[..., : self.context.shape[-1]]


Listener = Callable[[Step], None]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " _"]],
    listeners: Sequence[Listener],
    *,
    steps: int = 64,
    sampling: Sampling | None = None,
    batch_size: int = 8,
) -> Iterator[range]:
    """Answer the questions from a wholly kept context, some at a time; yields which ones were just answered.

    Each question is read, then up to `steps` tokens are decoded (fewer where the model ends its answer); only those
    steps are told. Raises BadInput.
    """
    if steps < 1 or not questions or any(len(q) == 0 for q in questions):
        raise BadInput("the oracle needs at least one step and one question, and no question may be empty.")
    require_whole(whole)
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        recorder = _Recorder(listeners, len(batch), whole)
        _decode(model, whole, recorder, batch, steps, sampling, generator)
        yield range(start, start + len(batch))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " _"]],
    *,
    steps: int,
) -> list[Int[Tensor, " _"]]:
    """What the model answers from the full cache, greedily: up to `steps` tokens each, an end token included."""
    require_whole(whole)
    recorder = _Recorder((), len(questions), whole)
    return _decode(model, whole, recorder, questions, steps, Sampling(), torch.Generator())


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

    "layer" divides ||v W_O|| by its sum over the layer, as the authors' code does; "none" is the formula of the paper.
    Raises BadInput.
    """
    require_whole(whole)
    importance = Importance(whole)
    answered = decode(model, whole, questions, [importance], steps=steps, sampling=sampling, batch_size=batch_size)
    found = torch.cat([importance.take() for _ in answered])
    return found / importance.scale[:, None, None] if normalization == "layer" else found


class Importance:
    """Listener: the importance of every entry for each question of the batch at hand, not normalised.

    `scale` [layers] is what "layer" normalisation divides by: the sum of ||v W_O|| over a layer's heads and entries.
    """

    def __init__(self, whole: RaggedCache):
        self.norms = [_written_norms(whole, layer) for layer in range(len(whole.ragged_layers))]  # [H, G, N] each
        self.scale = torch.stack([norms.sum() for norms in self.norms])
        self._found: dict[int, Tensor] = {}

    def __call__(self, step: Step) -> None:
        """Take note of a step."""
        useful = (step.weights() * self.norms[step.layer]).amax(2) * step.answering[:, None, None]
        found = self._found.get(step.layer)
        self._found[step.layer] = useful if found is None else torch.maximum(found, useful)

    def take(self) -> Float[Tensor, "batch layers kv_heads tokens"]:
        """What was noted since the last time."""
        found, self._found = self._found, {}
        return torch.stack([found[layer] for layer in range(len(self.norms))], dim=1)


class _Recorder:
    """Stands before the kernel of every layer and tells the listeners of each decoding step."""

    def __init__(self, listeners: Sequence[Listener], num_questions: int, whole: RaggedCache):
        self.listeners = listeners
        self.answering = torch.ones(num_questions, dtype=torch.bool, device=states_of(whole, 0)[0].device)
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
        if self.recording and self.listeners:
            now = query[:, :, :, 0].float() * scaling
            keys = _by_head(segments.keys, segments.kv_heads).float()
            tail = torch.einsum("bhgd,bhnd->bhgn", now, tail_keys.float())
            if mask is not None:
                tail = tail.masked_fill(~mask[:, None, -1:], -torch.inf)
            step = Step(
                layer=layer,
                context=torch.einsum("bhgd,hnd->bhgn", now, keys),
                tail=tail,
                tail_values=tail_values.float(),
                answering=self.answering,
            )
            for listener in self.listeners:
                listener(step)
        return kernel(query, segments, rows, tail_keys, tail_values, mask, scaling)


def _decode(
    model: PreTrainedModel,
    whole: RaggedCache,
    recorder: _Recorder,
    questions: Sequence[Tensor],
    steps: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> list[Int[Tensor, " _"]]:
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
    recorder.recording, ids, said = True, ids[:, -1:], []
    lengths = torch.zeros(len(questions), dtype=torch.int64, device=ids.device)
    for _ in range(steps):
        ids = _next(_forward(model, cache, ids, mask), sampling, generator)
        said.append(ids)
        lengths = lengths + recorder.answering.long()
        recorder.answering = recorder.answering & ~torch.isin(ids[:, 0], ends)
        if not bool(recorder.answering.any()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    return [row[:length] for row, length in zip(torch.cat(said, dim=-1), lengths.tolist(), strict=True)]


def _forward(
    model: PreTrainedModel, cache: RaggedCache, ids: Tensor, mask: Tensor
) -> Float[Tensor, "batch vocabulary"]:
    positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :].clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **given(model, cache), logits_to_keep=1)
    return out.logits[:, -1]


def _next(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    weights = (logits.float() / sampling.temperature).softmax(-1).cpu()
    return torch.multinomial(weights, 1, generator=generator).to(logits.device)


def _end_tokens(model: PreTrainedModel, device: torch.device) -> Tensor:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return torch.tensor([ends] if isinstance(ends, int) else (ends or []), dtype=torch.long, device=device)


def require_whole(whole: RaggedCache) -> None:
    """Raise BadInput unless the cache holds one context, all of it."""
    for layer in whole.ragged_layers:
        segments = layer.segments
        if segments is None or segments.batch != 1 or len(set(segments.lengths)) > 1:
            raise BadInput("the importance of entries is measured on one context at a time, read and kept whole.")


def states_of(
    whole: RaggedCache, layer: int
) -> tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens head_dim"]]:
    """Keys and values of a layer of a wholly kept context, views."""
    segments = whole.ragged_layers[layer].segments
    assert segments is not None
    return _by_head(segments.keys, segments.kv_heads), _by_head(segments.values, segments.kv_heads)


def output_gram(whole: RaggedCache, layer: int) -> Float[Tensor, "kv_heads group head_dim head_dim"]:
    """W_O W_O^T of every query head: ||x W_O||^2 = x gram x^T. float32."""
    heads = whole.view.shape.kv_heads
    weight = whole.view.output_weight(layer).detach().float().unflatten(0, (heads, -1))  # [H, G, D, hidden]
    return weight @ weight.transpose(-1, -2)


def _by_head(states: Tensor, heads: int) -> Tensor:
    """Flat storage of one wholly kept context as [H, N, D]."""
    return states.view(heads, -1, states.shape[-1])


def _written_norms(whole: RaggedCache, layer: int) -> Float[Tensor, "kv_heads group tokens"]:
    """||v W_O||_2 of every entry for every query head that shares it."""
    values = states_of(whole, layer)[1].float()
    squares = torch.einsum("hnd,hgde,hne->hgn", values, output_gram(whole, layer), values)
    return squares.clamp(min=0).sqrt()
