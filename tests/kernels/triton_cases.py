"""The Triton kernel in Triton's interpreter; `test_triton.py` runs this file in a process of its own."""

import pytest
import torch

from headwise.kernels import get_kernel, pages, partial, reference, triton_decode
from headwise.kernels.quantised import ENTRIES
from headwise.kernels.segments import Segments, quantise, split_into_chunks

HEADS = 2
LENGTHS = [300, 0, 1, 130]  # of two contexts, two heads each
CASES = [  # dtype, dim, group, new tokens, rows, tail, masked
    ("float32", 64, 1, 1, [0, 1], 5, False),
    ("bfloat16", 128, 4, 1, [0, 1], 64, False),
    ("float16", 64, 8, 1, [1, 0], 3, True),
    ("bfloat16", 96, 3, 3, [0, 1, 0], 70, True),
    ("float32", 128, 4, 3, [1, 0, 1], 260, True),
    ("float16", 96, 3, 1, [0], 17, False),
    ("bfloat16", 64, 8, 3, [1, 1], 9, True),
    ("float32", 16, 3, 1, [1, 0], 260, True),
]
CODED = [  # how entries are stored, and the same
    (["int8"], ("float32", 64, 1, 1, [0, 1], 5, False)),
    (["int8"], ("bfloat16", 128, 4, 1, [0, 1], 64, True)),
    (["int8"], ("float16", 80, 3, 3, [0, 1, 0], 20, True)),
    (["int8"], ("float32", 256, 1, 1, [0], 3, False)),  # a block in several tiles
    (["k8v4"], ("bfloat16", 64, 8, 1, [1, 0], 3, True)),
    (["k8v4"], ("float32", 96, 4, 3, [1, 0, 1], 20, True)),
    (["int4"], ("float32", 16, 3, 1, [1, 0], 9, True)),
    (["int4"], ("bfloat16", 96, 3, 3, [0, 1, 0], 70, True)),
    (["int4"], ("float16", 128, 4, 1, [0], 17, False)),
    (["int4"], ("float32", 80, 2, 1, [1, 1], 5, False)),
    (["int8", "int4"], ("bfloat16", 64, 8, 3, [1, 1], 9, True)),
    (["int4", "k8v4", "int4"], ("float32", 24, 3, 1, [0, 1], 4, True)),
]


def randn(*shape, dtype):
    return torch.randn(*shape).to(dtype)


def make_segments(lengths, dim, dtype):
    total = sum(lengths)
    return Segments(
        keys=randn(total, dim, dtype=dtype),
        values=randn(total, dim, dtype=dtype),
        positions=torch.arange(total, dtype=torch.int32),
        lengths=tuple(lengths),
        kv_heads=HEADS,
    )


def coded(segments, kinds, share=0.6):
    """Some entries of every kind, the others as they are; all of them where there are two or fewer."""
    for kind in kinds:
        chosen = torch.rand(len(segments.keys)) < share
        for segment, length in enumerate(segments.lengths):
            chosen[segments.slice(segment)] |= length <= 2
        segments = quantise(segments, chosen, ENTRIES[kind])
    return segments


