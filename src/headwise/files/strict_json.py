"""Read JSON strictly, and check its fields: files may be damaged, or made up.

`loads` takes only what every program reads as the same values: no NaN, no numbers that are too large, no name twice,
no half characters, no deep nesting. A check returns a value as it is kept, or raises TypeError or ValueError. A table
has a check for every field of one kind of object, and `checked` applies it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from reprlib import repr as shown
from typing import Any

from headwise.errors import BadInput

Check = Callable[[Any], Any]
DEEPEST = 64  # lists and objects within each other
LONGEST_INTEGER = 20  # digits: enough for 64 bits
MOST_COUNTED = 2**53
LARGEST, LEAST = 1e50, 1e-50  # of numbers: a smaller one becomes 0, so that ratios are finite
MOST = 2**31 - 1  # of tokens, heads or layers
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str | bytes, *, values: bool = True) -> Any:
    """Return the value of a JSON text. Raises ValueError, which says what is wrong.

    Without `values`, numbers and characters are not checked: a table of checks does that, which can name the field.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_each_once, **(_NUMBERS if values else {}))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEEPEST:
        _require_shallow(value)
    if values and _HALF_CHARACTER.search(text):
        _require_whole(json.dumps(value, ensure_ascii=False))
    return value


def checked(raw: Any, fields: Mapping[str, Check], place: str, advice: str) -> dict[str, Any]:
    """Return the fields of the table, checked, without others. Raises BadInput, naming the place and the field."""
    if not isinstance(raw, dict):
        raise BadInput(f"{place} is damaged: it is no JSON object; {advice}")
    values = {}
    for name, check in fields.items():
        if name not in raw:
            raise BadInput(f"{place} is damaged: it lacks {name!r}; {advice}")
        try:
            values[name] = check(raw[name])
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise BadInput(f"{place} is damaged: {name!r} is {str(raw[name])[:60]!r}; {advice}") from error
    return values


_TOO_DEEP = f"lists and objects lie within each other more than {DEEPEST} deep"


def _require_whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {shown(text)} is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


_NUMBERS: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite, "parse_int": _integer}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} is there twice")
    return unique


def _require_shallow(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
        depth += 1
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)


def text(value: Any) -> str:
    """Return a text of whole characters: half a character can be neither printed nor written."""
    if not isinstance(value, str):
        raise TypeError
    return value.encode().decode()


def words(value: Any) -> str:
    """Return a text that is not blank."""
    if not text(value).strip():
        raise ValueError
    return value


def texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts, as a tuple."""
    if not isinstance(value, list):
        raise TypeError
    return tuple(text(item) for item in value)


def whole(value: Any) -> int:
    """Return an integer of 64 bits."""
    if type(value) is not int or abs(value) >= 2**63:
        raise TypeError
    return value


def seed(value: Any) -> int:
    """Return an integer that is not negative."""
    if whole(value) < 0:
        raise ValueError
    return value


def count(value: Any) -> int:
    """Return an integer from 0 to MOST_COUNTED: sums of such integers are exact."""
    if seed(value) > MOST_COUNTED:
        raise ValueError
    return value


def size(value: Any) -> int:
    """Return an integer from 0 to MOST: a number of tokens, or of anything else that needs memory."""
    if count(value) > MOST:
        raise ValueError
    return value


def positive(value: Any) -> int:
    """Return an integer of at least 1, by which others can be divided."""
    if count(value) == 0:
        raise ValueError
    return value


def number(value: Any) -> float:
    """Return a finite number that can be divided, squared and added up. One that is nearly 0 becomes 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise TypeError
    return float(value) if abs(value) >= LEAST else 0.0


def above_0(value: Any) -> float:
    """Return a number above 0, which has a logarithm."""
    if not number(value) > 0:
        raise ValueError
    return float(value)


def flag(value: Any) -> bool:
    """Return True or False."""
    if type(value) is not bool:
        raise TypeError
    return value


def mapping(value: Any) -> dict[str, Any]:
    """Return an object, whatever it holds."""
    if not isinstance(value, dict):
        raise TypeError
    return value


def or_none(check: Check) -> Check:
    """Return a check that takes None, and what `check` takes."""
    return lambda value: None if value is None else check(value)


def mapping_of(check: Check) -> Check:
    """Return a check of an object whose values `check` takes."""
    return lambda value: {text(name): check(item) for name, item in mapping(value).items()}


def list_of(check: Check) -> Check:
    """Return a check of a list whose values `check` takes; it returns a tuple."""

    def check_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError
        return tuple(check(item) for item in value)

    return check_list
