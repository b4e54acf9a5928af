"""Whether a document can fit into a model at all, told before it is tokenised, which takes long for a large one."""

import re
from typing import Any

from headwise.errors import BadInput

SHRUNK = 4  # characters that a tokenizer makes one of before it looks for tokens, at most
_WORD = re.compile(r"\S+")


def require_room(tokenizer: Any, text: str, limit: int) -> None:
    """Raise BadInput if no way of cutting `text` into tokens would make as few as `limit`.

    A token is no longer than the longest of the vocabulary, or it stands for a whole word that is not in it.
    """
    if len(text) <= limit:
        return
    most = limit * SHRUNK * max(map(len, tokenizer.get_vocab()))
    if len(text) <= most:
        return
    words = characters = 0
    for word in _WORD.finditer(text):
        words, characters = words + 1, characters + word.end() - word.start()
        if words > limit and characters > most:
            raise BadInput(
                f"the document has {len(text):,} characters, more than {limit:,} tokens however they are cut, but this "
                "model was made for so many. Shorten the document."
            )
