"""Caches whose entries are quantised: budgets in bytes, what is held, files, forks, batches, every family."""

import copy
import json

import pytest
import torch
from families import FAMILIES, padded_ids, random_ids, tiny_model
from held_memory import Allocations, storages_in
from random_gates import method_for
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise import RaggedCache
from headwise.cache.kept import Kept
from headwise.cache.reading import read
from headwise.cache.whole import require_whole
from headwise.errors import BadInput, BudgetInfeasible, NonFiniteValues
from headwise.kernels import quantised
from headwise.kernels.quantised import ENTRIES
from headwise.kernels.segments import Segments, gather, quantise
from headwise.methods.method import Method
from headwise.methods.storage import Storage

NAMES = [*ENTRIES]
LENGTHS = (300, 170)


def contexts(lengths=LENGTHS):
    return padded_ids(lengths)


def compressed(name, method="expected+adakv", keep=0.3, family="llama", lengths=LENGTHS, **options):
    ids, mask = contexts(lengths)
    return headwise.compress(tiny_model(family), ids, method, keep=keep, attention_mask=mask, entries=name, **options)


@torch.no_grad()
def logits(cache, seed=1):
    """Of what follows 5 tokens more."""
    rows = len(cache.frozen_layers[0].rows)
    return following(cache, random_ids(rows, 5, seed=seed))


def following(cache, ids):
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return cache.view.model.generate(**cache.fork().inputs(ids), **options).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_keeps_the_same_entries_and_nearly_the_same_predictions(family, name):
    lengths = (120, 120) if family == "gemma3_text" else LENGTHS
    native, cache = (compressed(x, family=family, lengths=lengths, keep=0.5) for x in ("native", name))
    assert torch.equal(cache.lengths, native.lengths)
    for layer in range(len(cache.frozen_layers)):
        assert torch.equal(cache.positions(layer, 1, 1), native.positions(layer, 1, 1))
    assert cache.nbytes - cache.sliding_nbytes < 0.5 * (native.nbytes - native.sliding_nbytes)
    moved = (logits(cache) - logits(native)).norm() / logits(native).norm()
    assert 0 < moved < (0.05 if name == "int8" else 0.7)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_every_storage_that_is_held(name):
    """Nothing is left in the model's dtype but the first tokens, the tail, and scales."""
    cache = compressed(name)
    held = storages_in(cache.layers)
    assert cache.nbytes + cache.index_nbytes - cache._noted.nbytes == sum(held.values())
    floats = storages_in(cache.layers, floating=True)
    native = sum(layer.segments.keys.nbytes + layer.segments.values.nbytes for layer in cache.frozen_layers)
    scales = sum(
        part.key_scales.nbytes + part.value_scales.nbytes
        for layer in cache.frozen_layers
        for part in layer.segments.quantised
    )
    assert native == sum(sum(layer.segments.lengths) for layer in cache.frozen_layers) * 2 * 16 * 4
    assert max(max(layer.segments.lengths) for layer in cache.frozen_layers) <= 4
    assert sum(floats.values()) == native + scales


@pytest.mark.parametrize("name", NAMES)
def test_the_price_of_entries_is_what_they_take(name):
    cache = compressed(name, method="streaming")  # whose first 4 tokens are in every head
    storage = Storage(head_dim=16, itemsize=4, bits=ENTRIES[name])
    assert cache.nbytes == storage.nbytes(cache.lengths).sum()


