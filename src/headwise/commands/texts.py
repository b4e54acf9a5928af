"""Load the texts of calibrate, profile and train, as their options name them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.offline.calibration import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The values of --data, --length, --contexts and --questions."""

    data: str
    length: int | None
    contexts: int | None
    questions: str | int | None

    def examples(
        self, tokenizer: Any, *, max_positions: int, split: str = "calibration", default: int | None = None
    ) -> "list[Example]":
        """Return the contexts with their questions; `default` is how many there are if no option says it.

        Raises BadInput as `load_examples` does.
        """
        from headwise.offline.calibration import DEFAULT_CONTEXTS, load_examples

        return load_examples(
            self.data,
            tokenizer,
            max_positions=max_positions,
            split=split,
            default=DEFAULT_CONTEXTS if default is None else default,
            length=self.length,
            contexts=self.contexts,
            questions=self.questions,
        )

    def training_examples(self, model: "PreTrainedModel", tokenizer: Any) -> "list[Example]":
        """Return examples for training, which are more, and others, than those for calibration. Raises BadInput."""
        from headwise.models.families import view
        from headwise.offline.calibration import TRAINING_CONTEXTS

        positions = view(model).max_positions
        return self.examples(tokenizer, max_positions=positions, split="train", default=TRAINING_CONTEXTS)


def parse_questions(text: str | None) -> str | int | None:
    """Return the value of --questions as the library takes it: a number, or a word that it checks."""
    return int(text) if text is not None and text.isdecimal() and len(text) <= 9 else text
