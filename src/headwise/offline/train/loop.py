"""The training loop of LKV: the frozen model teaches gates what its own answers need (arXiv 2605.06676; our design).

For every context: read it once, answer its questions from the full cache (the teacher), then show the model the same
questions and answers while every head sees only what the gates keep (the student), selected hard as at inference. What
each entry was worth to the student (values.py) is weighted with the shares of a soft top-k of the scores, whose sum is
the budget. The implicit gradient of that soft top-k trains scores and budgets. Every step draws a keep, so that one
checkpoint serves all.

All randomness of a step comes from (seed, step): a resumed run goes on as if it had not stopped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from headwise.artifacts.gates import EntryScores, HeadBudgets, context_summary, entry_features
from headwise.artifacts.soft_topk import soft_topk
from headwise.cache.cache import RaggedCache
from headwise.cache.reading import read
from headwise.cache.whole import states_of
from headwise.interfaces import AbstractScorer
from headwise.methods.allocate.learned import budget_counts
from headwise.methods.select import protected_mask, protection_order
from headwise.models.families import view
from headwise.models.processes import Processes
from headwise.offline.calibration import Example, encode
from headwise.offline.train.fit import FitSettings
from headwise.offline.train.values import Judgement, Teaching, judge
from headwise.offline.watch import answers

PROTECTED_STEP = 0.1  # between the scores of protected tokens: some of them share the gradient of a budget
VALIDATION_KEEPS = (0.0625, 0.15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How gates are trained; part of their provenance.

    First, scores learn to predict attention (`fit`); that is all by default. Then every head can learn by itself
    (`warm_steps`), and scores and budgets jointly from the teacher's answers (`steps`). A stage of 0 steps is left out.
    """

    fit: FitSettings = field(default_factory=FitSettings)
    steps: int = 0
    contexts_per_step: int = 4  # over all processes
    questions: int = 12  # of a context, at a time
    answer_tokens: int = 16
    keeps: tuple[float, float] = (0.03, 0.3)
    temperature: float = 0.2  # of the soft top-k, in units of the scores' spread
    budget_temperature: float = 0.5  # of the one that trains budgets: more entries speak for or against an edge
    rest_weight: float = 0.1  # of tokens after the context that are no answer
    warm_steps: int = 0  # before `steps`; the scores of every head learn by themselves, see warm.py
    warm_questions: int = 2  # of a context, in such a step
    warm_keeps: tuple[float, float] = (0.01, 0.5)  # of a head
    lr_budgets: float = 2e-3
    lr_scores: float = 2e-3
    warmup: int = 10
    clip: float = 0.01  # small: contexts differ in how much is at stake, steps do not
    averaging: float = 0.99  # of the gates over the last steps; what is kept in the end
    sink: int = 1
    window: int = 4  # few: at a small keep a protected token in every head costs more than it gives
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A context that has been read, its questions with the teacher's answers, and what the teacher predicts."""

    whole: RaggedCache
    features: Float[Tensor, "layers kv_heads tokens width"]
    summary: Float[Tensor, " of_context"]
    questions: tuple[Int[Tensor, " _"], ...]
    fixed: tuple[Float[Tensor, "layers kv_heads tokens"], ...]  # scores of the fixed scorer, if there is one
    teaching: Teaching

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory."""
        return self.whole.nbytes + self.teaching.nbytes + sum(t.nbytes for t in (self.features, *self.fixed))


@torch.no_grad()
def prepare(
    model: PreTrainedModel,
    tokenizer: object,
    example: Example,
    settings: Settings,
    scorer: AbstractScorer | None = None,
) -> Lesson:
    """Read a context, and have the teacher answer its first questions. Raises BadInput if a text is too short."""
    context, questions = encode(tokenizer, example, device=model.device)
    questions = questions[: settings.questions]
    reading = read(model, context, [scorer] if scorer is not None else [])
    answer_ids = answers(model, reading.whole, questions, steps=settings.answer_tokens)
    texts = [torch.cat([question, answer]) for question, answer in zip(questions, answer_ids, strict=True)]
    ids = pad_sequence(texts, batch_first=True)
    places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int64)
    starts = torch.tensor([len(q) - 1 for q in questions], device=ids.device, dtype=torch.int64)[:, None]
    ends = torch.tensor([len(text) - 1 for text in texts], device=ids.device, dtype=torch.int64)[:, None]
    model_view, positions = view(model), torch.arange(context.shape[1], device=ids.device, dtype=torch.int64)[None]
    states = [states_of(reading.whole, layer) for layer in range(len(model_view.shape.layers))]
    features = [
        entry_features(keys[None], values[None], positions, model_view.rotary(layer))[0]
        for layer, (keys, values) in enumerate(states)
    ]
    first, everything = reading.first, torch.ones_like(positions, dtype=torch.bool)
    real = places < ends
    return Lesson(
        whole=reading.whole,
        features=torch.stack(features),
        summary=context_summary(first.keys, first.values, positions, everything, first.rotary)[0],
        questions=questions,
        fixed=() if scorer is None else (reading.scores[scorer][:, 0],),
        teaching=Teaching.of(model, reading.whole, ids, (places >= starts) & real, real, settings.rest_weight),
    )


def raw_scores(lesson: Lesson, scores: EntryScores) -> Float[Tensor, "layers kv_heads tokens"]:
    """Return scores as the network gives them."""
    return torch.stack([scores(layer[None], index)[0] for index, layer in enumerate(lesson.features)])


def lesson_scores(lesson: Lesson, raw: Tensor | None) -> Float[Tensor, "layers kv_heads tokens"]:
    """Return raw scores in units of their spread, so that one temperature fits all heads. None: the fixed scores."""
    if raw is None:
        (fixed,) = lesson.fixed
        rank = fixed.argsort(dim=-1).argsort(dim=-1).float()
        return torch.erfinv((2 * rank + 1) / rank.shape[-1] - 1) * math.sqrt(2)
    return (raw - raw.mean(-1, keepdim=True)) / (raw.std(-1, keepdim=True) + 1e-4)


def with_protection(
    scores: Float[Tensor, "layers kv_heads tokens"], sink: int, window: int
) -> Float[Tensor, "layers kv_heads tokens"]:
    """Return scores with protected tokens above all others, in the order in which they are kept."""
    if sink + window == 0:
        return scores
    valid = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device)
    order, protected = protection_order(valid, sink, window)[0], protected_mask(valid, sink, window)[0]
    above = scores.detach().amax() + 10.0 + PROTECTED_STEP * (sink + window - order.float())
    return torch.where(protected, above, scores)


def hard_choice(
    scores: Float[Tensor, "layers kv_heads tokens"], counts: Int[Tensor, "layers kv_heads"]
) -> Bool[Tensor, "layers kv_heads tokens"]:
    """Return the entries that inference would keep."""
    best = scores.argsort(dim=-1, descending=True, stable=True)
    winners = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int64) < counts[..., None]
    return torch.zeros_like(winners).scatter(-1, best, winners)


def lesson_step(
    model: PreTrainedModel,
    lesson: Lesson,
    budgets: Callable[[float, Float[Tensor, " width"]], Float[Tensor, " heads"]],
    scores: EntryScores | None,
    *,
    keep: float,
    settings: Settings,
    draw: torch.Generator | None = None,
) -> tuple[Tensor, Judgement]:
    """Return what a gradient step should lower (0 without a generator), and how near the student came."""
    tokens = lesson.features.shape[2]
    fractions = budgets(keep, lesson.summary)
    raw = None if scores is None else raw_scores(lesson, scores)
    ranked = with_protection(lesson_scores(lesson, raw), settings.sink, settings.window)
    counts = budget_counts(fractions, tokens, round(keep * tokens * len(fractions))).view(ranked.shape[:2])
    choice = hard_choice(ranked.detach(), counts.to(ranked.device))
    judgement = judge(model, lesson.whole, lesson.teaching, choice, draw)
    if judgement.values is None:
        return ranked.new_zeros(()), judgement
    chosen = soft_topk(ranked, counts.to(ranked), settings.temperature)
    granted = soft_topk(ranked.detach(), (fractions * tokens).view(ranked.shape[:2]), settings.budget_temperature)
    return -(judgement.values * (chosen + granted)).sum(), judgement


def draw_for(settings: Settings, number: int, index: int) -> torch.Generator:
    """Return the generator of one context in one step, the same whichever process has it."""
    return torch.Generator().manual_seed(((settings.seed * 1_000_003 + number) * 1_000_003 + index) % 2**63)


def add_up(parameters: Iterable[Tensor], processes: Processes) -> None:
    """Sum gradients over processes."""
    for parameter in parameters:
        parameter.grad = processes.sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


@dataclass(kw_only=True)
class Trainer:
    """Trains gates. `step(n)` does step n; the same n on the same gates does the same."""

    model: PreTrainedModel
    lessons: Sequence[Lesson]
    settings: Settings
    budgets: HeadBudgets | None
    scores: EntryScores | None
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        s = self.settings
        self.model.requires_grad_(False)
        modules = [(self.budgets, s.lr_budgets), (self.scores, s.lr_scores)]
        groups = [{"params": list(m.parameters()), "lr": lr} for m, lr in modules if m is not None]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.mean = [parameter.detach().clone() for parameter in self.parameters()]

    def fractions(self, keep: float, summary: Float[Tensor, " width"] | None = None) -> Float[Tensor, " heads"]:
        """Return the budgets of a context at a keep; without a `summary`, those of no particular context."""
        if self.budgets is None:
            return torch.full((view(self.model).shape.num_heads,), keep, device=self.model.device, dtype=torch.float32)
        return self.budgets(keep, summary)

    def parameters(self) -> list[Tensor]:
        """Return everything that is trained, in the order of `mean`."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(self, number: int) -> tuple[float, float]:
        """Do one step. Return the mean loss, and the mean agreement on answers."""
        s = self.settings
        self._set_rates(number)
        chosen, keeps = self._drawn(number)
        self.optimizer.zero_grad()
        totals = torch.zeros(2, dtype=torch.float32, device="cpu")
        for place in self.processes.share(len(chosen)):
            index = chosen[place]
            lesson = self.lessons[index]
            self.processes.catch_up()
            objective, judgement = lesson_step(
                self.model,
                lesson,
                self.fractions,
                self.scores,
                keep=keeps[place],
                settings=s,
                draw=draw_for(s, number, index),
            )
            (objective / len(chosen)).backward()
            pair = [judgement.loss, judgement.agreement]
            totals += torch.tensor(pair, dtype=torch.float32, device="cpu") / len(chosen)
        add_up(self.parameters(), self.processes)
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], s.clip)
        self.optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(self.mean, self.parameters(), strict=True):
                mean.lerp_(parameter, 1 - min(s.averaging, (number + 1) / (number + 10)))
        loss, agree = self.processes.sum(totals.to(self.model.device)).tolist()
        return loss, agree

    def _set_rates(self, number: int) -> None:
        """Set the learning rates of a step: they rise at first, then fall along a cosine."""
        s = self.settings
        rate = min(1.0, (number + 1) / s.warmup) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * number / s.steps)))
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate

    def _drawn(self, number: int) -> tuple[list[int], list[float]]:
        """Return the contexts of a step, and a keep for each."""
        s = self.settings
        draw = torch.Generator().manual_seed((s.seed * 1_000_003 + number) % 2**63)
        order = torch.randperm(len(self.lessons), generator=draw, dtype=torch.int64, device="cpu")
        chosen = order[: s.contexts_per_step].tolist()
        low, high = (math.log(keep) for keep in s.keeps)
        places = torch.rand(len(chosen), generator=draw, dtype=torch.float32, device="cpu")
        return chosen, (low + (high - low) * places).exp().tolist()

    @torch.no_grad()
    def validate(self, lessons: Sequence[Lesson]) -> tuple[float, float]:
        """Return the mean loss and agreement of the averaged gates at small keeps."""
        last = [parameter.clone() for parameter in self.parameters()]
        self.put(self.mean)
        measured: list[Tensor] = []
        for lesson in (lessons[index] for index in self.processes.share(len(lessons))):
            judgements = [
                lesson_step(self.model, lesson, self.fractions, self.scores, keep=keep, settings=self.settings)[1]
                for keep in VALIDATION_KEEPS
            ]
            pairs = [[judgement.loss, judgement.agreement] for judgement in judgements]
            measured.append(torch.tensor(pairs, dtype=torch.float32, device="cpu"))
        self.put(last)
        self.processes.catch_up()
        template = torch.zeros(len(VALIDATION_KEEPS), 2, device=self.model.device, dtype=torch.float32)
        loss, agree = self.processes.gather(measured, len(lessons), template).double().flatten(0, 1).mean(0).tolist()
        return loss, agree

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        """Set everything that is trained."""
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)
