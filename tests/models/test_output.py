"""W_O is what the output projection does, however its weights are kept; methods that do not read it do not ask."""

import copy

import pytest
import torch
from families import random_ids, tiny_model
from torch import nn

import headwise
from headwise.errors import UnsupportedModel
from headwise.models.families import view

CONTEXT = random_ids(1, 80)


class Adapted(nn.Module):
    """As peft's LoRA: `weight` is the base layer's."""

    def __init__(self, base, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base_layer = base
        self.a = torch.randn(4, base.in_features, generator=generator)
        self.b = torch.randn(base.out_features, 4, generator=generator)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T

    def merged(self):
        twin = copy.deepcopy(self.base_layer)
        twin.weight.data += self.b @ self.a
        return twin


class Coded(nn.Module):
    """As bitsandbytes' 4 bits: two codes in a byte."""

    levels = torch.linspace(-1, 1, 16)

    def __init__(self, base, seed):
        super().__init__()
        self.shape, self.scale = base.weight.shape, base.weight.detach().abs().amax()
        code = ((base.weight.detach() / self.scale)[..., None] - self.levels).abs().argmin(-1).flatten()
        self.weight = nn.Parameter((code[::2] * 16 + code[1::2]).to(torch.uint8)[:, None], requires_grad=False)

    def dense(self):
        byte = self.weight[:, 0].long()
        return self.levels[torch.stack([byte // 16, byte % 16], -1)].view(self.shape) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense())

    def merged(self):
        twin = nn.Linear(self.shape[1], self.shape[0], bias=False)
        twin.weight.data = self.dense()
        return twin


class Packed(nn.Module):
    """As GPTQ and AWQ: nothing is called `weight`. Here with a bias, which is no part of W_O."""

    def __init__(self, base, seed):
        super().__init__()
        self.register_buffer("qweight", base.weight.detach().clone())
        self.register_buffer("bias", torch.randn(base.out_features))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight, self.bias)

    def merged(self):
        twin = nn.Linear(self.qweight.shape[1], self.qweight.shape[0])
        twin.weight.data, twin.bias.data = self.qweight, self.bias
        return twin


class Squashed(nn.Module):
    """No linear map at all."""

    def __init__(self, base, seed):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x).tanh()


def with_projections(kind):
    model = tiny_model()
    for seed, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj = kind(layer.self_attn.o_proj, seed)
    return model


def kept(cache):
    return [cache.positions(layer, 0, head).tolist() for layer in range(3) for head in range(2)]


@pytest.mark.parametrize("kind", [Adapted, Coded, Packed])
@pytest.mark.slow
def test_a_method_keeps_what_it_keeps_of_the_plain_twin(kind):
    model = with_projections(kind)
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        layer.self_attn.o_proj = layer.self_attn.o_proj.merged()
    found, expected = view(model).output_weight(0), view(twin).output_weight(0)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    for method in ("criticalkv", "snapkv", "keydiff+global"):
        found, expected = (headwise.compress(m, CONTEXT, method, keep=0.5) for m in (model, twin))
        assert kept(found) == kept(expected)


def test_a_forward_hook_on_the_projection_counts():
    model = tiny_model()
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: 2 * output)
    plain = tiny_model()
    torch.testing.assert_close(view(model).output_weight(0), 2 * view(plain).output_weight(0).detach())


def test_a_forward_of_the_user_s_own_counts():
    model = tiny_model()
    projection = model.model.layers[0].self_attn.o_proj
    plain = projection.forward
    projection.forward = lambda x: 2 * plain(x)
    torch.testing.assert_close(view(model).output_weight(0), 2 * view(tiny_model()).output_weight(0).detach())


def test_hooks_of_the_user_s_are_given_a_batch():
    model, shapes = tiny_model(), []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(
        lambda m, args, out: shapes.append(out[:, -1, :].shape)
    )
    assert headwise.compress(model, CONTEXT, "criticalkv", keep=0.5).compressed
    assert shapes


def test_a_plain_weight_is_not_copied():
    model = tiny_model()
    assert view(model).output_weight(1).data_ptr() == model.model.layers[1].self_attn.o_proj.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_int8_of_pytorch_is_read_too():
    """Its weight is packed in an object, and inputs are quantised as well: linear up to that."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(
            _for_dynamic_int8(layer.self_attn.o_proj)
        )
    expected = view(tiny_model()).output_weight(0).detach()
    assert (view(model).output_weight(0) - expected).norm() < 0.02 * expected.norm()
    assert headwise.compress(model, CONTEXT, "criticalkv", keep=0.5).compressed


def _for_dynamic_int8(linear):
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def test_only_methods_that_read_it_need_it():
    model = with_projections(Squashed)
    for method in ("streaming", "keydiff", "adakv", "expected+global", "kvzip"):
        assert headwise.compress(model, CONTEXT, method, keep=0.5).compressed
    with pytest.raises(UnsupportedModel, match=r"\(Squashed\) is not linear.*such as keydiff"):
        headwise.compress(model, CONTEXT, "criticalkv", keep=0.5)
