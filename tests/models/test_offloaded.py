"""Models whose weights wait on the CPU or on a disk (accelerate's offload): read through its hooks, or refused."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import random_ids, tiny_model
from folders import word_tokenizer
from random_gates import method_for
from second_device import CPU, FIRST, more_devices
from seeing import seeing, shown
from torch import nn

import headwise
from headwise.errors import BadInput, UnsupportedModel
from headwise.evals.run import Evaluation, manifest
from headwise.methods.keep import parse_keep
from headwise.models.families import view
from headwise.models.fingerprint import model_fingerprint
from headwise.offline.calibration import load_examples
from headwise.offline.profile import profile
from headwise.tasks.suites import Sizes, make_tasks, parse_tasks

FAMILIES = ["llama", "gemma3_text"]


@pytest.fixture(autouse=True)
def _more_devices():
    with torch.no_grad(), more_devices():
        yield


def on_cpu(model, folder):
    return cpu_offload(model, CPU)


def on_disk(model, folder):
    return disk_offload(model, str(folder), CPU)


def in_blocks(model, folder):
    """The weights of a whole attention layer come and go together."""
    return cpu_offload(model, CPU, preload_module_classes=["LlamaAttention", "Gemma3Attention"])


def in_part(model, folder):
    """A layer on another device, one that waits on the CPU for it, one on the disk."""
    places = {f"model.{name}": str(FIRST) for name, _ in model.model.named_children() if name != "layers"}
    places |= {"lm_head": str(FIRST), "model.layers.0": str(FIRST), "model.layers.1": "cpu", "model.layers.2": "disk"}
    options = {"offload_dir": str(folder), "skip_keys": model._skip_keys_device_placement}
    vars(model)["before"] = [*model.parameters()]  # accelerate knows tied weights by their addresses, for ever
    return dispatch_model(model, places, main_device=str(FIRST), **options)


WAYS = [on_cpu, on_disk, in_blocks, in_part]


def said(model, name, tmp_path, reading):
    """What is kept of a context, and what the model answers, from a file too."""
    device = view(model).device
    options = {"keep": 0.4, "kernel": "reference", "prefill_chunk_size": 40, "reading": reading}
    cache = headwise.compress(model, random_ids(1, 90).to(device), name, **options)
    cache.save(tmp_path / "cache")
    loaded = headwise.load(tmp_path / "cache", model, kernel="reference")
    inputs = loaded.inputs(random_ids(1, 5, seed=1).to(device))
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return [layer.segments.positions.tolist() for layer in cache.frozen_layers], answer.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offload", WAYS)
@pytest.mark.parametrize(("name", "reading"), [("criticalkv", "exact"), ("keydiff+global", "evict")])
def test_the_same_is_kept_and_said(family, offload, name, reading, tmp_path):
    offloaded = offload(tiny_model(family), tmp_path / "weights")
    assert any(weight.is_meta for weight in offloaded.parameters())
    assert said(offloaded, name, tmp_path, reading) == said(tiny_model(family), name, tmp_path, reading)
    assert all(layer.type != "meta" for layer in view(offloaded).devices)


@pytest.mark.parametrize("offload", WAYS)
def test_the_fingerprint_is_that_of_the_numbers(offload, tmp_path):
    models = [tiny_model(), offload(tiny_model(), tmp_path / "one"), offload(tiny_model(seed=1), tmp_path / "other")]
    whole, same, other = map(model_fingerprint, models)
    assert whole == same != other
    changed = tiny_model()
    changed.model.layers[2].mlp.down_proj.weight[0, 0] += 1  # one number of one weight
    assert model_fingerprint(offload(changed, tmp_path / "changed")) not in (whole, other)


def test_an_idle_weight_does_not_count():
    model = tiny_model()
    model.model.layers[0].idle = nn.Linear(4, 4)
    assert model_fingerprint(on_cpu(model, None)) == model_fingerprint(tiny_model())


@pytest.mark.parametrize("offload", [on_cpu, on_disk, in_part])
def test_w_o_is_read_through_the_hook(offload, tmp_path):
    whole, offloaded = view(tiny_model()), view(offload(tiny_model(), tmp_path))
    for layer in range(3):
        weight = offloaded.output_weight(layer)
        assert weight.device == offloaded.devices[layer]
        assert torch.allclose(weight.cpu(), whole.output_weight(layer), atol=1e-6)


class Adapted(nn.Module):
    """As adapters are: its weights are those of its parts, and these have the hooks."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.twice = base_layer, nn.Linear(64, 64, bias=False)

    def forward(self, states):
        return self.base_layer(states) + self.twice(states)


