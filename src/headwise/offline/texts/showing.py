"""Show examples to a reader: how many there are of each domain, and one of them with its middle left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from headwise.offline.texts.cutting import Count
from headwise.offline.texts.example import Example

_SHOWN = 600  # characters of a context, at its start and at its end


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """Counts of one domain. Tokens are those of its contexts."""

    domain: str
    contexts: int
    tokens: int
    shortest: int
    longest: int
    following_tokens: int
    questions: int


def totals(examples: Sequence[Example], count: Count) -> list[Total]:
    """Return a row for each domain, in the order in which they come."""
    rows: list[Total] = []
    for domain in dict.fromkeys(example.domain for example in examples):
        of_domain = [example for example in examples if example.domain == domain]
        tokens = [count(example.context) for example in of_domain]
        rows.append(
            Total(
                domain=domain,
                contexts=len(tokens),
                tokens=sum(tokens),
                shortest=min(tokens),
                longest=max(tokens),
                following_tokens=sum(count(example.following) for example in of_domain),
                questions=sum(len(example.questions) for example in of_domain),
            )
        )
    return rows


def render(example: Example, count: Count, *, full: bool) -> str:
    """Return an example as a text for a reader. `full`: show all of it."""
    context = example.context if full else _shortened(example.context)
    questions = [f"  ? {question}" for question in example.questions] or ["  none: the model's own continuation"]
    return "\n".join(
        [
            f"--- {example.domain}: context, {count(example.context)} tokens",
            context,
            f"--- follows, {count(example.following)} tokens",
            example.following.strip("\n") if full else _shortened(example.following.strip("\n")),
            f"--- questions, {len(example.questions)}",
            *questions,
            "",
        ]
    )


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * _SHOWN
    if left_out <= 0:
        return text
    return f"{text[:_SHOWN]}\n[... {left_out:,} characters ...]\n{text[-_SHOWN:]}"
