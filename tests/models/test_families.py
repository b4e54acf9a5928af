"""What the flow reads from a model is what the model does: its rotation, its sizes, its output projection."""

import warnings
from inspect import signature, unwrap
from types import SimpleNamespace

import pytest
import torch
from families import COMMON, FAMILIES, random_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    Gemma3nTextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    RobertaConfig,
    Zamba2Config,
)

import headwise
from headwise.errors import BadInput, UnsupportedModel
from headwise.models import families as hf
from headwise.shapes import ModelShape

MAX_POSITIONS = COMMON["max_position_embeddings"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}
NEO = {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
BERT = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SCALED = {"yarn": YARN, "llama3": LLAMA3, "dynamic": DYNAMIC, "longrope": LONG}


def scaled_llama(rope):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64 if rope in ("dynamic", "linear") else 256,
        rope_parameters=dict({**SCALED, "linear": LINEAR}[rope]),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def model_of(name):
    return scaled_llama(name) if name in SCALED else tiny_model(name)


def rotated_by_the_model(model, layer, states, positions):
    """Rotation by the model's own code: cosines and sines of its rotary module, its family's apply function."""
    decoder, view = model.get_decoder(), hf.view(model)
    types = getattr(model.config, "layer_types", None)
    typed = "layer_type" in signature(type(decoder.rotary_emb).forward).parameters
    kind = (types[view.shape.layers[layer]],) if typed else ()
    cos, sin = decoder.rotary_emb(states, positions, *kind)
    apply = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"]).apply_rotary_pos_emb
    return apply(states, states, cos, sin)[0]


def states_and_positions(model):
    positions = torch.stack([torch.randperm(200)[:12], torch.arange(12)])
    return torch.randn(2, 4, 12, hf.view(model).shape.head_dim), positions


@pytest.mark.parametrize("name", [*FAMILIES, *SCALED])
def test_unrotate_undoes_the_models_rotation(name):
    model = model_of(name)
    states, positions = states_and_positions(model)
    for layer in range(len(hf.view(model).shape.layers)):
        rotated = rotated_by_the_model(model, layer, states, positions)
        assert (rotated - states).abs().max() > 0.5
        torch.testing.assert_close(
            hf.view(model).rotary(layer).unrotate(rotated, positions), states, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", [*FAMILIES, *SCALED])
def test_mean_rotation_is_the_mean_of_the_models_rotations(name):
    model = model_of(name)
    states, positions = states_and_positions(model)
    states = states[:, :, :1].expand(-1, -1, 12, -1)  # the same vector at every position
    for layer in range(len(hf.view(model).shape.layers)):
        expected = rotated_by_the_model(model, layer, states, positions).mean(2)
        matrix = hf.view(model).rotary(layer).mean_rotation(positions)
        found = torch.einsum("bij,bhj->bhi", matrix, states[:, :, 0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, *SCALED])
def test_positions_may_be_asked_about_in_blocks(name):
    """Dynamic and long scaling choose frequencies by the longest position of a call: that of the pass counts."""
    model = model_of(name)
    states, positions = states_and_positions(model)
    rotated = rotated_by_the_model(model, 0, states, positions)
    rotary = hf.view(model).rotary(0)
    blocks = [rotary.unrotate(r, p) for r, p in zip(rotated.split(5, 2), positions.split(5, 1), strict=True)]
    assert torch.equal(torch.cat(blocks, dim=2), rotary.unrotate(rotated, positions))


@pytest.mark.parametrize("name", [*FAMILIES, *SCALED])
def test_scoring_does_not_change_the_model(name):
    """`expected` unrotates queries and asks about positions to come; the logits after it are those of a stock cache."""
    model, stock, ids = model_of(name), model_of(name), random_ids(1, 100)
    question = random_ids(1, 5, seed=1)
    with torch.no_grad():
        past = stock(ids).past_key_values
        cache = headwise.compress(model, ids, "expected", keep=1.0)
        for mine, theirs in zip(*(m.get_decoder().rotary_emb.named_buffers() for m in (model, stock)), strict=True):
            assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])
        found = model(question, past_key_values=cache).logits
        expected = stock(question, past_key_values=past).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_yarn_scales_what_it_rotates():
    """The two tests above would pass without any division if it did not."""
    model = scaled_llama("yarn")
    states, positions = states_and_positions(model)
    ratio = rotated_by_the_model(model, 0, states, positions).norm() / states.norm()
    assert ratio > 1.05


