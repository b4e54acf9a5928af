"""The texts that calibrate, profile and train work on, as their options name them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.offline.calibration import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """What --data, --length, --contexts and --questions say."""

    data: str
    length: int | None
    contexts: int | None
    questions: str | int | None

    def examples(
        self, tokenizer: Any, *, max_positions: int, split: str = "calibration", default: int | None = None
    ) -> "list[Example]":
        """The contexts with their questions; `default` is how many there are if nothing says it. Raises BadInput."""
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
        """The same for training, which needs more contexts and others than calibration has. Raises BadInput."""
        from headwise.models.families import view
        from headwise.offline.calibration import TRAINING_CONTEXTS

        positions = view(model).max_positions
        return self.examples(tokenizer, max_positions=positions, split="train", default=TRAINING_CONTEXTS)


def parse_questions(text: str | None) -> str | int | None:
    """What --questions says, as the library takes it: a number, or a word that it will judge."""
    return int(text) if text is not None and text.isdecimal() and len(text) <= 9 else text
