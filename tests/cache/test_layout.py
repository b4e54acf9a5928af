"""Frozen storage: the kept entries of every head, in position order, and nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.kernels.segments import gather

HEADS, DIM = 3, 4


@st.composite
def contexts(draw):
    """Keys that say where they come from, NaN at padding; a random selection of real tokens."""
    width = draw(st.integers(1, 30))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**16))
    valid = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    states = torch.arange(len(lengths) * HEADS * width * DIM).view(len(lengths), HEADS, width, DIM).float()
    states = states.masked_fill(~valid[:, None, :, None], torch.nan)
    kept = torch.rand(states.shape[:3], generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
    return states, kept & valid[:, None], (valid.cumsum(-1) - 1).clamp(min=0), lengths


@given(contexts())
def test_every_segment_holds_the_kept_entries_of_its_head_in_position_order(context):
    states, kept, positions, lengths = context
    segments = gather(states, -states, kept, positions)
    assert segments.lengths == tuple(kept.sum(-1).flatten().tolist())
    assert segments.batch == len(lengths)
    for row in range(len(lengths)):
        for head in range(HEADS):
            part = segments.slice(row * HEADS + head)
            assert torch.equal(segments.keys[part], states[row, head, kept[row, head]])
            assert torch.equal(segments.values[part], -states[row, head, kept[row, head]])
            found = segments.positions[part].tolist()
            assert found == sorted(set(found))
            assert found == positions[row, kept[row, head]].tolist()


@given(contexts())
def test_padding_is_never_stored(context):
    states, kept, positions, lengths = context
    segments = gather(states, states, kept, positions)
    assert not segments.keys.isnan().any()
    assert all(int(p) < max(lengths) for p in segments.positions)


@given(contexts())
def test_storage_has_the_size_of_what_is_kept_and_is_its_own(context):
    states, kept, positions, _ = context
    segments = gather(states, states, kept, positions)
    assert segments.nbytes == 2 * int(kept.sum()) * DIM * 4
    before = segments.keys.clone()
    states.fill_(-1)
    assert torch.equal(segments.keys, before)
    assert segments.keys.data_ptr() != segments.values.data_ptr() or not kept.any()


@given(contexts())
def test_segments_tile_the_storage(context):
    states, kept, positions, _ = context
    segments = gather(states, states, kept, positions)
    ends = [0, *(segments.slice(s).stop for s in range(len(segments.lengths)))]
    assert list(segments.starts) == ends[:-1]
    assert ends[-1] == len(segments.keys) == len(segments.positions)
