"""KV-cache groups that give their leading blocks back when the prompt has been read (the scheduler's side)."""

from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from headwise.errors import BadInput
from headwise.serving.tiers import WHOLE, freed_blocks


@dataclass(frozen=True, kw_only=True)
class TierSpec(FullAttentionSpec):
    """The KV cache of one head that keeps `keep` millionths of a prompt, and at least `floor` tokens."""

    keep: int = WHOLE
    floor: int = 1

    def freed_blocks(self, prompt: int) -> int:
        """Leading blocks given back when a prompt of so many tokens has been read."""
        return freed_blocks(prompt, keep=self.keep, floor=self.floor, block=self.block_size)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Heads that keep alike make one group."""
        return all(spec == self for spec in kv_cache_specs.values())

    @classmethod
    def merge(cls, specs: list["TierSpec"]) -> "TierSpec":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Only equals share a group: full attention's own rule would forget `keep`."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("heads of different tiers cannot share a KV-cache group")  # what vLLM expects
        return specs[0]

    @property
    def prefix_cacheable(self) -> bool:
        """Blocks are rewritten when the prompt has been read."""
        return False


class TierManager(FullAttentionManager):
    """Block tables of one group."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back the leading blocks of a prompt that has been read, and whose step has been processed.

        Raises BadInput for a request whose prompt has grown since.
        """
        if num_prompt_tokens is None:
            return
        if processed_computed_tokens >= num_prompt_tokens:
            assert isinstance(self.kv_cache_spec, TierSpec)
            self._remove_blocks_in_range(request_id, 0, self.kv_cache_spec.freed_blocks(num_prompt_tokens))
        elif any(block.is_null for block in self.req_to_blocks.get(request_id, ())[:1]):
            raise BadInput(
                "headwise: a prompt has grown after it was compressed (streaming input), which cannot be served: send "
                "the whole conversation as a new request."
            )
