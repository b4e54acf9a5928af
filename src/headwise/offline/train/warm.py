"""Start LKV's training: every head learns its scores by itself, and LU-KV solves budgets for those scores.

From a start at random the joint training often ends with heads that have lost entries they need: the value of a budget
is seen at its edge only. LU-KV's curves see all of a head. So the scores first learn, head by head and without a pass
through the model, to leave what a head writes as it is, at any count; then LU-KV (arXiv 2602.08585) solves budgets for
them, with which the budget network begins.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.artifacts.gates import KNOTS, EntryScores, HeadBudgets
from headwise.artifacts.hulls import concave_hulls
from headwise.artifacts.soft_topk import soft_topk
from headwise.cache.whole import states_of
from headwise.methods.allocate.profiled import lukv_counts
from headwise.models.families import view
from headwise.models.processes import Processes
from headwise.offline.losses import RANKS, OutputLoss, keeping_order
from headwise.offline.train.loop import (
    Lesson,
    Settings,
    add_up,
    draw_for,
    hard_choice,
    lesson_scores,
    raw_scores,
    with_protection,
)
from headwise.offline.train.student import Kept, kept_attention
from headwise.offline.train.values import values_of
from headwise.offline.watch import decode

PROFILED = 32  # lessons whose curves the first budgets are solved from
WARM_NUMBER = 500_000  # number of the first step, beyond those of the joint training: random draws differ


def warm_scores(
    lessons: Sequence[Lesson],
    scores: EntryScores,
    settings: Settings,
    processes: Processes,
    progress: Callable[[int, float], None] = lambda step, change: None,
) -> None:
    """Teach every head by itself which entries its output rests on, at any count."""
    optimizer = torch.optim.AdamW(scores.parameters(), lr=3 * settings.lr_scores, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(settings.warm_steps):
        number = WARM_NUMBER + step
        draw = torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % 2**63)
        chosen = torch.randint(
            len(lessons), (settings.contexts_per_step,), generator=draw, dtype=torch.int64, device="cpu"
        ).tolist()
        rate = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.warm_steps)))
        for group in optimizer.param_groups:
            group["lr"] = 3 * settings.lr_scores * rate
        optimizer.zero_grad()
        change = torch.zeros(1, dtype=torch.float32, device="cpu")
        for place in processes.share(len(chosen)):
            objective, lost = alone_step(lessons[chosen[place]], scores, settings, draw_for(settings, number, place))
            (objective / len(chosen)).backward()
            change += lost / len(chosen)
        processes.catch_up()
        add_up(scores.parameters(), processes)
        torch.nn.utils.clip_grad_norm_(scores.parameters(), settings.clip)
        optimizer.step()
        progress(step + 1, float(processes.sum(change.to(scores.weight_in.device))))


def alone_step(
    lesson: Lesson, scores: EntryScores, settings: Settings, draw: torch.Generator
) -> tuple[Float[Tensor, ""], float]:
    """Return what a gradient step should lower, and the change of the heads' outputs in units of their spread.

    Every head keeps a random share of the context, and sees the teacher's queries.
    """
    ranked = with_protection(lesson_scores(lesson, raw_scores(lesson, scores)), settings.sink, settings.window)
    layers, heads, tokens = ranked.shape
    low, high = (math.log(keep) for keep in settings.warm_keeps)
    counts = (
        low + (high - low) * torch.rand(layers, heads, generator=draw, dtype=torch.float32, device="cpu")
    ).exp() * tokens
    counts = counts.round().long().clamp(min(settings.sink + settings.window + 1, tokens), tokens).to(ranked.device)
    kept = Kept.of(hard_choice(ranked.detach(), counts))
    weight = lesson.teaching.weight
    size = (settings.warm_questions,)
    questions = torch.randint(len(weight), size, generator=draw, dtype=torch.int64, device="cpu").to(weight.device)
    losses, projected = [], []
    for layer in range(layers):
        change, spread = _output_changes(lesson, layer, questions, kept)  # [questions, H, T, hidden], [H]
        share = (weight[questions] / weight[questions].sum())[:, None]
        scale = (share / spread[:, None]).sqrt()[..., None]  # [questions, H, T, 1]
        random = torch.randn(change.shape, generator=draw, dtype=torch.float32, device="cpu").to(change.device)
        losses.append((scale * change).square().sum())
        projected.append((scale * random * change).sum())
    loss = torch.stack(losses).sum()
    values = values_of(loss, torch.stack(projected).sum(), kept)
    shares = soft_topk(ranked, counts.to(ranked), settings.temperature)
    return -(values * shares).sum() / (layers * heads), float(loss.detach()) / (layers * heads)


def _output_changes(
    lesson: Lesson, layer: int, questions: Int[Tensor, " some"], kept: Kept
) -> tuple[Float[Tensor, "some kv_heads new hidden"], Float[Tensor, " kv_heads"]]:
    """Return the change of what KV heads write after some questions, and the spread of what they write after all."""
    context, record = states_of(lesson.whole, layer), lesson.teaching.records[layer]
    weight_out = lesson.whole.view.output_weight(layer).detach().float().unflatten(0, (len(context[0]), -1))
    own = record.keys[questions], record.values[questions]
    special = {"softcap": record.softcap, "sinks": record.sinks}
    out = kept_attention(record.query[questions], context, own, kept.mask[layer], kept, **special)
    full = torch.einsum("bhgtd,hgdo->bhto", record.out, weight_out)
    share = (lesson.teaching.weight / lesson.teaching.weight.sum())[:, None, :, None]
    spread = (share * (full - (share * full).sum((0, 2), keepdim=True)).square()).sum((0, 2, 3))
    return torch.einsum("bhgtd,hgdo->bhto", out, weight_out) - full[questions], spread.clamp(min=1e-12)


def warm_budgets(
    model: PreTrainedModel,
    lessons: Sequence[Lesson],
    scores: EntryScores | None,
    budgets: HeadBudgets,
    settings: Settings,
    processes: Processes,
) -> None:
    """Solve budgets for the scores as LU-KV does, and start the budget network from them."""
    protected = settings.sink + settings.window
    curve = _mean_curve(model, lessons[:PROFILED], scores, settings, processes).flatten(0, 1)
    protected_part, hulls = curve[:, :protected], concave_hulls(curve[:, protected:])
    tokens = max(lesson.features.shape[2] for lesson in lessons[:PROFILED])
    totals = [round(keep * tokens * len(curve)) for keep in KNOTS]
    counts = [lukv_counts(protected_part, hulls, tokens, protected, total, 1) for total in totals]
    budgets.start_from(torch.stack(counts, dim=-1).float() / tokens)
    summaries = [lessons[index].summary for index in processes.share(len(lessons))]
    processes.catch_up()
    budgets.get_used_to(processes.gather(summaries, len(lessons), budgets.usual[0]))


@torch.no_grad()
def _mean_curve(
    model: PreTrainedModel,
    lessons: Sequence[Lesson],
    scores: EntryScores | None,
    settings: Settings,
    processes: Processes,
) -> Float[Tensor, "layers kv_heads steps"]:
    """Return LU-KV's curve of the scores on the CPU, every lesson counting the same."""
    shape = view(model).shape
    # Whole also where a process has no lesson.
    total = torch.zeros(
        len(shape.layers), shape.kv_heads, settings.sink + settings.window + RANKS, dtype=torch.float32, device="cpu"
    )
    for lesson in (lessons[index] for index in processes.share(len(lessons))):
        (ranked,) = lesson.fixed if scores is None else (raw_scores(lesson, scores),)
        order = keeping_order(ranked, settings.sink, settings.window)
        loss = OutputLoss(lesson.whole, order, settings.sink + settings.window)
        for _ in decode(model, lesson.whole, lesson.questions, [loss], steps=settings.answer_tokens):
            pass
        curve = loss.marginal().cpu()
        total = total + curve / curve.sum().clamp(min=1e-30)
    processes.catch_up()
    return processes.sum(total.to(model.device)).cpu() / len(lessons)
