"""Make examples of a user's own texts: cut them into contexts with what follows each, and ask about them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from headwise.errors import BadInput
from headwise.offline.texts.cutting import Count, paragraph_starts, passage
from headwise.offline.texts.example import Example
from headwise.offline.texts.questions import about_code, about_text, looks_like_code

SHORTEST = 64  # tokens of a text, or of what is left at the end of one


def cut_up(texts: Sequence[tuple[Example, bool]], count: Count, lengths: Sequence[int], contexts: int) -> list[Example]:
    """Return the examples, with plain texts cut into contexts of `lengths` tokens in turn, at most.

    `texts` says of each whether it is plain. All plain texts together give about `contexts`, each in proportion to its
    size, and at least one. Raises BadInput if a text is too short.
    """
    characters = sum(len(text.context) for text, plain in texts if plain)
    examples: list[Example] = []
    for text, plain in texts:
        num_contexts = max(1, round(contexts * len(text.context) / characters)) if plain else 0
        cut = list(_contexts(text, count, lengths, num_contexts, len(examples))) if plain else [text]
        if not cut:
            raise BadInput(
                f"the text {text.context.strip()[:40]!r} ({text.domain}) is too short to be cut into contexts: "
                f"it needs {SHORTEST} tokens. Leave it out, or put texts that belong together in one file."
            )
        examples += cut
    return examples


def with_questions(example: Example, rng: Random) -> Example:
    """Return the example, with questions made for its context if it has none."""
    if example.questions:
        return example
    ask = about_code if looks_like_code(example.context) else about_text
    return replace(example, questions=ask(example.context, rng))


def _contexts(text: Example, count: Count, lengths: Sequence[int], num_contexts: int, before: int) -> Iterator[Example]:
    """Yield at most `num_contexts` passages, from places all over the text. None overlaps with the next one."""
    document, end = text.context, 0
    starts = paragraph_starts(document)
    for number in range(num_contexts):
        aim = max(end, len(document) * number // num_contexts)
        start = next((start for start in starts if start >= aim), aim) if aim > end else end
        start += len(document[start:]) - len(document[start:].lstrip("\n"))
        length = lengths[(before + number) % len(lengths)]
        context, following = passage(document[start:], count, length)
        if count(context) + count(following) < (max(SHORTEST, length // 2) if number else SHORTEST):
            return  # the rest of a text is not worth a context of its own
        end = start + len(context)
        yield replace(text, context=context, following=following)
