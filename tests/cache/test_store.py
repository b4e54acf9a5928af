"""A saved cache is the cache, and a file that is not of this model and context is refused."""

import os

import pytest
import torch
from families import FAMILIES, random_ids, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headwise
from headwise import RaggedCache
from headwise.artifacts.tensors import describe, read_tensors, write_tensors
from headwise.errors import ArtifactMismatch, BadInput, UnsupportedGeneration
from headwise.models.fingerprint import model_fingerprint

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


def read(model, cache, *pieces):
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv+adakv", "expected+global"])
def test_a_loaded_cache_is_the_saved_one(path, family, method):
    """Logits and generation are identical, sliding-window layers included."""
    model, context, question = tiny_model(family), random_ids(2, 60), random_ids(2, 5, seed=1)
    cache = headwise.compress(model, context, method, keep=0.6)
    cache.save(path)
    loaded = headwise.load(path, tiny_model(family), input_ids=context)
    assert torch.equal(read(model, loaded.fork(), question), read(model, cache.fork(), question))
    whole = torch.cat([context, question], dim=-1)
    answers = [model.generate(whole, past_key_values=c.fork(), **GREEDY) for c in (cache, loaded)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_is_saved_with_the_tokens_that_came_after_its_context(path, family):
    model, context = tiny_model(family), random_ids(2, 60)
    cache = headwise.compress(model, context, "keydiff+adakv", keep=0.5)
    read(model, cache, random_ids(2, 7, seed=1))
    cache.save(path)
    loaded = headwise.load(path, model)
    assert loaded.get_seq_length() == 67
    pieces = random_ids(2, 1, seed=2), random_ids(2, 70, seed=3)  # beyond the capacity of the tail
    assert torch.equal(read(model, loaded, *pieces), read(model, cache, *pieces))


def test_forked_rows_are_saved(path):
    """Three continuations of one context: the context is stored once."""
    model = tiny_model()
    cache = headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5)
    branch = cache.fork(copies=3)
    questions = random_ids(3, 4, seed=1)
    read(model, branch, questions)
    branch.save(path)
    loaded = headwise.load(path, model)
    assert load_file(path)["0.keys"].shape == cache.ragged_layers[0].segments.keys.shape
    assert torch.equal(read(model, loaded, questions), read(model, branch, questions))


def test_what_a_loaded_cache_knows(path):
    model, context = tiny_model(), random_ids(1, 60)
    cache = headwise.compress(model, context, "snapkv+adakv", keep=0.6)
    cache.save(path)
    loaded = headwise.load(path, model)
    assert loaded.provenance == cache.provenance
    assert loaded.provenance["keep"] == "0.6"
    assert loaded.provenance["method"]["scorer"]["name"] == "SnapKV"
    assert (loaded.nbytes, loaded.peak_nbytes) == (cache.nbytes, cache.peak_nbytes)
    assert torch.equal(loaded.lengths, cache.lengths)
    for layer in range(3):
        for head in range(2):
            assert torch.equal(loaded.positions(layer, 0, head), cache.positions(layer, 0, head))
    assert describe(path)["kind"] == "cache"


def test_a_loaded_cache_can_be_saved_again(path, tmp_path):
    model = tiny_model()
    headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5).save(path)
    again = tmp_path / "again.safetensors"
    headwise.load(path, model).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_cache_goes_to_the_dtype_of_the_model(path):
    """Made in bfloat16, used in float32 by the same weights: every bfloat16 number is a float32 number."""
    small = tiny_model(dtype=torch.bfloat16)
    cache = headwise.compress(small, random_ids(1, 60), "keydiff", keep=0.5)
    cache.save(path)
    large = tiny_model(dtype=torch.bfloat16).float()
    loaded = headwise.load(path, large)
    assert torch.equal(loaded.ragged_layers[0].segments.keys, cache.ragged_layers[0].segments.keys.float())
    assert read(large, loaded, random_ids(1, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_model(seed=1),
        lambda: tiny_model("qwen2"),
        lambda: tiny_model(num_hidden_layers=2),
        lambda: tiny_model(rms_norm_eps=1e-5),
    ],
    ids=["other weights", "other family", "other depth", "other configuration"],
)
def test_another_model(path, other):
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(path)
    with pytest.raises(ArtifactMismatch, match=r"fingerprint \w{12}.*Compress the context again"):
        headwise.load(path, other())


