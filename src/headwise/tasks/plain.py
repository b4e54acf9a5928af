"""Make tasks from a user's own files: documents with questions and answers, and texts to be predicted.

    file:MY.jsonl        one object per line: {"context": "...", "question": "...", "answers": ["..."]}, or several:
                         {"context": "...", "questions": [{"question": "...", "answers": ["..."]}, ...]};
                         "metric" is contains (default), exact or f1; "max_new_tokens" is 32 unless it is given
    perplexity:TEXT.txt  the text in pieces of --length tokens: the first 7/8 of each are compressed, the rest predicted

A document is used as it is, however long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.tasks.document import read_text, require_whole, text_ids
from headwise.tasks.metrics import METRICS
from headwise.tasks.task import Question, Sample, Sizes, Suite, Task

CONTINUED = 8  # the last eighth of a piece is predicted
MAX_NEW_TOKENS = 32
EXAMPLE = '{"context": "...", "question": "Who ...?", "answers": ["Ada"], "metric": "contains"}'


def file_task(path: Path, length: int) -> Task:
    """Return a task of documents with questions. Raises BadInput, naming the line."""
    lines = [(n, line) for n, line in enumerate(read_text(path, newline="\n").split("\n"), start=1) if line.strip()]
    parsed = [_parse(line, f"{path}, line {number}") for number, line in lines]
    metrics = {metric for _, metric in parsed}
    if len(metrics) > 1:
        raise BadInput(f"{path} has several metrics ({', '.join(sorted(metrics))}); give each a file of its own.")
    metric = METRICS[metrics.pop()]
    return Task(
        name=f"file:{path.name}",
        length=length,
        num_samples=len(parsed),
        sample=lambda index: parsed[index][0],
        judge=lambda prediction, question: metric(prediction, question.answers),
    )


def perplexity_task(path: Path, tokenizer: Any, length: int) -> Task:
    """Return a task of a text in pieces of `length` tokens, whose ends are predicted.

    Pieces are the text's own tokens. A piece that is decoded and tokenized again would differ where a word is cut.
    Raises BadInput if the text is too short.
    """
    start, ids = text_ids(tokenizer, read_text(path))
    room = length - len(start)
    pieces = [ids[start : start + room] for start in range(0, len(ids) - room + 1, room)]
    if not pieces or room < 2 * CONTINUED:
        raise BadInput(f"{path} has {len(ids)} tokens, which makes no piece of {length}: give a smaller --length.")

    def sample(index: int) -> Sample:
        piece, cut = pieces[index], room - room // CONTINUED
        return Sample(
            context=tokenizer.decode(piece[:cut]),
            questions=(Question(prompt=tokenizer.decode(piece[cut:]), answers=()),),
            max_new_tokens=0,
            verbatim=True,
            chat=False,
            continues=((*start, *piece[:cut]), tuple(piece[cut:])),
        )

    return Task(name=f"perplexity:{path.name}", length=length, num_samples=len(pieces), sample=sample, judge=None)


def _parse(line: str, where: str) -> tuple[Sample, str]:
    """Return a sample and its metric."""
    try:
        record: Any = strict_json.loads(line, values=False)  # answers may hold any text: they are compared with
    except ValueError as error:
        raise BadInput(f"{where} is no JSON ({error}); write {EXAMPLE}.") from error
    if not isinstance(record, Mapping) or not _is_text(record.get("context")):
        raise BadInput(f"{where} has no context; write {EXAMPLE}.")
    raw_questions = record.get("questions", [record])
    metric, limit = record.get("metric", "contains"), record.get("max_new_tokens", MAX_NEW_TOKENS)
    if not isinstance(metric, str) or metric not in METRICS:
        raise BadInput(f"{where}: metric {shown(metric)} is not known; choose {', '.join(METRICS)}.")
    if type(limit) is not int or not 1 <= limit <= strict_json.MOST:
        raise BadInput(f"{where}: max_new_tokens={shown(limit)} must be a number of at least 1.")
    if not isinstance(raw_questions, list) or not raw_questions:
        raise BadInput(f"{where} has no questions; write {EXAMPLE}.")
    questions = tuple(_question(raw, where) for raw in raw_questions)
    for text in (record["context"], *(question.prompt for question in questions)):
        require_whole(text, where)
    return Sample(context=record["context"], questions=questions, max_new_tokens=limit), metric


def _question(raw: Any, where: str) -> Question:
    match raw:
        case {"question": str(question), "answers": [*answers]} if question.strip() and answers:
            if all(_is_text(answer) for answer in answers):
                return Question(prompt=question, answers=tuple(answers))
    raise BadInput(f"{where}: every question needs text and at least one answer; write {EXAMPLE}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _files(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return [_at_most(file_task(Path(name), sizes.length), sizes.samples) for name in names]


def _texts(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return [_at_most(perplexity_task(Path(name), tokenizer, sizes.length), sizes.samples) for name in names]


def _at_most(task: Task, samples: int) -> Task:
    return replace(task, num_samples=min(task.num_samples, samples))


FILES = Suite(names=(), make=_files, sized=False)
TEXTS = Suite(names=(), make=_texts)
