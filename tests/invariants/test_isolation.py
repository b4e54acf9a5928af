"""The cache is the state: nothing is kept on the model, in transformers or in headwise; caches do not meet."""

import copy
import gc
import hashlib
import io
import json
import pickle
import subprocess
import sys
import weakref
from functools import cache as once

import pytest
import torch
from families import FAMILIES, random_ids, tiny_model
from random_gates import method_for
from transformers import DynamicCache

import headwise
from headwise import RaggedCache
from headwise.errors import UnsupportedGeneration
from headwise.methods.registry import SCORERS

EXPORTED = [
    *("Budget", "Gates", "HeadwiseError", "Method", "Profile", "RaggedCache"),
    *("__version__", "compress", "enable", "load", "prompt"),
]


def in_another_process(program, **environment):
    """What a Python program prints, as JSON."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@torch.no_grad()
def answer(model, cache, first, steps):
    """Greedy decoding as a generator: one token at each turn, so that several can be interleaved."""
    token = first
    for _ in range(steps):
        logits = model(token, past_key_values=cache).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        yield logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_interleaved_caches_do_not_notice_each_other(family):
    """Two ragged caches of different methods, contexts and batch sizes, and a DynamicCache of transformers."""
    model = tiny_model(family)
    one = headwise.compress(model, random_ids(1, 60), "snapkv+adakv", keep=0.7)
    two = headwise.compress(model, random_ids(2, 45, seed=1), "keydiff+global", keep=0.4)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(3, 30, seed=2), past_key_values=dense)
    caches, firsts = (one, two, dense), [random_ids(len(rows), 1, seed=9) for rows in ("1", "12", "123")]
    copies = [one.fork(), two.fork(), DynamicCache(config=model.config)]
    with torch.no_grad():
        model(random_ids(3, 30, seed=2), past_key_values=copies[2])
    alone = [list(answer(model, cache, first, 8)) for cache, first in zip(copies, firsts, strict=True)]
    turns = zip(*(answer(model, cache, first, 8) for cache, first in zip(caches, firsts, strict=True)), strict=True)
    for turn, expected in zip(turns, zip(*alone, strict=True), strict=True):
        for found, logits in zip(turn, expected, strict=True):
            assert torch.equal(found, logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_forks_with_a_common_beginning_do_not_write_into_each_other(family):
    """Forked after a first question, so their tails begin alike and then differ."""
    model = tiny_model(family)
    cache = headwise.compress(model, random_ids(1, 60), "keydiff+adakv", keep=0.5)
    with torch.no_grad():
        model(random_ids(1, 6, seed=1), past_key_values=cache)
    firsts = [random_ids(1, 1, seed=2), random_ids(1, 1, seed=3)]
    alone = [list(answer(model, cache.fork(), first, 8)) for first in firsts]
    turns = zip(*(answer(model, cache.fork(), first, 8) for first in firsts), strict=True)
    for turn, expected in zip(turns, zip(*alone, strict=True), strict=True):
        assert torch.equal(turn[0], expected[0])
        assert torch.equal(turn[1], expected[1])


def test_a_context_may_be_read_while_another_is_decoded():
    model = tiny_model()
    cache = headwise.compress(model, random_ids(1, 60), "keydiff+adakv", keep=0.5)
    expected = list(answer(model, cache.fork(), random_ids(1, 1), 6))
    for at, logits in enumerate(answer(model, cache, random_ids(1, 1), 6)):
        headwise.compress(model, random_ids(2, 30 + at, seed=at), "expected+global", keep=0.5, prefill_chunk_size=7)
        assert torch.equal(logits, expected[at])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_enabled_model_is_the_same_model(family):
    """headwise's attention is SDPA for every cache that is not ours."""
    model, ids = tiny_model(family), random_ids(2, 40)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    headwise.enable(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_inference_mode_may_come_and_go(family, modes):
    """A tail made under inference_mode can be written to outside of it, and the other way round."""
    model, pieces = tiny_model(family), [random_ids(1, 5), random_ids(1, 1, seed=1), random_ids(1, 70, seed=2)]

    def logits(modes):
        with torch.inference_mode(modes[0]):
            cache, found = headwise.compress(model, random_ids(1, 60), "keydiff+adakv", keep=0.5), []
        for piece, mode in zip(pieces, (modes[0], modes[1], modes[0]), strict=True):
            with torch.inference_mode(mode), torch.no_grad():
                found.append(model(piece, past_key_values=cache).logits)
        return torch.cat(found, dim=1)

    assert torch.equal(logits(modes), logits((False, False)))


def test_no_autograd_graph_is_kept():
    """Even when the caller has gradients on."""
    model = tiny_model()
    cache = RaggedCache(model, "keydiff+adakv", keep=0.5, prompt_length=60)
    for length in (60, 3, 1, 70):
        model(random_ids(1, length), past_key_values=cache)
    for layer in cache.ragged_layers:
        held = (layer.segments.keys, layer.segments.values, layer.tail_keys, layer.tail_values)
        assert not any(states.requires_grad for states in held)


def state_of(model):
    """Every attribute of every module, by identity, and the configuration."""
    modules = {name: {key: id(value) for key, value in vars(m).items()} for name, m in model.named_modules()}
    hooks = {name: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for name, m in model.named_modules()}
    return modules, hooks, model.config.to_dict()


@pytest.mark.parametrize("method", ["snapkv+adakv", "kvzip", "expected+global"])
def test_nothing_is_stored_on_the_model(method):
    model = tiny_model()
    headwise.enable(model)  # see the test after this one
    before = state_of(model)
    cache = headwise.compress(model, random_ids(1, 60), method, keep=0.6)
    with torch.no_grad():
        model(random_ids(1, 3), past_key_values=cache)
    assert state_of(model) == before
    assert model.config._attn_implementation == "headwise"


def test_enabling_adds_two_hooks_and_two_methods_to_one_module():
    """And nothing to any other module, nor a second time; a copy of the model has them too, for itself."""
    model = tiny_model()
    before, hooks, _ = state_of(model)
    headwise.enable(model)
    headwise.enable(model)
    after, hooks_after, _ = state_of(model)
    added = {name: after[name].keys() - before[name].keys() for name in after}
    assert added.pop("") == {"_prefill", "init_continuous_batching"}
    assert not any(added.values())
    changed = {name: [b - a for a, b in zip(hooks[name], hooks_after[name], strict=True)] for name in hooks}
    assert sorted(changed.pop("")) == [0] * (len(hooks[""]) - 2) + [1, 1]
    assert not any(any(more) for more in changed.values())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        headwise.enable(copied)
        assert state_of(copied)[1] == hooks_after
        assert vars(copied)["_prefill"].model is copied


@pytest.mark.parametrize("dump", [pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())])
def test_a_cache_is_not_pickled(dump):
    """The whole model would go along, unseen."""
    cache = headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5)
    for held in (cache, [cache], cache.ragged_layers[0]):
        with pytest.raises(UnsupportedGeneration, match=r"cannot be pickled.*save\("):
            dump(held)


