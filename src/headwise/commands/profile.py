"""`headwise profile`: measure what every head gains by how much it keeps (LU-KV, offline)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, progress_bar
from headwise.commands.inputs import files_read, parse_entries
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
from headwise.files.strict_json import MOST
from headwise.files.terminal import say, split
from headwise.files.writing import require_file, require_folder
from headwise.models.places import find

if TYPE_CHECKING:
    from headwise.offline.calibration import Example
    from headwise.offline.profile import Settings
    from headwise.offline.watch import Sampling

Out = Annotated[Path, typer.Option("--out", "-o", help="Profile to write; a killed run goes on from OUT.parts.")]
Scorer = Annotated[str, typer.Option("--scorer", help="Comma-separated; one pass serves all.")]
Future = Annotated[
    str | None,
    typer.Option(help="Futures that show which entries matter: answers,repeat,following; left out: by the model."),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Tokens decoded per question; 64 if answers are the only future, else 8."),
]
Queries = Annotated[
    int, typer.Option(min=1, max=MOST, help="Of 1,024 tokens that are read as a future, how many count.")
]
Temperature = Annotated[float, typer.Option(min=0, max=MOST, help="0 decodes greedily.")]
Seed = Annotated[int, typer.Option(min=-SEEDS, max=SEEDS, help="Seed of sampling.")]
Entries = Annotated[
    str,
    typer.Option(
        help="Kinds of entries to measure: native,int8,k8v4,int4. A budget of all of them serves --entries auto."
    ),
]
Published = Annotated[bool, typer.Option("--published", help="Also solve every question by itself, as the paper does.")]


def profile(
    out: Out,
    model: Model = "reference",
    scorer: Scorer = "snapkv",
    data: Data = "builtin",
    length: Length = None,
    contexts: Contexts = None,
    questions: Questions = None,
    future: Future = None,
    steps: Steps = None,
    queries: Queries = 128,
    sink: Sink = 4,
    window: Window = 32,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    entries: Entries = "native",
    published: Published = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what every head gains by how much it keeps (LU-KV, offline). Also under 'accelerate launch'."""
    source = find(model)
    from headwise.models.families import view
    from headwise.offline.profile import profile as run
    from headwise.offline.watch import Sampling

    scorers, kinds = split(scorer), parse_entries(entries, auto=False)
    texts = Texts(data=data, length=length, contexts=contexts, questions=parse_questions(questions))
    require_file(out, inputs=files_read(model, scorers, Path(data)))
    require_folder(f"{out}.parts")
    processes, loaded, tokenizer = load_launched(source, dtype, device)
    examples = texts.examples(tokenizer, max_positions=view(loaded).max_positions)
    sampling = Sampling(temperature=temperature, seed=seed)
    settings = _settings(tokenizer, examples, future, steps, queries, sampling, sink, window, kinds, published)
    with progress_bar("contexts") as progress:
        run(loaded, tokenizer, examples, scorers, out, settings=settings, processes=processes, progress=progress)
    if processes.rank == 0:
        _print(out, scorer, examples, as_json)


def _settings(
    tokenizer: Any,
    examples: "Sequence[Example]",
    future: str | None,
    steps: int | None,
    queries: int,
    sampling: "Sampling",
    sink: int,
    window: int,
    entries: Sequence[str],
    published: bool,
) -> "Settings":
    """Return how losses are measured. Defaults follow from the model's language and the examples."""
    from headwise.offline.profile import Settings, default_futures, default_steps

    futures = default_futures(tokenizer, examples) if future is None else tuple(split(future))
    return Settings(
        steps=steps or default_steps(futures),
        futures=futures,
        queries=queries,
        sampling=sampling,
        sink=sink,
        window=window,
        entries=tuple(entries),
        published=published,
    )


def _print(out: Path, scorer: str, examples: "Sequence[Example]", as_json: bool) -> None:
    if as_json:
        print_json({"profile": str(out), "contexts": len(examples), "scorers": split(scorer)})
    else:
        say(f"{out}: {len(examples)} contexts, {scorer}. Next: headwise solve {out} --scorer ... --out ...")
