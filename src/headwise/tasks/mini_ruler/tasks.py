"""mini-RULER as a suite: what is generated for training and calibration too, as tasks of an evaluation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headwise.tasks.metrics import answers_found
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON, Lexicon
from headwise.tasks.mini_ruler.suite import TASKS, generate
from headwise.tasks.task import Question, Sample, Sizes, Suite, Task


def lexicon_for(tokenizer: Any) -> Lexicon:
    """The bundled lexicon, counting tokens as this tokenizer does."""
    return replace(
        REFERENCE_LEXICON,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        num_special_tokens=tokenizer.num_special_tokens_to_add(),
    )


def mini_ruler_tasks(names: Sequence[str], tokenizer: Any, sizes: Sizes) -> list[Task]:
    """Tasks of the split "evaluation", whose seeds neither training nor calibration can reach."""
    lexicon = lexicon_for(tokenizer)

    def of(name: str) -> Task:
        def sample(index: int) -> Sample:
            made = generate(
                name, lexicon=lexicon, length=sizes.length, seed=sizes.seed, index=index, split="evaluation"
            )
            questions = tuple(Question(prompt=q.prompt, answers=q.answers) for q in made.questions)
            return Sample(context=made.context, questions=questions, max_new_tokens=made.max_new_tokens)

        return Task(
            name=f"mini-ruler:{name}",
            length=sizes.length,
            num_samples=sizes.samples,
            sample=sample,
            judge=lambda prediction, question: answers_found(prediction, question.answers),
        )

    return [of(name) for name in names]


MINI_RULER = Suite(names=tuple(TASKS), make=mini_ruler_tasks)
