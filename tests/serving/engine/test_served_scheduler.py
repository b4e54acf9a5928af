"""The scheduler's side, without a model: vLLM's own KV-cache manager over groups of tiers."""

import random
from dataclasses import replace

import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from headwise.errors import BadInput
from headwise.serving import ARCHITECTURE
from headwise.serving.engine.groups import TierSpec
from headwise.serving.engine.plugin import register
from headwise.serving.tiers import freed_blocks, quantise

BLOCK, BLOCKS = 16, 4000


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register()
    register()  # vLLM may call it again


def test_another_vllm_is_left_alone(monkeypatch):
    """Who has headwise installed beside a vLLM that we do not know must be able to use that."""
    ours = MODELS_CONFIG_MAP.pop(ARCHITECTURE)
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    register()
    assert ARCHITECTURE not in MODELS_CONFIG_MAP
    MODELS_CONFIG_MAP[ARCHITECTURE] = ours


def _specs(tiers):
    spec = TierSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32, floor=tiers.floor)
    return {
        f"model.layers.{layer}.head{head}": replace(spec, keep=keep)
        for layer, row in enumerate(tiers.keeps)
        for head, keep in enumerate(row)
    }


def _manager(tiers):
    groups = _get_kv_cache_groups_uniform_page_size(_specs(tiers))
    config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        config, max_model_len=4096, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=False
    )


@pytest.fixture
def tiers():
    torch.manual_seed(0)
    return quantise(torch.rand(6, 4) ** 3, 4)


def test_vllm_pads_no_group(tiers):
    groups = _get_kv_cache_groups_uniform_page_size(_specs(tiers))
    assert {len(group.layer_names) for group in groups} == {min(tiers.sizes.values())}
    assert sum(len(group.layer_names) for group in groups) == 24


def test_heads_of_different_tiers_never_share_a_group(tiers):
    specs = _specs(tiers)
    for group in _get_kv_cache_groups_uniform_page_size(specs):
        assert {specs[name].keep for name in group.layer_names} == {group.kv_cache_spec.keep}


def _request(number, prompt):
    sampling = SamplingParams(max_tokens=64)
    sampling.update_from_generation_config({}, eos_token_id=None)
    return Request(str(number), [1] * prompt, sampling, None)


@pytest.mark.parametrize("lag", [0, 1], ids=["synchronous", "one step ahead"])
def test_random_lives_of_500_requests(tiers, lag):
    """Chunks, decoding, aborts at any time, preemption; with asynchronous scheduling a step is in flight.

    Blocks go back when the step that ends the prompt has been processed, never before; all of them in the end.
    """
    order = random.Random(lag)
    manager = _manager(tiers)
    pool = manager.block_pool
    free = pool.get_num_free_blocks()
    waiting, running, peak = [_request(n, order.randrange(1, 600)) for n in range(500)], [], 0
    while waiting or running:
        if waiting and len(running) < 12:
            running.append(waiting.pop())
        request = order.choice(running)
        event = order.random()
        if event < 0.02:  # aborted, or done
            manager.free(request)
            running.remove(request)
        elif event < 0.03:  # preempted: everything is read again
            manager.free(request)
            request.num_computed_tokens = request.num_in_flight_tokens = 0
        else:
            _advance(manager, tiers, request, order, lag)
        peak = max(peak, free - pool.get_num_free_blocks())
        assert free - pool.get_num_free_blocks() == sum(_held(manager, r) for r in running)
    assert 0 < peak < free
    assert pool.get_num_free_blocks() == free
    assert all(not m.req_to_blocks for m in manager.coordinator.single_type_managers)


def test_a_prompt_that_grows_is_refused(tiers):
    """Streaming input: what was compressed cannot be read as a part of a longer prompt."""
    manager, request = _manager(tiers), _request(0, 400)
    for count in (400, 1, 1):
        manager.allocate_slots(request, count)
        request.num_computed_tokens += count
    request.num_prompt_tokens = 450
    with pytest.raises(BadInput, match="streaming input"):
        manager.allocate_slots(request, 40)


def _advance(manager, tiers, request, order, lag):
    """One step: slots for the next tokens, which are then computed (at once, or by the next step)."""
    left = request.num_prompt_tokens - request.num_computed_tokens
    count = min(left, order.randrange(1, 200)) if left > 0 else 1
    processed = request.num_computed_tokens - request.num_in_flight_tokens
    if manager.allocate_slots(request, count) is None:
        return
    for single in manager.coordinator.single_type_managers:
        blocks = single.req_to_blocks[request.request_id]
        gone = sum(block.is_null for block in blocks)
        prompt = request.num_prompt_tokens
        freed = freed_blocks(prompt, keep=single.kv_cache_spec.keep, floor=tiers.floor, block=BLOCK)
        assert gone == (freed if processed >= prompt else 0)
        assert not any(block.is_null for block in blocks[gone:])
    request.num_computed_tokens += count
    request.num_in_flight_tokens = lag * count


def _held(manager, request):
    return sum(
        not block.is_null
        for single in manager.coordinator.single_type_managers
        for block in single.req_to_blocks.get(request.request_id, ())
    )
