"""JSON of files, read strictly, and the checks that its fields are held against: files may be damaged, or made up.

`loads` takes what any other program would take for the same values: no NaN, no numbers that are too large, no name
twice, no half characters, no deep nesting. A check returns a value as it is kept, or raises TypeError or ValueError; a
table of checks says what the fields of one kind of object are, and `checked` holds an object against it.
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
LARGEST, LEAST = 1e50, 1e-50  # of numbers: what is nearer to 0 is 0, so that ratios are finite
MOST = 2**31 - 1  # of what is counted in tokens, heads or layers
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str | bytes, *, values: bool = True) -> Any:
    """What a JSON text says. Raises ValueError, saying why not.

    Without `values` numbers and characters are taken as they are: a table of checks, which can name field and line,
    looks at them.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        found = json.loads(text, object_pairs_hook=_each_once, **(_NUMBERS if values else {}))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEEPEST:
        _require_shallow(found)
    if values and _HALF_CHARACTER.search(text):
        _require_whole(json.dumps(found, ensure_ascii=False))
    return found


def checked(raw: Any, fields: Mapping[str, Check], place: str, advice: str) -> dict[str, Any]:
    """The fields that are known, checked; others are passed over. Raises BadInput, naming the place and the field."""
    if not isinstance(raw, dict):
        raise BadInput(f"{place} is damaged: it is no JSON object; {advice}")
    found = {}
    for name, check in fields.items():
        if name not in raw:
            raise BadInput(f"{place} is damaged: it lacks {name!r}; {advice}")
        try:
            found[name] = check(raw[name])
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise BadInput(f"{place} is damaged: {name!r} is {str(raw[name])[:60]!r}; {advice}") from error
    return found


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
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} is there twice")
    return found


def _require_shallow(found: Any) -> None:
    level, depth = [found], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        depth += 1
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)


def text(value: Any) -> str:
    """Text, with whole characters: half a character can be neither printed nor written."""
    if not isinstance(value, str):
        raise TypeError
    return value.encode().decode()


def words(value: Any) -> str:
    """Text that is not blank."""
    if not text(value).strip():
        raise ValueError
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of text."""
    if not isinstance(value, list):
        raise TypeError
    return tuple(text(item) for item in value)


def whole(value: Any) -> int:
    """An integer of 64 bits."""
    if type(value) is not int or abs(value) >= 2**63:
        raise TypeError
    return value


def seed(value: Any) -> int:
    """Any integer that is not negative."""
    if whole(value) < 0:
        raise ValueError
    return value


def count(value: Any) -> int:
    """An integer that is not negative, small enough to be added up."""
    if seed(value) > MOST_COUNTED:
        raise ValueError
    return value


def size(value: Any) -> int:
    """So many tokens, or something else that memory is needed for."""
    if count(value) > MOST:
        raise ValueError
    return value


def positive(value: Any) -> int:
    """At least 1: something that is divided by."""
    if count(value) == 0:
        raise ValueError
    return value


def number(value: Any) -> float:
    """A finite number, small enough to be divided by another, squared and added up."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise TypeError
    return float(value) if abs(value) >= LEAST else 0.0


def above_0(value: Any) -> float:
    """What a logarithm is taken of."""
    if not number(value) > 0:
        raise ValueError
    return float(value)


def flag(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise TypeError
    return value


def mapping(value: Any) -> dict[str, Any]:
    """An object, whatever it holds."""
    if not isinstance(value, dict):
        raise TypeError
    return value


def or_none(check: Check) -> Check:
    """What the check takes, or nothing."""
    return lambda value: None if value is None else check(value)


def mapping_of(check: Check) -> Check:
    """An object whose values the check takes."""
    return lambda value: {text(name): check(one) for name, one in mapping(value).items()}


def list_of(check: Check) -> Check:
    """A list whose values the check takes, as a tuple."""

    def of(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError
        return tuple(check(one) for one in value)

    return of
