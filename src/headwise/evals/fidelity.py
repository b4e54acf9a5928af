"""Measure how faithful a cut cache is to the full one, without labels: what each predicts for one continuation.

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
    """Means over the tokens of each continuation, then over questions. KL and NLL in nats. None: not measured."""

    kl: float | None = None
    agreement: float | None = None
    nll: float | None = None

    @classmethod
    def mean(cls, parts: "Sequence[Fidelity]") -> "Fidelity":
        """Return the mean of some, each counting the same."""
        names = ("kl", "agreement", "nll")
        values = {name: [v for part in parts if (v := getattr(part, name)) is not None] for name in names}
        return cls(**{name: fmean(known) if known else None for name, known in values.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuations:
    """Questions, and the tokens that follow each."""

    questions: tuple[Int[Tensor, " _"], ...]
    texts: tuple[Int[Tensor, " _"], ...]

    @classmethod
    def of(cls, questions: Sequence[Int[Tensor, " _"]], texts: Sequence[Int[Tensor, " _"]]) -> "Continuations":
        """Return the questions that are followed by something, with what follows."""
        pairs = [(question, text) for question, text in zip(questions, texts, strict=True) if len(text)]
        return cls(questions=tuple(question for question, _ in pairs), texts=tuple(text for _, text in pairs))


@torch.no_grad()
def predictions(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: Memory,
    context: Int[Tensor, "1 tokens"],
    continuations: Continuations,
    *,
    contexts: int = 1,
) -> Iterator[tuple[int, Float[Tensor, "contexts text vocabulary"]]]:
    """Yield the number of each question, and log-probabilities at each token of what follows it.

    `memory` may join several `contexts`; the log-probabilities are of all of them.
    """
    if not continuations.texts:
        return
    pairs = zip(continuations.questions, continuations.texts, strict=True)
    inputs = tuple(torch.cat([question, text[:-1]]) for question, text in pairs)
    longest, pad = max(len(text) for text in continuations.texts), padding_token(tokenizer)
    row_bytes = longest * model.config.get_text_config().vocab_size * 4
    batch_size = max(1, LOGITS_BYTES // (contexts * row_bytes))
    if isinstance(memory, FullMemory):
        batch_size = max(1, min(batch_size, COPIED_BYTES // memory.nbytes))
    for batch in question_batches(model, Tokens(context=context, questions=inputs), batch_size):
        ids, mask = follow(context, [inputs[i] for i in batch], pad)
        num_context = context.shape[1]
        logits = model(
            input_ids=ids[:, num_context:].repeat(contexts, 1),
            attention_mask=mask.repeat(contexts, 1),
            position_ids=(mask.cumsum(-1) - 1)[:, num_context:].repeat(contexts, 1),
            **given(model, memory.fork(copies=len(batch))),
            logits_to_keep=longest,
        ).logits.unflatten(0, (contexts, len(batch)))
        for slot, number in enumerate(batch):
            yield number, logits[:, slot, -len(continuations.texts[number]) :].float().log_softmax(-1)


def compare(
    full: Float[Tensor, "text vocabulary"],
    cut: Float[Tensor, "contexts text vocabulary"],
    text: Int[Tensor, " text"],
) -> list[Fidelity]:
    """Return the fidelity of every context on one continuation, from log-probabilities."""
    kl = (full.exp() * (full - cut)).sum(-1).mean(-1).clamp(min=0)  # 0 but for rounding where nothing was cut
    agreement = (cut.argmax(-1) == full.argmax(-1)).float().mean(-1)
    nll = -cut.gather(-1, text.expand(len(cut), -1)[..., None])[..., 0].mean(-1)
    return [
        Fidelity(kl=values[0], agreement=values[1], nll=values[2])
        for values in zip(kl.tolist(), agreement.tolist(), nll.tolist(), strict=True)
    ]


class Yardstick:
    """What the full cache predicts. Measures how near other caches come."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, memory: Memory, context: Tensor, continuations: Continuations
    ):
        self.model, self.tokenizer, self.context, self.continuations = model, tokenizer, context, continuations
        predicted = predictions(model, tokenizer, memory, context, continuations)
        self.full = {number: log_probs[0] for number, log_probs in predicted}
        self._is_greedy = all(  # but for rounding, where the texts are its own greedy answers
            torch.equal(log_probs.argmax(-1), continuations.texts[number]) for number, log_probs in self.full.items()
        )

    @property
    def texts(self) -> tuple[Int[Tensor, " _"], ...]:
        """The tokens that follow each question."""
        return self.continuations.texts

    def is_repeated_by(self, fidelity: Fidelity) -> bool:
        """Return whether a context of this fidelity would give the same answers: each token is its first choice."""
        return self._is_greedy and fidelity.agreement == 1

    def measure(self, memory: Memory, contexts: int) -> list[Fidelity]:
        """Return the fidelity of each of the contexts that `memory` joins."""
        parts: list[list[Fidelity]] = [[] for _ in range(contexts)]
        for number, log_probs in predictions(
            self.model, self.tokenizer, memory, self.context, self.continuations, contexts=contexts
        ):
            compared = compare(self.full[number], log_probs, self.continuations.texts[number])
            for part, fidelity in zip(parts, compared, strict=True):
                part.append(fidelity)
        return [Fidelity.mean(part) for part in parts]