def make_arguments(case, lengths=LENGTHS, kinds=()):
    """What a kernel is called with; as in a model, queries are transposed and the tail is part of its capacity."""
    dtype, dim, group, num_new, rows, tail, masked = case
    dtype, batch = getattr(torch, dtype), len(rows)
    query = 2 * randn(batch, num_new, HEADS, group, dim, dtype=dtype).permute(0, 2, 3, 1, 4)
    tail_keys, tail_values = (randn(batch, HEADS, tail + 7, dim, dtype=dtype)[:, :, :tail] for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(batch, num_new, tail + 2)[:, :, 2:] < 0.7
        mask[0, :, : tail // 2] = False  # left padding
        mask[..., -1] = True
    segments = coded(make_segments(lengths, dim, dtype), kinds)
    return query, segments, torch.tensor(rows), tail_keys, tail_values, mask, dim**-0.5


def exactly(query, segments, rows, tail_keys, tail_values, mask, scaling, **options):
    exact = Segments(
        keys=segments.keys.double(),
        values=segments.values.double(),
        positions=segments.positions,
        lengths=segments.lengths,
        kv_heads=segments.kv_heads,
        quantised=segments.quantised,
    )
    tail = tail_keys.double(), tail_values.double()
    return reference.attend(query.double(), exact, rows, *tail, mask, scaling, **options)


def plainly(query, segments, rows, tail_keys, tail_values, mask, scaling, softcap=None, sinks=None):
    """PyTorch's own attention in the same precision, one head at a time; with options, matrix products as precise."""
    out = torch.empty_like(query)
    for row, context in enumerate(rows.tolist()):
        for head in range(HEADS):
            segment = context * HEADS + head
            numbers = [part.segment(segment) for part in segments.quantised]
            numbers += [(segments.keys[segments.slice(segment)], segments.values[segments.slice(segment)])]
            numbers += [(tail_keys[row, head], tail_values[row, head])]
            keys, values = (torch.cat([part.to(query.dtype) for part in parts]) for parts in zip(*numbers, strict=True))
            visible = torch.ones(query.shape[3], len(keys), dtype=torch.bool)
            if mask is not None:
                visible[:, len(keys) - mask.shape[2] :] = mask[row]
            keys, values = (states.expand(query.shape[2], -1, -1) for states in (keys, values))
            if softcap is not None or sinks is not None:
                logits = partial.capped(query[row, head] @ keys.transpose(-1, -2) * scaling, softcap)
                own = torch.full((query.shape[2],), -torch.inf) if sinks is None else sinks.view(HEADS, -1)[head]
                own = own.to(logits.dtype)[:, None, None].expand(-1, query.shape[3], 1)
                weights = torch.cat([logits.masked_fill(~visible, -torch.inf), own], dim=-1).softmax(-1)
                out[row, head] = weights[..., :-1] @ values
                continue
            out[row, head] = torch.nn.functional.scaled_dot_product_attention(
                query[row, head], keys, values, attn_mask=visible, scale=scaling
            )
    return out


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that was never written must not be read."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_attention(case):
    arguments = make_arguments(case)
    exact = exactly(*arguments)
    found = get_kernel("triton")(*arguments)
    assert found.dtype == arguments[0].dtype
    assert (found.double() - exact).norm() <= 2 * (plainly(*arguments).double() - exact).norm()


@pytest.mark.parametrize("options", [("softcap",), ("sinks",), ("softcap", "sinks")], ids=str)
@pytest.mark.parametrize(
    ("kinds", "case"), [([], CASES[0]), ([], CASES[4]), ([], CASES[3]), CODED[2], CODED[7]], ids=str
)
def test_soft_caps_and_sinks(kinds, case, options):
    """As below."""
    arguments = make_arguments(case, kinds=kinds)
    sinks = 5 + torch.randn(HEADS * case[2])
    sinks[0] = -torch.inf
    chosen = {name: value for name, value in {"softcap": 1.5, "sinks": sinks}.items() if name in options}
    exact = exactly(*arguments, **chosen)
    found, plain = get_kernel("triton")(*arguments, **chosen), plainly(*arguments, **chosen)
    assert (exact - exactly(*arguments)).norm() > 0.01 * exact.norm()
    assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(("kinds", "case"), CODED, ids=str)
def test_error_with_quantised_entries_is_at_most_twice_that_of_plain_attention(kinds, case):
    """Plain attention reads the same numbers, rounded to the dtype of the query."""
    arguments = make_arguments(case, [150, 0, 1, 130], kinds)
    assert [part.lengths[1:3] for part in arguments[1].quantised] == [(0, 1)] + [(0, 0)] * (len(kinds) - 1)
    exact = exactly(*arguments)
    found = get_kernel("triton")(*arguments)
    assert found.dtype == arguments[0].dtype
    assert (found.double() - exact).norm() <= 2 * (plainly(*arguments).double() - exact).norm()


@pytest.mark.parametrize("kinds", [["int8"], ["int4"], ["int4", "int8"]], ids=str)
def test_only_quantised_entries_and_no_tail(kinds):
    """The storage of native entries is empty, as is the last one of two."""
    query, segments, *others = make_arguments(("float32", 64, 2, 1, [1, 0], 0, False), [70, 33, 32, 1])
    arguments = (query, coded(segments, kinds, share=2), *others)
    assert not len(arguments[1].keys)
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kinds", "length"), [(["int8"], 3700), (["int4", "int4"], 2000)], ids=str)
def test_more_chunks_of_quantised_entries_than_are_combined_at_once(kinds, length):
    arguments = make_arguments(("float32", 16, 2, 1, [0], 3, False), [length, 3], kinds)
    for part in arguments[1].quantised:
        blocks = tuple(part.blocks.segment.bincount(minlength=2).tolist())
        part.__dict__["chunks"] = split_into_chunks(blocks, 1, torch.device("cpu"))
    assert len(arguments[1].quantised[0].chunks.segment) > 32
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-6)


def test_large_numbers_of_one_sign_in_a_channel_of_quantised_keys():
    """As biases make them: queries see nothing of them but the differences."""
    query, segments, *others = make_arguments(("bfloat16", 64, 4, 1, [0, 1], 5, True))
    segments.keys[:, 7] += 200
    arguments = (query, coded(segments, ["int4"]), *others)
    exact = exactly(*arguments)
    found = get_kernel("triton")(*arguments).double()
    assert (found - exact).norm() <= 2 * (plainly(*arguments).double() - exact).norm()


def test_more_chunks_than_are_combined_at_once():
    arguments = make_arguments(("float32", 16, 2, 1, [0], 3, False), [4200, 3])
    segments = arguments[1]
    segments.__dict__["chunks"] = split_into_chunks(segments.lengths, 128, torch.device("cpu"))
    assert len(segments.chunks.segment) > 32
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_of_the_tail_sees_the_frozen_part():
    query, segments, rows, tail_keys, tail_values, mask, scaling = make_arguments(CASES[4], [5, 6, 7, 8])
    mask[:] = False
    arguments = (query, segments, rows, tail_keys, tail_values, mask, scaling)
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-5)


