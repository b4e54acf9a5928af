"""`headwise calibrate`: show the texts that a model would be profiled or trained on."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.inputs import files_read
from headwise.commands.options import AsJson, Contexts, Data, Length, Model, Questions
from headwise.commands.texts import Texts, parse_questions
from headwise.files.strict_json import MOST
from headwise.files.terminal import count, say
from headwise.files.writing import require_file, write_bytes
from headwise.models.places import find

if TYPE_CHECKING:
    from headwise.offline.calibration import Example

Split = Annotated[str, typer.Option("--split", help="Of builtin: calibration, as profile has it, or train.")]
Show = Annotated[int, typer.Option(min=0, max=MOST, help="How many examples to print.")]
Full = Annotated[bool, typer.Option("--full", help="Print contexts with their middle.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File (.jsonl) to write, for --data.")]


def calibrate(
    model: Model = "reference",
    data: Data = "builtin",
    length: Length = None,
    contexts: Contexts = None,
    questions: Questions = None,
    part: Split = "calibration",
    show: Show = 0,
    full: Full = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model would be profiled or trained on: a table, examples, or a file. Loads the tokenizer only."""
    source = find(model)
    from headwise.models.families import max_positions
    from headwise.models.loading import load_config, load_tokenizer
    from headwise.offline.calibration import to_json_lines

    if out is not None:
        require_file(out, inputs=files_read(model, [], Path(data)))
    positions, tokenizer = max_positions(load_config(source)), load_tokenizer(source)
    texts = Texts(data=data, length=length, contexts=contexts, questions=parse_questions(questions))
    examples = texts.examples(tokenizer, max_positions=positions, split=part)
    if out is not None:
        write_bytes(out, to_json_lines(examples).encode())
    if as_json:
        print_json([asdict(example) for example in examples[:show]] or _totals(examples, tokenizer))
    elif show:
        _print_examples(examples[:show], tokenizer, full)
    else:
        rows = [[str(cell) for cell in total.values()] for total in _totals(examples, tokenizer)]
        header = ["domain", "contexts", "tokens", "shortest", "longest", "following", "questions"]
        print_table(f"{count(examples, 'context')} from {data}. Model: {model}", header, rows)


def _totals(examples: "Sequence[Example]", tokenizer: Any) -> list[dict[str, Any]]:
    """Return how much there is of every domain."""
    from headwise.offline.calibration import count_tokens
    from headwise.offline.texts.showing import totals

    return [asdict(total) for total in totals(examples, count_tokens(tokenizer))]


def _print_examples(examples: "Sequence[Example]", tokenizer: Any, full: bool) -> None:
    from headwise.offline.calibration import count_tokens
    from headwise.offline.texts.showing import render

    for example in examples:
        say(render(example, count_tokens(tokenizer), full=full))