def test_another_context(path):
    model, context = tiny_model(), random_ids(1, 60)
    headwise.compress(model, context, "keydiff", keep=0.5).save(path)
    changed = context.clone()
    changed[0, 30] += 1
    for ids in (changed, context[:, :-1]):
        with pytest.raises(ArtifactMismatch, match="another context"):
            headwise.load(path, model, input_ids=ids)
    mask = torch.ones_like(context)
    mask[0, :3] = 0
    with pytest.raises(ArtifactMismatch, match="another context"):
        headwise.load(path, model, input_ids=context, attention_mask=mask)
    assert headwise.load(path, model, input_ids=context, attention_mask=torch.ones_like(context)).compressed


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_the_same_context_in_other_integers(path, dtype):
    model, context = tiny_model(), random_ids(1, 60)
    ids = context.int() if dtype == torch.int32 else context
    headwise.compress(model, ids, "keydiff", keep=0.5, attention_mask=torch.ones_like(context).to(dtype)).save(path)
    assert headwise.load(path, model, input_ids=context).compressed
    assert headwise.load(path, model, input_ids=ids, attention_mask=torch.ones_like(context).to(dtype)).compressed


def test_a_context_that_is_not_known(path):
    """A cache that generate() filled has not seen the ids, so it cannot vouch for them."""
    model, prompt = tiny_model(), random_ids(1, 60)
    cache = RaggedCache(model, "keydiff", keep=0.5)
    model.generate(prompt, past_key_values=cache, **GREEDY)
    cache.save(path)
    assert headwise.load(path, model).get_seq_length() == cache.get_seq_length()
    with pytest.raises(ArtifactMismatch, match="tokens unknown"):
        headwise.load(path, model, input_ids=prompt)


def test_a_damaged_file(path):
    model = tiny_model()
    headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"no tensors here"):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="damaged"):
            headwise.load(path, model)
    with pytest.raises(BadInput, match="not a file"):
        headwise.load(path.with_name("nothing"), model)


def test_a_file_without_one_of_its_tensors(path):
    model = tiny_model()
    headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["1.keys"]
    save_file(tensors, path, metadata)
    with pytest.raises(BadInput, match="damaged: layer 1 has no 'keys'"):
        headwise.load(path, model)


def rewritten(path, change, **metadata):
    """The file, its tensors changed by `change(tensors)` in place, its metadata updated."""
    tensors, known = read_tensors(path, "cache")
    change(tensors)
    write_tensors(path, "cache", {name: tensor.contiguous() for name, tensor in tensors.items()}, {**known, **metadata})


def changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def set_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


ALTERED = {
    "a row too many": (changed("0.rows", lambda x: x + 1), "2 rows, which must each name one of its 2 contexts"),
    "a row below 0": (changed("1.rows", lambda x: x - 1), "'1.rows' holds numbers from -1"),
    "rows of another dtype": (changed("0.rows", torch.Tensor.int), "'0.rows' is of dtype I32; expected I64"),
    "rows of another layer": (changed("0.rows", lambda x: x[:1]), "'0.tail_keys' has shape .* need"),
    "more entries than keys": (changed("0.lengths", lambda x: x + 1), "lengths that sum to .*, but .* keys"),
    "fewer than no entries": (changed("0.lengths", lambda x: -x), "'0.lengths' holds numbers from -"),
    "as many as no context has": (changed("0.lengths", lambda x: x + 2**62), "'0.lengths' holds numbers"),
    "lengths that are not whole": (changed("0.lengths", torch.Tensor.float), "'0.lengths' is of dtype F32"),
    "a head too few": (changed("0.lengths", lambda x: x[:, :1]), "'0.lengths' has shape"),
    "fewer values": (changed("0.values", lambda x: x[:-1]), "'0.values' has shape"),
    "half a head": (changed("0.values", lambda x: x[:, :8]), "'0.values' has shape"),
    "no key at all": (changed("0.keys", lambda x: x[:0]), "has shape"),
    "NaN": (changed("2.keys", set_first(float("nan"))), "'2.keys' holds numbers from nan"),
    "infinity": (changed("2.values", set_first(float("-inf"))), "'2.values' holds numbers from -inf"),
    "NaN in the tail": (changed("1.tail_values", set_first(float("nan"))), "'1.tail_values' holds numbers from nan"),
    "a tail of another length": (changed("1.tail_keys", lambda x: x[:, :, :2]), "'1.tail_keys' has shape"),
    "a tail in one layer only": (lambda tensors: tensors.pop("1.tail_keys"), "layer 1 has no 'tail_keys'"),
    "keys that are not numbers of the model": (changed("0.keys", torch.Tensor.long), "'0.keys' is of dtype I64"),
    "positions beyond the model": (changed("0.positions", lambda x: x + 1000), "keeps position .* of 1024"),
    "a position below 0": (changed("0.positions", set_first(-1)), "'0.positions' holds numbers from -1"),
    "positions in any order": (changed("0.positions", lambda x: x.flip(0)), "positions do not ascend"),
    "a position twice": (
        lambda tensors: tensors["0.positions"][1:2].copy_(tensors["0.positions"][:1]),
        "do not ascend",
    ),
    "a layer that the model lacks": (lambda tensors: tensors.update({"7.keys": tensors["0.keys"].clone()}), "unknown"),
    "a tensor of another name": (lambda tensors: tensors.update({"0.more": torch.ones(1)}), "unknown tensor '0.more'"),
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_cache_is_refused(path, how):
    """Its numbers would be addresses: none of these may reach a kernel."""
    model = tiny_model()
    cache = headwise.compress(model, random_ids(2, 60), "keydiff", keep=0.5)
    read(model, cache, random_ids(2, 3, seed=1))
    cache.save(path)
    change, words = ALTERED[how]
    rewritten(path, change)
    with pytest.raises(BadInput, match=rf"cache\.safetensors is damaged: .*{words}.* Compress the context again"):
        headwise.load(path, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seen", -1),
        ("seen", 10**12),
        ("seen", "60"),
        ("seen", None),
        ("seen", 59.0),
        ("peak_nbytes", -1),
        ("method", []),
        ("tokens_fingerprint", 3),
        ("keep", 0.5),
        ("model", ["x"]),
        ("model_fingerprint", 5),
    ],
)
def test_altered_metadata_is_refused(path, field, value):
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(path)
    rewritten(path, lambda tensors: None, **{field: value})
    with pytest.raises(BadInput, match=f"the metadata is damaged: '{field}' is"):
        headwise.load(path, tiny_model())


