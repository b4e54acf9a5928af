"""Which answers count as found."""

import pytest

from headwise.evals.metrics import answers_found


@pytest.mark.parametrize(
    ("text", "answers", "share"),
    [
        ("It is blue.", ["blue"], 1.0),
        ("It is BLUE", ["Blue"], 1.0),
        ("blueberry", ["blue"], 0.0),
        ("a blue\n  whale", ["blue whale"], 1.0),
        ("whale, blue", ["blue", "whale"], 1.0),
        ("blue", ["blue", "whale"], 0.5),
        ("", ["blue"], 0.0),
        ("costs $5.00 now", ["$5.00"], 1.0),
        ("a.c", ["a.c"], 1.0),
        ("abc", ["a.c"], 0.0),  # not a pattern
        ("code 12345", ["1234"], 0.0),
        ("?!", ["?!"], 1.0),
        ("", [""], 1.0),  # a full cache that says nothing agrees with itself
        ("something", [""], 0.0),
    ],
)
def test_whole_words_in_any_case_and_order(text, answers, share):
    assert answers_found(text, answers) == share
