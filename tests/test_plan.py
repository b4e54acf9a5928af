"""Plans: numbers worked out by hand, and equal to what a cache really holds."""

from itertools import pairwise

import pytest
import torch
from families import random_ids, tiny_model
from transformers import AutoConfig, DeepseekV3Config, Gemma3TextConfig, LlamaConfig

from headwise import compress
from headwise.errors import BadInput, UnsupportedModel
from headwise.evals.answers import FullMemory
from headwise.methods.keep import parse_keep
from headwise.models.families import shape_of
from headwise.models.plan import ACTIVATIONS_NOTE, NO_DTYPE_NOTE, Plan, plan

GIB = 2**30
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    dtype="bfloat16",
)
CONTEXT = 128 * 1024


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """As a user has it: a folder with config.json only."""
    folder = tmp_path_factory.mktemp("llama")
    LLAMA_8B.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


def planned(config, **changes) -> Plan:
    return plan(config, **{"context": CONTEXT, "keep": 0.15, **changes})


def test_llama_8b_at_128k_takes_16_gib_and_15_percent_of_it(config):
    found = planned(config)
    # keys and values of 32 layers x 8 heads x 131,072 tokens x 128 dimensions x 2 bytes
    assert found.full_kv_bytes == 2 * 32 * 8 * CONTEXT * 128 * 2 == 16 * GIB
    entries = (32 * 8 * CONTEXT * 15 + 50) // 100
    assert found.kv_bytes == entries * 2 * 128 * 2
    assert found.peak_kv_bytes == found.kv_bytes + 16 * GIB // 32
    assert found.peak_kv_bytes_model_scope == 16 * GIB + 16 * GIB // 32
    assert found.weight_bytes == 2 * 8_030_261_248
    assert (found.fits, found.max_batch, found.max_context) == (None, None, None)
    assert (found.keep, found.dtype, found.max_positions) == (0.15, "bfloat16", 131_072)


def test_what_fits_by_hand(config):
    found = planned(config, memory=24 * GIB)
    room = 24 * GIB - found.weight_bytes
    assert found.full_fits is False
    assert found.fits is True
    assert found.max_batch_full == 0
    assert found.max_batch == room // found.peak_kv_bytes
    assert found.max_context_full == room // (16 * GIB // CONTEXT)
    kept = (32 * 8 * (found.max_context + 1) * 15 + 50) // 100 * 512
    assert kept + 8 * (found.max_context + 1) * 512 > room  # one token more would not fit


def test_a_batch_takes_a_multiple(config):
    one, four = planned(config), planned(config, batch=4)
    assert (four.full_kv_bytes, four.kv_bytes, four.peak_kv_bytes) == (
        4 * one.full_kv_bytes,
        4 * one.kv_bytes,
        4 * one.peak_kv_bytes,
    )


@pytest.mark.parametrize("memory", [0, 1, 2 * GIB, 15 * 10**9])
def test_less_memory_than_the_weights_fits_nothing(config, memory):
    found = planned(config, memory=memory)
    assert not found.full_fits
    assert not found.fits
    assert (found.max_batch_full, found.max_batch, found.max_context_full, found.max_context) == (0, 0, 0, 0)


def test_more_memory_fits_more_and_a_larger_keep_fits_less(config):
    for changes in (
        [{"memory": n * GIB} for n in (16, 20, 24, 40, 80)],
        [{"memory": 80 * GIB, "keep": keep} for keep in (1.0, 0.5, 0.15, 0.01)],
    ):
        plans = [planned(config, **change) for change in changes]
        assert all(a.max_batch <= b.max_batch for a, b in pairwise(plans))
        assert all(a.max_context <= b.max_context for a, b in pairwise(plans))


