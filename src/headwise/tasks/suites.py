"""Names of tasks, and the suites they are of. A new suite is a file, and a line in SUITES.

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
    """(suite, name) for every task that is named, each once; `whole` says what a suite's name alone stands for.

    Raises BadInput.
    """
    found: list[tuple[str, str]] = []
    suite = ""
    for part in (part.strip() for part in text.split(",")):
        head, colon, rest = part.partition(":")
        if head in SUITES:
            suite, part = head, rest.strip()
            if not colon and SUITES[suite].names:
                found += [(suite, name) for name in whole(suite)]
                continue
        if not suite:
            raise BadInput(f"tasks={text!r}: {part!r} is no suite; choose {', '.join(SUITES)}, such as mini-ruler:vt.")
        if part:
            found.append((suite, _known(suite, part)))
    if not found:
        raise BadInput(f"tasks={text!r} names no task; write a suite ({', '.join(SUITES)}), or suite:task,task.")
    return list(dict.fromkeys(found))


def with_data(suite: str, *, data_dir: Path | None, tell: Callable[[str], None]) -> list[str]:
    """The tasks of a suite whose data are there, or are made; `tell` is told of the others. Raises BadInput."""
    lacking = SUITES[suite].lacking(data_dir)
    if lacking:
        names = f"{suite}: {', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'}"
        tell(f"{names} left out for want of data. To see which data, ask for --tasks {suite}:{lacking[0]}.")
    return [name for name in SUITES[suite].names if name not in lacking]


def make_tasks(named: Sequence[tuple[str, str]], tokenizer: Any, sizes: Sizes) -> list[Task]:
    """The tasks, their data found and read. Raises BadInput."""
    by_suite: dict[str, list[str]] = {}
    for suite, name in named:
        by_suite.setdefault(suite, []).append(name)
    made = {
        task.name: task for suite, names in by_suite.items() for task in SUITES[suite].make(names, tokenizer, sizes)
    }
    return list(made.values())


def _known(suite: str, name: str) -> str:
    known = SUITES[suite].names
    if known and name not in known:
        raise BadInput(f"unknown task {name!r} of {suite}; the tasks are {', '.join(known)}.")
    return name
