"""`headwise train`: train gates from a model and texts (LKV)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, progress_bar
from headwise.commands.inputs import files_read
from headwise.commands.loading import load_launched
from headwise.commands.options import (
    SEEDS,
    AsJson,
    Contexts,
    Data,
    Device,
    Dtype,
    Length,
    Model,
    Questions,
    Sink,
    Window,
)
from headwise.commands.texts import Texts, parse_questions
from headwise.errors import BadInput
from headwise.files.strict_json import MOST
from headwise.files.terminal import say, split
from headwise.files.writing import require_file
from headwise.models.places import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.models.processes import Processes
    from headwise.offline.calibration import Example
    from headwise.offline.train.loop import Settings
    from headwise.offline.train.run import Part as Trained

Out = Annotated[Path, typer.Option("--out", "-o", help="Gates to write; a killed run goes on from OUT.state.")]
Part = Annotated[str, typer.Option(help="lkv (both), lkv-h (budgets only) or lkv-t (scores only).")]
Scorer = Annotated[str | None, typer.Option(help="The fixed scorer that budgets alone are trained for.")]
FitSteps = Annotated[
    int, typer.Option(min=0, max=MOST, help="Steps in which scores learn to predict attention; 0: none.")
]
WarmSteps = Annotated[
    int, typer.Option(min=0, max=MOST, help="Steps then in which every head learns alone what its output needs.")
]
Steps = Annotated[
    int | None,
    typer.Option(min=0, max=MOST, help="Steps of joint training from answers; left out: 600 for lkv-h, or 0."),
]
ContextsPerStep = Annotated[int, typer.Option(min=1, max=MOST, help="Contexts of a step, over all processes.")]
AnswerTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of the teacher's answers, at most.")]
Bounds = Annotated[str, typer.Option(help="Smallest and largest keep to train for.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="The same seed gives the same gates.")]


def train(
    out: Out,
    model: Model = "reference",
    data: Data = "builtin",
    length: Length = None,
    contexts: Contexts = None,
    questions: Questions = None,
    part: Part = "lkv",
    scorer: Scorer = None,
    fit_steps: FitSteps = 1000,
    warm_steps: WarmSteps = 0,
    steps: Steps = None,
    contexts_per_step: ContextsPerStep = 4,
    answer_tokens: AnswerTokens = 16,
    keeps: Bounds = "0.03,0.3",
    sink: Sink = 1,
    window: Window = 4,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Learn how much every head keeps, and which entries (LKV). Also under 'accelerate launch'."""
    source = find(model)
    part = _parse_part(part)
    texts = Texts(data=data, length=length, contexts=contexts, questions=parse_questions(questions))
    settings = _settings(
        part, fit_steps, warm_steps, steps, contexts_per_step, texts, answer_tokens, keeps, sink, window, seed
    )
    _require_writable(out, model, scorer, data)
    processes, loaded, tokenizer = load_launched(source, dtype, device)
    examples = texts.training_examples(loaded, tokenizer)
    _train(loaded, tokenizer, examples, out, part, scorer, settings, processes)
    if processes.rank == 0:
        _print(out, part, scorer, settings.steps, len(examples), as_json)


def _parse_part(part: str) -> "Trained":
    """Return what to train. Raises BadInput if it is unknown."""
    if part not in ("lkv", "lkv-h", "lkv-t"):
        raise BadInput(f"part={part!r}: choose lkv, lkv-h or lkv-t.")
    return part


def _settings(
    part: "Trained",
    fit_steps: int,
    warm_steps: int,
    steps: int | None,
    contexts_per_step: int,
    texts: Texts,
    answer_tokens: int,
    keeps: str,
    sink: int,
    window: int,
    seed: int,
) -> "Settings":
    """Return how gates are trained. `steps` defaults to 600 for lkv-h, else 0. Raises BadInput if `keeps` are wrong."""
    from headwise.offline.train.fit import FitSettings
    from headwise.offline.train.loop import Settings

    return Settings(
        fit=FitSettings(steps=fit_steps, seed=seed),
        steps=steps if steps is not None else 600 * (part == "lkv-h"),
        warm_steps=warm_steps,
        contexts_per_step=contexts_per_step,
        questions=texts.questions if isinstance(texts.questions, int) else Settings().questions,
        answer_tokens=answer_tokens,
        keeps=_bounds(keeps),
        sink=sink,
        window=window,
        seed=seed,
    )


def _bounds(keeps: str) -> tuple[float, float]:
    """Return the smallest and the largest keep. Raises BadInput if there are not two, in this order."""
    from headwise.methods.keep import parse_fraction

    bounds = [parse_fraction(keep, "keeps") for keep in split(keeps)]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise BadInput(f"keeps={keeps!r}: write the smallest and the largest, in this order, such as 0.03,0.5.")
    return bounds[0], bounds[1]


def _require_writable(out: Path, model: str, scorer: str | None, data: str) -> None:
    """Raise BadInput unless gates, log and state can be written, and are none of the files that are read."""
    from headwise.offline.train.run import written

    for path in written(out):
        require_file(path, inputs=files_read(model, [scorer or ""], Path(data)))


def _train(
    model: "PreTrainedModel",
    tokenizer: Any,
    examples: "Sequence[Example]",
    out: Path,
    part: "Trained",
    scorer: str | None,
    settings: "Settings",
    processes: "Processes",
) -> None:
    """Train, write, and show progress."""
    from headwise.offline.train.run import train as run

    with progress_bar("steps") as progress:
        run(
            model,
            tokenizer,
            examples,
            out,
            part=part,
            scorer=scorer,
            settings=settings,
            processes=processes,
            progress=progress,
        )


def _print(out: Path, part: "Trained", scorer: str | None, steps: int, examples: int, as_json: bool) -> None:
    use = {"lkv": f"lkv@{out}", "lkv-h": f"{scorer}+lkv-h@{out}", "lkv-t": f"lkv-t@{out}"}[part]
    if as_json:
        print_json({"gates": str(out), "log": f"{out}.log.jsonl", "steps": steps, "method": use})
    else:
        say(f"{out}: trained on {examples} contexts. Use it as {use}")