def test_a_cache_that_saw_less_than_it_kept(path):
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(path)
    rewritten(path, lambda tensors: tensors.pop("ids"), seen=5)
    with pytest.raises(BadInput, match=r"'0.lengths' holds numbers from .* expected finite ones from 0 to 5"):
        headwise.load(path, tiny_model())


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda t: t.update(ids=t["ids"][:, :-1]), {}, r"'ids' has shape \(1, 59\)"),
        (lambda t: t.update(ids=t["ids"].float()), {}, "'ids'"),
        (lambda t: t.update(ids=-t["ids"]), {}, "'ids' holds numbers from -"),
        (lambda t: None, {"context_tokens": [60, 60]}, "no tokens of its 1 contexts"),
        (lambda t: None, {"context_tokens": [61]}, "no tokens of its 1 contexts"),
        (lambda t: None, {"context_tokens": [0]}, "context_tokens"),
        (lambda t: None, {"context_tokens": "60"}, "context_tokens"),
    ],
)
def test_ids_and_counts_that_do_not_fit(path, change, fields, message):
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(path)
    rewritten(path, change, **fields)
    with pytest.raises(BadInput, match=message):
        headwise.load(path, tiny_model())


def test_a_file_of_an_earlier_version_is_known_by_the_context_that_is_given(path):
    """It holds neither ids nor counts."""
    model, ids = tiny_model(), random_ids(1, 60)
    headwise.compress(model, ids, "keydiff", keep=0.5).save(path)
    rewritten(path, lambda tensors: tensors.pop("ids"), context_tokens=None)
    assert headwise.load(path, model).transcript.ids is None
    assert torch.equal(headwise.load(path, model, input_ids=ids).transcript.ids, ids)


def test_a_sliding_window_of_another_length(path):
    model = tiny_model("gemma3_text")
    headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5).save(path)
    rewritten(path, lambda tensors: tensors.update({f"0.{n}": tensors[f"0.{n}"][:, :, :7] for n in ("keys", "values")}))
    with pytest.raises(BadInput, match=r"'0.keys' has shape \(1, 2, 7, 16\), .* need \(1, 2, 15, 16\)"):
        headwise.load(path, model)


def test_numbers_that_the_dtype_of_the_model_cannot_hold(path):
    """In float16 they would be infinite."""
    headwise.compress(tiny_model(), random_ids(1, 60), "keydiff", keep=0.5).save(path)
    rewritten(path, changed("0.keys", set_first(1e5)))
    assert headwise.load(path, tiny_model()).compressed
    half = tiny_model(dtype=torch.float16)
    rewritten(path, lambda tensors: None, model_fingerprint=model_fingerprint(half))
    with pytest.raises(BadInput, match=r"'0.keys' holds numbers .* to 100000; expected .* to 65504"):
        headwise.load(path, half)


def test_a_loaded_cache_does_not_change_with_its_file(path):
    """Tensors that safetensors gives are the file itself: cut short, it would end the process."""
    model, question = tiny_model(), random_ids(1, 5, seed=1)
    cache = headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5)
    cache.save(path)
    loaded = headwise.load(path, model)
    with path.open("r+b") as file:
        file.truncate(10)
    assert torch.equal(read(model, loaded, question), read(model, cache, question))


def test_a_cache_that_has_not_read_its_context(path):
    with pytest.raises(UnsupportedGeneration, match="nothing to save"):
        RaggedCache(tiny_model(), "keydiff", keep=0.5).save(path)
    assert not path.exists()


def test_saving_is_all_or_nothing(path, monkeypatch):
    """What was there stays when the disk fills up, and no temporary file is left."""
    model = tiny_model()
    headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.5).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        headwise.compress(model, random_ids(1, 50), "keydiff", keep=0.5).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
