"""What the model really looks at: every question answered from the full cache, and who wants to know may listen.

`decode` answers questions on a wholly kept context and tells its listeners of every decoding step. `follow` has the
model read a text instead, such as the context itself, and tells of some of its queries. `Importance` is the listener
that LU-KV (arXiv 2602.08585) defines; the long-horizon utility of entry j of a KV head is

    I[j] = max over later decoding steps k and the query heads of the group of  A[k, j] * ||v_j W_O||_2

with A the softmax attention over everything in the cache at step k. Only decoding steps count: queries whose output is
a generated token. The other tokens of a question are no future queries. Queries are gathered and passed on 64 at a
time, so attention is never made for the whole context: memory O(context). Ours differs from the authors' code in that
the last token of the question counts: it decodes the first token of the answer, which in a short answer is where the
looking up is done.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.listener import Listener
from headwise.cache.whole import require_whole, states_of
from headwise.errors import BadInput
from headwise.kernels.partial import capped
from headwise.models.families import end_tokens, given

QUERIES_AT_ONCE = 64  # that readers are given, at least, unless there are no more


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are decoded: greedily, or sampled at a temperature (the paper: 0.7) with a seed."""

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise BadInput("the seed is out of range: choose one from 0 to 2**63 - 1.")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Queries of one layer that come after a context: what they look at. float32, logits before the softmax."""

    layer: int
    queries: Float[Tensor, "kv_heads group rows head_dim"]  # scaled: their products with keys are logits, or get capped
    context: Float[Tensor, "kv_heads group rows tokens"]  # logits at the context's entries
    tail: Float[Tensor, "kv_heads group rows"]  # log-sum-exp of the logits at what else they see: later tokens, a sink
    tail_output: Float[Tensor, "kv_heads group rows head_dim"]  # attention's output on that alone
    question: Int[Tensor, " rows"]  # of which question of the batch each is
    softcap: float | None = None  # of all logits

    @cached_property
    def weights(self) -> Float[Tensor, "kv_heads group rows tokens"]:
        """Attention on the context's entries: a softmax over context and tail."""
        whole = torch.logaddexp(self.context.logsumexp(-1), self.tail)
        return (self.context - whole[..., None]).exp_()


Reader = Callable[[Rows], None]  # of queries, as they come


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " _"]],
    readers: Sequence[Reader],
    *,
    steps: int = 64,
    sampling: Sampling | None = None,
    batch_size: int = 8,
) -> Iterator[range]:
    """Answer the questions from a wholly kept context, some at a time; yields which ones were just answered.

    Each question is read, then up to `steps` tokens are decoded (fewer where the model ends its answer); only those
    steps count. Raises BadInput.
    """
    if steps < 1 or not questions or any(len(q) == 0 for q in questions):
        raise BadInput("the oracle needs at least one step and one question, and no question may be empty.")
    require_whole(whole)
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        recorder = _Recorder(readers, len(batch), whole)
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


@torch.no_grad()
def follow(
    model: PreTrainedModel,
    whole: RaggedCache,
    opening: Int[Tensor, " _"],
    text: Int[Tensor, " _"],
    readers: Sequence[Reader],
    *,
    queries: int,
) -> None:
    """Let the model read `opening` and then `text` after a wholly kept context, in one pass.

    Readers are given so many queries, evenly spread over those that a token of the text is predicted from. Raises
    BadInput.
    """
    require_whole(whole)
    ids = torch.cat([opening, text])[None, :-1]
    first = max(len(opening) - 1, 0)
    if queries < 1 or ids.shape[1] <= first:
        raise BadInput("a text that follows needs at least two tokens, and at least one of them must be looked at.")
    recorder, cache = _Recorder(readers, 1, whole), whole.fork()
    cache.listen(recorder)
    spread = torch.linspace(
        first, ids.shape[1] - 1, min(queries, ids.shape[1] - first), dtype=torch.float64, device="cpu"
    )
    recorder.recording = spread.round().long().tolist()
    _forward(model, cache, ids, ids.new_ones(1, whole.get_seq_length() + ids.shape[1]))
    recorder.finish()


class Written:
    """What entries of a wholly kept context write to the output, in head_dim numbers per query head instead of hidden.

    They are so rotated that lengths stay what they are: with W_O^T = Q R, the norm of v R^T is that of v W_O.
    """

    def __init__(self, whole: RaggedCache):
        self.whole = whole
        self._factors: dict[int, Tensor] = {}
        self._last: tuple[int, Tensor] | None = None  # readers ask for the same layer one after the other

    def values(self, layer: int) -> Float[Tensor, "kv_heads group tokens head_dim"]:
        """Of every entry. float32."""
        if self._last is None or self._last[0] != layer:
            self._last = layer, self.of(states_of(self.whole, layer)[1].float()[:, None], layer)
        return self._last[1]

    def of(
        self, outputs: Float[Tensor, "kv_heads one_or_group rows head_dim"], layer: int
    ) -> Float[Tensor, "kv_heads group rows head_dim"]:
        """Of values, or outputs of attention, of the query heads of a layer."""
        if layer not in self._factors:
            weight = self.whole.view.output_weight(layer).detach().float()
            weight = weight.unflatten(0, (self.whole.view.shape.kv_heads, -1))  # [H, G, D, hidden]
            self._factors[layer] = torch.linalg.qr(weight.mT, mode="r").R.mT
        return outputs @ self._factors[layer]


