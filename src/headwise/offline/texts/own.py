"""A user's own texts: cut into contexts with what follows each, and asked about."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from headwise.errors import BadInput
from headwise.offline.texts.cutting import Count, paragraph_starts, passage
from headwise.offline.texts.example import Example
from headwise.offline.texts.questions import about_code, about_text, looks_like_code

SHORTEST = 64  # tokens of a text, or of what is left at the end of one


def cut_up(read: Sequence[tuple[Example, bool]], count: Count, lengths: Sequence[int], contexts: int) -> list[Example]:
    """The examples, of which those that are plain texts are cut into contexts of `lengths` tokens in turn, at most.

    `read` says of each whether it is plain. All plain texts together give about `contexts`, from all over them: each
    has a part in them as its size has, and at least one. Raises BadInput for a text that is too short.
    """
    characters = sum(len(text.context) for text, plain in read if plain)
    found: list[Example] = []
    for text, plain in read:
        wanted = max(1, round(contexts * len(text.context) / characters)) if plain else 0
        cut = list(_contexts(text, count, lengths, wanted, len(found))) if plain else [text]
        if not cut:
            raise BadInput(
                f"the text {text.context.strip()[:40]!r} ({text.domain}) is too short to be cut into contexts: "
                f"it needs {SHORTEST} tokens. Leave it out, or put texts that belong together in one file."
            )
        found += cut
    return found


def with_questions(example: Example, rng: Random) -> Example:
    """The example with questions made for its context, if it has none."""
    if example.questions:
        return example
    ask = about_code if looks_like_code(example.context) else about_text
    return replace(example, questions=ask(example.context, rng))


def _contexts(text: Example, count: Count, lengths: Sequence[int], wanted: int, before: int) -> Iterator[Example]:
    """At most `wanted` passages, from places all over the text; none overlaps with the next one."""
    whole, end = text.context, 0
    starts = paragraph_starts(whole)
    for number in range(wanted):
        aim = max(end, len(whole) * number // wanted)
        start = next((start for start in starts if start >= aim), aim) if aim > end else end
        start += len(whole[start:]) - len(whole[start:].lstrip("\n"))
        length = lengths[(before + number) % len(lengths)]
        context, following = passage(whole[start:], count, length)
        if count(context) + count(following) < (max(SHORTEST, length // 2) if number else SHORTEST):
            return  # the rest of a text is not worth a context of its own
        end = start + len(context)
        yield replace(text, context=context, following=following)