def test_a_copy_of_a_cache_is_a_fork():
    model = tiny_model()
    cache = headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5)
    for twin in (copy.copy(cache), copy.deepcopy(cache), cache.fork()):
        with torch.no_grad():
            model(random_ids(1, 5), past_key_values=twin)
        assert (twin.get_seq_length(), cache.get_seq_length()) == (65, 60)


def test_a_model_that_is_dropped_is_gone_at_once():
    """What `enable` adds must not hold the model in a cycle: its memory would wait for the garbage collector."""
    model = tiny_model()
    headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5)
    there = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert there() is None
    finally:
        gc.enable()


def test_a_model_that_used_other_attention_is_told_once():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match=r"was 'eager'; with headwise it goes through SDPA"):
        headwise.enable(model)
    headwise.enable(model)  # warnings are errors
    RaggedCache(model, "keydiff", keep=0.5)


def test_importing_headwise_changes_nothing_in_transformers():
    """Every submodule is imported; then `enable` adds one name to each registry, and no more."""
    program = """
import importlib, json, pkgutil, sys, types
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.integrations import sdpa_attention
from transformers.models.llama import modeling_llama

registries = {"attention": modeling_utils.ALL_ATTENTION_FUNCTIONS, "mask": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS}
modules = [transformers, cache_utils, masking_utils, modeling_utils, sdpa_attention, modeling_llama]

def contents(scope):
    return {name: id(value) for name, value in vars(scope).items() if isinstance(value, types.FunctionType | type)}

def classes():
    return {c: {k: id(v) for k, v in vars(c).items() if isinstance(v, types.FunctionType)}
            for m in modules for c in vars(m).values() if isinstance(c, type)}

def names():
    return {kind: {name: id(registry[name]) for name in registry} for kind, registry in registries.items()}

model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1))
before = names(), [contents(m) for m in modules], classes()
import headwise
loaded = [name for name in sys.modules if name.startswith("headwise.")]
for found in pkgutil.walk_packages(headwise.__path__, "headwise."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:  # an optional dependency, such as vllm
        assert not error.name.startswith("headwise"), error
unchanged = before == (names(), [contents(m) for m in modules], classes())
headwise.enable(model)
after = names()
added = {kind: sorted(after[kind].keys() - before[0][kind].keys()) for kind in after}
kept = all(after[kind][name] == was for kind in after for name, was in before[0][kind].items())
print(json.dumps({"loaded": loaded, "unchanged": unchanged, "added": added, "kept": kept,
                  "elsewhere": before[1:] == ([contents(m) for m in modules], classes())}))
"""
    found = in_another_process(program)
    assert found == {
        "loaded": [],  # `import headwise` alone imports none of its modules
        "unchanged": True,
        "added": {"attention": ["headwise"], "mask": ["headwise"]},
        "kept": True,
        "elsewhere": True,
    }


def test_exported_names():
    assert sorted(headwise.__all__) == EXPORTED
    assert [name for name in dir(headwise) if name in headwise.__all__] == EXPORTED
    for name in EXPORTED:
        assert getattr(headwise, name) is not None
    with pytest.raises(AttributeError, match="compres"):
        headwise.compres  # noqa: B018


def selection(scorer):
    """What a scorer and a contest over all heads keep of a context long enough for torch to use its threads."""
    model = tiny_model()
    cache = headwise.compress(model, random_ids(2, 500), method_for(f"{scorer}+global", model), keep=0.3)
    kept = [[layer.segments.lengths, layer.segments.positions.tolist()] for layer in cache.ragged_layers]
    return hashlib.sha256(repr(kept).encode()).hexdigest()


@once
def selection_on_one_thread(scorer):
    return selection(scorer)


@pytest.fixture
def two_threads():
    yield lambda: torch.set_num_threads(2)
    torch.set_num_threads(1)


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_selection_does_not_depend_on_the_number_of_threads(scorer, two_threads):
    expected = selection_on_one_thread(scorer)
    two_threads()
    assert selection(scorer) == expected


def test_the_selection_does_not_depend_on_the_process():
    program = f"""
import json
from test_isolation import selection
print(json.dumps({{scorer: selection(scorer) for scorer in {list(SCORERS)!r}}}))
"""
    found = in_another_process(program, PYTHONHASHSEED="7", OMP_NUM_THREADS="1")
    assert found == {scorer: selection_on_one_thread(scorer) for scorer in SCORERS}