class Importance:
    """Reader: the importance of every entry for each question of the batch at hand, not normalised.

    `scale` [layers] is what "layer" normalisation divides by: the sum of ||v W_O|| over a layer's heads and entries.
    """

    def __init__(self, whole: RaggedCache, written: Written | None = None):
        written = written or Written(whole)
        # [H, G, N] each
        self.norms = [written.values(layer).norm(dim=-1) for layer in range(len(whole.ragged_layers))]
        self.scale = torch.stack([norms.sum() for norms in self.norms])
        self._found: dict[tuple[int, int], Tensor] = {}  # question, layer -> [H, N]

    def __call__(self, rows: Rows) -> None:
        """Take note of some queries."""
        for question in rows.question.unique().tolist():
            seen = rows.weights[:, :, rows.question == question].amax(2)
            useful, key = (seen * self.norms[rows.layer]).amax(1), (question, rows.layer)
            self._found[key] = torch.maximum(self._found[key], useful) if key in self._found else useful

    def take(self) -> Float[Tensor, "batch layers kv_heads tokens"]:
        """What was noted since the last time."""
        found, self._found = self._found, {}
        questions = sorted({question for question, _ in found})
        return torch.stack([torch.stack([found[q, layer] for layer in range(len(self.norms))]) for q in questions])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gathered:
    """Queries of one pass that wait for others."""

    queries: Float[Tensor, "kv_heads group rows head_dim"]  # scaled
    tail: Float[Tensor, "kv_heads group rows"]
    tail_output: Float[Tensor, "kv_heads group rows head_dim"]
    question: Int[Tensor, " rows"]
    softcap: float | None


class _Recorder(Listener):
    """Hears the queries of every layer, gathers them, and gives the readers many at a time."""

    def __init__(self, readers: Sequence[Reader], num_questions: int, whole: RaggedCache):
        self.readers, self.whole = readers, whole
        self.answering = torch.ones(num_questions, dtype=torch.bool, device=states_of(whole, 0)[0].device)
        self.recording: Sequence[int] = ()  # which queries of a pass count
        self._waiting: dict[int, list[_Gathered]] = {}  # by layer

    def attends(
        self,
        layer: int,
        query: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        mask: Tensor | None,
        scaling: float,
        *,
        softcap: float | None = None,
        sinks: Float[Tensor, " query_heads"] | None = None,
    ) -> None:
        """Gather those queries of the pass that count."""
        if not len(self.recording) or not self.readers:
            return
        at = torch.tensor(self.recording, dtype=torch.int64, device=query.device)
        now = query[:, :, :, at].float() * scaling
        logits = capped(torch.einsum("bhgtd,bhnd->bhgtn", now, tail_keys.float()), softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, at], -torch.inf)
        output = torch.einsum("bhgtn,bhnd->bhgtd", logits.softmax(-1), tail_values.float())
        total = logits.logsumexp(-1, keepdim=True)
        if sinks is not None:  # they are looked at, and write nothing
            alone, total = total, torch.logaddexp(total, sinks.float().view(query.shape[1], -1, 1, 1))
            output = output * (alone - total).exp()
        question = torch.arange(len(query), dtype=torch.int64, device=query.device)[:, None].expand(-1, len(at))
        chosen = self.answering.nonzero()[:, 0]
        waiting = self._waiting.setdefault(layer, [])
        waiting.append(
            _Gathered(
                queries=_as_rows(now[chosen]),
                tail=_as_rows(total[chosen])[..., 0],
                tail_output=_as_rows(output[chosen]),
                question=question[chosen].flatten(),
                softcap=softcap,
            )
        )
        if sum(len(part.question) for part in waiting) >= QUERIES_AT_ONCE:
            self._pass_on(layer)

    def finish(self) -> None:
        """Give the readers what still waits."""
        for layer in list(self._waiting):
            self._pass_on(layer)

    def _pass_on(self, layer: int) -> None:
        waiting = self._waiting.pop(layer)
        keys = states_of(self.whole, layer)[0].float()
        queries, softcap = torch.cat([part.queries for part in waiting], dim=2), waiting[0].softcap
        rows = Rows(
            layer=layer,
            queries=queries,
            context=capped(queries @ keys[:, None].mT, softcap),
            tail=torch.cat([part.tail for part in waiting], dim=2),
            tail_output=torch.cat([part.tail_output for part in waiting], dim=2),
            question=torch.cat([part.question for part in waiting]),
            softcap=softcap,
        )
        for reader in self.readers:
            reader(rows)


def _as_rows(batch: Float[Tensor, "batch kv_heads group some size"]) -> Float[Tensor, "kv_heads group rows size"]:
    return batch.permute(1, 2, 0, 3, 4).flatten(2, 3)


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
    cache = whole.fork(copies=len(questions))
    ends = torch.tensor(end_tokens(model), dtype=torch.int64, device=ids.device)
    cache.listen(recorder)
    if longest > 1:
        _forward(model, cache, ids[:, :-1], mask[:, :-1])
    recorder.recording, ids, said = (0,), ids[:, -1:], []
    lengths = torch.zeros(len(questions), dtype=torch.int64, device=ids.device)
    for _ in range(steps):
        ids = _next(_forward(model, cache, ids, mask), sampling, generator)
        said.append(ids)
        lengths = lengths + recorder.answering.long()
        recorder.answering = recorder.answering & ~torch.isin(ids[:, 0], ends)
        if not bool(recorder.answering.any()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    recorder.finish()
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