def test_gemma3_rotates_full_and_sliding_layers_differently():
    """So the layer's type must reach its rotary module."""
    model = tiny_model("gemma3_text")
    positions = torch.arange(50)[None]
    full, sliding = (
        model.model.rotary_emb(torch.empty(0), positions, kind)[0] for kind in ("full_attention", "sliding_attention")
    )
    assert not torch.allclose(full, sliding)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_is_the_shape_of_the_cache(family):
    """Against keys that the model itself hands to a stock cache."""
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(random_ids(1, 5)).past_key_values
    shape = hf.shape_of(model.config)
    bounded = [getattr(layer, "sliding_window", None if hasattr(layer, "keys") else 0) for layer in cache.layers]
    whole = tuple(i for i, window in enumerate(bounded) if window is None or window >= MAX_POSITIONS)
    assert (shape.num_layers, shape.layers) == (len(cache.layers), whole)
    assert cache.layers[whole[0]].keys.shape == (1, shape.kv_heads, 5, shape.head_dim)
    assert shape.query_heads == model.config.num_attention_heads
    assert shape == hf.view(model).shape


def test_the_shape_of_gemma3_counts_only_layers_with_full_attention():
    assert hf.shape_of(tiny_model("gemma3_text").config) == ModelShape(
        num_layers=3, layers=(1, 2), kv_heads=2, query_heads=4, head_dim=16
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_output_weight_is_what_a_heads_value_is_multiplied_with(family):
    model = tiny_model(family)
    view = hf.view(model)
    for layer, index in enumerate(view.shape.layers):
        heads = torch.randn(view.shape.query_heads, view.shape.head_dim)
        with torch.no_grad():
            expected = model.get_decoder().layers[index].self_attn.o_proj(heads.flatten())
            found = torch.einsum("hd,hdm->m", heads, view.output_weight(layer))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_longest_context(family):
    assert hf.view(tiny_model(family)).max_positions == MAX_POSITIONS


@pytest.mark.parametrize(
    ("rope", "limit"), [("yarn", 256), ("llama3", 512), ("dynamic", 256), ("longrope", 256), ("linear", 256)]
)
def test_rope_scaling_stretches_the_longest_context(rope, limit):
    """To `original_max_position_embeddings` times `factor`, where that is more than the configuration says."""
    assert hf.max_positions(scaled_llama(rope).config) == limit


def test_beyond_what_linear_scaling_certainly_reaches_there_is_a_warning():
    """vicuna-7b-16k counts positions before scaling (4096 x 4), deepseek-coder after it: configurations are silent."""
    model = scaled_llama("linear")
    assert headwise.compress(model, random_ids(1, 64), "keydiff", keep=0.5).compressed  # warnings are errors
    with pytest.warns(UserWarning, match="beyond the 64 positions .* linear"):
        assert headwise.compress(model, random_ids(1, 200), "keydiff", keep=0.5).compressed
    with pytest.raises(BadInput, match="has 257 tokens, but this model was made for 256"):
        headwise.compress(model, random_ids(1, 257), "keydiff", keep=0.5)
    model.config.rope_parameters = {**LINEAR, "original_max_position_embeddings": 64}
    assert headwise.compress(model, random_ids(1, 200), "keydiff", keep=0.5).compressed


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("method", ["kvzip", "keydiff"])
def test_a_second_reading_leaves_the_frequencies_of_the_context(rope, method):
    """Repeating it reaches further than the context; what is asked then must be rotated as what is kept was."""
    context, question = random_ids(1, 60 if rope == "longrope" else 120), random_ids(1, 6, seed=1)
    model, stock, full = scaled_llama(rope), scaled_llama(rope), DynamicCache()
    with torch.no_grad():
        stock(context, past_key_values=full)
        cache = headwise.compress(model, context, method, keep=1.0)
        assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
        asked = model(question, past_key_values=cache).logits, stock(question, past_key_values=full).logits
    torch.testing.assert_close(*asked, atol=1e-3, rtol=1e-3)


def test_frequencies_are_given_back_when_the_second_reading_fails():
    model, context = scaled_llama("dynamic"), random_ids(1, 120)
    with torch.no_grad():
        model(context)
    before = model.model.rotary_emb.inv_freq.clone()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1) if len(calls) < 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        headwise.compress(model, context, "kvzip", keep=0.5)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (lambda: "Qwen/Qwen3-4B", r"the text 'Qwen/Qwen3-4B': load it with AutoModelForCausalLM"),
        (lambda: torch.nn.DataParallel(tiny_model()), r"a DataParallel is not .*: give its \.module"),
        (lambda: SimpleNamespace(model=tiny_model()), r"a SimpleNamespace is not .*: give its \.model"),
        (lambda: tiny_model().config, "a LlamaConfig is not a model.*: give what AutoModelForCausalLM"),
        (lambda: torch.nn.Linear(2, 2), "a Linear is not a model"),
        (lambda: None, "a NoneType is not a model"),
    ],
)
def test_what_is_no_model(given, advice):
    for use in (
        lambda model: unwrap(headwise.compress)(model, random_ids(1, 40), "keydiff", keep=0.5),
        unwrap(headwise.enable),
        lambda model: unwrap(headwise.RaggedCache.__init__)(
            object.__new__(headwise.RaggedCache), model, "keydiff", keep=1
        ),
    ):
        with pytest.raises(BadInput, match=advice):
            use(given())


