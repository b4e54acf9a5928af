"""A step of the engine as attention sees it: what every query reads, and which prompts end.

Queries of a prompt see all that came before them. When the prompt has been read, each head is cut, and later queries
see what it kept: the pages after those that were given back. A request that was preempted reads its prompt AND its
answer so far again: a chunk may then hold both kinds of queries, and the later ones wait until the cut (`after`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from headwise.serving.engine.groups import TierSpec


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupStep(AttentionMetadata):
    """What vLLM gives the heads of one KV-cache group at a step."""

    spec: TierSpec
    common: CommonAttentionMetadata


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A request of the batch: its tokens `start : stop`, of which the first `prompt` are its prompt."""

    index: int  # in the batch
    first: int  # its first query in the batch
    start: int
    stop: int
    prompt: int

    @property
    def border(self) -> int:
        """Where its queries of the prompt end and those after it begin, as tokens."""
        return min(max(self.prompt, self.start), self.stop)

    @property
    def ends_prompt(self) -> bool:
        """Whether the last token of its prompt is read at this step."""
        return self.start < self.prompt <= self.stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Queries that are attended to together: some of every row's."""

    rows: tuple[Row, ...]
    counts: tuple[int, ...]  # queries of each
    queries: Int[Tensor, " queries"] | None  # which of the batch; None: all
    cut: tuple[bool, ...]  # whether they see what was kept, or all

    @property
    def starts(self) -> tuple[int, ...]:
        """First query of each row, in this part, and their number."""
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        return tuple(starts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What a part's queries see of one KV-cache group: pages of every row, and how many entries."""

    tables: Int[Tensor, "rows blocks"]
    lengths: Int[Tensor, " rows"]  # on the CPU


class Step:
    """A batch, in its parts."""

    def __init__(self, groups: Sequence[GroupStep]):
        rows = _rows(groups[0].common)
        self.num_queries = rows[-1].first + rows[-1].stop - rows[-1].start if rows else 0
        self.ending = tuple(row for row in rows if row.ends_prompt)
        split = [row for row in rows if row.start < row.border < row.stop]
        self._groups = groups
        device = groups[0].common.block_table_tensor.device
        self.now = _part(rows, [row.border - row.start or row.stop - row.start for row in rows], bool(split), device)
        self.after = _after(split, device) if split else None
        self._now = _views(self.now, groups)
        self._after = {} if self.after is None else _views(self.after, groups)

    def now_of(self, group: GroupStep) -> Views:
        """What the first part sees."""
        return self._now[id(group)]

    def after_of(self, group: GroupStep) -> Views:
        """What the second part sees."""
        return self._after[id(group)]

    @cached_property
    def first_blocks(self) -> list[int]:
        """The physical block, in one group, of every request's first token: no two prompts that are read share one."""
        return self._groups[0].common.block_table_tensor[:, 0].tolist()


class Steps:
    """The step at hand, made once for all layers."""

    def __init__(self) -> None:
        self._metadata: Mapping[str, GroupStep] | None = None
        self._step: Step | None = None

    def of(self, metadata: Mapping[str, GroupStep]) -> Step:
        """The step of this metadata, which is one object for all layers of a forward pass."""
        if metadata is not self._metadata or self._step is None:
            self._step = Step(list({id(group): group for group in metadata.values()}.values()))
            self._metadata = metadata
        return self._step


def _rows(common: CommonAttentionMetadata) -> list[Row]:
    prompts = common.rswa_prefix_lens
    if prompts is None:  # a batch of no requests: warming up, or an idle data-parallel rank
        return []
    assert common.seq_lens_cpu_upper_bound is not None
    starts = common.query_start_loc_cpu.tolist()
    stops, lengths = common.seq_lens_cpu_upper_bound.tolist(), prompts.tolist()  # exact: nothing is speculated
    rows = []
    for index in range(common.num_reqs):
        count = starts[index + 1] - starts[index]
        if count > 0:  # not padding
            stop = stops[index]
            rows.append(Row(index=index, first=starts[index], start=stop - count, stop=stop, prompt=lengths[index]))
    return rows


def _part(rows: list[Row], counts: list[int], some: bool, device: torch.device) -> Part:
    queries = None
    if some:
        spans = [
            torch.arange(row.first, row.first + count, dtype=torch.int64, device="cpu")
            for row, count in zip(rows, counts, strict=True)
        ]
        queries = torch.cat(spans).to(device)
    cut = tuple(row.start >= row.prompt for row in rows)
    return Part(rows=tuple(rows), counts=tuple(counts), queries=queries, cut=cut)


def _after(split: list[Row], device: torch.device) -> Part:
    spans = [
        torch.arange(
            row.first + row.border - row.start, row.first + row.stop - row.start, dtype=torch.int64, device="cpu"
        )
        for row in split
    ]
    return Part(
        rows=tuple(split),
        counts=tuple(row.stop - row.border for row in split),
        queries=torch.cat(spans).to(device),
        cut=(True,) * len(split),
    )


def _views(part: Part, groups: Sequence[GroupStep]) -> dict[int, Views]:
    """Block tables from the first block that is read, by the group's id; all of one width."""
    if not part.rows:
        return {}
    block, device = groups[0].spec.block_size, groups[0].common.block_table_tensor.device
    freed = torch.tensor(
        [[_gone(group, row, cut) for row, cut in zip(part.rows, part.cut, strict=True)] for group in groups],
        dtype=torch.int64,
        device="cpu",
    )
    stops = [
        row.stop if cut else row.start + count for row, count, cut in zip(part.rows, part.counts, part.cut, strict=True)
    ]
    lengths = torch.tensor(stops, dtype=torch.int64, device="cpu") - freed * block  # [groups, rows]
    width = int(-(-lengths.max() // block))
    index = torch.tensor([row.index for row in part.rows], dtype=torch.int64, device="cpu").to(device)[:, None]
    blocks = (freed[..., None] + torch.arange(width, dtype=torch.int64, device="cpu")).to(
        device
    )  # [groups, rows, width]
    views = {}
    for number, group in enumerate(groups):
        table = group.common.block_table_tensor
        wanted = blocks[number].clamp(max=table.shape[1] - 1)  # what is beyond a row's length is not looked at
        views[id(group)] = Views(tables=table[index, wanted], lengths=lengths[number])
    return views


def _gone(group: GroupStep, row: Row, cut: bool) -> int:
    return group.spec.freed_blocks(row.prompt) if cut else 0
