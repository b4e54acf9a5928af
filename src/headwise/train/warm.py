"""Where LKV's training starts: scores that know the importance of entries, budgets that LU-KV solves for those scores.

From a start at random the joint training often ends with heads that have lost entries they need: the gradient of a
budget sees only the entries at its edge. LU-KV's curves see all of a head. So the scores first learn, head by head, the
importance that the teacher's answers show (cross-entropy, no pass through the model), then LU-KV (arXiv 2602.08585)
solves budgets for them, and the budget network learns those by heart, at all keeps.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from headwise.allocate.profiled import lukv_counts
from headwise.gates import EntryScores, HeadBudgets
from headwise.hulls import concave_hulls
from headwise.losses import OutputLoss, keeping_order
from headwise.oracle import decode
from headwise.train.loop import Lesson, Settings, importance_loss, raw_scores

PROFILED = 32  # lessons whose curves the first budgets are solved from
FIT_STEPS = 600
FIT_KEEPS = (0.02, 0.5)


def warm_scores(
    lessons: Sequence[Lesson], scores: EntryScores, settings: Settings, progress: Callable[[int, float], None]
) -> None:
    """Teach the scores the importance of entries."""
    optimizer = torch.optim.AdamW(scores.parameters(), lr=3 * settings.lr_scores, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(settings.warm_steps):
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + 500_000 + step)
        chosen = torch.randint(len(lessons), (settings.contexts_per_step,), generator=draw).tolist()
        rate = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.warm_steps)))
        for group in optimizer.param_groups:
            group["lr"] = 3 * settings.lr_scores * rate
        optimizer.zero_grad()
        total = 0.0
        for at in chosen:
            loss = importance_loss(lessons[at], raw_scores(lessons[at], scores), settings) / len(chosen)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(scores.parameters(), settings.clip)
        optimizer.step()
        progress(step + 1, total)


def warm_budgets(
    model: PreTrainedModel,
    lessons: Sequence[Lesson],
    scores: EntryScores | None,
    budgets: HeadBudgets,
    settings: Settings,
) -> None:
    """Solve budgets for the scores as LU-KV does, and teach them to the budget network."""
    protected = settings.sink + settings.window
    curve = _mean_curve(model, lessons[:PROFILED], scores, settings).flatten(0, 1)
    first, rest = curve[:, :protected], concave_hulls(curve[:, protected:])
    draw = torch.Generator().manual_seed(settings.seed)
    lengths = [lesson.features.shape[2] for lesson in lessons[:PROFILED]]
    low, high = (math.log(keep) for keep in FIT_KEEPS)
    optimizer = torch.optim.Adam(budgets.parameters(), lr=3e-3)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        for at in torch.randint(len(lengths), (4,), generator=draw).tolist():
            keep = math.exp(low + (high - low) * float(torch.rand((), generator=draw)))
            counts = lukv_counts(first, rest, lengths[at], protected, round(keep * lengths[at] * len(first)), 1)
            wanted = (counts.float() / lengths[at]).to(budgets.embedding.device)
            ((budgets(keep, lengths[at]) - wanted).square().mean() / keep).backward()
        optimizer.step()


@torch.no_grad()
def _mean_curve(
    model: PreTrainedModel, lessons: Sequence[Lesson], scores: EntryScores | None, settings: Settings
) -> Float[Tensor, "layers kv_heads steps"]:
    """LU-KV's curve of the scores, every lesson counting the same; on the CPU."""
    curves = []
    for lesson in lessons:
        found = lesson.fixed_scores if scores is None else raw_scores(lesson, scores)
        assert found is not None
        order = keeping_order(found, settings.sink, settings.window)
        loss = OutputLoss(lesson.whole, order, settings.sink + settings.window)
        for _ in decode(model, lesson.whole, lesson.questions, [loss], steps=settings.answer_tokens):
            pass
        curve = loss.marginal().cpu()
        curves.append(curve / curve.sum().clamp(min=1e-30))
    return torch.stack(curves).mean(0)
