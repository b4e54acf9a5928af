"""Codes of 8 and 4 bits: how far a number may move, what is refused, and every kernel over them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from headwise import kernels
from headwise.errors import BadInput, NonFiniteValues, ShapeMismatch
from headwise.kernels import get_kernel, pages, quantised, reference, usable
from headwise.kernels.quantised import ENTRIES, LARGEST, Bits, Quantised, parse_entries, quantise
from headwise.kernels.segments import Segments
from headwise.kernels.segments import join as joined
from headwise.kernels.segments import quantise as quantised_segments

BLOCK = {8: 64, 4: 32}
NAMES = [*ENTRIES]


def stored(keys, values, lengths, bits, kv_heads=1):
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    return quantise(keys.__getitem__, values.__getitem__, positions, tuple(lengths), kv_heads, bits)


def gap(x):
    """Between float16 numbers around x, at most."""
    return np.maximum(np.abs(x) * 2.0**-10, 2.0**-24)


def bound(numbers, bits, axis):
    """How far a number of a group may move: half a step, of a group whose ends are rounded outwards to float16."""
    x = numbers.double().numpy()
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    lowered = low - gap(low)
    step = (high - lowered) / (2**bits - 1)
    step = step + gap(step)
    return torch.from_numpy(np.broadcast_to(step / 2 + 1e-6 * np.abs(x).max(), x.shape).copy())


def largest_moves(keys, values, lengths, bits):
    """Of keys and values: how far each number moved, as a share of how far it may."""
    part, dim = stored(keys, values, lengths, bits), keys.shape[1]
    shares, start = [], 0
    for segment, length in enumerate(lengths):
        found_keys, found_values = part.segment(segment)
        own_keys, own_values = keys[start : start + length], values[start : start + length]
        for first in range(0, length, BLOCK[bits.keys]):
            block = slice(first, first + BLOCK[bits.keys])
            shares.append((found_keys[block] - own_keys[block]).abs() / bound(own_keys[block], bits.keys, 0))
        if not length:
            continue
        groups = own_values.unflatten(1, (-1, int(np.gcd(dim, BLOCK[bits.values]))))
        shares.append((found_values.view_as(groups) - groups).abs() / bound(groups, bits.values, 2))
        start += length
    return max(float(share.max()) for share in shares if share.numel())


@settings(max_examples=80, deadline=None)
@given(
    numbers=arrays.arrays(
        np.float32, (2, 70, 32), elements=st.floats(-LARGEST, LARGEST, width=16, allow_nan=False), fill=st.just(0.0)
    ),
    name=st.sampled_from(NAMES),
    length=st.integers(1, 70),
    scale=st.sampled_from([1.0, 1e-3, 1e-7]),
)
def test_no_number_moves_by_more_than_half_a_step(numbers, name, length, scale):
    keys, values = torch.from_numpy(numbers[:, :length] * np.float32(scale))
    assert largest_moves(keys, values, [length], ENTRIES[name]) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 48, 80, 128])
def test_as_they_are_in_models(name, dtype, dim):
    """Ragged heads, one channel that is large and nearly constant in all of them, as biases of Qwen2.5 make it."""
    keys, values = torch.randn(2, 200, dim)
    keys[:, 3] = 200 + keys[:, 3]
    lengths = [100, 3, 0, 64, 33]
    keys, values = (states.to(dtype).float() for states in (keys, values))
    assert largest_moves(keys, values, lengths, ENTRIES[name]) <= 1
    part = stored(keys, values, lengths, ENTRIES[name])
    moved = (part.segment(0)[0] - keys[:100]).abs()
    assert moved[:, 4:].max() <= 0.5 * 9 / (2 ** ENTRIES[name].keys - 1)  # the large channel costs others nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.5, LARGEST, -LARGEST, 2.0**-24])
def test_what_is_constant_is_exact(name, number):
    states = torch.full((40, 16), number)
    keys, values = stored(states, states, [40], ENTRIES[name]).segment(0)
    assert keys.equal(states)
    assert values.equal(states)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 70000.0, -3e38])
def test_what_float16_does_not_reach_is_refused(name, which, number):
    states = {"keys": torch.ones(40, 16), "values": torch.ones(40, 16)}
    states[which][7, 3] = number
    with pytest.raises(NonFiniteValues, match=f"some {which} are beyond 65504 or not finite"):
        stored(states["keys"], states["values"], [40], ENTRIES[name])


def test_heads_of_an_odd_size_are_refused():
    with pytest.raises(BadInput, match="heads of 7 numbers"):
        stored(torch.ones(4, 7), torch.ones(4, 7), [4], ENTRIES["int4"])


@pytest.mark.parametrize("name", ["int2", "INT8", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(BadInput, match="choose native, int8, k8v4, int4"):
        parse_entries(name)


def test_bytes_are_of_codes_and_scales():
    """Of 100 and 3 entries of 64 numbers: int4 has 4 blocks and 1, and 2 groups of each value."""
    part = stored(torch.randn(103, 64), torch.randn(103, 64), [100, 3], ENTRIES["int4"])
    assert part.nbytes == 103 * (32 + 32) + 5 * 2 * 64 * 2 + 103 * 2 * 2 * 2
    part = stored(torch.randn(103, 64), torch.randn(103, 64), [100, 3], ENTRIES["int8"])
    assert part.nbytes == 103 * (64 + 64) + 3 * 2 * 64 * 2 + 103 * 2 * 1 * 2


def test_what_is_chosen_is_quantised_and_the_rest_is_as_it_was():
    lengths = (50, 0, 7, 33)
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    whole = Segments(
        keys=torch.randn(90, 32), values=torch.randn(90, 32), positions=positions, lengths=lengths, kv_heads=2
    )
    segments = quantised_segments(whole, positions >= 4, ENTRIES["int8"])
    assert (segments.lengths, segments.quantised[0].lengths) == ((4, 0, 4, 4), (46, 0, 3, 29))
    assert segments.kept == lengths
    assert [segments.positions_of(s).tolist() for s in range(4)] == [[*range(length)] for length in lengths]
    assert torch.equal(segments.keys, whole.keys[positions < 4])
    assert torch.equal(segments.values, whole.values[positions < 4])
    twice = joined([segments, segments])
    assert twice.kept == 2 * lengths
    assert twice.nbytes == 2 * segments.nbytes
    other = quantised_segments(whole, positions >= 4, ENTRIES["int4"])
    both = joined([segments, other])
    assert [part.bits for part in both.quantised] == [ENTRIES["int8"], ENTRIES["int4"]]
    assert [part.lengths for part in both.quantised] == [(46, 0, 3, 29, 0, 0, 0, 0), (0, 0, 0, 0, 46, 0, 3, 29)]
    assert (both.kept, both.nbytes) == (2 * lengths, segments.nbytes + other.nbytes)
    for segment in (0, 3):
        for own, all_of_it in ((segments, both.quantised[0]), (other, both.quantised[1])):
            expected, found = own.quantised[0].segment(segment), all_of_it.segment(segment + 4 * (own is other))
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


DAMAGED = {
    "codes of another dtype": {"keys": torch.Tensor.char},
    "codes of other bits": {"values": lambda x: x[:, :3].contiguous()},
    "a row too few": {"values": lambda x: x[1:]},
    "a block too few": {"key_scales": lambda x: x[1:]},
    "scales in float32": {"key_scales": torch.Tensor.float},
    "scales without zeros": {"value_scales": lambda x: x[:, :1].contiguous()},
    "scales of more groups": {"value_scales": lambda x: torch.cat([x, x], -1)},
    "codes with gaps": {"keys": lambda x: torch.stack([x, x], -1)[..., 0]},
    "a position too few": {"positions": lambda x: x[1:]},
}


@pytest.mark.parametrize("how", DAMAGED)
def test_parts_that_do_not_fit_are_refused(how):
    part = stored(torch.randn(90, 32), torch.randn(90, 32), [50, 40], ENTRIES["k8v4"])
    fields = {name: getattr(part, name) for name in Quantised.__dataclass_fields__}
    assert Quantised(**fields).bits == ENTRIES["k8v4"]
    changes = {name: change(fields[name]) for name, change in DAMAGED[how].items()}
    damaged = object.__new__(Quantised)  # whose types are not checked by the tests first
    vars(damaged).update({**fields, **changes})
    with pytest.raises(ShapeMismatch, match="do not fit"):
        damaged.__post_init__()


def test_segments_of_other_heads_are_refused():
    part = stored(torch.randn(90, 32), torch.randn(90, 32), [50, 40], ENTRIES["k8v4"])
    none = torch.zeros(0, 16)
    with pytest.raises(ShapeMismatch, match="32 numbers do not fit"):
        Segments(
            keys=none,
            values=none,
            positions=torch.zeros(0, dtype=torch.int32),
            lengths=(0, 0),
            kv_heads=1,
            quantised=(part,),
        )


@pytest.mark.parametrize("kernel", [name for name in usable("cpu") if kernels.KERNELS[name].quantised][1:])
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=4, max_size=4),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    num_queries=st.sampled_from([1, 5, 40]),
    name=st.sampled_from(NAMES),
    dim=st.sampled_from([16, 48]),
)
def test_kernels_equal_the_reference(kernel, lengths, rows, num_queries, name, dim):
    generator = torch.Generator().manual_seed(sum(lengths))
    states = torch.randn(2, sum(lengths), dim, generator=generator)
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    segments = quantised_segments(
        Segments(keys=states[0], values=states[1], positions=positions, lengths=tuple(lengths), kv_heads=2),
        positions >= 4,
        ENTRIES[name],
    )
    query = 2 * torch.randn(len(rows), 2, 3, num_queries, dim, generator=generator)
    tail = torch.randn(2, len(rows), 2, 9, dim, generator=generator)
    mask = torch.rand(len(rows), num_queries, 9, generator=generator) < 0.7
    arguments = (query, segments, torch.tensor(rows), *tail, mask, dim**-0.5)
    expected = reference.attend(*arguments)
    torch.testing.assert_close(get_kernel(kernel)(*arguments), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("num_queries", "most"), [(1, 40), (300, 20)])
def test_pages_never_holds_numbers_of_all_entries(monkeypatch, num_queries, most):
    """Three blocks at most at a time; and of many queries no part for every one of the 27 blocks."""
    monkeypatch.setattr(quantised, "AT_ONCE", 16 * 64 * 3)  # three blocks
    lengths, largest, parts = (900, 0, 5, 700), [], []
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    whole = Segments(
        keys=torch.randn(1605, 16), values=torch.randn(1605, 16), positions=positions, lengths=lengths, kv_heads=2
    )
    segments = quantised_segments(whole, positions >= 4, ENTRIES["int8"])
    real, merge = Quantised.numbers, pages.merge

    def numbers(self, some):
        largest.append(len(some))
        return real(self, some)

    def merged(found, owners):
        parts.append(sum(out.numel() for out, *_ in found))
        return merge(found, owners)

    monkeypatch.setattr(Quantised, "numbers", numbers)
    monkeypatch.setattr(pages, "merge", merged)
    query, tail = torch.randn(2, 2, 1, num_queries, 16), torch.randn(2, 2, 2, 3, 16)
    arguments = (query, segments, torch.tensor([0, 1]), *tail, None, 0.25)
    found = pages.attend(*arguments)
    monkeypatch.setattr(Quantised, "numbers", real)
    torch.testing.assert_close(found, reference.attend(*arguments), rtol=1e-4, atol=2e-5)
    assert max(largest) == 3
    assert parts[0] <= most * num_queries * 16


def test_the_reference_attends_to_the_numbers_that_codes_stand_for():
    """Against one softmax, written out, over native entries, the numbers that codes stand for, and the tail."""
    states = torch.randn(2, 60, 16)
    positions = torch.arange(60, dtype=torch.int32)
    whole = Segments(keys=states[0], values=states[1], positions=positions, lengths=(60,), kv_heads=1)
    segments = quantised_segments(whole, positions >= 4, Bits(keys=8, values=4))
    (keys, values), tail = segments.quantised[0].segment(0), torch.randn(2, 3, 16)
    query = torch.randn(1, 1, 2, 1, 16)
    keys, values = torch.cat([states[0, :4], keys, tail[0]]), torch.cat([states[1, :4], values, tail[1]])
    expected = (query @ keys.T * 0.25).softmax(-1) @ values
    found = reference.attend(query, segments, torch.tensor([0]), *tail[:, None, None], None, 0.25)
    torch.testing.assert_close(found, expected)


def test_a_kernel_that_does_not_read_codes_is_never_given_any(monkeypatch):
    """A contributor's, the last of the table: `auto` takes it for native entries only."""
    poor = kernels.Entry(module="reference", summary="of native entries")
    monkeypatch.setattr(kernels, "KERNELS", {**kernels.KERNELS, "poor": poor})
    kernels._by_device.cache_clear()
    kernels.why_not.cache_clear()
    assert get_kernel("poor") is reference.attend
    with pytest.raises(BadInput, match="kernel='poor' does not read quantised entries; choose auto, reference"):
        get_kernel("poor", quantised=True)
    assert kernels._by_device("cpu", kernels.Needs()) is reference.attend
    for need in ("quantised", "softcap", "sinks"):
        assert kernels._by_device("cpu", kernels.Needs(**{need: True})) is not reference.attend
    kernels._by_device.cache_clear()
    kernels.why_not.cache_clear()
