"""The first stage of LKV-T: every head learns to predict the attention that its entries will get (futures.py).

A regression, so it takes a minute where distillation takes hours: a context is read, its futures are read after it, and
of some entries, drawn at random, features and target are kept. The model is not needed any more then.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from headwise.artifacts.gates import KNOTS, EntryScores, HeadBudgets, context_summary, entry_features
from headwise.cache.cache import RaggedCache
from headwise.cache.reading import read
from headwise.cache.whole import states_of
from headwise.methods.scores.reconstruct import INSTRUCTION
from headwise.models.families import view
from headwise.offline.calibration import Example, encode
from headwise.offline.train.futures import attention_paid
from headwise.offline.watch import answers
from headwise.tasks.seams import following_ids

LEAST = 3e-5  # attention, over all futures, below which entries are alike
BATCH = 256  # entries of a step, the same of every head
JUDGED = 0.15  # keep at which held-out contexts are judged


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """How scores learn to predict attention.

    A query of the text that follows counts `following_weight` times, a query of a question or its answer counts
    `answer_weight` times, a query of the repetition once. A context is repeated in pieces of `piece` tokens.
    """

    steps: int = 1000
    entries: int = 512  # of a context
    piece: int = 1024
    following: int = 128  # tokens of what follows, at most
    questions: int = 4  # of a context, at most
    answer_tokens: int = 32
    following_weight: float = 16.0
    answer_weight: float = 16.0
    lr: float = 3e-3
    weight_decay: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Some entries of one context, the same in every head, and the squared attention that each kind of future pays.

    Squares are summed over queries. Kinds of futures are apart, so that weights can change without the model.
    """

    features: Float[Tensor, "heads entries width"]  # float16
    again: Float[Tensor, "heads entries"]
    following: Float[Tensor, "heads entries"]
    answers: Float[Tensor, "heads entries"]
    summary: Float[Tensor, " of_context"]

    def targets(self, settings: FitSettings) -> Float[Tensor, "heads entries"]:
        """Return what scores learn: the logarithm of the root of the weighted sum."""
        paid = self.again + settings.following_weight * self.following + settings.answer_weight * self.answers
        return (paid + LEAST**2).log() / 2


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: object, example: Example, settings: FitSettings, generator: torch.Generator
) -> Sampled:
    """Read a context and its futures, and return some of its entries."""
    context, questions = encode(tokenizer, example, device=model.device)
    reading, shape = read(model, context, []), view(model).shape
    futures = futures_of(model, tokenizer, example, context, questions, reading.whole, settings)
    tokens = context.shape[1]
    chosen = torch.randperm(tokens, generator=generator, dtype=torch.int64, device="cpu")[: settings.entries].sort()
    places = chosen.values.to(model.device)
    positions = torch.arange(tokens, device=model.device, dtype=torch.int64)[None]
    features = []
    for layer in range(len(shape.layers)):
        keys, values = states_of(reading.whole, layer)
        layer_features = entry_features(keys[None], values[None], positions, view(model).rotary(layer))
        features.append(layer_features[0][:, places].half())
    first, everything = reading.first, torch.ones_like(positions, dtype=torch.bool)
    again, following, answered = (
        attention_paid(model, reading.whole, kind).flatten(0, 1)[:, places].cpu() for kind in futures
    )
    return Sampled(
        features=torch.cat(features).cpu(),
        again=again,
        following=following,
        answers=answered,
        summary=context_summary(first.keys, first.values, positions, everything, first.rotary)[0].cpu(),
    )


def futures_of(
    model: PreTrainedModel,
    tokenizer: Any,
    example: Example,
    context: Int[Tensor, "1 tokens"],
    questions: Sequence[Int[Tensor, " _"]],
    whole: RaggedCache,
    settings: FitSettings,
) -> tuple[list[Int[Tensor, " _"]], list[Int[Tensor, " _"]], list[Int[Tensor, " _"]]]:
    """Return the context once more in pieces, the tokens that follow it, and questions with the model's answers."""

    def ids(tokens: Sequence[int]) -> Int[Tensor, " _"]:
        return torch.tensor(tokens, dtype=torch.int64, device=context.device)

    instruction = ids(instruction_ids(tokenizer))
    again = [torch.cat([instruction, piece]) for piece in context[0].split(settings.piece)]
    following, answered = [], []
    if example.following:
        following.append(ids(following_ids(tokenizer, example.following)[: settings.following]))
    if settings.questions and example.questions:
        questions = questions[: settings.questions]
        answer_ids = answers(model, whole, questions, steps=settings.answer_tokens)
        answered += [torch.cat(pair) for pair in zip(questions, answer_ids, strict=True)]
    return again, following, answered


