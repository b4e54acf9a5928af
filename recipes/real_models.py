"""Evaluate every method on a real model: the runs behind docs/results, in an order in which the core is done first.

    python recipes/real_models.py MODEL --out runs --ruler RULER_DATA --longbench LONGBENCH_DATA --books BOOKS.txt.xz
    python recipes/real_models.py MODEL --out runs ... --sets ruler-1k --methods full,lkv --samples 10
    python recipes/real_models.py MODEL --out runs ... --methods full,lkv --again lkv   # its file has been made anew
    python recipes/real_models.py MODEL --out runs ... --methods full,lkv --keeps 0.15,1 --entries native,int4

Sets, in this order: ruler-1k (both protocols), longbench-2k, books, ruler-2k, ruler-4k, others. Every task of a set has
a folder of its own, runs/MODEL/SET/PROTOCOL/TASK, with short records: no text of a data set but what the model said. A
killed run goes on where it was. Several processes, started alike, share the tasks: who finds one in work takes the
next. The folders can be kept in a repository and continued on another machine (what is compared are the model's
weights). One report of them all: headwise report runs/MODEL/*/*/* -o report.html

Samples of RULER are of the split "evaluation", whose seeds no training and no calibration can reach. Books must be ones
that no gates were trained on.
"""

import argparse
import contextlib
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwise.errors import BadInput, HeadwiseError
from headwise.evals.records import RUN, RunFolder
from headwise.evals.run import Evaluation, evaluate, manifest
from headwise.files.locks import SUFFIX, locked
from headwise.files.writing import write_bytes
from headwise.kernels.quantised import ENTRIES, NATIVE, require_entries
from headwise.methods.keep import parse_keep
from headwise.models.loading import load
from headwise.tasks.longbench.data import LONGBENCH_TASKS
from headwise.tasks.plain import perplexity_task
from headwise.tasks.ruler.suite import RULER_TASKS
from headwise.tasks.suites import Sizes, make_tasks
from headwise.tasks.task import PROTOCOLS, Task, require_protocol

CORE = ("full", "lkv", "kvzip", "kvzip-l2", "keydiff", "keydiff+lukv", "expected", "expected+lukv")
CORE += ("snapkv", "snapkv+lukv", "oracle")
OTHERS = ("random", "streaming", "knorm", "tova", "h2o", "criticalkv", "pyramidkv", "adakv")
OTHERS += ("keydiff+adakv", "expected+adakv", "expected+global", "lkv-t", "lkv-t+lkv-h", "lkv-t+global")
KEEPS = ("0.0625", "0.15", "0.25")
SEED = 20_000  # of the evaluation: nothing was tuned on it
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
LETTERS_PER_TOKEN = 8  # of a passage, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Set:
    """Tasks of one suite at one length."""

    suite: str
    length: int
    methods: tuple[str, ...] = CORE
    keeps: tuple[str, ...] = KEEPS
    entries: tuple[str, ...] = (NATIVE,)
    share: float = 1.0  # of --samples
    protocols: tuple[str, ...] = ("query-agnostic",)


SETS: Mapping[str, Set] = {
    "ruler-1k": Set(suite="ruler", length=1024, protocols=("query-agnostic", "query-aware")),
    "longbench-2k": Set(suite="longbench", length=2048, share=0.5),
    "books": Set(suite="books", length=896),
    "ruler-2k": Set(suite="ruler", length=2048, keeps=("0.15",), share=0.5),
    "ruler-4k": Set(suite="ruler", length=4096, keeps=("0.15",), share=0.25),
    "others": Set(suite="ruler", length=1024, methods=OTHERS, keeps=("0.25",), share=0.25),
}


def main() -> None:
    """All sets that were asked for. A task that cannot be measured does not stop the others; the exit code tells."""
    asked, failed = arguments(), False
    model, tokenizer = load(str(asked.model), dtype=asked.dtype, device=asked.device)
    for name in asked.sets:
        chosen = replace(SETS[name], entries=asked.entries, keeps=asked.keeps or SETS[name].keeps)
        for protocol in asked.protocols or chosen.protocols:
            for task in tasks_of(chosen, asked, tokenizer):
                path = asked.out / asked.model.name / name / protocol / task.name.partition(":")[2]
                try:
                    run(model, tokenizer, task, chosen, protocol, path, asked.methods, asked.again)
                except HeadwiseError as error:
                    print(f"{path}: {error}", file=sys.stderr)
                    failed = True
    sys.exit(int(failed))


