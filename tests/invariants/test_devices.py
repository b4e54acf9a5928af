"""A model that is spread over two devices does what it does on one; what is kept of a layer is where the layer is."""

from copy import deepcopy
from functools import lru_cache

import families
import pytest
import torch
from families import COMMON, KINDS, WITH_EXPERTS, padded_ids, random_ids, tiny_model
from folders import word_tokenizer
from mixed_budgets import mixed_budget
from random_gates import method_for
from second_device import CPU, FIRST, SECOND, more_devices, spread
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

import headwise
from headwise.cache.reading import read
from headwise.errors import BadInput, UnsupportedModel
from headwise.evals.compare import compare
from headwise.evals.oracle import ORACLE, as_method, foresee
from headwise.evals.run import Evaluation, evaluate
from headwise.methods.allocate.profiled import LUKV
from headwise.methods.keep import parse_keep
from headwise.methods.method import Method
from headwise.methods.scores import KeyDiff
from headwise.models.families import view
from headwise.offline.calibration import load_examples
from headwise.offline.profile import profile
from headwise.offline.train.run import train
from headwise.tasks.document import Asked
from headwise.tasks.suites import Sizes, make_tasks, parse_tasks

# In gemma3_text the first layer, which slides, is on another device than the first one that is compressed.
FAMILIES = ["llama", "gemma3_text"]
METHODS = ["snapkv+adakv", "keydiff", "keydiff+global", "lkv", "lukv", "kvzip-l2", "criticalkv", "expected"]
READINGS = {
    "exact": {},
    "pieces": {"prefill_chunk_size": 37},
    "evict": {"prefill_chunk_size": 37, "reading": "evict"},
}
WHILE_READING = ["snapkv+adakv", "keydiff", "keydiff+global", "lkv", "lukv"]
CASES = [(m, r) for r in READINGS for m in (WHILE_READING if r == "evict" else METHODS)]
NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _more_devices():
    with torch.no_grad(), more_devices():
        yield


@lru_cache
def on_one(family, **changes):
    model = tiny_model(family, **changes)
    if family in WITH_EXPERTS:
        model.set_experts_implementation("eager")  # the other asks which kind of device it is on
    return model


@lru_cache
def on_two(family, **changes):
    return spread(deepcopy(on_one(family, **changes)))


def method(name, model):
    """Those of files have random ones; LU-KV has a budget that knows what bits cost."""
    if name == "lukv":
        return Method(scorer=KeyDiff(), allocator=LUKV(budget=mixed_budget(model)))
    return method_for(name, model)


def both(family, name="keydiff", keep=0.6, lengths=(90, 61), **options):
    """The caches of the same contexts, on one device and on two."""
    ids, mask = padded_ids(lengths)
    for model, device in ((on_one(family), CPU), (on_two(family), FIRST)):
        given = {"attention_mask": mask.to(device), "kernel": "reference", "keep": keep, **options}
        yield headwise.compress(model, ids.to(device), method(name, model), **given)


def following(cache, tokens=7):
    """Logits after a question and a few steps of the model's own, on the CPU."""
    device = view(cache.view.model).device
    rows = len(cache.frozen_layers[0].rows)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = cache.fork().inputs(random_ids(rows, tokens, seed=1).to(device))
    return torch.stack(cache.view.model.generate(**inputs, eos_token_id=None, **options).logits).cpu()


def require_same(one, two):
    """What two caches keep, and what the model says with them."""
    assert torch.equal(one.lengths, two.lengths)
    for layer, other in zip(one.frozen_layers, two.frozen_layers, strict=True):
        parts, others = ((layer.segments, *layer.segments.quantised) for layer in (layer, other))
        for part, same in zip(parts, others, strict=True):
            assert torch.equal(part.positions, same.positions.cpu())
            assert torch.equal(part.keys, same.keys.cpu())
    assert torch.allclose(following(one), following(two), **NEAR)
    assert (one.nbytes, one.peak_nbytes, one.provenance) == (two.nbytes, two.peak_nbytes, two.provenance)


def require_in_place(cache):
    """Every storage is where its layer is."""
    devices = cache.view.devices
    assert set(devices) == {FIRST, SECOND}
    for layer, part in zip(cache.layers, cache.kept.layers, strict=True):
        tensors = [t for name, t in part.tensors().items() if not name.endswith("lengths")]
        assert {t.device for t in tensors} == {devices[layer.model_index]}


