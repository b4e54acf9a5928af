"""The suites, and how the names of tasks are read. A new suite is a file, and a line in SUITES.

A name is suite:task,task; or the suite alone, for all of its tasks; or file:MY.jsonl. Several follow each other after
commas: mini-ruler:vt,cwe,ruler,file:my.jsonl. docs/evaluation.md says what each suite asks.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headwise.errors import BadInput
from headwise.tasks.longbench.suite import LONGBENCH, LONGBENCH_E
from headwise.tasks.mini_ruler.tasks import MINI_RULER
from headwise.tasks.plain import FILES, TEXTS
from headwise.tasks.ruler.suite import RULER
from headwise.tasks.task import Sizes, Suite, Task

SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "mini-ruler": MINI_RULER,
        "ruler": RULER,
        "longbench": LONGBENCH,
        "longbench-e": LONGBENCH_E,
        "file": FILES,
        "perplexity": TEXTS,
    }
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
    named
        (suite, name) of every task, as `parse_tasks` returns them.
    sizes
        How many samples, how long, and where data lie.

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


def _require_known(suite: str, name: str) -> str:
    known = SUITES[suite].names
    if known and name not in known:
        raise BadInput(f"unknown task {name!r} of {suite}; the tasks are {', '.join(known)}.")
    return name
