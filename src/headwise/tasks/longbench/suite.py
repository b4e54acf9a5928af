"""Make the tasks of LongBench (21 datasets of documents, few-shot examples and code, English and Chinese) and its E.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", arXiv:2308.14508. Names,
prompts, answer lengths and metrics are those of https://github.com/THUDM/LongBench (MIT licence, Copyright (c) 2023
THU-KEG & Zhipu AI). prompts.json is its LongBench/config/dataset2prompt.json, word for word.

The official prompt is split right after its document (or its few-shot examples): the first part is compressed, the rest
is asked. An answer is judged as it is decoded, spaces included. Ours differs from the official code in two ways.
`length` includes chat template, prompt and answer, where the official maximum is the prompt's alone. And an answer to
samsum may be empty, or go on after its first line; the official code wants one token and stops at the line's end. Both
judge that line only.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from headwise.errors import BadInput
from headwise.tasks.longbench.data import (
    LONGBENCH_E_NAMES,
    LONGBENCH_TASKS,
    Dataset,
    Line,
    Row,
    base_name,
    find_rows,
    length_group,
    load_rows,
    read_row,
)
from headwise.tasks.longbench.metrics import find_metric
from headwise.tasks.task import Question, Sample, Sizes, Suite, Task

__all__ = [
    "LONGBENCH",
    "LONGBENCH_E",
    "LONGBENCH_E_NAMES",
    "LONGBENCH_TASKS",
    "cut_middle",
    "length_group",
    "load_rows",
    "longbench_tasks",
    "render",
]


def longbench_tasks(
    names: Sequence[str], *, tokenizer: Any, length: int, num_samples: int | None, data_dir: Path | None
) -> list[Task]:
    """Return a task for each dataset (`qasper`, or `qasper_e` of LongBench-E), with its first `num_samples` rows.

    `length` is the most tokens that chat template, prompt and answer take; the text around a cut may take a few more or
    less. `data_dir` holds `<name>.jsonl`, or any .jsonl files whose lines name their "dataset"; None downloads the
    official files. Raises BadInput if a file is missing or damaged, before any sample is made.
    """
    if num_samples is not None and num_samples < 1:
        raise BadInput(f"num_samples={num_samples} must be at least 1, or None for all.")
    names = list(dict.fromkeys(names))
    judges = {name: _make_judge(LONGBENCH_TASKS[base_name(name)]) for name in names}
    rooms = {name: _room_for_prompt(name, tokenizer, length) for name in names}
    return [
        Task(
            name=f"longbench:{name}",
            length=length,
            num_samples=len(lines[:num_samples]),
            sample=_make_sampler(name, lines, tokenizer, rooms[name]),
            judge=judges[name],
        )
        for name, lines in find_rows(names, data_dir).items()
    ]


def render(name: str, row: Row) -> tuple[str, str]:
    """Return the official prompt up to the end of the row's context, and the rest of it.

    Raises BadInput if nothing is asked.
    """
    opening, ending = _prompts()[base_name(name)].split("{context}")
    prompt = ending.replace("{input}", row.input)
    if not prompt.strip():
        raise BadInput(f"a row of {name} asks nothing, its input is empty; its context begins {row.context[:60]!r}.")
    return opening + row.context, prompt


def cut_middle(tokenizer: Any, context: str, prompt: str, *, num_tokens: int) -> tuple[str, str]:
    """Return context and prompt of at most `num_tokens`, cut in the middle as in the official code.

    The first and the last half of the tokens are decoded and joined. If the tokenizer loses something of a text (upper
    case, spaces), the prompt is as the tokenizer decodes it. Raises BadInput if the prompt has no room.
    """
    ids = tokenizer(context + prompt)["input_ids"]
    if len(ids) <= num_tokens:
        return context, prompt
    half = num_tokens // 2
    head, tail = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[len(ids) - half :]))
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for ending in (prompt, tokenizer.decode(prompt_ids, skip_special_tokens=True)):
        if ending.strip() and tail.endswith(ending) and head.strip():
            return head + tail.removesuffix(ending), ending
    lacking = 2 * (len(prompt_ids) - half) + 2
    advice = f"add {lacking} or more" if lacking > 0 else "or the tokenizer does not give back the text it reads"
    raise BadInput(
        f"the length is too short: of {len(ids)} tokens the last {half} are kept, and they do not hold the question, "
        f"of {len(prompt_ids)} tokens, whole; {advice}."
    )


def _make_judge(dataset: Dataset) -> Callable[[str, Question], float]:
    metric = find_metric(dataset.metric)

    def judge(prediction: str, question: Question) -> float:
        if dataset.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return max(metric(prediction, answer, question.classes) for answer in question.answers)

    return judge


def _make_sampler(name: str, lines: Sequence[Line], tokenizer: Any, room: int) -> Callable[[int], Sample]:
    dataset = LONGBENCH_TASKS[base_name(name)]

    def sample(index: int) -> Sample:
        row = read_row(name, lines[index])
        context, prompt = cut_middle(tokenizer, *render(name, row), num_tokens=room)
        return Sample(
            context=context,
            questions=(Question(prompt=prompt, answers=row.answers, classes=row.classes),),
            max_new_tokens=dataset.max_new_tokens,
            verbatim=True,
            chat=dataset.chat,
        )

    return sample


def _room_for_prompt(name: str, tokenizer: Any, length: int) -> int:
    dataset = LONGBENCH_TASKS[base_name(name)]
    room = length - dataset.max_new_tokens
    if dataset.chat and getattr(tokenizer, "chat_template", None) is not None:
        around = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        room -= len(tokenizer(around, add_special_tokens=False)["input_ids"])
    if room < 2:
        raise BadInput(
            f"length {length} is too short for {name}: its answer takes {dataset.max_new_tokens} and leaves no room "
            "for its prompt."
        )
    return room


@cache
def _prompts() -> dict[str, str]:
    return json.loads((files("headwise.tasks.longbench") / "prompts.json").read_text(encoding="utf-8"))


def _make(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return longbench_tasks(
        names, tokenizer=tokenizer, length=sizes.length, num_samples=sizes.samples, data_dir=sizes.data_dir
    )


LONGBENCH = Suite(names=tuple(LONGBENCH_TASKS), make=_make)
LONGBENCH_E = Suite(names=LONGBENCH_E_NAMES, make=_make)
