"""Bounded reading: what is held while a context is read, what later pieces see of it, and what is kept in the end."""

from dataclasses import dataclass

import pytest
import torch
from dense_oracle import positions_of
from families import padded_ids, random_ids, tiny_model
from held_memory import storages_in
from random_gates import method_for
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

import headwise
from headwise import RaggedCache
from headwise.cache.evict import MARGIN
from headwise.cache.listener import Listener
from headwise.errors import BadInput, BudgetInfeasible, NonFiniteValues, UnsupportedGeneration
from headwise.interfaces import AbstractAllocator
from headwise.methods.method import Method
from headwise.methods.registry import SCORERS
from headwise.methods.scores import Knorm

ONCE = ["streaming", "knorm", "lkv-t"]
ALLOCATED = [*ONCE, "knorm+adakv", "lkv-t+adakv", "lkv-t+global", "knorm+pyramid", "lkv", "lkv-t+lkv-h", "knorm+lkv-h"]
ANEW = ["keydiff", "snapkv", "keydiff+adakv", "snapkv+global", "snapkv+lkv-h"]
LENGTHS = (180, 121)  # the second row begins in the second or third piece


def one_layer():
    """Its keys and values depend on no attention, so every way to read has the same."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=96, num_hidden_layers=1, **sizes)).eval()


def read(model, method, keep, piece, lengths=LENGTHS, **options):
    ids, mask = padded_ids(lengths)
    return headwise.compress(
        model, ids, method, keep=keep, attention_mask=mask, prefill_chunk_size=piece, reading="evict", **options
    )


@pytest.mark.parametrize("method", ALLOCATED)
@pytest.mark.parametrize("piece", [16, 50])
def test_scores_that_never_change_keep_the_entries_of_one_shot(method, piece):
    model, (ids, mask) = one_layer(), padded_ids(LENGTHS)
    method = method_for(method, model)
    for keep in (0.15, 0.4, "30tok"):
        exact = headwise.compress(model, ids, method, keep=keep, attention_mask=mask)
        evicted = read(model, method, keep, piece)
        for layer, other in zip(exact.frozen_layers, evicted.frozen_layers, strict=True):
            assert layer.segments.lengths == other.segments.lengths
            assert torch.equal(layer.segments.positions, other.segments.positions)
            assert torch.allclose(layer.segments.keys, other.segments.keys, atol=1e-6)


@pytest.mark.parametrize("method", [*ALLOCATED, *ANEW])
@pytest.mark.parametrize("keep", ["0.3", "43.25tok", "80000B", "1.0"])
def test_totals_are_exact_and_protected_tokens_are_kept(method, keep):
    model, (ids, mask) = tiny_model(), padded_ids(LENGTHS)
    method = method_for(method, model)
    exact = headwise.compress(model, ids, method, keep=keep, attention_mask=mask)
    cache = read(model, method, keep, 50)
    assert cache.lengths.sum((0, 2)).tolist() == exact.lengths.sum((0, 2)).tolist()
    for row, length in enumerate(LENGTHS):
        protected = [*range(method.sink), *range(length - 1, length - 1 - method.window, -1)]
        for layer in range(3):
            for head in range(2):
                kept = cache.positions(layer, row, head).tolist()
                assert len(set(kept)) == len(kept)
                assert set(protected if method.keeps_protected else protected[: len(kept)]) <= set(kept)


def masked_rows(module, query, key, value, attention_mask, scaling, seen, **kwargs):
    """Attention in which `seen[layer]` [B, H, T, N] says what every query of every KV head sees."""
    visible = seen[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    states = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, *states, attn_mask=visible, scale=scaling)
    return out.transpose(1, 2), None


def seen_by(model, cache, ids, mask, piece):
    """Read in pieces; which tokens each of them saw in every layer, by what the layers held before it."""
    (batch, tokens), heads = ids.shape, model.config.num_key_value_heads
    seen = [torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool) for _ in model.model.layers]
    for start in range(0, tokens, piece):
        stop = min(tokens, start + piece)
        for layer, visible in zip(cache.ragged_layers, seen, strict=True):
            visible[:, :, start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            for at, held in enumerate(layer.heads):
                visible[at // heads, at % heads, start:stop, held.tokens] = True
        positions = positions_of(mask)[:, start:stop]
        with torch.no_grad():
            model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
    padding = ~mask.bool()
    return [visible & ~padding[:, None, None] | torch.eye(tokens, dtype=torch.bool) for visible in seen]


@pytest.mark.parametrize("method", ["knorm+adakv", "snapkv", "lkv"])
@pytest.mark.parametrize("lengths", [(120, 120), (120, 75)])
def test_later_pieces_attend_to_what_is_kept_and_to_nothing_else(method, lengths):
    """The states that are kept are those of dense attention masked to what each layer and head held."""
    model, (ids, mask) = tiny_model(), padded_ids(lengths)
    cache = RaggedCache(model, method_for(method, model), keep="44tok", prompt_length=120, reading="evict")
    seen = seen_by(model, cache, ids, mask, 32)
    AttentionInterface.register("masked_rows", masked_rows)
    AttentionMaskInterface.register("masked_rows", sdpa_mask)
    dense = tiny_model()
    dense.set_attn_implementation("masked_rows")
    with torch.no_grad():
        full = dense(ids, attention_mask=mask, position_ids=positions_of(mask), seen=seen).past_key_values
    assert cache.compressed and int(cache.lengths.sum()) == 44 * 6 * 2
    for layer, whole in zip(cache.frozen_layers, full.layers, strict=True):
        for segment in range(4):
            row, head = divmod(segment, 2)
            columns = layer.segments.positions_of(segment).long() + 120 - lengths[row]
            for name in ("keys", "values"):
                own = getattr(layer.segments, name)[layer.segments.slice(segment)]
                assert torch.allclose(own, getattr(whole, name)[row, head, columns], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_where_all_is_kept_nothing_differs_from_an_exact_reading(family):
    model, (ids, mask) = tiny_model(family), padded_ids((96, 40))
    options = {"keep": 1.0, "attention_mask": mask, "prefill_chunk_size": 20}
    exact, evicted = (headwise.compress(model, ids, "knorm", reading=r, **options) for r in ("exact", "evict"))
    question = random_ids(2, 5, seed=1)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers = [model.generate(**cache.inputs(question), **options) for cache in (exact, evicted)]
    assert torch.equal(*(answer.sequences for answer in answers))
    assert torch.allclose(*(torch.stack(answer.logits) for answer in answers), atol=1e-4)


@pytest.mark.parametrize("method", ["knorm", "keydiff+global", "snapkv+adakv", "lkv-t+lkv-h"])
@pytest.mark.parametrize("tokens", [512, 1024])
def test_the_peak_is_what_is_kept_and_the_margin_and_one_piece(method, tokens):
    """And what one head holds, which is copied when it is cut. The reported bytes are those held, after every piece."""
    model, ids, piece = tiny_model(), random_ids(1, tokens), 64
    cache = RaggedCache(model, method_for(method, model), keep=0.1, prompt_length=tokens, reading="evict")
    most = 0
    for start in range(0, tokens, piece):
        with torch.no_grad():
            model(ids[:, start : start + piece], past_key_values=cache)
        scores = sum(head.scores.nbytes for layer in cache.ragged_layers for head in getattr(layer, "heads", ()))
        held = sum(storages_in(*cache.layers, without=[cache.prefill], floating=True).values()) - scores
        assert cache.nbytes == held
        heads = [len(head.tokens) for layer in cache.ragged_layers for head in getattr(layer, "heads", ())]
        most = max([most, *heads])
    entry, floor = 2 * 16 * 4, 6 * (4 + 32)  # of a key and a value; entries of first tokens and of snapkv's window
    kept = round(0.1 * tokens * 6)
    assert cache.nbytes == kept * entry
    bound = max(float(kept * (1 + MARGIN)), floor) + 6 * piece + 2 * (most + piece)
    assert cache.peak_nbytes <= bound * entry
    assert cache.peak_nbytes < 0.6 * 6 * tokens * entry


def test_nothing_but_the_kept_entries_stays_alive():
    cache = read(tiny_model(), "snapkv+global", 0.3, 50)
    assert sum(storages_in(cache).values()) == cache.nbytes + cache.index_nbytes


@pytest.mark.parametrize("entries", ["int8", "int4"])
@pytest.mark.parametrize("method", ["knorm", "keydiff+global", "snapkv+adakv"])
@pytest.mark.parametrize("keep", [0.4, "30%bytes"])
def test_entries_in_fewer_bits_are_made_at_the_last_cut(entries, method, keep):
    model, ids = tiny_model(), random_ids(1, 200)
    options = {"keep": keep, "entries": entries, "prefill_chunk_size": 64}
    exact, evicted = (headwise.compress(model, ids, method, reading=r, **options) for r in ("exact", "evict"))
    assert evicted.nbytes == pytest.approx(exact.nbytes, rel=0.05)
    assert evicted.lengths.sum() == pytest.approx(int(exact.lengths.sum()), rel=0.05)
    assert all(layer.segments.quantised for layer in evicted.frozen_layers)


def test_generate_reads_in_pieces_too():
    model, ids = tiny_model(), random_ids(1, 100)
    cache = RaggedCache(model, "knorm", keep=0.3, prompt_length=100, reading="evict")
    answer = model.generate(**cache.inputs(ids), max_new_tokens=4, do_sample=False, prefill_chunk_size=30)
    own = headwise.compress(model, ids, "knorm", keep=0.3, prefill_chunk_size=30, reading="evict")
    assert answer.shape[1] == 104
    for layer, other in zip(cache.frozen_layers, own.frozen_layers, strict=True):
        assert torch.equal(layer.segments.positions, other.segments.positions)


def test_a_saved_cache_says_how_its_context_was_read(tmp_path):
    model = tiny_model()
    cache = read(model, "knorm", 0.3, 50)
    cache.save(tmp_path / "cache.safetensors")
    assert headwise.load(tmp_path / "cache.safetensors", model).provenance["reading"] == "evict"


@pytest.mark.parametrize("name", [name for name, entry in SCORERS.items() if entry.make().while_reading == "never"])
def test_a_scorer_that_needs_the_whole_context_is_refused_by_name(name):
    with pytest.raises(BadInput, match=r"evict.*scores a context that is all there.*knorm, keydiff, snapkv, lkv-t"):
        headwise.compress(tiny_model(), random_ids(1, 50), name, keep=0.5, reading="evict")


def test_what_cannot_be_read_so_is_refused_before_anything_is_read():
    model, ids = tiny_model(), random_ids(1, 50)
    with pytest.raises(BadInput, match=r"reading='evicted' does not exist; choose exact, evict, offload"):
        headwise.compress(model, ids, "knorm", keep=0.5, reading="evicted")
    with pytest.raises(BadInput, match="prefill_chunk_size=0"):
        headwise.compress(model, ids, "knorm", keep=0.5, reading="evict", prefill_chunk_size=0)
    with pytest.raises(BadInput, match="the length of the context"):
        RaggedCache(model, "knorm", keep=0.5, reading="evict")
    with pytest.raises(UnsupportedGeneration, match="listener"):
        headwise.compress(model, ids, "knorm", keep=0.5, reading="evict", listeners=[Listener()])
    with pytest.raises(BudgetInfeasible):
        headwise.compress(model, ids, "snapkv", keep=0.1, reading="evict", prefill_chunk_size=10)


def test_without_a_chunk_size_pieces_have_2048_tokens():
    steps = []
    model = one_layer()
    model.config.max_position_embeddings = 4096
    headwise.compress(
        model, random_ids(1, 3000), "knorm", keep=0.2, reading="evict", progress=lambda done, _: steps.append(done)
    )
    assert steps == [2048, 3000]


@dataclass(frozen=True)
class Uneven(AbstractAllocator):
    """Asks more of the first head than it has held so far."""

    def allocate(self, scores, candidates, layers, demand):
        counts = torch.full((len(layers), len(demand.totals), scores.shape[2]), 10)
        counts[:, :, 0] = demand.totals[0] // len(demand.shape.layers) - 10
        return counts


def test_a_head_is_never_asked_for_more_than_it_holds():
    method = Method(scorer=Knorm(), allocator=Uneven())
    cache = headwise.compress(
        tiny_model(), random_ids(1, 100), method, keep=0.6, reading="evict", prefill_chunk_size=20
    )
    assert cache.lengths.sum() == 360 and cache.lengths.max() <= 100


def test_a_failed_reading_cannot_go_on():
    model, ids = tiny_model(), random_ids(1, 60)
    cache = RaggedCache(model, "knorm", keep=0.5, prompt_length=60, reading="evict")
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        states = embedding(ids[:, 30:])
        with pytest.raises(NonFiniteValues):
            model(inputs_embeds=states * torch.nan, past_key_values=cache)
        with pytest.raises(UnsupportedGeneration, match="failed while reading"):
            model(ids[:, 30:], past_key_values=cache)