def instruction_ids(tokenizer: Any) -> list[int]:
    """Return tokens that ask for a repetition; none if the tokenizer lacks the words, as the bundled one does."""
    ids = tokenizer(f"\n\n{INSTRUCTION}\n\n", add_special_tokens=False)["input_ids"]
    return [] if tokenizer.unk_token_id in ids else ids


def fit(
    scores: EntryScores,
    samples: Sequence[Sampled],
    held_out: Sequence[Sampled],
    settings: FitSettings,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Fit the scores to the targets by squared errors, and return a log: a row every 50 steps."""
    history: list[dict[str, Any]] = []
    device = scores.weight_in.device
    features = torch.cat([context_sample.features for context_sample in samples], dim=1)
    targets = torch.cat([context_sample.targets(settings) for context_sample in samples], dim=1)
    draw = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        scores.bias_out.copy_(targets.mean(-1).view_as(scores.bias_out))
    optimizer = torch.optim.AdamW(scores.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        batch = torch.randint(targets.shape[1], (BATCH,), generator=draw, dtype=torch.int64, device="cpu")
        error = predicted(scores, features[:, batch].to(device)) - targets[:, batch].to(device)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            explained, shared = quality(scores, held_out, settings)
            history.append({"step": step + 1, "explained": explained, "shared": shared})
            progress(step + 1, settings.steps, f"explains {explained:.1%} held out, finds {shared:.1%} of the best 15%")
    return history


def predicted(scores: EntryScores, features: Float[Tensor, "heads entries width"]) -> Float[Tensor, "heads entries"]:
    """Return the scores of all heads."""
    inner = features.float() @ scores.weight_in.flatten(0, 1) + scores.bias_in.flatten(0, 1)
    outputs = torch.einsum("hnf,hf->hn", functional.gelu(inner), scores.weight_out.flatten(0, 1))
    return outputs + scores.bias_out.flatten()[:, None]


@torch.no_grad()
def quality(scores: EntryScores, held_out: Sequence[Sampled], settings: FitSettings) -> tuple[float, float]:
    """Return the share of the targets' variance that is explained, and of the best entries that are chosen."""
    explained, shared = [], []
    for context_sample in held_out:
        predictions = predicted(scores, context_sample.features.to(scores.bias_out.device)).cpu()
        targets = context_sample.targets(settings)
        explained.append(1 - float((predictions - targets).square().mean() / targets.var(correction=0)))
        best, chosen = (_best(values, JUDGED) for values in (targets, predictions))
        shared.append(float((best & chosen).sum() / best.sum()))
    return fmean(explained), fmean(shared)


def _best(values: Float[Tensor, "heads entries"], keep: float) -> Bool[Tensor, "heads entries"]:
    """Return the entries that a contest of all heads keeps."""
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    chosen[values.flatten().topk(max(1, round(keep * values.numel()))).indices] = True
    return chosen.view_as(values)


@torch.no_grad()
def fit_budgets(budgets: HeadBudgets, scores: EntryScores, samples: Sequence[Sampled]) -> None:
    """Set the budgets to each head's mean share of a contest of all heads, over contexts."""
    shares = torch.zeros_like(budgets.start, device="cpu")
    for context_sample in samples:
        predictions = predicted(scores, context_sample.features.to(scores.bias_out.device)).cpu()
        shares += torch.stack([_best(predictions, keep).float().mean(-1) for keep in KNOTS], dim=-1) / len(samples)
    budgets.start_from(shares.to(budgets.start.device))
    budgets.get_used_to(torch.stack([context_sample.summary for context_sample in samples]).to(budgets.start.device))
