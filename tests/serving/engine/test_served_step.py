"""What workers make of a batch, without a model: rows, parts, windows of queries, and what is cut."""

from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from headwise.methods.method import Method
from headwise.models.families import ModelRotary
from headwise.serving.engine.compaction import Compactor, Windows
from headwise.serving.engine.groups import TierSpec
from headwise.serving.engine.step import GroupStep, Row, Step
from headwise.shapes import ModelShape

BLOCK = 4
SPEC = TierSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, keep=250_000, floor=1)


def _group(requests, prompts: Any = ...):
    """A batch of (tokens before, new tokens, prompt)."""
    starts = torch.tensor([0] + [new for _, new, _ in requests]).cumsum(0)
    lengths = torch.tensor([before + new for before, new, _ in requests])
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        rswa_prefix_lens=torch.tensor([prompt for *_, prompt in requests]) if prompts is ... else prompts,
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(new for _, new, _ in requests),
        max_seq_len=int(lengths.max()),
        block_table_tensor=torch.arange(100 * len(requests)).view(len(requests), 100),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.long),
    )
    return GroupStep(spec=SPEC, common=common)


def test_a_prompt_in_pieces_then_an_answer():
    """Prompt of 40 tokens, a quarter kept: 7 blocks of 4 go, 12 tokens stay."""
    pieces = [(0, 16), (16, 23), (39, 1), (40, 1), (41, 1)]
    seen = []
    for before, new in pieces:
        group = _group([(before, new, 40)])
        step = Step([group])
        views = step.now_of(group)
        seen.append((views.lengths.tolist()[0], views.tables[0, 0].item(), len(step.ending), step.after is None))
    assert seen == [(16, 0, 0, True), (39, 0, 0, True), (40, 0, 1, True), (13, 7, 0, True), (14, 7, 0, True)]


def test_a_resumed_request_waits_for_the_cut_in_the_middle_of_a_chunk():
    group = _group([(30, 15, 40), (50, 1, 40)])
    step = Step([group])
    assert step.num_queries == 16
    assert step.now.counts == (10, 1)
    assert step.now.queries is not None and step.now.queries.tolist() == [*range(10), 15]
    assert step.now_of(group).lengths.tolist() == [40, 51 - 28]
    assert step.after is not None and step.after.queries is not None
    assert step.after.queries.tolist() == [10, 11, 12, 13, 14]
    assert step.after_of(group).lengths.tolist() == [45 - 28]
    assert step.after_of(group).tables[0].tolist()[:5] == [7, 8, 9, 10, 11]
    assert [row.index for row in step.ending] == [0]


@pytest.mark.parametrize("group", [_group([(0, 3, 0)], prompts=None), _group([(5, 0, 9)])], ids=["warm-up", "padding"])
def test_a_batch_of_no_requests(group):
    step = Step([group])
    assert step.num_queries == 0
    assert not step.ending


def _row(start, stop, prompt=100):
    return Row(index=0, first=0, start=start, stop=stop, prompt=prompt)


def _queries(start, stop):
    """Queries that say which token they are of."""
    return torch.arange(start, stop).float().view(-1, 1, 1)


@pytest.mark.parametrize("ends", [[100], [96, 100], [95, 96, 97, 98, 99, 100], [10, 97, 99, 100], [99, 105]])
def test_the_last_queries_of_a_prompt_in_any_pieces(ends):
    windows, start = Windows(4, 8), 0
    for stop in ends:
        windows.add(7, _row(start, stop), _queries(start, stop))
        start = stop
    assert windows.take(7).flatten().tolist() == [96, 97, 98, 99]


def test_a_prompt_that_was_given_up_leaves_nothing_to_the_next_in_its_block():
    windows = Windows(4, 8)
    windows.add(7, _row(0, 98), _queries(0, 98))
    windows.add(7, _row(0, 97), _queries(0, 97) + 1000)
    windows.add(7, _row(97, 100), _queries(97, 100) + 1000)
    assert windows.take(7).flatten().tolist() == [1096, 1097, 1098, 1099]


def test_prompts_that_were_given_up_do_not_pile_up():
    windows = Windows(4, 8)
    for block in range(50):
        windows.add(block, _row(0, 98), _queries(0, 98))
    assert len(windows._held) == 8


def test_a_prompt_of_nan_is_cut_like_any_other():
    """One request's overflow must not stop the server."""
    shape = ModelShape(num_layers=1, layers=(0,), kv_heads=2, query_heads=4, head_dim=8)
    rotary = ModelRotary(frequencies=torch.ones(4), attention_scaling=1.0, head_dim=8)
    compactor = Compactor(Method.parse("keydiff"), shape, lambda: rotary, 4, 64)
    entries = torch.randn(2, 30, 16)
    entries[:, 5:20] = torch.nan
    kept = compactor._keep(0, entries, torch.zeros(0, 4, 8), 1.0, torch.tensor([9, 30]))
    assert kept.sum(-1).tolist() == [9, 30]
