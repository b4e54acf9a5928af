"""JSON of files: what is read, what is refused, and how it is said."""

import json

import pytest

from headwise.errors import BadInput
from headwise.files import strict_json

REFUSED = {
    "NaN": "NaN is no number",
    "[Infinity]": "Infinity is no number",
    "[-Infinity]": "-Infinity is no number",
    "1e999": "the number '1e999' is too large",
    "9" * 21: "21 digits",
    "9" * 5000: "5000 digits",
    '{"a": 1, "b": 2, "a": 1}': "the name 'a' is there twice",
    '["\\ud800"]': "half a character",
    "[" * 65 + "]" * 65: "more than 64 deep",
    "[" * 200_000 + "]" * 200_000: "more than 64 deep",
    '{"a":' * 200_000 + "1" + "}" * 200_000: "more than 64 deep",
    "": "Expecting value",
    "[1,": "Expecting value",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_value_of_every_program(text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        strict_json.loads(text)


@pytest.mark.parametrize(
    "text", ["null", "[" * 64 + "]" * 64, '{"a": {"a": [1, -2.5e10, "\\ud83d\\ude00", 18446744073709551615]}}']
)
def test_everything_else_is_read(text):
    assert strict_json.loads(text) == strict_json.loads(text.encode()) == json.loads(text)


def test_bytes_that_are_no_text():
    with pytest.raises(ValueError, match="utf-8"):
        strict_json.loads(b"\xff")


def test_values_can_be_left_to_checks_which_name_the_field():
    found = strict_json.loads('{"a": NaN, "b": 1e999, "c": "\\ud800"}', values=False)
    for name, check in (("a", strict_json.number), ("b", strict_json.number), ("c", strict_json.text)):
        with pytest.raises(BadInput, match=f"f.json is damaged: '{name}' is .*; make it again"):
            strict_json.checked(found, {name: check}, "f.json", "make it again.")


GOOD = {
    "text": ["", "a"],
    "words": ["a"],
    "texts": [[], ["a"]],
    "whole": [-(2**62), 0, 2**62],
    "seed": [0, 2**62],
    "count": [0, 2**53],
    "size": [0, 2**31 - 1],
    "positive": [1],
    "number": [0, -1.5, 1e50],
    "above_0": [1e-49],
    "flag": [True, False],
    "mapping": [{}],
}
VALUES = [
    None,
    True,
    0,
    -1,
    1,
    0.0,
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    2**53 + 1,
    2**63,
    10**400,
    "",
    " ",
    "a",
    "\ud800",
    [],
    ["a"],
    [1],
    {},
]


@pytest.mark.parametrize("name", GOOD)
def test_a_check_takes_its_own_values_and_no_other(name):
    check = getattr(strict_json, name)
    for value in GOOD[name]:
        assert check(value) == (tuple(value) if isinstance(value, list) else value)
    for value in VALUES:
        try:
            found = check(value)
        except (TypeError, ValueError):
            continue
        assert found == tuple(value) if isinstance(value, list) else found == value or found == float(value)
        assert abs(found) <= 1e99 if isinstance(found, int | float) else True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", "\ud800"),
        ("text", 1),
        ("words", " "),
        ("texts", "a"),
        ("texts", [1]),
        ("whole", True),
        ("whole", 2**63),
        ("whole", 1.0),
        ("seed", -1),
        ("count", 2**53 + 1),
        ("count", -1),
        ("size", 2**31),
        ("positive", 0),
        ("number", True),
        ("number", float("nan")),
        ("number", float("inf")),
        ("number", 1e51),
        ("number", 10**400),
        ("number", "1"),
        ("above_0", 0),
        ("flag", 1),
        ("flag", None),
        ("mapping", []),
    ],
)
def test_what_a_check_refuses(name, value):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        getattr(strict_json, name)(value)


def test_numbers_that_are_next_to_nothing_are_nothing():
    """What is divided by them would be no number any more."""
    assert strict_json.number(1e-320) == strict_json.number(-1e-60) == 0.0
    with pytest.raises(ValueError):  # noqa: PT011 - the field is named by who asks
        strict_json.above_0(1e-60)
