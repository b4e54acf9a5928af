"""What the flow reads from a model is what the model does: its rotation, its sizes, its output projection."""

import pytest
import torch
from families import FAMILIES, random_ids, tiny_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedConfig

from headwise.errors import UnsupportedModel
from headwise.hf import families as hf
from headwise.shapes import ModelShape

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
SCALED = {"yarn": YARN, "llama3": LLAMA3}


def scaled_llama(rope):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=dict(SCALED[rope]),
    )
    return LlamaForCausalLM(config).eval()


def model_of(name):
    return scaled_llama(name) if name in SCALED else tiny_model(name)


def rotated_by_the_model(model, layer, states, positions):
    """Rotation by the model's own code: cosines and sines of its rotary module, its family's apply function."""
    decoder, view = model.get_decoder(), hf.view(model)
    types = getattr(model.config, "layer_types", None)
    kind = (types[view.shape.layers[layer]],) if view.family.typed_rotary else ()
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
        matrix = hf.view(model).rotary(layer).mean_rotation(positions)
        found = torch.einsum("bij,bhj->bhi", matrix, states[:, :, 0])
        expected = rotated_by_the_model(model, layer, states, positions).mean(2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    whole = tuple(i for i, layer in enumerate(cache.layers) if not layer.is_sliding)
    assert (shape.num_layers, shape.layers) == (len(cache.layers), whole)
    assert cache.layers[0].keys.shape == (1, shape.kv_heads, 5, shape.head_dim)
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
    assert hf.view(tiny_model(family)).max_positions == 1024


def test_an_unsupported_model_is_told_what_is_supported():
    with pytest.raises(UnsupportedModel) as caught:
        hf.shape_of(GPT2Config())
    for family in FAMILIES:
        assert family in str(caught.value)
    assert "hf/families.py" in str(caught.value)
    assert set(hf.FAMILIES) == set(FAMILIES)  # tests/families.py has a configuration of each


def test_a_model_whose_every_layer_slides():
    with pytest.raises(UnsupportedModel, match=r"every layer .* sliding window of 4096 tokens"):
        hf.shape_of(MistralConfig(sliding_window=4096))


def test_a_family_that_soft_caps():
    config = tiny_model("gemma3_text").config
    config.attn_logit_softcapping = 30.0
    with pytest.raises(UnsupportedModel, match="soft-caps"):
        hf.shape_of(config)


def test_a_nested_text_configuration_is_looked_into():
    class Outer(PreTrainedConfig):
        model_type = "outer"

        def get_text_config(self, *_, **__):
            return tiny_model("llama").config

    assert hf.shape_of(Outer()) == hf.shape_of(tiny_model("llama").config)