def test_operations_fail_where_devices_mix():
    here, there, other = torch.ones(3), torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([there, other]),
        lambda: here[there > 0],
        lambda: other @ there,
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (there + here[0]).device == there[torch.tensor([0])].device == here.to(FIRST).device == FIRST
    assert torch.equal(other.copy_(there * 2).cpu(), here * 2)
    assert torch.tensor([1, 2], device=SECOND).device == torch.arange(3, device=SECOND).device == SECOND


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_cache_is_the_model(family):
    ids, question = random_ids(1, 50), random_ids(1, 7, seed=1)
    cache = headwise.compress(on_two(family), ids.to(FIRST), "keydiff", keep=1.0)
    inputs = cache.fork().inputs(question.to(FIRST))
    found = on_two(family)(**{**inputs, "input_ids": question.to(FIRST)}).logits
    stock = tiny_model(family)(torch.cat([ids, question], dim=-1)).logits[:, 50:]
    assert found.device == FIRST
    assert torch.allclose(found.cpu(), stock, **NEAR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "reading"), CASES)
def test_the_same_is_kept_and_said(family, name, reading):
    one, two = both(family, name, **READINGS[reading])
    require_same(one, two)
    require_in_place(two)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("entries", "reading"), [("int4", "pieces"), ("int4", "evict"), ("auto", "exact")])
def test_fewer_bits(family, reading, entries):
    one, two = both(family, "lukv", keep="30%bytes", entries=entries, **READINGS[reading])
    require_same(one, two)
    require_in_place(two)


@pytest.mark.parametrize("kernel", ["pages", "auto"])
def test_other_kernels(kernel):
    one, two = both("llama", kernel=kernel)
    require_same(one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_reads_the_prompt_itself(family):
    ids, options = random_ids(1, 60), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    said = []
    for model, device in ((on_one(family), CPU), (on_two(family), FIRST)):
        cache = headwise.RaggedCache(model, "keydiff+global", keep=0.4, prompt_length=60, kernel="reference")
        said.append(model.generate(**cache.inputs(ids.to(device)), **options).cpu())  # beams: rows are chosen
    assert torch.equal(*said)


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_rows_and_joins(family):
    one, two = both(family, lengths=(70,))
    require_same(one.fork(copies=3), two.fork(copies=3))
    copies = two.fork(copies=3)
    copies.reorder_cache(torch.tensor([2, 0], device=FIRST))
    require_in_place(copies)
    other_one, other_two = both(family, keep=0.5, lengths=(70,))
    joined = headwise.RaggedCache.join([two, other_two])
    require_same(headwise.RaggedCache.join([one, other_one]), joined)
    require_in_place(joined)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_files_are_for_the_model_wherever_it_is(family, tmp_path):
    one, two = both(family)
    for cache, path in ((one, tmp_path / "one"), (two, tmp_path / "two")):
        cache.fork().save(path)
        for model in (on_one(family), on_two(family)):
            loaded = headwise.load(path, model, kernel="reference")
            assert loaded.transcript.ids.device == view(model).device
            require_same(one, loaded)
    require_in_place(loaded)


def test_a_cache_may_have_come_far_and_its_ids_from_anywhere():
    _, two = both("llama", lengths=(60,))
    step = random_ids(1, 1, seed=2)
    for ids in (step, step.to(SECOND), step.to(FIRST)):
        on_two("llama")(ids, past_key_values=two)
    assert two.transcript.ids.device == FIRST
    assert two.transcript.ids[0, -3:].tolist() == step[0].tolist() * 3
    two.crop(-2)
    assert two.get_seq_length() == 61


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["snapkv+adakv", "keydiff+global", "criticalkv", "lkv", "kvzip-l2"])
def test_cuts_of_one_reading(family, name):
    cuts = []
    for model, device in ((on_one(family), CPU), (on_two(family), FIRST)):
        parsed = method(name, model)
        cuts.append(read(model, random_ids(1, 90).to(device), [parsed.scorer]).cut(parsed, 0.6, entries="int8"))
    require_same(*cuts)
    require_in_place(cuts[1])