def test_a_compiled_model_is_the_model_that_was_compiled():
    """PyTorch's compiler cannot trace what a cache does; the model inside reads, and generate() goes on as before."""
    model, context, question = tiny_model(), random_ids(1, 60), random_ids(1, 5, seed=1)
    prompt, greedy = torch.cat([context, question], dim=-1), {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, past_key_values=headwise.compress(model, context, "keydiff", keep=0.5), **greedy)
    compiled = torch.compile(model, backend="eager")
    cache = unwrap(headwise.compress)(compiled, context, "keydiff", keep=0.5)
    assert torch.equal(compiled.generate(prompt, past_key_values=cache.fork(), **greedy), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (random_ids(1, 40).to("meta"), "input_ids are on meta, the model takes them on cpu"),
        (random_ids(1, 40) + 97, "this model knows 0 to 96. Is the tokenizer that of the model"),
        (random_ids(1, 40) - 50, "input_ids go from -"),
    ],
)
def test_ids_that_the_model_cannot_read(ids, message):
    with pytest.raises(BadInput, match=message):
        headwise.compress(tiny_model(), ids, "keydiff", keep=0.5)


def test_a_decoder_without_a_head_is_a_model():
    """It has no generate(), so there is nothing to show its caches."""
    model = tiny_model().model
    cache = headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5)
    with torch.no_grad():
        assert model(random_ids(1, 5), past_key_values=cache).last_hidden_state.shape == (1, 5, 64)
    assert cache.transcript.length == 65


def test_ids_that_are_no_whole_numbers():
    with pytest.raises(BadInput, match=r"input_ids are torch.float32; token ids are int64"):
        unwrap(headwise.compress)(tiny_model(), random_ids(1, 40).float(), "keydiff", keep=0.5)


def test_a_model_that_puts_its_states_elsewhere_is_found_out():
    """peft's prefix tuning replaces the cache that it is given."""
    model = tiny_model()
    plain = model.forward

    def forward(*args, **kwargs):
        kwargs.update({name: DynamicCache() for name in ("cache", "past_key_values") if name in kwargs})
        return plain(*args, **kwargs)

    model.forward = forward
    with pytest.raises(UnsupportedModel, match="given 100 tokens and put 0 into the cache"):
        headwise.compress(model, random_ids(1, 100), "keydiff", keep=0.5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: DeepseekV3Config(num_hidden_layers=2), r"one latent for all heads of a layer \(MLA\)"),
        (
            lambda: Zamba2Config(),
            "LinearAttentionAndFullAttentionLayer, which headwise does not know",
        ),
        (lambda: MambaConfig(num_hidden_layers=2), "has keys and values: there is nothing to compress"),
        (RobertaConfig, "counts positions from the id of its padding token"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(config, why):
    with pytest.raises(UnsupportedModel, match=why):
        hf.shape_of(config())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: GPTNeoForCausalLM(GPTNeoConfig(**NEO)), "does not give its attention, .*, the keys that the cache"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)), "no position_ids"),
        (lambda: BertLMHeadModel(BertConfig(**BERT)), "attends to later tokens, too"),
        (lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**COMMON)), "the values that the cache has returned"),
    ],
)
def test_what_a_forward_pass_shows_is_refused_by_name(make, why):
    with pytest.raises(UnsupportedModel, match=why):
        headwise.compress(make().eval(), random_ids(1, 20), "keydiff", keep=0.5)


