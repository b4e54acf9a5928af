"""Tokens of a text and texts of tokens where one text goes on in another: as if both were one. Imports no torch."""

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what a tokenizer of bytes decodes a part of a letter to
_SPACES = ("▁", "Ġ")  # how tokens show that a space precedes
_PARTED = (".", "\n", "a")  # texts that hardly any token has in common with one that follows them
LONGEST_LETTER = 4  # bytes


def unclosed(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens of a text that goes on: without the end token that some tokenizers put after every text."""
    return ids[:-1] if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None) else ids


def following_ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """Tokens of a text as it follows another one, without the space that some tokenizers put before every text."""

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, **options)["input_ids"]

    ids = ids_of(text)
    name_of = getattr(tokenizer, "convert_ids_to_tokens", None)
    if name_of is None or not ids or not str(name_of(ids[0])).startswith(_SPACES):
        return ids
    for before in _PARTED:
        first, both = ids_of(before), ids_of(before + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return ids


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it. A letter that is cut in several comes with its last one."""
    found: list[str] = []
    before = after = 0  # the last whole letters are read again: alone, a token may lose the space before it
    for end in range(1, len(ids) + 1):
        known, text = tokenizer.decode(ids[before:after]), tokenizer.decode(ids[before:end])
        if text.endswith(_HALF) and end - after < LONGEST_LETTER:
            found.append("")
            continue
        found.append(text.removeprefix(known))
        before, after = after, end
    return found
