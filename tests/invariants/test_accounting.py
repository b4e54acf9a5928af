"""Counts are exact, memory is really freed, and what is reported is what is held.

Memory is measured from outside (held_memory.py): by walking what a cache refers to, and by following every storage that
torch makes.
"""

import copy
import gc
import weakref
from fractions import Fraction
from functools import cache as once

import pytest
import torch
from families import padded_ids, random_ids, tiny_model
from held_memory import Allocations, storages_in
from random_gates import method_for
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise import RaggedCache
from headwise.methods.registry import ALIASES

METHODS = [*ALIASES, "expected+global", "keydiff+adakv", "criticalkv+adakv", "h2o+pyramid", "random+pyramid"]
LENGTHS = (96, 75)
HEADS = 2 * 3  # per layer, layers
ENTRY = 2 * 16 * 4  # bytes of an entry's key and value: head dimension 16, float32


@once
def llama():
    return tiny_model()


def contexts(lengths=LENGTHS):
    return padded_ids(lengths)


def rounded_half_up(x):
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def expected_totals(keep):
    """Entries of each row, from the definition of `keep`."""
    if keep.endswith("tok"):
        return [rounded_half_up(Fraction(keep[:-3]) * HEADS)] * 2
    if keep.endswith("B"):
        entries = int(keep[:-1]) // ENTRY
        return [entries * n // sum(LENGTHS) for n in LENGTHS]
    return [rounded_half_up(Fraction(keep) * HEADS * n) for n in LENGTHS]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", ["0.45", "0.617", "1.0", "43.25tok", "60000B"])
def test_counts_sum_to_exactly_what_was_asked(method, keep):
    ids, mask = contexts()
    cache = headwise.compress(llama(), ids, method_for(method, llama()), keep=keep, attention_mask=mask)
    assert cache.lengths.sum((0, 2)).tolist() == expected_totals(keep)


@pytest.mark.parametrize("method", METHODS)
def test_every_head_keeps_its_protected_tokens_and_at_least_one(method):
    """All of them, or, where the allocator may give a head fewer (`lkv`), the first tokens before the latest."""
    method = method_for(method, llama())
    ids, mask = contexts()
    cache = headwise.compress(llama(), ids, method, keep=0.45, attention_mask=mask)
    assert cache.lengths.min() >= 1
    for row, length in enumerate(LENGTHS):
        protected = [*range(method.sink), *range(length - 1, length - 1 - method.window, -1)]
        for layer in range(3):
            for head in range(2):
                kept = cache.positions(layer, row, head).tolist()
                assert set(protected if method.keeps_protected else protected[: len(kept)]) <= set(kept)


def test_at_the_smallest_budget_every_head_keeps_one_entry():
    cache = headwise.compress(llama(), random_ids(1, 60), "keydiff+global", keep="1tok")
    assert cache.lengths.flatten().tolist() == [1] * HEADS


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("method", ["snapkv+adakv", "keydiff+global"])
def test_reported_bytes_are_those_of_the_storages_held(family, method):
    """Before, between and after: while filling, compressed, with a tail, with pages made, with a grown tail."""
    model, ids = tiny_model(family), random_ids(2, 96)
    cache = RaggedCache(model, method, keep=0.5, prompt_length=96)
    for piece in (ids[:, :50], ids[:, 50:], random_ids(2, 1), random_ids(2, 40), random_ids(2, 40)):
        with torch.no_grad():
            model(piece, past_key_values=cache)
        held = sum(storages_in(*cache.layers, cache._noted, without=[cache.prefill]).values())
        scalars = sum(layer._sliding_window_tensor.nbytes for layer in cache.layers if layer.is_sliding)
        assert cache.nbytes + cache.index_nbytes == held - scalars
    assert cache.compressed


def test_nothing_else_stays_alive_once_the_context_is_cut():
    """Neither scores nor queries nor masks: the whole cache object, its prefill observer included."""
    ids, mask = contexts()
    cache = headwise.compress(llama(), ids, "snapkv+global", keep=0.45, attention_mask=mask)
    assert sum(storages_in(cache).values()) == cache.nbytes + cache.index_nbytes


def test_bytes_follow_the_kept_entries():
    ids = random_ids(1, 96)
    for keep in (0.4, 0.8):
        cache = headwise.compress(llama(), ids, "snapkv+adakv", keep=keep)
        assert cache.nbytes == int(cache.lengths.sum()) * ENTRY


def test_forks_share_the_frozen_storage_and_add_only_their_tail():
    cache = headwise.compress(llama(), random_ids(1, 96), "snapkv+adakv", keep=0.5)
    with torch.no_grad():
        llama()(random_ids(1, 3), past_key_values=cache.fork())  # makes the page tables, which are shared too
    before = storages_in(*cache.layers)
    forks = [cache.fork(), cache.fork(copies=3)]
    for fork in forks:
        with torch.no_grad():
            llama()(random_ids(len(fork.ragged_layers[0].rows), 5), past_key_values=fork)
        for layer, twin in zip(cache.ragged_layers, fork.ragged_layers, strict=True):
            assert twin.segments.keys.data_ptr() == layer.segments.keys.data_ptr()
            assert twin.segments.values.data_ptr() == layer.segments.values.data_ptr()
    together = storages_in(*cache.layers, *forks[0].layers, *forks[1].layers, floating=True)
    tails = [t for fork in forks for layer in fork.ragged_layers for t in (layer.tail_keys, layer.tail_values)]
    added = {key: size for key, size in together.items() if key not in before}
    assert added == {t.data_ptr(): t.nbytes for t in tails}
    assert storages_in(*cache.layers) == before  # the cache that was forked has not changed


def test_a_deep_copy_is_a_fork():
    """What transformers' users do to ask several questions of one prefix: it must not copy the model."""
    cache = headwise.compress(llama(), random_ids(1, 96), "snapkv+adakv", keep=0.5)
    twin = copy.deepcopy(cache)
    assert twin.view.model is llama()
    assert all(t.segments is s.segments for t, s in zip(twin.ragged_layers, cache.ragged_layers, strict=True))
    with torch.no_grad():
        llama()(random_ids(1, 5), past_key_values=twin)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (101, 96)


def entries_held(cache, allocations):
    """Bytes of keys and values: floating-point storage that is of no page table and no scorer.

    While states grow, old and new ones exist at once, and only one of them is in the cache.
    """
    tables = [layer.segments.__dict__.get("pages") for layer in cache.ragged_layers if layer.frozen]
    stored = storages_in(*cache.layers, without=[cache.prefill, *tables], floating=True)
    return sum((stored | allocations.made_in_updates()).values())


@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("method", ["keydiff+adakv", "snapkv", "keydiff+global", "kvzip"])
def test_the_reported_peak_is_the_most_that_was_ever_held(monkeypatch, method, chunk):
    """Measured after every single operation of prefill, a question and the growth of the tail."""
    caches, peaks = [], [0]

    class Watched(RaggedCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr(headwise.cache.compress, "RaggedCache", Watched)
    allocations = Allocations(after=lambda: peaks.extend(entries_held(cache, allocations) for cache in caches))
    with allocations, torch.no_grad():
        cache = headwise.compress(llama(), random_ids(1, 96), method, keep=0.5, prefill_chunk_size=chunk)
        for tokens in (3, 1, 80):
            llama()(random_ids(1, tokens), past_key_values=cache)
    assert cache.peak_nbytes == max(peaks)


def sixteen_layers():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,  # so that nothing but keys and values is 24 wide
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def full_layers_alive(model, method, ids, keep):
    """The cache, and after each layer how many storages of the size of a layer's keys exist anywhere."""
    alive, allocations = [], Allocations()
    size = ids.shape[1] * model.config.num_key_value_heads * model.config.head_dim * 4
    headwise.enable(model)  # looks at the model, once
    hooks = [
        layer.register_forward_hook(lambda *_: alive.append(allocations.alive(size))) for layer in model.model.layers
    ]
    with allocations:
        cache = headwise.compress(model, ids, method, keep=keep)
    for hook in hooks:
        hook.remove()
    return cache, alive


def test_acceptance_peak_of_a_layer_scope_method_at_8k():
    """16 layers, 8k tokens, 15% kept: the peak is the compressed cache and 1.1 full layers at most."""
    model, tokens = sixteen_layers(), 8192
    cache, alive = full_layers_alive(model, "knorm+adakv", random_ids(1, tokens), 0.15)
    layer = 2 * tokens * model.config.num_key_value_heads * model.config.head_dim * 4
    assert cache.peak_nbytes <= 0.15 * 16 * layer + 1.1 * layer
    assert cache.peak_nbytes == cache.nbytes + layer  # at the last layer
    assert alive == [0] * 16  # each layer's full keys and values were gone before the next layer ran


def test_a_model_scope_method_holds_every_layer_until_the_last():
    """The measurement above sees full layers where there are some."""
    cache, alive = full_layers_alive(sixteen_layers(), "knorm+global", random_ids(1, 512), 0.15)
    assert alive[:-1] == [2 * n for n in range(1, 16)]
    assert alive[-1] == 0
    assert cache.peak_nbytes > 16 * 2 * 512 * 24 * 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_dropped_cache_is_freed_at_once(family: str) -> None:
    """By reference counts alone: on a GPU nobody waits for the garbage collector."""
    model, ids = tiny_model(family), random_ids(1, 60)
    gc.collect()
    gc.disable()
    try:
        cache = headwise.compress(model, ids, "keydiff+adakv", keep=0.5)
        branch = cache.fork(copies=2)
        kept = [weakref.ref(layer.segments) for layer in cache.ragged_layers]
        del cache
        assert all(ref() is not None for ref in kept)
        del branch
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()
