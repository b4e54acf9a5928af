"""The oracle: what could be kept if the questions and their answers were known. A yardstick, and no method.

It has seen what a method cannot see: the full cache's own answer to every question (or the text that goes on). The
model reads each question and its answer after the whole context, and every entry is given the squares of the attention
that these tokens pay it, summed: about what the heads' outputs would lose without it (see
`headwise.offline.train.futures`). The best entries of all heads together are kept. One cache serves all questions of a
context, so their sum counts. What falls short of the oracle at a keep can still be gained there; what the oracle loses,
hardly. It is near the best that can be kept, not proven to be the best: entries are chosen one by one, and a set of
them may do better.

The largest attention, and scores that count what an entry writes (attention times ||v W_O||), were tried, see
docs/decisions.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.cache.listener import Listener
from headwise.cache.reading import Reading
from headwise.cache.whole import require_whole, states_of
from headwise.interfaces import AbstractScorer, Observation
from headwise.methods.allocate import Global
from headwise.methods.method import Method
from headwise.methods.registry import ORACLE
from headwise.methods.scores.attention import attention
from headwise.models.families import given
from headwise.tasks.document import instructed

_QUERY_BLOCK = 128  # queries whose attention is computed at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Foresight(AbstractScorer):
    """Stands for scores that were looked up in what comes after the context: see `foresee`."""

    def score(self, observation: Observation) -> Float[Tensor, "batch kv_heads tokens"]:
        """A context alone does not tell them."""
        raise AssertionError("the oracle's scores are those of a reading that has foreseen; it watches none.")


def as_method(name: str, tokenizer: Any = None, *, chat: bool = True) -> Method:
    """The method of this name, with its instruction if there is a tokenizer; or what the oracle cuts by.

    Raises BadInput.
    """
    if name == ORACLE:
        return Method(scorer=Foresight(), allocator=Global())
    return Method.parse(name) if tokenizer is None else instructed(name, tokenizer, chat=chat)


def foresee(
    model: PreTrainedModel,
    reading: Reading,
    questions: Sequence[Int[Tensor, " _"]],
    answers: Sequence[Int[Tensor, " _"]],
) -> Reading:
    """The reading with the oracle's scores: `cut` takes `as_method(ORACLE)` then. Raises BadInput."""
    scores = squared_attention(model, reading.whole, questions, answers)
    return replace(reading, scores={**reading.scores, Foresight(): scores[:, None]})


@torch.no_grad()
def squared_attention(
    model: PreTrainedModel,
    whole: RaggedCache,
    questions: Sequence[Int[Tensor, " _"]],
    answers: Sequence[Int[Tensor, " _"]],
) -> Float[Tensor, "layers kv_heads tokens"]:
    """What each entry of a wholly kept context gets from the tokens that follow it: attention squared, summed; float32.

    Those are the tokens of every question and of its answer, each pair read alone right after the context, but for the
    answer's last token: nothing is predicted from it. The sum is over the query heads of a group, too. Raises
    BadInput unless the cache holds one context, all of it.
    """
    require_whole(whole)
    paid = _SquaredAttention([states_of(whole, layer)[0] for layer in range(len(whole.ragged_layers))])
    for question, answer in zip(questions, answers, strict=True):
        ids, cache = torch.cat([question, answer[:-1]])[None], whole.fork()
        positions = whole.get_seq_length() + torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)[None]
        cache.listen(paid)
        model(input_ids=ids, position_ids=positions, **given(model, cache), use_cache=True, logits_to_keep=1)
    return torch.stack([received.to(paid.sums[0].device) for received in paid.sums])


class _SquaredAttention(Listener):
    """Adds up what the queries pay the entries of a wholly kept context, layer by layer."""

    def __init__(self, keys: Sequence[Float[Tensor, "kv_heads tokens head_dim"]]):
        self.keys = keys
        self.sums = [torch.zeros(layer.shape[:2], dtype=torch.float32, device=layer.device) for layer in keys]

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
        """Of one sequence, whose tail is what the queries are of."""
        num_context, num_queries = self.keys[layer].shape[1], query.shape[3]
        every = torch.cat([self.keys[layer][None], tail_keys], dim=2)
        columns = torch.arange(every.shape[2], dtype=torch.int64, device=query.device)
        for start in range(0, num_queries, _QUERY_BLOCK):
            block = query[:, :, :, start : start + _QUERY_BLOCK]
            last = num_context + start + torch.arange(block.shape[3], dtype=torch.int64, device=query.device)
            seen = (columns <= last[:, None])[None]
            weights = attention(block.flatten(1, 2), every, seen, scaling=scaling, softcap=softcap, sinks=sinks)
            self.sums[layer] += weights[0, ..., :num_context].square().sum((1, 2))
