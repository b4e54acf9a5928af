"""Estimate what every entry is worth: by how much the student would be further from its teacher without it.

The student sees a hard selection, as inference will. Distance is the mean squared difference of its logits from the
teacher's, on the answers and a little on everything after the context, in units of the teacher's own spread: 0 is the
teacher, 1 a student that knows nothing. (Logits do not saturate as probabilities do, whose divergence is flat wherever
an answer is right.) For a change of attention outputs by d, with logits y and teacher's y*,

    |y + J d - y*|^2 = |y - y*|^2 + 2 (y - y*) . J d + |J d|^2

The second term is a gradient times d. The third is E (r . J d)^2 for random r of unit covariance, so one r and one more
backward pass estimate it for every entry at once. The third term keeps the entries that an answer rests on: where the
student is right, the second one is nearly zero. Terms that are not linear in J are left out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.cache.cache import RaggedCache
from headwise.offline.train.student import AttentionRecord, Kept, student_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """The teacher's answers after a context: tokens, and its logits (centred) with the weight of each position."""

    ids: Int[Tensor, "questions new"]  # question and answer, padded on the right
    answer: Bool[Tensor, "questions new"]  # positions whose prediction is part of the answer
    weight: Float[Tensor, "questions new"]
    logits: Float[Tensor, "questions new vocabulary"]
    spread: float  # weighted sum of squares of the logits
    records: tuple[AttentionRecord, ...]  # of every layer

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: PreTrainedModel,
        whole: RaggedCache,
        ids: Int[Tensor, "questions new"],
        answer: Bool[Tensor, "questions new"],
        real: Bool[Tensor, "questions new"],
        rest_weight: float,
    ) -> "Teaching":
        """Ask the full cache. `real` are the positions that predict a token of the text; others do not count.

        `rest_weight` is the weight of all of these together; the positions of answers have 1 more.
        """
        weight = answer.float() / answer.sum() + rest_weight * real.float() / real.sum()
        records: list[AttentionRecord] = []
        logits = _centred(student_logits(model, whole, ids, None, records))
        spread = float((weight[..., None] * logits.square()).sum())
        spread = max(spread, 1e-30)
        return cls(ids=ids, answer=answer, weight=weight, logits=logits, spread=spread, records=tuple(records))

    @property
    def nbytes(self) -> int:
        """Bytes of the logits and records."""
        states = (state for r in self.records for state in (r.query, r.keys, r.values, r.out))
        return self.logits.nbytes + sum(state.nbytes for state in states)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """How near a student came with a selection, and what each entry was worth to it."""

    loss: float
    agreement: float  # share of answer tokens on which student and teacher agree
    values: Float[Tensor, "layers kv_heads context"] | None  # rise of the loss if the entry were not kept


def judge(
    model: PreTrainedModel,
    whole: RaggedCache,
    teaching: Teaching,
    choice: Bool[Tensor, "layers kv_heads context"],
    draw: torch.Generator | None = None,
) -> Judgement:
    """Judge a student that answers with what a selection keeps.

    Values are estimated if there is a generator (on the CPU) for r.
    """
    kept = Kept.of(choice)
    with torch.set_grad_enabled(draw is not None):
        logits = _centred(student_logits(model, whole, teaching.ids, kept))
        loss = (teaching.weight[..., None] * (logits - teaching.logits).square()).sum() / teaching.spread
    agree = (logits.argmax(-1) == teaching.logits.argmax(-1))[teaching.answer].float().mean()
    if draw is None:
        return Judgement(loss=float(loss), agreement=float(agree), values=None)
    random = torch.randn(logits.shape, generator=draw, dtype=torch.float32, device="cpu").to(logits.device)
    projected = ((teaching.weight / teaching.spread).sqrt()[..., None] * random * logits).sum()
    return Judgement(loss=float(loss.detach()), agreement=float(agree), values=values_of(loss, projected, kept))


def values_of(loss: Float[Tensor, ""], projected: Float[Tensor, ""], kept: Kept) -> Float[Tensor, "layers kv_heads n"]:
    """Return the values of entries from a loss |y - y*|^2 and a projection r . y."""
    (first_order,) = torch.autograd.grad(loss, kept.mask, retain_graph=True)
    with kept.squared():
        (second_order,) = torch.autograd.grad(projected, kept.mask)
    # Keeping instead of evicting changes the loss by first + second; evicting instead of keeping by second - first.
    return torch.where(kept.mask > 0, second_order - first_order, -second_order - first_order).detach()


def _centred(logits: Tensor) -> Tensor:
    """Subtract the mean: a shift that is the same for all tokens changes no prediction."""
    logits = logits.float()
    return logits - logits.mean(-1, keepdim=True)
