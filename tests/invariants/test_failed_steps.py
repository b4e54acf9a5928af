"""A forward pass that fails leaves the cache as it was, or the cache says that it cannot go on."""

import contextlib
import gc
import weakref

import pytest
import torch
from families import random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import headwise
from headwise import RaggedCache
from headwise.errors import UnsupportedGeneration

CONTEXT, QUESTION, NEXT = random_ids(1, 120), random_ids(1, 6, seed=1), random_ids(1, 1, seed=2)


class Boom(RuntimeError):
    pass


class OutOfMemoryAt(TorchDispatchMode):
    """Fails at the n-th operation that makes a tensor."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("simulated")
        return func(*args, **(kwargs or {}))


def step(model, cache, ids=QUESTION):
    start = cache.get_seq_length()
    with torch.no_grad():
        positions = torch.arange(start, start + ids.shape[1])[None].expand(len(ids), -1)
        return model(input_ids=ids, past_key_values=cache, position_ids=positions).logits


def fail(*_):
    raise Boom


def interrupt(*_):
    raise KeyboardInterrupt


def parts_of(model):
    for layer in model.model.layers:
        yield from (layer, layer.self_attn, layer.self_attn.o_proj, layer.mlp)
    yield from (model.model.norm, model.lm_head)


def tails(cache):
    return [getattr(layer, "tail_length", None) for layer in cache.layers]


@pytest.mark.parametrize("hook", [fail, interrupt], ids=["exception", "interrupt"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_a_step_that_failed_anywhere_can_be_made_again(family, hook):
    """Gemma3's sliding layers had dropped what left their window, and take it back."""
    model = tiny_model(family)
    base = headwise.compress(model, CONTEXT, "keydiff+adakv", keep=0.3)
    want = [step(model, base_again := base.fork()), step(model, base_again, NEXT)]
    for part in parts_of(model):
        cache = base.fork()
        handle = part.register_forward_pre_hook(hook)
        for _ in range(2):
            with pytest.raises((Boom, KeyboardInterrupt)):
                step(model, cache)
        handle.remove()
        assert cache.get_seq_length() == 120
        torch.testing.assert_close([step(model, cache), step(model, cache, NEXT)], want, atol=1e-5, rtol=1e-5)
        assert tails(cache) == tails(base_again)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_that_ran_out_of_memory_anywhere_can_be_made_again(family):
    """At every single operation, those that make the tail longer (64 tokens) among them."""
    model = tiny_model(family)
    base = headwise.compress(model, CONTEXT, "keydiff+adakv", keep=0.3)
    step(model, base, random_ids(1, 62, seed=3))
    ids = random_ids(1, 4, seed=4)
    want = step(model, base.fork(), ids)
    number = failed = 0
    while failed == number:
        number += 1
        cache = base.fork()
        try:
            with OutOfMemoryAt(number):
                step(model, cache, ids)
        except torch.OutOfMemoryError:
            failed += 1
            torch.testing.assert_close(step(model, cache, ids), want, atol=1e-5, rtol=1e-5)
    assert failed > 100


def test_what_asks_a_cache_after_a_failure_sees_it_as_it_was(tmp_path):
    model = tiny_model()
    base = headwise.compress(model, CONTEXT, "keydiff", keep=0.3)
    step(model, base)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    caches = [base.fork() for _ in range(4)]
    for cache in caches:
        with pytest.raises(Boom):
            step(model, cache, NEXT)
    handle.remove()
    expected = step(model, base.fork(), NEXT)
    caches[0].save(tmp_path / "cache.safetensors")
    loaded = headwise.load(tmp_path / "cache.safetensors", model)
    twin = caches[1].fork(copies=2)
    caches[2].crop(-1)
    with pytest.raises(UnsupportedGeneration, match="only the 5 that came"):
        caches[2].crop(-6)
    for cache in (loaded, caches[3]):
        torch.testing.assert_close(step(model, cache, NEXT), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step(model, twin, NEXT.repeat(2, 1))[:1], expected, atol=1e-4, rtol=1e-4)
    assert caches[2].get_seq_length() == 125


@pytest.mark.parametrize("hook", [fail, interrupt], ids=["exception", "interrupt"])
def test_a_pass_that_failed_before_any_layer_leaves_no_trace(hook):
    """In the embedding, say: what is taken back or added next counts from where the cache really is."""
    model = tiny_model()
    base = headwise.compress(model, CONTEXT, "keydiff", keep=0.3)
    step(model, base)
    cache = base.fork()
    handle = model.model.embed_tokens.register_forward_pre_hook(hook)
    with pytest.raises((Boom, KeyboardInterrupt)):
        step(model, cache, NEXT)
    handle.remove()
    cache.crop(-3)
    base.crop(-3)
    assert cache.get_seq_length() == base.get_seq_length() == 123
    torch.testing.assert_close(step(model, cache), step(model, base), atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.transcript.ids, base.transcript.ids)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_the_user_s_that_fails_fails_the_pass(when):
    """One that looks for NaN in the logits, say; added before the model was enabled, or after."""
    model = tiny_model()
    if when == "after":
        headwise.enable(model)
    counted = []
    handle = model.register_forward_hook(lambda *_: fail() if len(counted) == 2 else None)
    base = headwise.compress(model, CONTEXT, "keydiff", keep=0.3)
    counted.append(1)
    want = step(model, base.fork())
    counted.append(2)
    with pytest.raises(Boom):
        step(model, base)
    handle.remove()
    torch.testing.assert_close(step(model, base), want, atol=1e-5, rtol=1e-5)


