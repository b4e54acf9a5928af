"""A file names the model that made it by the weights at work: active adapters count, idle ones do not."""

import pytest
import torch
from families import FAMILIES, random_ids, tiny_model
from torch import nn

import headwise
from headwise.artifacts.origin import config_hash
from headwise.artifacts.tensors import fingerprint
from headwise.errors import ArtifactMismatch
from headwise.models.fingerprint import model_fingerprint

CONTEXT = random_ids(1, 60)


class Adapters(nn.Module):
    """Several adapters of a layer, one of them or none active, as peft has them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.adapters, self.active = base, nn.ModuleDict(), None

    def add(self, name, seed):
        torch.manual_seed(seed)
        down = nn.Linear(self.base_layer.in_features, 4, bias=False)
        self.adapters[name] = nn.Sequential(down, nn.Linear(4, self.base_layer.out_features, bias=False))

    def forward(self, x):
        return self.base_layer(x) + (self.adapters[self.active](x) if self.active else 0)


class Adapted:
    def __init__(self):
        self.model, self.layers = tiny_model(), []
        for layer in self.model.model.layers:
            layer.self_attn.k_proj = Adapters(layer.self_attn.k_proj)
            self.layers.append(layer.self_attn.k_proj)

    def add(self, name, seed):
        for number, layer in enumerate(self.layers):
            layer.add(name, seed + number)

    def use(self, name):
        for layer in self.layers:
            layer.active = name


@pytest.fixture
def adapted():
    found = Adapted()
    found.add("contracts", 10)
    found.add("poems", 20)
    found.use("contracts")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_plain_model_every_weight_counts(family):
    """By its name and a sample of it: what files that were written earlier hold."""
    model = tiny_model(family)
    parts = [config_hash(model.config.get_text_config().to_dict())]
    for name, weight in model.get_decoder().named_parameters():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64]
        parts += [name, sample.to(torch.bfloat16).float()]
    assert model_fingerprint(model) == fingerprint(*parts)
    for weight in model.get_decoder().parameters():
        before, kept = model_fingerprint(model), weight.data.clone()
        weight.data[(0,) * weight.ndim] += 1
        assert model_fingerprint(model) != before
        weight.data.copy_(kept)


def test_a_cache_is_taken_under_the_adapter_that_made_it_only(adapted, tmp_path):
    path = tmp_path / "cache.safetensors"
    headwise.compress(adapted.model, CONTEXT, "keydiff", keep=0.5).save(path)
    assert headwise.load(path, adapted.model, input_ids=CONTEXT).compressed
    adapted.add("idle", 30)
    assert headwise.load(path, adapted.model, input_ids=CONTEXT).compressed
    for name in ("poems", "idle", None):
        adapted.use(name)
        with pytest.raises(ArtifactMismatch, match="another adapter is active"):
            headwise.load(path, adapted.model)


def test_adapters_of_which_none_is_active_do_not_count(adapted):
    adapted.use(None)
    assert model_fingerprint(adapted.model) == model_fingerprint(tiny_model())


def test_autocast_makes_no_difference():
    """It keeps copies of weights, which operations are given in their place."""
    model = tiny_model()
    expected = model_fingerprint(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(CONTEXT)
        assert model_fingerprint(model) == expected


def test_what_the_model_is_left_with(adapted):
    """The tokens read for it leave no trace, in frequencies that dynamic scaling has chosen either."""
    scaled = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
    model = tiny_model(max_position_embeddings=64, rope_parameters=scaled)
    with torch.no_grad():
        model(CONTEXT.repeat(1, 3))
    before, reached = model.model.rotary_emb.inv_freq.clone(), model.model.rotary_emb.max_seq_len_cached
    model_fingerprint(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.model.rotary_emb.max_seq_len_cached == reached == 180