def test_an_unknown_argument_of_attention_is_refused_by_its_name():
    model, context = tiny_model(), random_ids(1, 40)
    cache = headwise.compress(model, context, "keydiff", keep=0.5)
    with pytest.raises(UnsupportedModel, match="LlamaAttention gives attention the argument 'warmth'"):
        model(random_ids(1, 3), past_key_values=cache, warmth=2.0)


def test_looking_at_a_model_leaves_no_trace_in_it():
    """Modes, attention, frequencies and hooks are what they were."""
    model = scaled_llama("dynamic").train()
    before = model.model.rotary_emb.inv_freq.clone(), dict(model._forward_hooks), model.config._attn_implementation
    assert hf.view(model).anatomy.parts
    assert model.training
    assert all(module.training for module in model.modules())
    after = model.model.rotary_emb.inv_freq, dict(model._forward_hooks), model.config._attn_implementation
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_rotation_that_is_not_known_refuses_only_what_needs_it():
    """By an attention that turns keys twice as far as its frequencies say."""
    model, context = tiny_model(), random_ids(1, 60)
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda states, position_ids: plain(states, 2 * position_ids)
    assert headwise.compress(model, context, "snapkv", keep=0.8).compressed
    with pytest.raises(UnsupportedModel, match=r"ExpectedAttention cannot be used: .* rotate .* not known.*keydiff"):
        headwise.compress(model, context, "expected", keep=0.5)


def test_methods_of_all_kinds_on_layers_that_read_another_layers_cache():
    """Gemma 3n: what a producer hands on is held until the pass ends, and counts."""
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma3nTextConfig(
        **{**COMMON, "num_hidden_layers": 6},
        head_dim=16,
        layer_types=kinds,
        sliding_window=16,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        activation_sparsity_pattern=[0.0] * 6,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5)
    assert cache.view.shape.layers == (1, 3)
    kept, full = 30 * 2 * 2 * 16 * 4, 60 * 2 * 2 * 16 * 4
    windows = 15 * 2 * 2 * 16 * 4  # of each of two layers
    assert cache.nbytes == 2 * kept + 2 * windows
    assert cache.peak_nbytes >= 2 * kept + full + windows


def test_a_model_whose_every_layer_slides():
    with pytest.raises(UnsupportedModel, match=r"every layer .* sliding window of 4096 tokens"):
        hf.shape_of(MistralConfig(sliding_window=4096))


def test_a_window_as_long_as_any_sequence_is_none():
    """Phi-4-mini's configuration: all of its layers are full."""
    config = Phi3Config(sliding_window=262144, max_position_embeddings=131072, num_hidden_layers=4)
    assert hf.shape_of(config).layers == (0, 1, 2, 3)


def test_a_nested_text_configuration_is_looked_into():
    class Outer(PreTrainedConfig):
        model_type = "outer"

        def get_text_config(self, *_, **__):
            return tiny_model("llama").config

    assert hf.shape_of(Outer()) == hf.shape_of(tiny_model("llama").config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hash_of_a_configuration_survives_saving_and_serving(family, tmp_path):
    """A budget made on one machine is of use on another, where the same model has another pad token, say."""
    model = tiny_model(family)
    before = hf.view(model).config_hash
    model.save_pretrained(tmp_path)
    model.config.pad_token_id, model.config.use_cache, model.config.max_position_embeddings = 5, False, 2000
    headwise.enable(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert hf.view(model).config_hash == hf.view(again).config_hash == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_given_by_the_name_that_this_transformers_wants(family):
    """Story: 5.24 renamed past_key_values to cache, and every forward pass of ours warned its users."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        headwise.compress(tiny_model(family), random_ids(1, 24), "knorm", keep=0.5)