def test_keep_in_tokens_and_bytes(config):
    assert planned(config, keep="1024tok").kv_bytes == 32 * 8 * 1024 * 512
    assert planned(config, keep="1024tok").keep == "1024tok"
    assert planned(config, keep="2GiB").kv_bytes == 2 * GIB
    assert planned(config, keep="64GiB").kv_bytes == 16 * GIB  # never more than there is


def test_entries_in_fewer_bits_by_hand(config):
    """A head keeps 19,660.8 tokens: the first 4 are native, the others are blocks of 32 keys with a scale a channel."""
    found = planned(config, entries="int4")
    small = 2 * 128 // 2 + 4 * 128 // 32  # codes of key and value, and a scale and a zero for 32 channels of the value
    heads = {kept: 4 * 512 + (kept - 4) * small + -(-(kept - 4) // 32) * 4 * 128 for kept in (19_660, 19_661)}
    entries = (32 * 8 * CONTEXT * 15 + 50) // 100
    more = entries - 19_660 * 256
    assert found.kv_bytes == more * heads[19_661] + (256 - more) * heads[19_660]
    assert (found.entries, found.full_kv_bytes) == ("int4", 16 * GIB)
    assert found.peak_kv_bytes == found.kv_bytes + 16 * GIB // 32
    assert planned(config).entries == "native"
    bytes_of = [planned(config, entries=name).kv_bytes for name in ("native", "int8", "k8v4", "int4")]
    assert bytes_of == sorted(bytes_of, reverse=True)


@pytest.mark.parametrize("entries", ["native", "int8", "k8v4", "int4"])
def test_a_keep_in_bytes_is_filled_whatever_the_entries(config, entries):
    for keep, limit in (("2GiB", 2 * GIB), ("5%bytes", 16 * GIB // 20)):
        found = planned(config, keep=keep, entries=entries)
        assert limit - 256 * 512 < found.kv_bytes <= limit
        assert planned(config, keep=keep, entries=entries, batch=4).kv_bytes == pytest.approx(
            found.kv_bytes * (1 if keep == "2GiB" else 4), rel=1e-3
        )
    assert (
        planned(config, keep="64GiB", entries=entries).kv_bytes == planned(config, keep=1.0, entries=entries).kv_bytes
    )


def test_unknown_entries_are_refused(config):
    with pytest.raises(BadInput, match="entries='int3' does not exist; choose native, int8, k8v4, int4"):
        planned(config, entries="int3")


def test_float32_takes_twice(config):
    assert planned(config, dtype=torch.float32).full_kv_bytes == 32 * GIB


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_the_dtype_is_the_checkpoint_s(name):
    """It was bfloat16 whatever the checkpoint: half of what a float32 one then took."""
    found = plan(LlamaConfig(num_hidden_layers=1, dtype=name), context=10, keep=0.5)
    assert (found.dtype, found.note) == (name, ACTIVATIONS_NOTE)
    assert found.full_kv_bytes == 2 * 32 * 10 * 128 * getattr(torch, name).itemsize


def test_without_a_dtype_float32_is_assumed_and_told():
    found = plan(LlamaConfig(num_hidden_layers=1), context=10, keep=0.5)
    assert found.dtype == "float32"
    assert NO_DTYPE_NOTE in found.note
    assert NO_DTYPE_NOTE not in plan(LlamaConfig(), context=10, keep=0.5, dtype=torch.float16).note


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
    ],
)
def test_quantised_weights_are_counted_as_they_are_stored(settings, bits):
    """Embeddings, the output's too, and norms stay as they are, and so do keys and values."""
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "dtype": "float16"}
    whole = plan(LlamaConfig(**sizes, num_attention_heads=4), context=10, keep=0.5)
    found = plan(LlamaConfig(**sizes, num_attention_heads=4, quantization_config=settings), context=10, keep=0.5)
    linear = 7 * 64 * 64
    assert whole.weight_bytes - found.weight_bytes == linear * 2 - linear * bits // 8
    assert (found.kv_bytes, found.dtype) == (whole.kv_bytes, "float16")
    assert f"counted with {bits} bits ({settings['quant_method']})" in found.note


def test_an_unknown_quantisation_is_told():
    config = LlamaConfig(num_hidden_layers=1, dtype="float16", quantization_config={"quant_method": "new"})
    assert (
        "how new quantises is not known here, so weights are counted as float16"
        in plan(config, context=10, keep=0.5).note
    )


def test_a_context_beyond_the_model_is_told(config):
    assert [planned(config, context=n).beyond_positions for n in (131_072, 131_073)] == [False, True]


def test_sliding_layers_are_bounded_and_left_whole():
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    found = plan(config, context=1000, keep=0.5, dtype=torch.bfloat16)
    entry = 2 * 16 * 2
    assert found.sliding_kv_bytes == 2 * 2 * 31 * entry  # a window of 32 is 31 older tokens and the new one
    assert found.full_kv_bytes == 2 * 1000 * entry + found.sliding_kv_bytes
    assert found.kv_bytes == 2 * 500 * entry + found.sliding_kv_bytes
    assert plan(config, context=10, keep=0.5, dtype=torch.bfloat16).sliding_kv_bytes == 2 * 2 * 10 * entry


@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0, "40tok"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_plan_is_what_a_cache_holds(family, keep):
    """The peak once left out the layer that is being cut, so that keep=1.0 seemed to need no more than the cache."""
    model, ids = tiny_model(family), random_ids(1, 200)
    found = plan(model.config, context=200, keep=keep, dtype=torch.float32)
    assert FullMemory(model, ids).nbytes == found.full_kv_bytes
    cache = compress(model, ids, "keydiff", keep=keep)
    assert (cache.nbytes, cache.peak_nbytes) == (found.kv_bytes, found.peak_kv_bytes)
    assert compress(model, ids, "keydiff+global", keep=keep).peak_nbytes <= found.peak_kv_bytes_model_scope


@pytest.mark.parametrize("keep", [0.3, 1.0, "40tok", "20%bytes", "30KiB"])
@pytest.mark.parametrize("entries", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_plan_of_fewer_bits_is_what_a_cache_holds(family, entries, keep):
    """Of a method whose heads all keep the same, the first tokens among it."""
    model = tiny_model(family)
    found = plan(model.config, context=200, keep=keep, dtype=torch.float32, entries=entries)
    cache = compress(model, random_ids(1, 200), "streaming", keep=keep, entries=entries)
    assert (cache.nbytes, cache.peak_nbytes) == (found.kv_bytes, found.peak_kv_bytes)


def test_shared_embeddings_are_counted_once():
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    tied, untied = (
        plan(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tie), context=10, keep=0.5)
        for tie in (True, False)
    )
    assert untied.weight_bytes - tied.weight_bytes == 1000 * 64 * 4


@pytest.mark.parametrize("wrong", [{"context": 0}, {"batch": 0}, {"context": -5}, {"keep": 0.0}, {"keep": 1.5}])
def test_senseless_sizes_are_refused(config, wrong):
    with pytest.raises(BadInput):
        planned(config, **wrong)


def test_an_unsupported_model_is_refused():
    with pytest.raises(UnsupportedModel, match="deepseek_v3 model keeps one latent"):
        planned(DeepseekV3Config())


@pytest.mark.parametrize("keep", [0.15, "100tok", "1MiB"])
def test_time_does_not_depend_on_the_batch(config, keep):
    """Rows are alike: a list of them once took minutes, and all of the memory."""
    found = planned(config, context=100, keep=keep, batch=2**31 - 1, memory=2**50)
    assert found.max_batch > 10**6
    shape, entry = shape_of(config), 2 * 128 * 2
    rows = parse_keep(keep).entries(shape=shape, tokens=[100] * 3, entry_bytes=entry)
    assert planned(config, context=100, keep=keep, batch=3).kv_bytes == sum(rows) * entry
