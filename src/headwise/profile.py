"""LU-KV, first half: how much long-horizon utility each head would retain, as a function of how much it keeps.

LU-KV (arXiv 2602.08585). For every calibration context: one prefill, in which the scorers see the context only; its
questions are answered from the full cache, which gives every entry its oracle importance; sorted by a scorer, best
first, importance becomes the utility curve of that scorer in every head. The importance of an entry is POOLED over the
questions of a context (its maximum) before anything is solved; averaging solutions per question, as published,
underfunds the heads that few questions need. Memory: the full cache of one context and a few numbers per entry,
O(context).

Every context is measured into a file of its own beside the profile, which is why a killed run goes on where it was, why
several processes can share the work, and why neither changes the result: the parts are merged in the data's order.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headwise.artifacts import Origin, Profile, fingerprint, read_tensors, write_tensors
from headwise.calibration import Example, encode
from headwise.errors import BadInput
from headwise.hf.families import view
from headwise.interfaces import AbstractScorer
from headwise.method import Method
from headwise.oracle import Normalization, Sampling, entry_importance
from headwise.ragged.store import model_fingerprint
from headwise.reading import Reading, can_watch, read
from headwise.select import protected_mask

RANKS = 1024  # resolution of a curve: steps from nothing kept to everything kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How importance is measured; part of the profile's provenance."""

    steps: int = 64
    normalization: Normalization = "layer"
    sampling: Sampling = field(default_factory=Sampling)


