"""What calibration and training learn from: a context, what may be asked of it, and what really follows it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A context and what may be asked of it; without questions the model's continuation of it is the future.

    `following` is the text that really comes next in the source, empty where that is not known: `context + following`
    is a part of the source, character by character.
    """

    context: str
    questions: tuple[str, ...] = ()
    domain: str = "text"
    following: str = ""
