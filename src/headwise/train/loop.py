"""LKV's training loop: the frozen model teaches gates what its own answers need (arXiv 2605.06676; our design).

For every context: read it once, answer its questions from the full cache (the teacher), then show the model the same
questions and answers while entries are weighted by the gates (the student). Loss: KL of the teacher's to the student's
predictions on the answers, and a little on everything after the context. The first part of training weights entries
softly; then the forward pass is the hard selection that inference will make and only the gradients are soft, because
soft masks leak. Every step draws a keep, so that one checkpoint serves all.

All randomness of a step comes from (seed, step): a resumed run goes on as if it had not stopped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from headwise.allocate.learned import budget_counts
from headwise.calibration import Example, encode
from headwise.gates import EntryScores, HeadBudgets, entry_features
from headwise.hf.families import view
from headwise.interfaces import AbstractScorer
from headwise.oracle import Importance, answers, states_of
from headwise.ragged.cache import RaggedCache
from headwise.reading import read
from headwise.select import protected_mask, protection_order
from headwise.soft_topk import soft_topk
from headwise.train.student import student_logits

PROTECTED_STEP = 0.1  # between the scores of protected tokens: some of them share the gradient of a budget
VALIDATION_KEEPS = (0.0625, 0.15)
Reduce = Callable[[Tensor], Tensor]  # the sum over processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How gates are trained; part of their provenance."""

    steps: int = 600
    contexts_per_step: int = 4  # over all processes
    questions: int = 8  # of a context, at a time
    answer_tokens: int = 16
    keeps: tuple[float, float] = (0.03, 0.3)
    soft_share: float = 0.0  # of the steps
    temperatures: tuple[float, float] = (0.5, 0.1)
    rest_weight: float = 0.1  # of tokens after the context that are no answer
    warm_steps: int = 1000  # in which scores learn the importance that the teacher's answers show; see warm.py
    lr_budgets: float = 3e-4
    lr_scores: float = 1e-3
    warmup: int = 10
    clip: float = 1.0
    averaging: float = 0.99  # of the gates over the last steps; what is kept in the end
    sink: int = 4
    window: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A context that has been read, its questions with the teacher's answers, and what the teacher predicts."""

    whole: RaggedCache
    features: Float[Tensor, "layers kv_heads tokens width"]
    questions: tuple[Int[Tensor, " _"], ...]
    fixed_scores: Float[Tensor, "layers kv_heads tokens"] | None
    ids: Int[Tensor, "questions new"]  # question and answer, padded on the right
    answer: Bool[Tensor, "questions new"]  # positions whose prediction is part of the answer
    real: Bool[Tensor, "questions new"]  # positions whose prediction is of a real token
    teacher: Float[Tensor, "questions new vocabulary"]  # log-probabilities
    importance: Float[Tensor, "layers kv_heads tokens"]  # of LU-KV, pooled over the questions

    @property
    def nbytes(self) -> int:
        """Bytes it keeps in memory."""
        tensors = [self.features, self.fixed_scores, self.teacher, self.importance]
        return self.whole.nbytes + sum(t.nbytes for t in tensors if t is not None)


@torch.no_grad()
def prepare(
    model: PreTrainedModel,
    tokenizer: object,
    example: Example,
    settings: Settings,
    scorer: AbstractScorer | None = None,
) -> Lesson:
    """Read a context and have the teacher answer its first questions."""
    context, questions = encode(tokenizer, example, device=model.device)
    questions = questions[: settings.questions]
    reading = read(model, context, [scorer] if scorer is not None else [])
    importance = Importance(reading.whole)
    said = answers(model, reading.whole, questions, steps=settings.answer_tokens, listeners=[importance])
    pooled = importance.take().amax(0)
    texts = [torch.cat([question, answer]) for question, answer in zip(questions, said, strict=True)]
    ids = pad_sequence(texts, batch_first=True)
    at = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.tensor([len(q) - 1 for q in questions], device=ids.device)[:, None]
    ends = torch.tensor([len(text) - 1 for text in texts], device=ids.device)[:, None]
    seen, positions = view(model), torch.arange(context.shape[1], device=ids.device)[None]
    states = [states_of(reading.whole, layer) for layer in range(len(seen.shape.layers))]
    features = [
        entry_features(keys[None], values[None], positions, seen.rotary(layer))[0]
        for layer, (keys, values) in enumerate(states)
    ]
    return Lesson(
        whole=reading.whole,
        features=torch.stack(features),
        questions=questions,
        fixed_scores=None if scorer is None else reading.scores[scorer][:, 0],
        ids=ids,
        answer=(at >= starts) & (at < ends),
        real=at < ends,
        teacher=student_logits(model, reading.whole, ids, None).float().log_softmax(-1),
        importance=pooled,
    )


