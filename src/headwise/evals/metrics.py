"""How an answer is judged."""

import re
from collections.abc import Sequence


def answers_found(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in `text` as whole words, in any case and order (RULER's string match)."""
    text = " ".join(text.lower().split())
    found = [re.search(rf"(?<!\w){re.escape(' '.join(a.lower().split()))}(?!\w)", text) is not None for a in answers]
    return sum(found) / len(found)