@pytest.mark.parametrize("together", [[], ["Adapted"]])
def test_w_o_with_an_adapter(together):
    whole, offloaded = tiny_model(), tiny_model()
    for model in (whole, offloaded):
        torch.manual_seed(0)
        model.model.layers[1].self_attn.o_proj = Adapted(model.model.layers[1].self_attn.o_proj)
    cpu_offload(offloaded, CPU, preload_module_classes=together)
    assert torch.allclose(view(offloaded).output_weight(1), view(whole).output_weight(1), atol=1e-6)
    assert not torch.allclose(view(offloaded).output_weight(1), view(tiny_model()).output_weight(1), atol=1e-2)
    assert model_fingerprint(offloaded) == model_fingerprint(whole) != model_fingerprint(tiny_model())


def test_w_o_without_numbers_is_refused():
    """Between passes nobody fetches one projection alone, where whole layers come and go."""
    model = tiny_model()
    model.model.layers[1].self_attn.o_proj = Adapted(model.model.layers[1].self_attn.o_proj)
    in_blocks(model, None)
    for layer in (0, 1):
        with pytest.raises(UnsupportedModel, match="'meta', without numbers, so its W_O"):
            view(model).output_weight(layer)


def test_frequencies_that_wait_are_not_known():
    model = tiny_model()
    model.model.rotary_emb.register_buffer("inv_freq", model.model.rotary_emb.inv_freq, persistent=True)
    cpu_offload(model, CPU, offload_buffers=True)
    with pytest.raises(UnsupportedModel, match="LKVT cannot be used: how the layers of this model rotate their keys"):
        headwise.compress(model, random_ids(1, 40), method_for("lkv-t", tiny_model()), keep=0.5)
    assert headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5).compressed


@pytest.mark.parametrize("part", ["", "model.embed_tokens", "model.layers.2.mlp"])
def test_a_model_without_numbers_is_refused(part):
    model = tiny_model()
    model.get_submodule(part).to("meta")
    with pytest.raises(UnsupportedModel, match="'meta', without numbers: load them"):
        headwise.compress(model, random_ids(1, 40), "keydiff", keep=0.5)


def test_ids_go_where_the_model_computes():
    model = on_cpu(tiny_model(), None)
    with pytest.raises(BadInput, match="on meta, the model takes them on cpu"):
        headwise.compress(model, random_ids(1, 40).to(model.device), "keydiff", keep=0.5)


def test_runs_name_the_weights(tmp_path):
    tasks = make_tasks(parse_tasks("mini-ruler:niah_single"), word_tokenizer(), Sizes(samples=1, length=160))
    evaluation = Evaluation(tasks=tuple(tasks), methods=("keydiff",), keeps=(parse_keep(0.25),))
    whole, offloaded = tiny_model(), on_disk(tiny_model(), tmp_path)
    runs = [manifest(model, "name", evaluation, 100, "command") for model in (whole, offloaded)]
    assert [run["device"] for run in runs] == ["cpu", "cpu"]
    assert runs[0]["weights"] == runs[1]["weights"]


def test_profiles_need_the_weights(tmp_path):
    tokenizer = word_tokenizer()
    model = on_cpu(tiny_model(vocab_size=len(tokenizer)), None)
    examples = load_examples("builtin:2", tokenizer, max_positions=1024)
    with pytest.raises(UnsupportedModel, match="spread over meta, and headwise profile needs all of it"):
        profile(model, tokenizer, examples, ["keydiff"], tmp_path / "profile")


@pytest.mark.parametrize(
    ("kind", "why"),
    [("llava", "a context with images"), ("qwen2_5_vl", "a cache that places images on a grid")],
)
def test_images_need_the_weights(kind, why):
    model = on_cpu(deepcopy(seeing(kind)), None)
    with pytest.raises(UnsupportedModel, match=f"spread over meta, and {why} needs all of it on one device"):
        headwise.compress(model, **shown(kind), method="keydiff", keep=0.5)