def test_a_pass_within_the_handling_of_an_exception_is_no_failure():
    model = tiny_model()
    base = headwise.compress(model, CONTEXT, "keydiff", keep=0.3)
    try:
        fail()
    except Boom:
        step(model, base)
    assert (base.get_seq_length(), base.transcript.length) == (126, 126)


def test_passes_that_no_hook_tells_of_after_one_that_failed():
    """`model.forward` runs no hooks, and with a mask of four axes nobody asks the cache how long a mask must be."""
    model = tiny_model()
    base = headwise.compress(model, CONTEXT, "keydiff", keep=1.0)
    mask = torch.ones(6, 126, dtype=torch.bool).tril(120)[None, None]
    options = {"attention_mask": mask, "position_ids": torch.arange(120, 126)[None]}
    with torch.no_grad():
        want = model.forward(QUESTION, past_key_values=base.fork(), **options).logits
        for part in (model.model.embed_tokens, model.model.layers[1].mlp, model.lm_head):
            cache = base.fork()
            handle = part.register_forward_pre_hook(fail)
            with pytest.raises(Boom):
                model(QUESTION, past_key_values=cache)
            handle.remove()
            for piece in QUESTION.split(1, dim=-1):
                assert model.forward(piece, past_key_values=(twin := cache.fork())).logits.shape[1] == 1
            assert twin.get_seq_length() == 121
            torch.testing.assert_close(
                model.forward(QUESTION, past_key_values=cache, **options).logits, want, atol=1e-4, rtol=1e-4
            )


def test_a_failure_that_no_hook_tells_of_is_found_by_the_layers():
    """The decoder is called by itself: only that layers have seen different numbers of tokens shows it."""
    model = tiny_model()
    base = headwise.compress(model, CONTEXT, "keydiff", keep=0.3)
    with torch.no_grad():
        want = model.model(QUESTION, past_key_values=base.fork()).last_hidden_state
        cache = base.fork()
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Boom):
            model.model(QUESTION, past_key_values=cache)
        handle.remove()
        torch.testing.assert_close(model.model(QUESTION, past_key_values=cache).last_hidden_state, want)


@pytest.mark.parametrize("method", ["keydiff+adakv", "keydiff+global"])
def test_a_cache_whose_context_was_not_read_to_its_end_says_so(method):
    """Wherever it failed, after the cut as well; and it is the same cache that says so, every time."""
    model = tiny_model()
    for part in list(parts_of(model))[1:]:
        cache = RaggedCache(model, method, keep=0.5)
        handle = part.register_forward_pre_hook(fail)
        with pytest.raises(Boom), torch.no_grad():
            model(CONTEXT, past_key_values=cache)
        handle.remove()
        for _ in range(2):
            if cache.get_seq_length() == 0 and not any(layer.seen for layer in cache.ragged_layers):
                continue  # it failed before the first layer: nothing was read
            with pytest.raises(UnsupportedGeneration, match="make a new one"), torch.no_grad():
                model(CONTEXT, past_key_values=cache)


def test_rows_are_chosen_in_all_layers_or_in_none():
    model = tiny_model()
    cache = headwise.compress(model, CONTEXT, "keydiff", keep=0.3).fork(copies=2)
    ids = torch.cat([QUESTION, random_ids(1, 6, seed=7)])
    step(model, cache, ids)
    want = step(model, cache.fork(), NEXT.repeat(2, 1))
    for number in range(1, 8):
        twin = cache.fork()
        with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(number):
            twin.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(step(model, twin, NEXT.repeat(2, 1)), want, atol=1e-5, rtol=1e-5)


def test_memory_is_given_back_at_once(tmp_path):
    """After a failed prefill and of a loaded cache, too: no cycle makes it wait for the garbage collector."""
    model = tiny_model()
    headwise.compress(model, CONTEXT, "keydiff", keep=0.5).save(tmp_path / "cache.safetensors")
    loaded = headwise.load(tmp_path / "cache.safetensors", model)
    failed = RaggedCache(model, "keydiff", keep=0.5)
    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with contextlib.suppress(Boom):
        model(CONTEXT, past_key_values=failed)
    handle.remove()
    whole = RaggedCache(model, "keydiff+global", keep=0.5, prompt_length=500)
    with torch.no_grad():
        model(CONTEXT, past_key_values=whole)
    held = [weakref.ref(layer) for cache in (loaded, failed, whole) for layer in cache.layers]
    gc.collect()
    gc.disable()
    try:
        del loaded, failed, whole
        assert not any(layer() for layer in held)
    finally:
        gc.enable()
