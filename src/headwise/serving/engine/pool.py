"""Where vLLM stores the heads of one layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pool:
    """The whole allocation that the KV caches of all heads lie in, region after region, as pages of one head each."""

    pages: Float[Tensor, "pages block width"]  # keys, then values, of `block` entries
    regions: Int[Tensor, " kv_heads"]  # the first page of each head's region: that of its block 0

    @classmethod
    def of(cls, caches: Sequence[Float[Tensor, "blocks 1 block width"]]) -> "Pool":
        """From the caches that vLLM has bound to the heads."""
        first = caches[0]
        block, width = first.shape[2:]
        page = block * width
        storage = first.untyped_storage()
        for cache in caches:
            shared = cache.untyped_storage().data_ptr() == storage.data_ptr()
            paged = cache.storage_offset() % page == 0 and cache[0].is_contiguous() and cache.stride(0) == page
            assert shared and paged, "the heads' KV caches are not regions of one allocation"
        return cls(
            pages=whole(first),
            regions=torch.tensor(
                [cache.storage_offset() // page for cache in caches], device=first.device, dtype=torch.int64
            ),
        )

    @property
    def block(self) -> int:
        """Entries of a page."""
        return self.pages.shape[1]

    @property
    def entries(self) -> Float[Tensor, "entries width"]:
        """All entries, a view: entry `slot` of a head is number `slot + block * region`."""
        return self.pages.view(-1, self.pages.shape[2])


def whole(cache: Float[Tensor, "blocks 1 block width"]) -> Float[Tensor, "pages block width"]:
    """The allocation that a head's KV cache lies in, as pages (a view)."""
    block, width = cache.shape[2:]
    count = cache.untyped_storage().nbytes() // cache.element_size() // (block * width)
    return cache.as_strided((count, block, width), (block * width, width, 1), 0)