METHODS = ["expected+uniform", "expected+pyramid", "expected+adakv", "expected+global", "streaming", "kvzip", "lkv"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", ["30000B", "9%bytes", "15%bytes"])
def test_a_keep_in_bytes_is_never_exceeded_and_nearly_used(name, method, keep):
    model = tiny_model()
    method = method_for(method, model)
    cache = compressed(name, method=method, keep=keep)
    everything = 2 * 3 * sum(LENGTHS) * 2 * 16 * 4
    asked = 30000 if keep.endswith("B") else everything * int(keep.partition("%")[0]) // 100
    # Of every head a block may be nearly empty, and the first tokens may not be kept.
    spare = 2 * 6 * (4 * 16 + 4 * 2 * 16 * 4)
    assert asked - spare <= cache.nbytes <= asked


def test_a_keep_in_bytes_is_used_to_the_last_entry_where_counts_are_known():
    storage = Storage(head_dim=16, itemsize=4, bits=ENTRIES["int4"])
    for keep in ("30000B", "41234B", "17%bytes"):
        cache = compressed("int4", method="streaming", keep=keep, lengths=(300,))
        asked = 6 * 300 * 2 * 16 * 4 * 17 // 100 if "%" in keep else int(keep[:-1])
        more = cache.lengths.flatten().clone()
        more[int(cache.lengths.flatten().argmin())] += 1
        assert cache.nbytes <= asked < storage.nbytes(more).sum()


@pytest.mark.parametrize("keep", ["50000B", "15%bytes"])
def test_native_entries_take_the_same_keep(keep):
    asked = 50000 if keep == "50000B" else 6 * sum(LENGTHS) * 128 * 15 // 100
    assert asked - 2 * 128 < compressed("native", keep=keep).nbytes <= asked


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_them_as_they_are(name, tmp_path):
    cache, file = compressed(name), tmp_path / "cache.safetensors"
    expected = logits(cache)
    cache.save(file)
    ids, mask = contexts()
    loaded = headwise.load(file, tiny_model(), input_ids=ids, attention_mask=mask)
    assert loaded.kept == cache.kept
    assert loaded.provenance["entries"] == name
    assert loaded.nbytes == cache.nbytes
    assert logits(loaded).equal(expected)
    assert file.stat().st_size < cache.nbytes + cache.index_nbytes + 2**14


def test_a_file_of_other_bits_than_it_says_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    cache, file = compressed("int4"), tmp_path / "cache.safetensors"
    cache.save(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for changes in (
        {"0.k4v4_keys": tensors["0.k4v4_keys"][:, :4].contiguous()},
        {"0.k4v4_key_scales": tensors["0.k4v4_key_scales"][1:].contiguous()},
        {"0.k4v4_lengths": tensors["0.k4v4_lengths"] + 1},
        {"0.k4v4_positions": tensors["0.k4v4_positions"] + 2000},
        {"0.k4v4_value_scales": tensors["0.k4v4_value_scales"] * torch.inf},
        {"0.k4v4_value_scales": tensors["0.k4v4_value_scales"] * -1},
        {"0.k4v4_key_scales": tensors["0.k4v4_key_scales"] * -1},
    ):
        save_file({**tensors, **changes}, file, metadata)
        with pytest.raises(headwise.HeadwiseError):
            headwise.load(file, tiny_model())
    save_file({name: t for name, t in tensors.items() if name != "1.k4v4_values"}, file, metadata)
    with pytest.raises(BadInput, match=r"1\.k4v4_values"):
        headwise.load(file, tiny_model())


@pytest.mark.parametrize("name", NAMES)
def test_forks_share_them_and_joins_copy_them(name):
    cache = compressed(name)
    twin = cache.fork(copies=2)
    for layer, other in zip(cache.frozen_layers, twin.frozen_layers, strict=True):
        assert layer.segments is other.segments
    expected = logits(cache)
    both = RaggedCache.join([cache, cache])
    found = following(both, random_ids(2, 5, seed=1).repeat(2, 1))
    torch.testing.assert_close(found, expected.repeat(2, 1), rtol=1e-4, atol=1e-4)
    assert both.nbytes == 2 * cache.nbytes
    with pytest.raises(BadInput, match="different bits"):
        RaggedCache.join([cache, compressed("native")])
    assert logits(copy.deepcopy(cache)).equal(expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_batch_is_as_if_it_were_alone(name):
    batch = compressed(name)
    ids, _ = contexts()
    for row, length in enumerate(LENGTHS):
        alone = headwise.compress(tiny_model(), ids[row : row + 1, -length:], "expected+adakv", keep=0.3, entries=name)
        for layer in range(3):
            for head in range(2):
                assert torch.equal(batch.positions(layer, row, head), alone.positions(layer, 0, head))
        expected = following(alone, random_ids(2, 5, seed=1)[row : row + 1])
        torch.testing.assert_close(logits(batch)[row : row + 1], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_reading_is_cut_as_compress_does_it(name):
    ids, mask = contexts()
    reading = read(tiny_model(), ids, [Method.parse("expected").scorer], attention_mask=mask)
    for method in ("expected+adakv", "expected+global", "expected"):
        for keep in (0.3, "20%bytes"):
            own = compressed(name, method=method, keep=keep)
            cut = reading.cut(method, keep, entries=name)
            assert cut.kept.with_segments(own.kept.segments) == own.kept
            assert (cut.nbytes, cut.peak_nbytes) == (own.nbytes, own.peak_nbytes)
            torch.testing.assert_close(logits(cut), logits(own), rtol=1e-3, atol=1e-3)


def test_generate_compresses_a_prompt_into_them():
    model, ids = tiny_model(), random_ids(1, 200)
    cache = RaggedCache(model, "snapkv", keep=0.5, entries="int8")
    native = RaggedCache(model, "snapkv", keep=0.5)
    answers = [model.generate(**c.inputs(ids), max_new_tokens=4, do_sample=False) for c in (cache, native)]
    assert answers[0].shape == answers[1].shape
    assert cache.nbytes < 0.6 * native.nbytes
    assert cache.provenance["entries"] == "int8"


def test_an_unknown_name_is_refused_before_anything_is_read():
    with pytest.raises(BadInput, match="choose native, int8, k8v4, int4"):
        headwise.compress(tiny_model(), random_ids(1, 20), "snapkv", keep=0.5, entries="int3")


def test_keys_that_float16_does_not_reach_are_refused_and_stay_possible_native():
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 1e6
    ids = random_ids(1, 100)
    assert headwise.compress(model, ids, "streaming", keep=0.5).compressed
    with pytest.raises(NonFiniteValues, match="entries='native'"):
        headwise.compress(model, ids, "streaming", keep=0.5, entries="int8")


@pytest.mark.parametrize("name", NAMES)
def test_native_is_as_without_the_option_and_no_context_is_too_short(name):
    first, other = (
        compressed("native"),
        headwise.compress(tiny_model(), contexts()[0], "expected+adakv", keep=0.3, attention_mask=contexts()[1]),
    )
    assert first.kept == other.kept
    short = compressed(name, method="streaming", keep=1.0, lengths=(3,))
    assert short.lengths.unique().tolist() == [3]
    assert isinstance(short.kept, Kept)
    assert torch.isfinite(logits(short)).all()


def wide_model():
    """Heads of 128 numbers in bfloat16: there a quantised entry alone in its block takes more than a native one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["keydiff", "knorm", "h2o+global", "expected+adakv", "random+global", "streaming"])
def test_not_even_a_budget_of_a_few_entries_is_exceeded(name, method):
    model, ids = wide_model(), random_ids(1, 200)
    possible = 0
    for budget in (4096, 6300, 9000, 16384, 17000, 33000, 70000):
        try:
            cache = headwise.compress(model, ids, method, keep=f"{budget}B", entries=name)
        except BudgetInfeasible:
            continue
        possible += 1
        assert cache.nbytes <= budget, (budget, cache.lengths.flatten().tolist())
    assert possible >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_price_is_the_most_that_any_entries_of_a_head_take(name):
    """Whichever of its entries are those of the first tokens."""
    bits = ENTRIES[name]
    storage = Storage(head_dim=128, itemsize=2, bits=bits)
    for count in (1, 2, 3, 4, 5, 32, 33, 64, 65, 68, 69):
        found = []
        for first in range(min(count, 4) + 1):
            positions = torch.cat([torch.arange(first), torch.arange(4, 4 + count - first)]).int()
            states = torch.randn(2, count, 128, dtype=torch.bfloat16)
            whole = Segments(keys=states[0], values=states[1], positions=positions, lengths=(count,), kv_heads=1)
            found.append(quantise(whole, positions >= 4, bits).nbytes)
        counts = torch.tensor([count])
        assert int(storage.most(counts)) == max(found)
        assert int(storage.nbytes(counts)) == found[-1]
        assert storage.entries(max(found), heads=1) <= count


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_kept_whole_takes_nothing_from_the_others(name):
    ids, mask = contexts((300, 4))
    with pytest.warns(UserWarning, match="kept whole"):
        both = headwise.compress(tiny_model(), ids, "streaming", keep="12%bytes", attention_mask=mask, entries=name)
    alone = headwise.compress(tiny_model(), ids[:1], "streaming", keep=f"{6 * 300 * 128 * 12 // 100}B", entries=name)
    assert both.lengths[:, 1].unique().tolist() == [4]
    assert both.lengths[:, 0].sum() == alone.lengths.sum()


@pytest.mark.parametrize("name", NAMES)
def test_while_a_layer_is_cut_no_copy_of_its_entries_is_made(name, monkeypatch):
    """The largest storage that is made meanwhile is a piece that becomes codes, however much is kept."""
    monkeypatch.setattr(quantised, "AT_ONCE", 2**12)
    keys, values = torch.randn(2, 1, 2, 2000, 64)
    kept, positions = torch.ones(1, 2, 2000, dtype=torch.bool), torch.arange(2000)[None]
    with Allocations() as made:
        later = (positions >= 4)[:, None].expand_as(kept)
        segments = gather(keys, values, kept, positions, [(ENTRIES[name], later)])
    assert segments.kept == (2000, 2000)
    codes = max(part.nbytes for part in (segments.quantised[0].keys, segments.quantised[0].values))
    index = 2 * 2000 * 8
    assert max(size for _, size in made.made.values()) <= max(codes, 4 * 2**12, index) < keys.nbytes / 2


def test_a_quantised_context_is_not_whole():
    with pytest.raises(BadInput, match="kept whole, natively"):
        require_whole(compressed("int8", method="streaming", keep=1.0, lengths=(100,)))


def test_a_file_that_says_other_entries_than_it_holds_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = tmp_path / "cache.safetensors"
    compressed("int4").save(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)

    def saved(changes=(), **said):
        raw = {key: json.loads(text) if text[:1] in '{["' else text for key, text in metadata.items()}
        place = next(key for key, value in raw.items() if isinstance(value, dict) and "entries" in value)
        written = {**metadata, place: json.dumps({**raw[place], **said})}
        save_file({**tensors, **dict(changes)}, file, written)

    saved()
    assert headwise.load(file, tiny_model()).compressed
    for name in ("native", "int8"):
        saved(entries=name)
        with pytest.raises(BadInput, match=f"does not hold the {name} entries"):
            headwise.load(file, tiny_model())
    saved(entries="int3")
    with pytest.raises(BadInput, match="entries"):
        headwise.load(file, tiny_model())
    twice = tensors["0.positions"].clone()
    twice[-1] = tensors["0.k4v4_positions"][-1]
    saved({"0.positions": twice})
    with pytest.raises(BadInput, match="twice in one head"):
        headwise.load(file, tiny_model())
    saved({"0.k4v4_key_scales": tensors["0.k4v4_key_scales"][1:].contiguous()})
    with pytest.raises(BadInput, match=r"cache\.safetensors is damaged: layer 0 .* scales of as many blocks"):
        headwise.load(file, tiny_model())
