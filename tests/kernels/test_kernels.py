"""Every kernel against the reference: ragged lengths, shared contexts, tails with masks, several precisions."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from headwise.errors import BadInput
from headwise.kernels import KERNELS, get_kernel, partial, reference, usable
from headwise.kernels.segments import Segments, page_table

HEADS, GROUP, DIM = 2, 3, 16
SCALING = DIM**-0.5
EVERY = pytest.mark.parametrize("kernel", [name for name in usable("cpu") if name != "reference"])


def make_segments(lengths, dtype, seed=0, heads=HEADS, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return Segments(
        keys=torch.randn(total, dim, generator=generator).to(dtype),
        values=torch.randn(total, dim, generator=generator).to(dtype),
        positions=torch.arange(total, dtype=torch.int32),
        lengths=tuple(lengths),
        kv_heads=heads,
    )


def make_query(rows, num_queries, tail, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = len(rows)
    query = 2 * torch.randn(batch, HEADS, GROUP, num_queries, DIM, generator=generator)
    tail_keys = torch.randn(batch, HEADS, tail, DIM, generator=generator)
    tail_values = torch.randn(batch, HEADS, tail, DIM, generator=generator)
    mask = torch.rand(batch, num_queries, tail, generator=generator) < 0.7
    mask[..., -1] = True
    return query.to(dtype), tail_keys.to(dtype), tail_values.to(dtype), mask


@EVERY
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=4, max_size=4),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    num_queries=st.sampled_from([1, 2, 5, 17, 600]),
    tail=st.integers(1, 70),
)
def test_equals_the_reference(kernel, lengths, rows, num_queries, tail):
    segments = make_segments(lengths, torch.float64)
    query, tail_keys, tail_values, mask = make_query(rows, num_queries, tail, torch.float64)
    arguments = (segments, torch.tensor(rows), tail_keys, tail_values, mask, SCALING)
    expected = reference.attend(query, *arguments)
    torch.testing.assert_close(get_kernel(kernel)(query, *arguments), expected, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_error_is_at_most_twice_that_of_plain_attention(kernel, dtype, num_queries):
    """Against float64, with the same rounded inputs; plain = PyTorch's own attention in the same precision."""
    segments = make_segments([300, 5, 70, 1000], dtype)
    query, tail_keys, tail_values, mask = make_query([0, 1], num_queries, 40, dtype)
    exact_segments = make_segments([300, 5, 70, 1000], dtype)
    exact_segments = Segments(
        keys=segments.keys.double(),
        values=segments.values.double(),
        positions=segments.positions,
        lengths=segments.lengths,
        kv_heads=HEADS,
    )
    rows = torch.tensor([0, 1])
    exact = reference.attend(
        query.double(), exact_segments, rows, tail_keys.double(), tail_values.double(), mask, SCALING
    )
    ours = get_kernel(kernel)(query, segments, rows, tail_keys, tail_values, mask, SCALING)
    plain = torch.empty_like(query)
    for b in range(2):
        for h in range(HEADS):
            part = segments.slice(b * HEADS + h)
            visible = torch.cat([torch.ones(num_queries, part.stop - part.start, dtype=torch.bool), mask[b]], dim=-1)
            plain[b, h] = torch.nn.functional.scaled_dot_product_attention(
                query[b, h],
                torch.cat([segments.keys[part], tail_keys[b, h]]).expand(GROUP, -1, -1),
                torch.cat([segments.values[part], tail_values[b, h]]).expand(GROUP, -1, -1),
                attn_mask=visible,
                scale=SCALING,
            )
    assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@pytest.mark.parametrize("kernel", [name for name in usable("cpu") if KERNELS[name].softcap and KERNELS[name].sinks])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 5, 600])
