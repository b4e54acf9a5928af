"""Make RULER's thirteen official tasks, in their official wording, at the length of any tokenizer.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv:2404.06654. Names,
parameters, templates, scores and the way a prompt is put together are those of github.com/NVIDIA/RULER (2025, where
vt's answer prefix reads "assigned" instead of 2024's "assgined"). The essays are Paul Graham's only where the data
folder has them, otherwise a bundled text: `sources.haystack_name` says which. Where ours differs:

- All draws of a sample come from its own generator, seeded by task, length, seed and index, so that a sample can be
  made alone. RULER draws all samples from one stream and shuffles each of them alike.
- Each sample is as long as fits. RULER looks for the size of one sample and gives it to all.
- Special tokens count towards the length, a chat template does not. RULER counts the template and no special tokens.
- All keys, values and names of a sample are different, and none of the asked ones is in the essays.
- vt's example has another value than the question; cwe's example has other words than the list.
- The examples of vt and cwe are in the user's message, as in RULER's data for NeMo-Skills. RULER's own cwe repeats
  the model's template around its example.
- Essays are cut into sentences by a rule instead of nltk's model; keys and listed words are from our own word lists.
- A qa prompt that lacks more than 2% of the length gets the beginning of one document more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headwise.errors import BadInput
from headwise.tasks.mini_ruler.suite import seeded_generator
from headwise.tasks.ruler.documents import QuestionAnswering
from headwise.tasks.ruler.drafts import Draft, Family, Setting, fill
from headwise.tasks.ruler.lists import CommonWords, FrequentWords
from headwise.tasks.ruler.needles import Needles, VariableTracking
from headwise.tasks.task import Question, Sample, Sizes, Suite, Task

RULER_TASKS: Mapping[str, Family] = MappingProxyType(
    {
        "niah_single_1": Needles(type_haystack="noise"),
        "niah_single_2": Needles(type_haystack="essay"),
        "niah_single_3": Needles(type_haystack="essay", type_needle_v="uuids"),
        "niah_multikey_1": Needles(type_haystack="essay", num_needle_k=4),
        "niah_multikey_2": Needles(type_haystack="needle"),
        "niah_multikey_3": Needles(type_haystack="needle", type_needle_k="uuids", type_needle_v="uuids"),
        "niah_multivalue": Needles(type_haystack="essay", num_needle_v=4),
        "niah_multiquery": Needles(type_haystack="essay", num_needle_q=4),
        "vt": VariableTracking(),
        "cwe": CommonWords(),
        "fwe": FrequentWords(),
        "qa_1": QuestionAnswering(dataset="squad"),
        "qa_2": QuestionAnswering(dataset="hotpotqa"),
    }
)

_CONTROL = re.compile(r"[\x00-\x1f]")


def ruler_tasks(
    names: Sequence[str], *, tokenizer: Any, length: int, num_samples: int, seed: int, data_dir: Path | None
) -> list[Task]:
    """Make tasks by their official names; sources.py says what `data_dir` may hold.

    `length` is the most tokens that special tokens, the prompt and the generated answer take together; a sample takes
    at least 98% of it, or as many as its smallest unit allows. Raises BadInput if a name is unknown, a source is
    missing or damaged, or there are fewer questions than samples; and, when a sample is made, if the length is too
    short.
    """
    for name in names:
        if name not in RULER_TASKS:
            raise BadInput(f"unknown RULER task {name!r}; the tasks are {', '.join(RULER_TASKS)}.")
    if length < 1 or num_samples < 1 or seed < 0:
        raise BadInput(
            f"length={length}, num_samples={num_samples}, seed={seed}; the first two are at least 1, the seed is at "
            "least 0."
        )
    setting = Setting(count_tokens=partial(_count_tokens, tokenizer), length=length, data_dir=data_dir)
    return [_task(name, setting, num_samples, seed) for name in names]


def tasks_without_data(data_dir: Path | None) -> list[str]:
    """Return the tasks that need a file of questions which the folder does not hold.

    The essays and words of all other tasks are bundled. Raises BadInput if the folder does not exist.
    """
    return [
        name
        for name, family in RULER_TASKS.items()
        if isinstance(family, QuestionAnswering) and not family.has_data(data_dir)
    ]


def match_all(prediction: str, question: Question) -> float:
    """Return the share of the answers that the prediction contains, in any case."""
    matches = _matches(prediction, question)
    return sum(matches) / len(matches)


def match_part(prediction: str, question: Question) -> float:
    """Return 1 if the prediction contains any of the answers, in any case."""
    return float(any(_matches(prediction, question)))


def _matches(prediction: str, question: Question) -> list[bool]:
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [answer.lower() in text for answer in question.answers]


def _task(name: str, setting: Setting, num_samples: int, seed: int) -> Task:
    family = RULER_TASKS[name]
    prepared = family.prepare(setting)
    if prepared.most_samples is not None and num_samples > prepared.most_samples:
        raise BadInput(f"{num_samples} samples asked of {name}; its data have {prepared.most_samples} questions.")
    return Task(
        name=f"ruler:{name}",
        length=setting.length,
        num_samples=num_samples,
        sample=partial(_sample, f"ruler:{name}", family.tokens_to_generate, prepared.draft, setting, seed),
        judge=match_part if family.any_answer_counts else match_all,
    )


def _sample(
    name: str, tokens_to_generate: int, draft: Callable[[int], Draft], setting: Setting, seed: int, index: int
) -> Sample:
    new_rng = partial(seeded_generator, "evaluation", task=name, length=setting.length, seed=seed, index=index)
    try:
        prompt = fill(draft(index), new_rng, setting, tokens_to_generate)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    question = Question(prompt=prompt.question, answers=prompt.answers, answer_prefix=prompt.answer_prefix)
    return Sample(
        context=prompt.context, questions=(question,), max_new_tokens=tokens_to_generate, verbatim=True, chat=True
    )


def _count_tokens(tokenizer: Any, text: str) -> int:
    # Not verbose: a text longer than the model's context is counted too, without a warning.
    return len(tokenizer(text, verbose=False)["input_ids"])


def _make(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    return ruler_tasks(
        names,
        tokenizer=tokenizer,
        length=sizes.length,
        num_samples=sizes.samples,
        seed=sizes.seed,
        data_dir=sizes.data_dir,
    )


RULER = Suite(names=tuple(RULER_TASKS), make=_make, lacking=tasks_without_data)
