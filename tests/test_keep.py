"""`keep`: every way to write it, its exact entries, and what is refused."""

import re
from fractions import Fraction
from inspect import unwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import BadInput
from headwise.methods.keep import MOST_TOKENS, Keep, parse_bytes, parse_keep, parse_tokens, round_half_up
from headwise.shapes import ModelShape

CASES = settings(max_examples=100, deadline=None, derandomize=True)
SHAPE = ModelShape(num_layers=4, layers=(0, 1, 2), kv_heads=2, query_heads=4, head_dim=8)


@pytest.mark.parametrize(
    ("value", "kind", "amount"),
    [
        (0.15, "fraction", Fraction(3, 20)),
        ("0.15", "fraction", Fraction(3, 20)),
        (" .5 ", "fraction", Fraction(1, 2)),
        ("15%", "fraction", Fraction(3, 20)),
        ("12.5 %", "fraction", Fraction(1, 8)),
        (1.0, "fraction", Fraction(1)),
        (1e-5, "fraction", Fraction(1, 100_000)),
        ("100%", "fraction", Fraction(1)),
        ("1024tok", "tokens", Fraction(1024)),
        ("12.5 tok", "tokens", Fraction(25, 2)),
        ("2GiB", "bytes", Fraction(2**31)),
        ("500MB", "bytes", Fraction(500_000_000)),
        ("1.5KiB", "bytes", Fraction(1536)),
        ("7B", "bytes", Fraction(7)),
    ],
)
def test_every_way_to_write_it(value, kind, amount):
    assert parse_keep(value) == Keep(kind=kind, amount=amount)


def test_a_whole_number_is_a_fraction_too():
    bare = unwrap(parse_keep)  # the type checks of pytest tell int from float, callers need not
    assert bare(1) == parse_keep("100%")
    with pytest.raises(BadInput, match=r"outside \(0, 1\]"):
        bare(2)


def test_a_parsed_keep_stays_itself():
    keep = parse_keep("15%")
    assert parse_keep(keep) is keep


@pytest.mark.parametrize("value", ["0", 0.0, "0.0%", 1.01, "101%"])
def test_fractions_outside_zero_and_one_are_refused(value):
    with pytest.raises(BadInput, match=r"outside \(0, 1\].*such as 0\.15"):
        parse_keep(value)


@pytest.mark.parametrize(
    "value", ["", "abc", "-0.1", -0.5, "5 XB", "1,5", "0.15 0.2", "nan", float("nan"), "15%%", "iB"]
)
def test_what_is_not_understood_is_named(value):
    with pytest.raises(BadInput, match=r"not understood.*such as 0\.15"):
        parse_keep(value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (15, "Write '15%' for percent, or '15tok' for tokens per KV head: keep must be"),
        ("15", "Write '15%' for percent, or '15tok'"),
        (15.0, "Write '15%' for percent, or '15tok'"),
        ("12.5", "Write '12.5%' for percent, or '12.5tok'"),
        (100, "Write '100%' for percent"),
        (1024, "Write '1024tok' for tokens per KV head: keep must be"),
    ],
)
def test_a_number_over_one_is_understood_for_what_it_may_mean(value, hint):
    with pytest.raises(BadInput, match=r"is outside \(0, 1\]") as caught:
        parse_keep(value)
    assert hint in str(caught.value)
    for unit in re.findall("'([^']+(?:%|tok))'", hint):
        assert parse_keep(unit)


@pytest.mark.parametrize("value", ["150%", 0, "0", "0%", "1e400"])
def test_other_numbers_get_no_such_hint(value):
    with pytest.raises(BadInput, match=r"is outside \(0, 1\]. keep must be"):
        parse_keep(value)


@pytest.mark.parametrize("value", ["0tok", "0GiB"])
def test_nothing_is_not_a_budget(value):
    with pytest.raises(BadInput, match="keeps nothing"):
        parse_keep(value)


def test_fractions_are_exact_where_floats_are_not():
    """kvpress computes int(1000 * (1 - 0.8)) = 199."""
    one_head = ModelShape(num_layers=1, layers=(0,), kv_heads=1, query_heads=1, head_dim=8)
    assert parse_keep(0.2).entries(shape=one_head, tokens=[1000], entry_bytes=32) == [200]


