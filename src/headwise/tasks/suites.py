"""Parse the names of tasks, and make the tasks.

    mini-ruler[:vt,cwe]         generated with a small vocabulary, for the reference model (mini_ruler/)
    ruler[:niah_single_1,...]   RULER's official templates, any tokenizer and length (ruler/); "ruler" alone: all
                                whose data are there
    longbench[:qasper,...]      LongBench; longbench-e for its length-balanced variant (longbench/)
    file:MY.jsonl               your own documents, questions and answers (plain.py)
    perplexity:TEXT.txt         how well your own text is predicted after eviction (plain.py)

Several follow each other after commas: mini-ruler:vt,cwe,file:my.jsonl.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headwise.errors import BadInput
from headwise.tasks.longbench.suite import LONGBENCH_E_NAMES, LONGBENCH_TASKS, longbench_tasks
from headwise.tasks.metrics import answers_found
from headwise.tasks.mini_ruler import suite as mini_ruler
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON, Lexicon
from headwise.tasks.mini_ruler.suite import TASKS
from headwise.tasks.plain import file_task, perplexity_task
from headwise.tasks.ruler.suite import RULER_TASKS, ruler_tasks, tasks_without_data
from headwise.tasks.task import Question, Sample, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How many samples each task has, how long, and from which seed.

    Attributes
    ----------
    samples : how many samples each task has, at most.
    length : tokens of a sample.
    seed : what samples are drawn from, from 0 on.
    data_dir : the folder of data that are not in the package.

    Raises
    ------
    BadInput
        If a number is out of range.
    """

    samples: int
    length: int
    seed: int = 0
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1 or self.seed < 0:
            raise BadInput(
                f"samples={self.samples} and length={self.length} must be at least 1, seed={self.seed} at least 0."
            )


def parse_tasks(
    text: str, *, whole: Callable[[str], Sequence[str]] = lambda suite: SUITES[suite].names
) -> list[tuple[str, str]]:
    """Return (suite, name) for every task in a text such as "mini-ruler:vt,cwe,file:my.jsonl", each once.

    `whole` returns the names of a suite's tasks if the suite is named alone. Raises BadInput if a suite or task is
    unknown, or none is named.
    """
    tasks: list[tuple[str, str]] = []
    suite = ""
    for part in (part.strip() for part in text.split(",")):
        head, colon, names = part.partition(":")
        if head in SUITES:
            suite, part = head, names.strip()
            if not colon and SUITES[suite].names:
                tasks += [(suite, name) for name in whole(suite)]
                continue
        if not suite:
            raise BadInput(f"tasks={text!r}: {part!r} is no suite; choose {', '.join(SUITES)}, such as mini-ruler:vt.")
        if part:
            tasks.append((suite, _require_known(suite, part)))
    if not tasks:
        raise BadInput(f"tasks={text!r} names no task; write a suite ({', '.join(SUITES)}), or suite:task,task.")
    return list(dict.fromkeys(tasks))


def with_data(suite: str, *, data_dir: Path | None, tell: Callable[[str], None]) -> list[str]:
    """Return the tasks of a suite that have their data. `tell` is called with a sentence about the others.

    Raises BadInput if the folder does not exist.
    """
    lacking = SUITES[suite].lacking(data_dir)
    if lacking:
        names = f"{suite}: {', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'}"
        tell(f"{names} left out for want of data. To see which data, ask for --tasks {suite}:{lacking[0]}.")
    return [name for name in SUITES[suite].names if name not in lacking]


def make_tasks(named: Sequence[tuple[str, str]], tokenizer: Any, sizes: Sizes) -> list[Task]:
    """Find and read the data of tasks, and return the tasks.

    Parameters
    ----------
    named : (suite, name) of every task, as `parse_tasks` returns them.
    sizes : how many samples, how long, and where data lie.

    Raises
    ------
    BadInput
        If data are missing or damaged, or a size does not suit the task.
    """
    by_suite: dict[str, list[str]] = {}
    for suite, name in named:
        by_suite.setdefault(suite, []).append(name)
    tasks = {
        task.name: task for suite, names in by_suite.items() for task in SUITES[suite].make(names, tokenizer, sizes)
    }
    return list(tasks.values())


def lexicon_for(tokenizer: Any) -> Lexicon:
    """Return the bundled lexicon, which counts tokens as this tokenizer does."""
    return replace(
        REFERENCE_LEXICON,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        num_special_tokens=tokenizer.num_special_tokens_to_add(),
    )


def mini_ruler_tasks(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    """Return tasks of the split "evaluation", whose seeds neither training nor calibration can reach."""
    lexicon = lexicon_for(tokenizer)

    def make(name: str) -> Task:
        def sample(index: int) -> Sample:
            generated = mini_ruler.generate(
                name, lexicon=lexicon, length=sizes.length, seed=sizes.seed, index=index, split="evaluation"
            )
            questions = tuple(Question(prompt=q.prompt, answers=q.answers) for q in generated.questions)
            return Sample(context=generated.context, questions=questions, max_new_tokens=generated.max_new_tokens)

        return Task(
            name=f"mini-ruler:{name}",
            length=sizes.length,
            num_samples=sizes.samples,
            sample=sample,
            judge=lambda prediction, question: answers_found(prediction, question.answers),
        )

    return [make(name) for name in names]


def _ruler(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return ruler_tasks(
        names,
        tokenizer=tokenizer,
        length=sizes.length,
        num_samples=sizes.samples,
        seed=sizes.seed,
        data_dir=sizes.data_dir,
    )


def _longbench(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return longbench_tasks(
        names, tokenizer=tokenizer, length=sizes.length, num_samples=sizes.samples, data_dir=sizes.data_dir
    )


def _files(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return [_limit_samples(file_task(Path(name), sizes.length), sizes.samples) for name in names]


def _texts(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return [_limit_samples(perplexity_task(Path(name), tokenizer, sizes.length), sizes.samples) for name in names]


def _limit_samples(task: Task, samples: int) -> Task:
    return replace(task, num_samples=min(task.num_samples, samples))


def _require_known(suite: str, name: str) -> str:
    names = SUITES[suite].names
    if names and name not in names:
        raise BadInput(f"unknown task {name!r} of {suite}; the tasks are {', '.join(names)}.")
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A family of tasks. `names` are all of them; it is empty if a name is a file."""

    names: tuple[str, ...]
    make: Callable[[Sequence[str], Any, Sizes], list[Task]]
    lacking: Callable[[Path | None], list[str]] = lambda data_dir: []  # tasks whose data the folder does not hold


SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "mini-ruler": Suite(names=tuple(TASKS), make=mini_ruler_tasks),
        "ruler": Suite(names=tuple(RULER_TASKS), make=_ruler, lacking=tasks_without_data),
        "longbench": Suite(names=tuple(LONGBENCH_TASKS), make=_longbench),
        "longbench-e": Suite(names=LONGBENCH_E_NAMES, make=_longbench),
        "file": Suite(names=(), make=_files),
        "perplexity": Suite(names=(), make=_texts),
    }
)