@pytest.mark.parametrize("options", [("softcap",), ("sinks",), ("softcap", "sinks")])
def test_soft_caps_and_sinks(kernel, dtype, num_queries, options):
    """Against the reference in float64; plain = the reference in the same precision, which rounds its output."""
    values = {"softcap": 1.5, "sinks": torch.tensor([-3.0, 0.0, 2.0, 5.0, -torch.inf, 1.0])}
    given_options = {name: values[name] for name in options}
    segments, double = (make_segments([300, 5, 70, 40], dtype) for _ in range(2))
    double = replace(double, keys=double.keys.double(), values=double.values.double())
    query, tail_keys, tail_values, mask = make_query([0, 1], num_queries, 40, dtype)
    rows = torch.tensor([0, 1])
    exact = reference.attend(
        query.double(), double, rows, tail_keys.double(), tail_values.double(), mask, SCALING, **given_options
    )
    arguments = (query, segments, rows, tail_keys, tail_values, mask, SCALING)
    found, plain = (attend(*arguments, **given_options) for attend in (get_kernel(kernel), reference.attend))
    assert (plain - reference.attend(*arguments)).norm() > 0.1 * plain.norm()
    assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()


def test_the_reference_does_what_gemma2_and_gpt_oss_do():
    """By transformers' own eager attention of both."""
    query, keys, values = (torch.randn(1, heads, n, DIM) for heads, n in ((4, 1), (2, 9), (2, 9)))
    sinks = torch.randn(4)
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    segments = Segments(
        keys=keys[0, :, :5].flatten(0, 1),
        values=values[0, :, :5].flatten(0, 1),
        positions=torch.arange(5, dtype=torch.int32).repeat(2),
        lengths=(5, 5),
        kv_heads=2,
    )
    tail = keys[:, :, 5:], values[:, :, 5:], None, SCALING
    grouped = query.view(1, 2, 2, 1, DIM)
    for eager, own, options in (
        (modeling_gemma2.eager_attention_forward, {"softcap": 0.7}, {"softcap": 0.7}),
        (modeling_gpt_oss.eager_attention_forward, {}, {"sinks": sinks}),
    ):
        expected = eager(module, query, keys, values, None, scaling=SCALING, **own)[0]
        found = reference.attend(grouped, segments, torch.tensor([0]), *tail, **options)
        torch.testing.assert_close(found.view(1, 4, 1, DIM).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_unfused_equals_fused():
    query, keys, values = (torch.randn(3, 2, n, DIM, dtype=torch.float64) for n in (4, 9, 9))
    bias = torch.zeros(3, 1, 4, 9, dtype=torch.float64).masked_fill_(torch.rand(3, 1, 4, 9) < 0.3, -1e30)
    fused = partial.attend_part(query, keys, values, bias, SCALING)
    unfused = partial.attend_unfused(query, keys, values, bias, SCALING)
    torch.testing.assert_close(fused, unfused, rtol=1e-9, atol=1e-9)


@EVERY
def test_a_query_that_sees_nothing_of_the_tail_is_finite(kernel):
    segments = make_segments([3, 4], torch.float32)
    query, tail_keys, tail_values, mask = make_query([0], 2, 5, torch.float32)
    mask[:] = False
    out = get_kernel(kernel)(query, segments, torch.tensor([0]), tail_keys, tail_values, mask, SCALING)
    expected = reference.attend(query, segments, torch.tensor([0]), tail_keys, tail_values, mask, SCALING)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@given(lengths=st.lists(st.integers(0, 600), min_size=1, max_size=12).filter(lambda x: sum(x) > 0))
@pytest.mark.slow
def test_page_table_covers_every_row_once_for_its_owner(lengths):
    table = page_table(tuple(lengths), torch.device("cpu"), torch.float32)
    owner_of_row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = []
    for page, (owner, bias) in enumerate(zip(table.owner, table.bias, strict=True)):
        seen += [(page * table.size + int(i), int(owner)) for i in (bias == 0).nonzero()[:, 0]]
    for owner, index, bias in zip(table.extra_owner, table.extra_index, table.extra_bias, strict=True):
        seen += [(int(i), int(owner)) for i in index[bias == 0]]
    assert sorted(seen) == list(enumerate(owner_of_row.tolist()))


def test_unknown_kernel():
    with pytest.raises(BadInput, match="choose auto, reference, "):
        get_kernel("fast")
