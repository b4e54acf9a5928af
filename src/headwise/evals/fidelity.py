"""How faithful a cut cache is to the full one, without labels: what each predicts for the same continuation.

The continuation is what the full cache answered (or a text that is given). At each of its tokens the full cache's
distribution p and the cut cache's q are compared: KL(p || q) in nats, whether their first choices agree, and the
negative log-likelihood that q gives the token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.evals.answers import COPIED_BYTES, FullMemory, Memory, follow, padding_token, question_batches
from headwise.models.families import given
from headwise.tasks.document import Tokens

LOGITS_BYTES = 2**28  # of the logits that are made at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Means over the tokens of the continuation of each question, then over questions. None: not measured."""

    kl: float | None = None
    agreement: float | None = None
    nll: float | None = None

    @classmethod
    def mean(cls, parts: "Sequence[Fidelity]") -> "Fidelity":
        """Every part counts the same."""
        names = ("kl", "agreement", "nll")
        values = {name: [v for part in parts if (v := getattr(part, name)) is not None] for name in names}
        return cls(**{name: fmean(found) if found else None for name, found in values.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuations:
    """Questions, and what follows each."""

    questions: tuple[Int[Tensor, " _"], ...]
    texts: tuple[Int[Tensor, " _"], ...]

    @classmethod
    def of(cls, questions: Sequence[Int[Tensor, " _"]], texts: Sequence[Int[Tensor, " _"]]) -> "Continuations":
        """Those questions that are followed by something."""
        pairs = [(question, text) for question, text in zip(questions, texts, strict=True) if len(text)]
        return cls(questions=tuple(question for question, _ in pairs), texts=tuple(text for _, text in pairs))


@torch.no_grad()
def predictions(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: Memory,
    context: Int[Tensor, "1 tokens"],
    asked: Continuations,
    *,
    contexts: int = 1,
) -> Iterator[tuple[int, Float[Tensor, "contexts text vocabulary"]]]:
    """Numbers of questions, with log-probabilities at each token of what follows, for all contexts that are joined."""
    if not asked.texts:
        return
    read = tuple(torch.cat([q, text[:-1]]) for q, text in zip(asked.questions, asked.texts, strict=True))
    longest, pad = max(len(text) for text in asked.texts), padding_token(tokenizer)
    row_bytes = longest * model.config.get_text_config().vocab_size * 4
    most = max(1, LOGITS_BYTES // (contexts * row_bytes))
    if isinstance(memory, FullMemory):
        most = max(1, min(most, COPIED_BYTES // memory.nbytes))
    for batch in question_batches(model, Tokens(context=context, questions=read), most):
        ids, mask = follow(context, [read[i] for i in batch], pad)
        seen = context.shape[1]
        logits = model(
            input_ids=ids[:, seen:].repeat(contexts, 1),
            attention_mask=mask.repeat(contexts, 1),
            position_ids=(mask.cumsum(-1) - 1)[:, seen:].repeat(contexts, 1),
            **given(model, memory.fork(copies=len(batch))),
            logits_to_keep=longest,
        ).logits.unflatten(0, (contexts, len(batch)))
        for slot, number in enumerate(batch):
            yield number, logits[:, slot, -len(asked.texts[number]) :].float().log_softmax(-1)


def compare(
    full: Float[Tensor, "text vocabulary"],
    cut: Float[Tensor, "contexts text vocabulary"],
    text: Int[Tensor, " text"],
) -> list[Fidelity]:
    """Of every context, to one continuation, from log-probabilities."""
    kl = (full.exp() * (full - cut)).sum(-1).mean(-1).clamp(min=0)  # 0 but for rounding where nothing was cut
    agreement = (cut.argmax(-1) == full.argmax(-1)).float().mean(-1)
    nll = -cut.gather(-1, text.expand(len(cut), -1)[..., None])[..., 0].mean(-1)
    return [
        Fidelity(kl=one[0], agreement=one[1], nll=one[2])
        for one in zip(kl.tolist(), agreement.tolist(), nll.tolist(), strict=True)
    ]


class Yardstick:
    """What the full cache predicts, and how near others come."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, memory: Memory, context: Tensor, asked: Continuations):
        self.model, self.tokenizer, self.context, self.asked = model, tokenizer, context, asked
        self.full = {number: found[0] for number, found in predictions(model, tokenizer, memory, context, asked)}
        self._repeated = all(  # but for rounding, where the texts are its own greedy answers
            torch.equal(found.argmax(-1), asked.texts[number]) for number, found in self.full.items()
        )

    @property
    def texts(self) -> tuple[Int[Tensor, " _"], ...]:
        """What follows each question."""
        return self.asked.texts

    def is_said_by(self, fidelity: Fidelity) -> bool:
        """Whether a context that was measured would say all the texts itself: each token is its first choice."""
        return self._repeated and fidelity.agreement == 1

    def measure(self, memory: Memory, contexts: int) -> list[Fidelity]:
        """Fidelity of each of the contexts that `memory` joins."""
        parts: list[list[Fidelity]] = [[] for _ in range(contexts)]
        for number, found in predictions(
            self.model, self.tokenizer, memory, self.context, self.asked, contexts=contexts
        ):
            compared = compare(self.full[number], found, self.asked.texts[number])
            for part, one in zip(parts, compared, strict=True):
                part.append(one)
        return [Fidelity.mean(part) for part in parts]