def test_the_oracle():
    cuts, answer = [], random_ids(1, 6, seed=5)[0]
    for model, device in ((on_one("llama"), CPU), (on_two("llama"), FIRST)):
        reading = read(model, random_ids(1, 60).to(device), [KeyDiff()])
        reading = foresee(model, reading, [random_ids(1, 5, seed=4)[0].to(device)], [answer.to(device)])
        cuts.append(reading.cut(as_method(ORACLE), 0.3))
    require_same(*cuts)


def test_comparisons_and_evaluations():
    tokenizer = word_tokenizer()
    text, asked = "locker apple copper lantern. the bold fox guarded. " * 9, [Asked(question="? locker")]
    tasks = tuple(make_tasks(parse_tasks("mini-ruler:niah_single"), tokenizer, Sizes(samples=1, length=160)))
    evaluation = Evaluation(tasks=tasks, methods=("full", "keydiff+adakv"), keeps=(parse_keep(0.25),))
    found = []
    for make in (on_one, on_two):
        model = make("llama", vocab_size=len(tokenizer))
        rows = compare(model, tokenizer, text, asked, methods=["full", "keydiff+global"], keep=0.3, max_new_tokens=4)
        numbers = [(row.kv_bytes, row.peak_kv_bytes, row.answers, pytest.approx(row.kl, abs=1e-4)) for row in rows]
        records = [(r.method, r.predictions, r.kv_bytes) for r in evaluate(model, tokenizer, evaluation)]
        found.append((numbers, records))
    assert found[0] == found[1]


def test_a_model_that_was_moved_is_looked_at_again():
    model = tiny_model()
    assert set(view(model).devices) == {CPU}
    spread(model)
    assert set(view(model).devices) == {FIRST, SECOND}


def test_a_model_that_is_shared_out_is_not():
    """Processes that hold shares of its weights must pass through it at the same time."""
    model = tiny_model()
    known = view(model).anatomy
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh))
        model.model.norm.to(FIRST)
        assert view(model).anatomy is known
    finally:
        torch.distributed.destroy_process_group()


def test_keys_that_layers_share_must_stay_on_their_device():
    """The model moves them itself, and attention could not tell any more whose they are."""
    sizes = {"num_hidden_layers": 6, "layer_types": 3 * KINDS[:2], "num_kv_shared_layers": 2, "head_dim": 16}
    own = {"activation_sparsity_pattern": [0.0] * 6, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
    config = Gemma3nTextConfig(**COMMON | sizes | own, laurel_rank=8, sliding_window=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert headwise.compress(deepcopy(model), random_ids(1, 40), "keydiff", keep=0.5).compressed
    for last in (SECOND, "cpu"):  # only a layer that has no keys of its own is, or computes, elsewhere
        apart = spread(deepcopy(model), [FIRST] * 5 + [last], main=SECOND)
        with pytest.raises(UnsupportedModel, match="layers of this model read the keys of other layers"):
            headwise.compress(apart, random_ids(1, 40).to(FIRST), "keydiff", keep=0.5)
    together = spread(deepcopy(model), [FIRST] * 5 + ["cpu"])
    assert headwise.compress(together, random_ids(1, 40).to(FIRST), "keydiff", keep=0.5).compressed


def test_what_needs_one_device_says_so(tmp_path):
    model, tokenizer = on_two("llama", vocab_size=len(word_tokenizer())), word_tokenizer()
    spread_over = f"spread over {FIRST}, {SECOND}"
    with pytest.raises(UnsupportedModel, match=f"{spread_over}, and reading='offload' needs all of it on one device"):
        headwise.compress(model, random_ids(1, 60).to(FIRST), "keydiff", keep=0.3, reading="offload")
    examples = load_examples("builtin:10", tokenizer, max_positions=1024)
    with pytest.raises(UnsupportedModel, match=f"{spread_over}, and headwise profile"):
        profile(model, tokenizer, examples, ["keydiff"], tmp_path / "profile")
    with pytest.raises(UnsupportedModel, match=f"{spread_over}, and headwise train"):
        train(model, tokenizer, examples, tmp_path / "gates")
    with pytest.raises(BadInput, match=f"on cpu, the model takes them on {FIRST}"):
        headwise.compress(model, random_ids(1, 60), "keydiff", keep=0.3)