def test_tokens_are_an_average_per_head_and_end_at_the_context():
    assert parse_keep("10tok").entries(shape=SHAPE, tokens=[100, 7], entry_bytes=32) == [60, 42]
    assert parse_keep("2.5tok").entries(shape=SHAPE, tokens=[100], entry_bytes=32) == [15]


def test_bytes_are_shared_by_length_and_never_exceeded():
    entries = parse_keep("3200B").entries(shape=SHAPE, tokens=[30, 10], entry_bytes=32)
    assert entries == [75, 25]
    assert parse_keep("1GiB").entries(shape=SHAPE, tokens=[30, 10], entry_bytes=32) == [180, 60]


@CASES
@given(st.fractions(0, 1, max_denominator=1000).filter(bool), st.lists(st.integers(1, 10_000), min_size=1, max_size=4))
@pytest.mark.slow
def test_entries_lie_within_half_of_the_share(amount, tokens):
    entries = Keep(kind="fraction", amount=amount).entries(shape=SHAPE, tokens=tokens, entry_bytes=32)
    for kept, length in zip(entries, tokens, strict=True):
        assert abs(kept - amount * length * 6) <= Fraction(1, 2)
        assert 0 <= kept <= length * 6


@CASES
@given(st.integers(1, 10**7), st.lists(st.integers(1, 10_000), min_size=1, max_size=4))
def test_bytes_hold(size, tokens):
    entries = Keep(kind="bytes", amount=Fraction(size)).entries(shape=SHAPE, tokens=tokens, entry_bytes=32)
    assert sum(entries) * 32 <= size
    assert all(kept <= length * 6 for kept, length in zip(entries, tokens, strict=True))


@CASES
@given(st.integers(0, 1000), st.integers(0, 1))
def test_halves_go_up(whole, half):
    assert round_half_up(whole + Fraction(half, 2)) == whole + half


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1KB", 1000), ("0.5MiB", 2**19)])
def test_memory_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["0.5", "15%", "10tok"])
def test_memory_sizes_need_a_unit(text):
    with pytest.raises(BadInput, match="24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), (4096, 4096), ("128k", 131_072), ("1M", 1_048_576)])
def test_context_lengths(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "", "-1", "1.5k", "4GB", "k"])
def test_senseless_context_lengths_are_refused(text):
    with pytest.raises(BadInput, match="4096 or 128k"):
        parse_tokens(text)


@pytest.mark.parametrize(("value", "text"), [(0.15, "0.15"), ("1024tok", "1024tok"), ("500B", "500B")])
def test_it_prints_as_it_is_written(value, text):
    assert str(parse_keep(value)) == text


@pytest.mark.parametrize(
    "value",
    ["1e99999999", "1e-9999", "9" * 5000, "9" * 65 + "tok", "1e300tok", "1e19tok", "1e20GiB", 10**400, float("inf")],
)
def test_a_number_that_would_take_for_ever_or_is_more_than_there_can_be(value):
    with pytest.raises(BadInput, match=r"keep must be a fraction in \(0, 1\]") as caught:
        parse_keep(value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 13, "129M", "0", "-1", "1e3", "1e99999999k", -1])
def test_tokens_are_as_many_as_there_can_be(text):
    assert parse_tokens("128M") == MOST_TOKENS
    with pytest.raises(BadInput, match="is not a number of tokens from 1 to 128M") as caught:
        parse_tokens(text)
    assert len(str(caught.value)) < 200


NINES = "9" * 5000


@pytest.mark.parametrize(
    "value",
    [NINES, f"0.{NINES}", f"{NINES}tok", f"{NINES}GiB", "1e-999999999", 10**5000, -(10**5000)],
    ids=["digits", "decimals", "tokens", "bytes", "exponent", "integer", "negative"],
)
def test_numbers_beyond_all_bounds_are_refused_at_once_and_briefly(value):
    with pytest.raises(BadInput, match="keep must be a fraction") as caught:
        parse_keep(value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [NINES, f"{NINES}k", 10**5000], ids=["digits", "thousands", "integer"])
def test_no_context_has_so_many_tokens(value):
    with pytest.raises(BadInput, match="is not a number of tokens") as caught:
        parse_tokens(value)
    assert len(str(caught.value)) < 200
