"""Tokenize and decode texts that follow each other as if they were one text. Imports no torch."""

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # a tokenizer of bytes decodes a part of a letter to this
_SPACES = ("▁", "Ġ")  # how tokens show that a space precedes
_PARTED = (".", "\n", "a")  # texts that hardly any token has in common with one that follows them
LONGEST_LETTER = 4  # bytes


def unclosed(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the tokens without the end token that some tokenizers put after every text: the text goes on."""
    return ids[:-1] if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None) else ids


def following_ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """Return the tokens of a text that follows another one, without the space that some tokenizers put before it."""

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, **options)["input_ids"]

    ids = ids_of(text)
    name_of = getattr(tokenizer, "convert_ids_to_tokens", None)
    if name_of is None or not ids or not str(name_of(ids[0])).startswith(_SPACES):
        return ids
    for before in _PARTED:
        prefix, joined = ids_of(before), ids_of(before + text)
        if joined[: len(prefix)] == prefix:
            return joined[len(prefix) :]
    return ids


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text before it. A letter in several tokens comes with the last one."""
    texts: list[str] = []
    before = after = 0  # the last whole letters are read again: alone, a token may lose the space before it
    for end in range(1, len(ids) + 1):
        previous, text = tokenizer.decode(ids[before:after]), tokenizer.decode(ids[before:end])
        if text.endswith(_HALF) and end - after < LONGEST_LETTER:
            texts.append("")
            continue
        texts.append(text.removeprefix(previous))
        before, after = after, end
    return texts