def test_an_empty_tail():
    arguments = make_arguments(("float32", 16, 3, 1, [0, 1], 0, False), [5, 6, 7, 8])
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-5)


def test_more_queries_than_a_tile_holds():
    arguments = make_arguments(("float32", 16, 4, 6, [0, 1, 0, 0], 9, True), [40, 3, 2, 50])
    assert arguments[1].readers_of(arguments[2]).slots * 4 * 6 > triton_decode.Tiles.of(72, 16, 4).queries
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-5)


def test_more_queries_than_a_tile_holds_read_quantised_entries():
    arguments = make_arguments(("float32", 16, 4, 3, [0, 1, 0], 9, True), [40, 3, 2, 50], ["k8v4"])
    assert arguments[1].readers_of(arguments[2]).slots * 4 * 3 > triton_decode.Tiles.of_codes(24, 16, 4).queries
    torch.testing.assert_close(get_kernel("triton")(*arguments), reference.attend(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "case"),
    [
        ([], ("float64", 16, 2, 1, [0], 3, False)),
        ([], ("float32", 16, 2, 300, [0], 300, True)),
        (["int8"], ("float64", 16, 2, 1, [0], 3, False)),
        (["int4"], ("float32", 20, 2, 1, [0], 3, False)),
    ],
    ids=str,
)
def test_what_it_is_not_made_for_goes_to_pages(kinds, case, monkeypatch):
    monkeypatch.setattr(triton_decode, "attend_split", None)
    arguments = make_arguments(case, [40, 3], kinds)
    torch.testing.assert_close(get_kernel("triton")(*arguments), pages.attend(*arguments))


@pytest.mark.parametrize("kinds", [[], ["int8", "int4"]], ids=str)
def test_rows_are_asked_for_once(kinds, monkeypatch):
    arguments = make_arguments(CASES[0], kinds=kinds)
    get_kernel("triton")(*arguments)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    get_kernel("triton")(*arguments)