def raw_scores(lesson: Lesson, scores: EntryScores) -> Float[Tensor, "layers kv_heads tokens"]:
    """Scores as the network gives them."""
    return torch.stack([scores(layer[None], at)[0] for at, layer in enumerate(lesson.features)])


def importance_loss(
    lesson: Lesson, raw: Float[Tensor, "layers kv_heads tokens"], settings: Settings
) -> Float[Tensor, ""]:
    """Cross-entropy of the scores of the unprotected entries to their importance, the same weight for every head."""
    middle = slice(settings.sink, raw.shape[-1] - settings.window)
    wanted = lesson.importance[..., middle]
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-30)
    return -(wanted * raw[..., middle].log_softmax(-1)).sum(-1).mean()


def lesson_scores(lesson: Lesson, found: Tensor | None) -> Float[Tensor, "layers kv_heads tokens"]:
    """Raw (or the lesson's fixed) scores in units of their spread, so that one temperature fits all heads."""
    if found is None:
        assert lesson.fixed_scores is not None
        rank = lesson.fixed_scores.argsort(dim=-1).argsort(dim=-1).float()
        return torch.erfinv((2 * rank + 1) / rank.shape[-1] - 1) * math.sqrt(2)
    return (found - found.mean(-1, keepdim=True)) / (found.std(-1, keepdim=True) + 1e-4)


def with_protection(
    scores: Float[Tensor, "layers kv_heads tokens"], sink: int, window: int
) -> Float[Tensor, "layers kv_heads tokens"]:
    """Protected tokens above all others, in the order in which they are kept."""
    if sink + window == 0:
        return scores
    valid = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device)
    order, protected = protection_order(valid, sink, window)[0], protected_mask(valid, sink, window)[0]
    above = scores.detach().amax() + 10.0 + PROTECTED_STEP * (sink + window - order.float())
    return torch.where(protected, above, scores)


def hard_shares(
    scores: Float[Tensor, "layers kv_heads tokens"], counts: Int[Tensor, "layers kv_heads"]
) -> Float[Tensor, "layers kv_heads tokens"]:
    """1 for the entries that inference would keep, 0 for the others."""
    best = scores.argsort(dim=-1, descending=True, stable=True)
    winners = torch.arange(scores.shape[-1], device=scores.device) < counts[..., None]
    return torch.zeros_like(scores).scatter(-1, best, winners.to(scores.dtype))


class _Straight(torch.autograd.Function):
    """The hard value forward, the soft gradient backward."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def lesson_loss(
    model: PreTrainedModel,
    lesson: Lesson,
    budgets: Callable[[float, int], Float[Tensor, " heads"]],
    scores: EntryScores | None,
    *,
    keep: float,
    temperature: float,
    hard: bool,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Loss, and the share of answer tokens on which teacher and student agree."""
    tokens = lesson.features.shape[2]
    fractions = budgets(keep, tokens)
    raw = None if scores is None else raw_scores(lesson, scores)
    ranked = with_protection(lesson_scores(lesson, raw), settings.sink, settings.window)
    shares = soft_topk(ranked, (fractions * tokens).view(ranked.shape[:2]), temperature).clamp(0, 1)
    if hard:
        counts = budget_counts(fractions, tokens, round(keep * tokens * len(fractions))).view(ranked.shape[:2])
        shares = _Straight.apply(shares, hard_shares(ranked.detach(), counts))
    student = student_logits(model, lesson.whole, lesson.ids, shares).float().log_softmax(-1)
    divergence = (lesson.teacher.exp() * (lesson.teacher - student)).sum(-1)
    loss = divergence[lesson.answer].mean() + settings.rest_weight * divergence[lesson.real].mean()
    agree = (student.argmax(-1) == lesson.teacher.argmax(-1))[lesson.answer].float().mean()
    return loss, agree


