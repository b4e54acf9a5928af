"""Cutting a prompt that has been read: the scorer says what a head keeps, and it moves into the prompt's last slots."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from headwise.errors import UnsupportedModel
from headwise.interfaces import Observation, Rotary
from headwise.methods.method import Method
from headwise.methods.select import protected_mask, protection_order, select
from headwise.serving.engine.pool import Pool
from headwise.serving.engine.step import GroupStep, Row, Step
from headwise.shapes import ModelShape


class Compactor:
    """Cuts the prompts of one rank's heads, layer by layer."""

    def __init__(
        self, method: Method, shape: ModelShape, rotary: Callable[[], Rotary], max_requests: int, longest: int
    ):
        self.method = method
        self.shape = shape  # of this rank
        self.rotary = rotary
        self.longest = longest  # prompt, in tokens
        self._rehearsed = False
        self.windows = [Windows(method.scorer.query_window, 2 * max_requests) for _ in shape.layers]

    def cut(
        self,
        layer: int,
        step: Step,
        groups: Sequence[GroupStep],
        queries: Tensor,
        scaling: float,
        pool: Pool,
    ) -> None:
        """Cut every prompt that ends at this step; note the last queries of the others.

        `queries` [T, Hq, D] are the batch's, `groups` those of the layer's heads.
        """
        window = queries[:0]
        if self.method.scorer.query_window:
            for row in step.now.rows:
                if row.start < row.prompt:
                    self.windows[layer].add(step.first_blocks[row.index], row, queries)
        for row in step.ending:
            if self.method.scorer.query_window:
                window = self.windows[layer].take(step.first_blocks[row.index])
            freed = [group.spec.freed_blocks(row.prompt) for group in groups]
            if any(freed):
                self._cut(layer, row, groups, freed, window, scaling, pool)

    def rehearse(self, like: Tensor) -> None:
        """Take, once, the memory that cutting the longest prompt will take, so that vLLM leaves it free."""
        if self._rehearsed:
            return
        self._rehearsed = True
        shape, dim = self.shape, self.shape.head_dim
        entries = like.new_zeros(shape.kv_heads, self.longest, 2 * dim)
        window = like.new_zeros(min(self.method.scorer.query_window, self.longest), shape.query_heads, dim)
        counts = torch.full((shape.kv_heads,), self.longest, device=like.device, dtype=torch.int64)
        entries[self._keep(0, entries, window, 1.0, counts)]

    def _cut(
        self,
        layer: int,
        row: Row,
        groups: Sequence[GroupStep],
        freed: Sequence[int],
        window: Tensor,
        scaling: float,
        pool: Pool,
    ) -> None:
        block, device = pool.block, pool.pages.device
        tables = torch.stack([group.common.block_table_tensor[row.index] for group in groups])  # [H, blocks]
        token = torch.arange(row.prompt, device=device, dtype=torch.int64)
        slots = (tables[:, token // block] + pool.regions[:, None]) * block + token % block  # [H, P], of the whole pool
        entries = pool.entries[slots]  # a copy: [H, P, 2 D]
        gone = torch.tensor(freed, device=device, dtype=torch.int64) * block
        kept = self._keep(layer, entries, window, scaling, row.prompt - gone)
        # As many slots from the first that stays as entries are kept, head by head, both in the order of tokens.
        pool.entries[slots[token >= gone[:, None]]] = entries[kept]

    def _keep(self, layer: int, entries: Tensor, window: Tensor, scaling: float, counts: Tensor) -> Tensor:
        """Which tokens of a prompt every head keeps: [H, P]."""
        method, tokens, dim = self.method, entries.shape[1], self.shape.head_dim
        valid = torch.ones(1, tokens, dtype=torch.bool, device=entries.device)
        observation = Observation(
            shape=self.shape,
            layer=layer,
            keys=entries[None, ..., :dim],
            values=entries[None, ..., dim:],
            queries=window.transpose(0, 1)[None],
            valid=valid,
            positions=torch.arange(tokens, device=entries.device, dtype=torch.int64)[None],
            project=_no_projection,
            scaling=scaling,
            rotary=self.rotary(),
            statistics={},
            totals=(),
        )
        order = None if method.keeps_protected else protection_order(valid, method.sink, method.window)
        protected = protected_mask(valid, method.sink, method.window)
        # NaN comes from one request's keys or values (float16 overflows): its answer is lost, others' must not be.
        scores = method.scorer.score(observation).nan_to_num(nan=-torch.inf)
        return select(scores, counts[None], valid, protected, order)[0]


def _no_projection() -> NoReturn:
    raise UnsupportedModel("a layer's W_O is not at hand in vLLM: no scorer that is served reads it.")


class Windows:
    """The last queries of prompts that are being read in chunks: a prompt's end may bring one token only.

    A prompt goes by the physical block of its first token, which no other prompt has before this one has been read. One
    that was given up leaves its queries here until another takes its block or `capacity` prompts have come after it.
    """

    def __init__(self, size: int, capacity: int):
        self.size = size
        self.capacity = capacity
        self._held: OrderedDict[int, tuple[int, Tensor]] = OrderedDict()  # block -> next token, queries [W, Hq, D]

    def add(self, block: int, row: Row, queries: Tensor) -> None:
        """Note what a chunk brings of the prompt's last queries."""
        fresh = self._fresh(row, queries)
        held = self._held.pop(block, None) if row.start else None
        if row.start == 0:
            self._held.pop(block, None)  # of another prompt, which was given up
        if held is not None and held[0] == row.start:
            fresh = torch.cat([held[1], fresh])
        if len(fresh):
            self._held[block] = (row.border, fresh.clone())
            while len(self._held) > self.capacity:
                self._held.popitem(last=False)

    def take(self, block: int) -> Tensor:
        """The last queries of a prompt whose last chunk has been added: [W, Hq, D]; fewer if some were dropped."""
        return self._held.pop(block)[1]

    def _fresh(self, row: Row, queries: Tensor) -> Tensor:
        begin = max(row.start, row.prompt - self.size)
        return queries[row.first + begin - row.start : row.first + max(begin, row.border) - row.start]
