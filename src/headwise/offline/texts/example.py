"""The example that calibration and training learn from: a context, its questions, and what really follows it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A context and its questions. Without questions, the model's continuation of it is the future.

    `following` is the text that really comes next in the source, empty if that is not known: `context + following` is
    a part of the source, character by character.
    """

    context: str
    questions: tuple[str, ...] = ()
    domain: str = "text"
    following: str = ""