def arguments() -> argparse.Namespace:
    """What was asked on the command line. Raises BadInput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", type=names, default=tuple(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--tasks", type=names, help="of RULER and LongBench, instead of all")
    parser.add_argument("--methods", type=names, help="instead of those of the set")
    parser.add_argument("--keeps", type=names, help="instead of those of the set")
    parser.add_argument("--entries", type=names, default=(NATIVE,), help=f"of {', '.join((NATIVE, *ENTRIES))}")
    parser.add_argument("--protocols", type=names, help=f"instead of those of the set, of {', '.join(PROTOCOLS)}")
    parser.add_argument("--again", type=names, default=(), help="forget what was measured of these methods")
    parser.add_argument("--samples", type=int, default=20, help="per task of ruler-1k; other sets take a share")
    parser.add_argument("--ruler", type=Path, help="folder with RULER's essays, words and questions")
    parser.add_argument("--longbench", type=Path, help="folder with LongBench's .jsonl files")
    parser.add_argument("--books", type=Path, help="text of many books (.txt.xz)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    if unknown := [name for name in asked.sets if name not in SETS]:
        parser.error(f"there is no set {unknown[0]}; choose {', '.join(SETS)}.")
    for protocol in asked.protocols or ():
        require_protocol(protocol)
    for entries in asked.entries:
        require_entries(entries)
    for keep in asked.keeps or ():
        parse_keep(keep)
    return asked


def names(text: str) -> tuple[str, ...]:
    """Of a list with commas."""
    return tuple(part.strip() for part in text.split(","))


def tasks_of(chosen: Set, asked: argparse.Namespace, tokenizer: Any) -> Iterator[Task]:
    """The tasks of a set, one by one: a data set is read when it is needed. Raises BadInput."""
    samples = max(1, round(asked.samples * chosen.share))
    places = {"ruler": asked.ruler, "longbench": asked.longbench, "books": asked.books}
    if places[chosen.suite] is None:
        raise BadInput(f"--{chosen.suite} is missing: it says where the data lies.")
    if chosen.suite == "books":
        yield books(asked.books, tokenizer, chosen.length, samples)
        return
    sizes = Sizes(samples=samples, length=chosen.length, seed=SEED, data_dir=places[chosen.suite])
    known = RULER_TASKS if chosen.suite == "ruler" else [name for name in LONGBENCH_TASKS if name not in CHINESE]
    for name in known if asked.tasks is None else asked.tasks:
        yield from make_tasks([(chosen.suite, name)], tokenizer, sizes)


def books(path: Path, tokenizer: Any, length: int, samples: int) -> Task:
    """Passages that lie evenly in a text of many books: 7/8 of each is compressed, and the rest predicted."""
    text = lzma.decompress(path.read_bytes()).decode()
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(samples):
            start = text.index("\n\n", len(text) * index // samples) + 2
            piece = Path(folder) / "books"
            piece.write_text(text[start : start + LETTERS_PER_TOKEN * length])
            made.append(perplexity_task(piece, tokenizer, length))
    return replace(made[0], num_samples=samples, sample=lambda index: made[index].sample(0))


def forget(path: Path, methods: Sequence[str]) -> None:
    """Drop the records of methods whose files have been made anew, and what they were made of.

    Records go first: what is interrupted between the two is refused by the next run, and can be forgotten again.
    """
    about = path / RUN
    if not methods or not about.is_file():
        return
    for records in sorted(path.glob("records*.jsonl")):
        lines = [line for line in records.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = "".join(line for line in lines if json.loads(line)["method"] not in methods)
        write_bytes(records, kept.encode())
    known = json.loads(about.read_text())
    made_of = known.get("made_of", {})
    known["made_of"] = {method: file for method, file in made_of.items() if method not in methods}
    known["latest"] = [pair for pair in known["latest"] if pair[0] not in methods]  # else the last sample would go
    write_bytes(about, json.dumps(known, indent=1).encode())


def run(
    model: Any,
    tokenizer: Any,
    task: Task,
    chosen: Set,
    protocol: str,
    path: Path,
    methods: Sequence[str] | None,
    again: Sequence[str] = (),
) -> None:
    """Measure what a folder lacks, unless another process does."""
    evaluation = Evaluation(
        tasks=(task,),
        methods=tuple(methods or chosen.methods),
        keeps=tuple(parse_keep(keep) for keep in chosen.keeps),
        entries=chosen.entries,
        seed=SEED,
        protocol=protocol,
        timed=0,
        brief=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = path.with_name(f".{path.name}{SUFFIX}")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(claim, path))
        except BadInput:
            print(f"{path}: in work", file=sys.stderr)
            return
        forget(path, again)
        start = time.perf_counter()
        told = manifest(model, path.parts[-4], evaluation, chosen.length, "python recipes/real_models.py")
        found = evaluate(model, tokenizer, evaluation, folder=RunFolder(path, told))
        print(f"{path}: {len(found)} records, {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except HeadwiseError as error:
        sys.exit(f"error: {error}")