def profile(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    scorers: Sequence[str],
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure every example for every scorer and write the Profile `out`; resumes what a killed run left.

    `process` is (rank, number) when several processes share the examples and `out`; `wait` is then their barrier.
    Raises BadInput before anything is measured; ArtifactMismatch or BadInput for parts that are damaged. Parts of
    another model, other settings or other scorers are not taken up.
    """
    settings, parts = settings or Settings(), Path(f"{os.fspath(out)}.parts")
    chosen = _scorers(scorers)
    if not examples:
        raise BadInput("there is nothing to profile: give at least one example.")
    if Path(out).is_dir():
        raise BadInput(f"{out} is a folder; name a file for the profile.")
    encoded = [_fitting(model, tokenizer, example, list(chosen.values()), settings) for example in examples]
    parameters = sorted((name, repr(scorer.provenance())) for name, scorer in chosen.items())
    run = fingerprint(model_fingerprint(model), repr((asdict(settings), parameters, RANKS)))
    files = [parts / f"{fingerprint(run, context, *questions)[:24]}.safetensors" for context, questions in encoded]
    parts.mkdir(parents=True, exist_ok=True)
    rank, number = process
    mine = range(rank, len(examples), number)
    for done, index in enumerate(mine):
        progress(done, len(mine))
        if not files[index].is_file():
            curves = measure(model, *encoded[index], list(chosen.values()), settings)
            tensors = {name: curves[scorer].float() for name, scorer in chosen.items()}
            write_tensors(files[index], "part", tensors, {"run": run, "domain": examples[index].domain})
    progress(len(mine), len(mine))
    wait()
    if rank == 0:
        _merge(files, [e.domain for e in examples], chosen, _origin(model, run, files), settings).save(out)
        shutil.rmtree(parts)
    wait()


def measure(
    model: PreTrainedModel,
    context: Int[Tensor, "1 tokens"],
    questions: Sequence[Int[Tensor, " _"]],
    scorers: Sequence[AbstractScorer],
    settings: Settings,
) -> dict[AbstractScorer, Float[Tensor, "layers kv_heads ranks"]]:
    """Marginal utility of one context by rank, best entry first, for every scorer; over all heads it sums to 1."""
    reading = read(model, context, scorers)
    importance = entry_importance(
        model,
        reading.whole,
        questions,
        steps=settings.steps,
        normalization=settings.normalization,
        sampling=settings.sampling,
    ).amax(0)  # pooled over questions: [L, H, N]
    return {scorer: _curve(reading, scorer, importance) for scorer in reading.scores}


def marginal_utility(
    importance: Float[Tensor, "layers kv_heads tokens"],
    scores: Float[Tensor, "layers kv_heads tokens"],
    candidates: Bool[Tensor, " tokens"],
    ranks: int = RANKS,
) -> Float[Tensor, "layers kv_heads ranks"]:
    """Importance of the candidates in the scorer's order, best first, resampled to `ranks` equal steps (float64)."""
    order = scores[..., candidates].argsort(dim=-1, descending=True, stable=True)
    gained = importance[..., candidates].double().gather(-1, order).cumsum(-1)
    gained = torch.nn.functional.pad(gained, (1, 0))  # nothing kept, nothing gained
    at = torch.linspace(0, gained.shape[-1] - 1, ranks + 1, dtype=torch.float64, device=gained.device)
    below = at.floor().long().clamp(max=gained.shape[-1] - 2)
    step = gained[..., below + 1] - gained[..., below]
    return (gained[..., below] + step * (at - below)).diff(dim=-1)


def _curve(
    reading: Reading, scorer: AbstractScorer, importance: Float[Tensor, "layers kv_heads tokens"]
) -> Float[Tensor, "layers kv_heads ranks"]:
    protected = protected_mask(reading.valid, scorer.sink, scorer.window)
    candidates = (reading.valid & ~protected)[0]
    marginal = marginal_utility(importance, reading.scores[scorer][:, 0], candidates)
    return marginal / marginal.sum()


def _scorers(names: Sequence[str]) -> dict[str, AbstractScorer]:
    """Scorers by name, each once. Raises BadInput for none, an unknown one or one that cannot watch a prefill."""
    chosen = {name: Method.parse(f"{name}+uniform").scorer for name in dict.fromkeys(names)}
    if not chosen:
        raise BadInput("there is nothing to profile: give at least one scorer.")
    for name, scorer in chosen.items():
        if not can_watch(scorer):
            raise BadInput(f"{name} cannot be profiled: it reads the context twice, or its scores depend on the keep.")
    return chosen


def _fitting(
    model: PreTrainedModel, tokenizer: Any, example: Example, scorers: Sequence[AbstractScorer], settings: Settings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Context and question tokens. Raises BadInput where they are too many for the model or too few for a scorer."""
    context, questions = encode(tokenizer, example, device=model.device)
    tokens = context.shape[1] + max(len(q) for q in questions) + settings.steps
    limit = view(model).max_positions
    if tokens > limit:
        raise BadInput(
            f"a calibration context of {context.shape[1]} tokens, its longest question and {settings.steps} decoded "
            f"tokens need {tokens} positions, but this model was made for {limit}: {example.context[:40]!r}."
        )
    protected = max(scorer.sink + scorer.window for scorer in scorers)
    if context.shape[1] <= protected:
        raise BadInput(
            f"a calibration context of {context.shape[1]} tokens is no longer than the {protected} that its scorer "
            f"protects: {example.context[:40]!r}."
        )
    return context, questions


def _origin(model: PreTrainedModel, run: str, files: Sequence[Path]) -> Origin:
    seen, name = view(model), model.config.name_or_path or ""
    return Origin(
        shape=seen.shape,
        model=Path(name).name if Path(name).is_dir() else name,  # profiles are shared; where a model lay is not
        config_hash=seen.config_hash,
        calibration=fingerprint(run, *(file.stem for file in files)),
    )


def _merge(
    files: Sequence[Path],
    domains: Sequence[str],
    scorers: dict[str, AbstractScorer],
    origin: Origin,
    settings: Settings,
) -> Profile:
    """Mean curves per scorer and domain, summed in the order of the data."""
    names, counts = list(dict.fromkeys(domains)), dict.fromkeys(domains, 0)
    total: dict[tuple[str, str], Tensor] = {}
    for file, domain in zip(files, domains, strict=True):
        tensors, _ = read_tensors(file, "part")
        counts[domain] += 1
        for name in scorers:
            curve = tensors[name].double()
            total[name, domain] = total[name, domain] + curve if (name, domain) in total else curve
    curves = {n: torch.stack([total[n, d] / counts[d] for d in names]).float() for n in scorers}
    return Profile(
        curves=curves,
        domains=tuple(names),
        contexts=tuple(counts[d] for d in names),
        protection={name: (scorer.sink, scorer.window) for name, scorer in scorers.items()},
        parameters={name: scorer.provenance() for name, scorer in scorers.items()},
        settings=asdict(settings),
        origin=origin,
    )
