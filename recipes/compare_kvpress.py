"""Compare headwise with kvpress 0.5.5 on the samples of an evaluation, as a table of scores.

    headwise eval --model MODEL --tasks ruler:niah_single_2,niah_multikey_1,niah_multivalue --length 1024 --samples 8 \\
        --data-dir DATA --methods full,snapkv,keydiff,expected,adakv,kvzip --keep 0.25 --out run
    python recipes/compare_kvpress.py run --kvpress kvpress-env/bin/python --data-dir DATA

kvpress pins other versions of transformers, so it needs an environment of its own (a CPU is enough):

    python -m venv kvpress-env
    kvpress-env/bin/pip install torch==2.13.0 kvpress==0.5.5

The samples are made again from what run.json says, checked against the records, tokenised here, and given to kvpress as
token ids: recipes/kvpress_answers.py answers them, query-agnostically, with the same parameters. Answers are judged
here. A killed comparison goes on where it was. Writes RUN.kvpress/table.md, and beside it the ids and the answers.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from headwise.errors import BadInput, HeadwiseError
from headwise.evals.records import NATIVE, RECORDS, RUN, Record, records_in
from headwise.methods.keep import parse_keep
from headwise.methods.scores import SnapKV
from headwise.models.loading import load_tokenizer
from headwise.tasks.document import Tokens, tokenize
from headwise.tasks.suites import Sizes, make_tasks, parse_tasks
from headwise.tasks.task import Sample, Task

METHODS = ("full", "snapkv", "keydiff", "expected", "adakv", "kvzip")
Key = tuple[str, int, str]  # task, index, method


def main() -> None:
    """Export, have kvpress answer, judge, write."""
    asked = arguments()
    manifest = json.loads((asked.run / RUN).read_text())
    records = {(r.task, r.index, r.method): r for r in wanted(asked.run, manifest, asked.keep)}
    model = asked.model or manifest["model"]
    tokenizer = load_tokenizer(model)
    sizes = Sizes(
        samples=manifest["samples"], length=manifest["length"], seed=manifest["seed"], data_dir=asked.data_dir
    )
    tasks = {task.name: task for task in make_tasks(parse_tasks(",".join(manifest["tasks"])), tokenizer, sizes)}
    folder = asked.run.with_name(f"{asked.run.name}.kvpress")
    folder.mkdir(exist_ok=True)
    snapkv = SnapKV()
    job = {
        "model": model,
        "dtype": manifest["dtype"],
        "keep": asked.keep,
        "presses": [method for method in METHODS if any(key[2] == method for key in records)],
        "snapkv": {"window_size": snapkv.window_size, "kernel_size": snapkv.kernel_size},
        "samples": list(exported(tasks, records, tokenizer)),
    }
    (folder / "job.json").write_text(json.dumps(job))
    answered = folder / "answers.jsonl"
    script = Path(__file__).with_name("kvpress_answers.py")
    subprocess.run([asked.kvpress, script, folder / "job.json", answered], check=True)
    said = {tuple(line["of"]): line["answers"] for line in map(json.loads, answered.read_text().splitlines())}
    table = "\n".join(rows(tasks, records, said, tokenizer))
    (folder / "table.md").write_text(table + "\n")
    print(table)


def arguments() -> argparse.Namespace:
    """What was asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of 'headwise eval --out', query-agnostic")
    parser.add_argument("--kvpress", required=True, help="the Python of kvpress's environment")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--model", help="left out: as in run.json")
    parser.add_argument("--data-dir", type=Path, help="as it was given to 'headwise eval'")
    return parser.parse_args()


def wanted(run: Path, manifest: dict[str, Any], keep: float) -> list[Record]:
    """Records of the methods that both have, at one keep, all native. Raises BadInput if there are none."""
    native = [r for r in records_in(run / RECORDS) if r.method in METHODS and r.entries == NATIVE]
    found = [r for r in native if parse_keep(r.keep).value == (1.0 if r.method == "full" else keep)]
    if manifest["protocol"] != "query-agnostic" or not found:
        raise BadInput(f"{run} has no query-agnostic record of {', '.join(METHODS)} at keep {keep}.")
    return found


def exported(tasks: dict[str, Task], records: dict[Key, Record], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Every sample as token ids. Raises BadInput where it is not the one of the record."""
    for name, index in dict.fromkeys(key[:2] for key in records):
        sample = tasks[name].sample(index)
        tokens = tokens_of(sample, tokenizer)
        context, record = tokens.context[0].tolist(), next(r for r in records.values() if r.unit == (name, index))
        same = record.context_tokens == len(context)
        if not same or (record.answers and record.answers != tuple(q.answers for q in sample.questions)):
            raise BadInput(f"{name}, sample {index}, is not that of the record: give the same --data-dir and --model.")
        questions = [question.tolist() for question in tokens.questions]
        most = sample.max_new_tokens
        yield {"of": [name, index], "context": context, "questions": questions, "max_new_tokens": most}


def tokens_of(sample: Sample, tokenizer: Any) -> Tokens:
    """As `headwise eval` tokenises it."""
    return tokenize(
        tokenizer,
        sample.context,
        [question.prompt for question in sample.questions],
        separator="" if sample.verbatim else "\n\n",
        prefixes=[question.answer_prefix for question in sample.questions],
        chat=sample.chat,
    )


def rows(
    tasks: dict[str, Task], records: dict[Key, Record], said: dict[Key, list[list[int]]], tokenizer: Any
) -> Iterator[str]:
    """A Markdown table: a row for every method and task, then one for the mean of all tasks."""
    yield "| method | task | samples | headwise | kvpress | difference | same answers |"
    yield "|---|---|---|---|---|---|---|"
    for method in METHODS:
        scored: list[tuple[float, float, bool]] = []
        for task in tasks.values():
            keys = [key for key in records if key[0] == task.name and key[2] == method]
            found = [pair(task, records[key], said[key], tokenizer) for key in keys]
            if found:
                yield row(method, task.name, found)
                scored += found
        if scored and len(tasks) > 1:
            yield row(method, "all", scored)


def pair(task: Task, record: Record, said: list[list[int]], tokenizer: Any) -> tuple[float, float, bool]:
    """Score of headwise, score of kvpress, and whether both have said the same."""
    assert task.judge is not None and record.score is not None
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    questions = task.sample(record.index).questions
    score = fmean(task.judge(text, question) for text, question in zip(texts, questions, strict=True))
    return record.score, score, tuple(texts) == record.predictions


def row(method: str, task: str, found: Sequence[tuple[float, float, bool]]) -> str:
    """One line of the table."""
    ours, theirs, same = (fmean(column) for column in zip(*found, strict=True))
    return f"| {method} | {task} | {len(found)} | {ours:.3f} | {theirs:.3f} | {ours - theirs:+.3f} | {same:.0%} |"


if __name__ == "__main__":
    try:
        main()
    except HeadwiseError as error:
        sys.exit(f"error: {error}")