@dataclass(kw_only=True)
class Trainer:
    """Gates in training. `step(n)` does step n; the same n on the same gates does the same."""

    model: PreTrainedModel
    lessons: Sequence[Lesson]
    settings: Settings
    budgets: HeadBudgets | None
    scores: EntryScores | None
    process: tuple[int, int] = (0, 1)
    reduce: Reduce = lambda tensor: tensor

    def __post_init__(self) -> None:
        s = self.settings
        self.model.requires_grad_(False)
        modules = [(self.budgets, s.lr_budgets), (self.scores, s.lr_scores)]
        groups = [{"params": list(m.parameters()), "lr": lr} for m, lr in modules if m is not None]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.mean = [parameter.detach().clone() for parameter in self.parameters()]

    def fractions(self, keep: float, tokens: int) -> Float[Tensor, " heads"]:
        """Budgets at a keep."""
        if self.budgets is None:
            return torch.full((view(self.model).shape.num_heads,), keep, device=self.model.device)
        return self.budgets(keep, tokens)

    def parameters(self) -> list[Tensor]:
        """Everything that is trained, in the order of `mean`."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(self, number: int) -> tuple[float, float]:
        """One step; mean loss, and mean agreement on answers."""
        s = self.settings
        draw = torch.Generator().manual_seed(s.seed * 1_000_003 + number)
        soft = round(s.steps * s.soft_share)
        start, end = s.temperatures
        temperature = end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, number / max(1, soft))))
        rate = min(1.0, (number + 1) / s.warmup) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * number / s.steps)))
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        chosen = torch.randperm(len(self.lessons), generator=draw)[: s.contexts_per_step].tolist()
        low, high = (math.log(keep) for keep in s.keeps)
        keeps = (low + (high - low) * torch.rand(len(chosen), generator=draw)).exp().tolist()
        self.optimizer.zero_grad()
        rank, processes = self.process
        seen = torch.zeros(2)
        for at, keep in list(zip(chosen, keeps, strict=True))[rank::processes]:
            loss, agree = lesson_loss(
                self.model,
                self.lessons[at],
                self.fractions,
                self.scores,
                keep=keep,
                temperature=temperature,
                hard=number >= soft,
                settings=s,
            )
            (loss / len(chosen)).backward()
            seen += torch.stack([loss.detach(), agree]).cpu() / len(chosen)
        for parameter in self.parameters():
            parameter.grad = self.reduce(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], s.clip)
        self.optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(self.mean, self.parameters(), strict=True):
                mean.lerp_(parameter, 1 - min(s.averaging, (number + 1) / (number + 10)))
        loss, agree = self.reduce(seen.to(self.model.device)).tolist()
        return loss, agree

    @torch.no_grad()
    def validate(self, lessons: Sequence[Lesson]) -> float:
        """Mean loss of the averaged gates with hard selections, at two small keeps."""
        last = [parameter.clone() for parameter in self.parameters()]
        self.put(self.mean)
        losses = [
            lesson_loss(
                self.model,
                lesson,
                self.fractions,
                self.scores,
                keep=keep,
                temperature=self.settings.temperatures[1],
                hard=True,
                settings=self.settings,
            )[0]
            for lesson in lessons
            for keep in VALIDATION_KEEPS
        ]
        self.put(last)
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        """Set everything that is trained."""
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)
