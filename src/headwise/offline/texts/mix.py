"""The mix of natural texts: which domains, in which order, how long."""

from collections import Counter
from collections.abc import Sequence
from random import Random

from headwise.offline.texts.cutting import Count
from headwise.offline.texts.dialogue import dialogue
from headwise.offline.texts.document import finish
from headwise.offline.texts.example import Example
from headwise.offline.texts.fewshot import few_shot
from headwise.offline.texts.prose import code, paragraphs, prose
from headwise.offline.texts.records import records, table
from headwise.offline.texts.retrieval import retrieval

ORDER = (
    "prose",
    "retrieval",
    "code",
    "records",
    "dialogue",
    "retrieval",
    "prose",
    "table",
    "few-shot",
    "code",
    "retrieval",
)
_DRAFTS = {"records": records, "table": table, "dialogue": dialogue, "few-shot": few_shot}


def natural(count: Count, number: int, lengths: Sequence[int], seed: int, split: str) -> list[Example]:
    """Return `number` examples, their contexts of `lengths` tokens in turn, at most.

    A larger `number` begins with the same examples. `split` is "calibration" or "train"; their sources and seeds are
    different. Raises BadInput if this Python has no sources of its library.
    """
    examples: list[Example] = []
    nth: Counter[str] = Counter()
    for place in range(number):
        domain = ORDER[place % len(ORDER)]
        examples.append(_make(domain, nth[domain], count, lengths[place % len(lengths)], seed, split))
        nth[domain] += 1
    return examples


def _make(domain: str, number: int, count: Count, length: int, seed: int, split: str) -> Example:
    """Make the nth example of a domain."""
    if domain == "prose":
        return prose(number, count, length, seed, split)
    if domain == "code":
        return code(number, count, length, seed, split)
    rng = Random(f"{split} {domain} {number} {seed}")
    if domain == "retrieval":
        draft = retrieval(rng, number, paragraphs(number, length, seed, split))
    else:
        draft = _DRAFTS[domain](rng)
    return finish(draft, count, length, rng)
