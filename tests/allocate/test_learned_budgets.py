"""LKV in a model: trained budgets as an allocator, entry scores beside them, names, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from families import random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gates import gates_file, gates_for, make_gates
from transformers import DynamicCache

import headwise
from headwise.artifacts.gates import context_summary, summary_width
from headwise.cache.reading import read
from headwise.errors import ArtifactMismatch, BadInput, BudgetInfeasible
from headwise.interfaces import Demand
from headwise.methods.allocate import LKVH, ShippedContest, ShippedLKVH, Uniform, learned_budgets
from headwise.methods.allocate.learned import budget_counts
from headwise.methods.method import Method
from headwise.methods.scores import LKVT, ShippedLKVT, SnapKV
from headwise.models.families import view
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=4, layers=(0, 2, 3), kv_heads=2, query_heads=4, head_dim=8)
CASES = settings(max_examples=100, deadline=None, derandomize=True)
BUDGETS = learned_budgets(make_gates(SHAPE))


def counts(allocator, tokens, totals, floors=None, layers=(0, 1, 2), summary=None):
    """[layers, batch, heads], asked layer by layer as the flow does."""
    size, batch = max(tokens), len(tokens)
    floors = tuple(floors or (1,) * batch)
    demand = Demand(
        shape=SHAPE,
        tokens=tuple(tokens),
        totals=tuple(totals),
        floors=floors,
        protected=(0,) * batch,
        summary=summary,
    )
    scores, candidates = torch.zeros(1, batch, 2, size), torch.ones(batch, size, dtype=torch.bool)
    return torch.cat([allocator.allocate(scores, candidates, [layer], demand) for layer in layers])


# --- counts ---


@CASES
@given(st.integers(1, 400), st.integers(0, 40), st.floats(0, 1), st.sampled_from([0.1, 1.0, 4.0]), st.integers(0, 9))
def test_exact_totals_within_bounds(tokens, floor, part, size, seed):
    allocator = learned_budgets(make_gates(SHAPE, seed=seed, size=size, sink=4, window=32))
    floor = max(1, min(floor, tokens))
    total = round(6 * floor + part * 6 * (tokens - floor))
    found = counts(allocator, [tokens], [total], [floor])
    assert int(found.sum()) == total
    assert (found >= floor).all()
    assert (found <= tokens).all()


def test_counts_are_the_fractions_of_the_context():
    found = counts(BUDGETS, [1000], [900])
    wanted = 1000 * BUDGETS.gates.fractions(900 / 6000).view(3, 1, 2)
    assert (found - wanted.clamp(1)).abs().max() < 3  # every head keeps one, whatever its fraction
    assert wanted.max() > 2 * wanted.min()


def test_rows_of_a_batch_do_not_see_each_other():
    rows = [(300, 500), (40, 200), (1, 6), (3, 9), (299, 1794)]
    tokens, totals = zip(*rows, strict=True)
    for summary in (None, torch.randn(5, summary_width(SHAPE), generator=torch.Generator().manual_seed(0))):
        together = counts(BUDGETS, tokens, totals, summary=summary)
        for row, (length, total) in enumerate(rows):
            own = None if summary is None else summary[row : row + 1]
            assert counts(BUDGETS, [length], [total], summary=own).equal(together[:, row : row + 1])


def test_what_a_context_is_like_moves_budgets_between_heads():
    """The total stays; the usual context gets what one without a summary does."""
    one, other = torch.randn(2, 1, summary_width(SHAPE), generator=torch.Generator().manual_seed(0))
    usual = BUDGETS.gates.budgets.usual[:1]
    found = [counts(BUDGETS, [1000], [900], summary=summary) for summary in (None, usual, one, other)]
    assert [int(each.sum()) for each in found] == [900] * 4
    assert found[0].equal(found[1])
    assert (found[2] - found[3]).abs().max() > 50


def test_a_total_below_one_entry_per_head_is_shared_evenly():
    """In training, where a small keep may meet a short context."""
    assert budget_counts(torch.rand(6), 50, 4).tolist() == [1, 1, 1, 1, 0, 0]
    assert budget_counts(torch.rand(6), 50, 6).tolist() == [1] * 6


def test_infeasible_totals_and_other_shapes_are_refused():
    with pytest.raises(BudgetInfeasible, match="hold only 600"):
        counts(BUDGETS, [100], [601])
    with pytest.raises(BudgetInfeasible, match="every head needs 1 of 100"):
        counts(BUDGETS, [100], [5])
    demand = Demand(shape=replace(SHAPE, kv_heads=1), tokens=(9,), totals=(9,), floors=(1,), protected=(0,))
    with pytest.raises(ArtifactMismatch, match="layers of 1 KV heads"):
        BUDGETS.allocate(torch.zeros(1, 1, 1, 9), torch.ones(1, 9, dtype=torch.bool), [0], demand)


def test_provenance_is_json_and_names_the_gates():
    found = BUDGETS.provenance()
    assert json.loads(json.dumps(found))["name"] == "LKVH"
    assert found == learned_budgets(make_gates(SHAPE)).provenance()
    assert found != learned_budgets(make_gates(SHAPE, seed=1)).provenance()


# --- names ---


@pytest.fixture
def both(tmp_path):
    """A model and a file with both parts for it."""
    model = tiny_model()
    return model, gates_file(tmp_path, model)


def test_lkv_with_a_file_is_both_parts_of_it(both):
    _, file = both
    method = Method.parse(f"lkv@{file}")
    assert method == Method.parse(f"lkv-t@{file}+lkv-h@{file}") == Method.parse(f" lkv-t@{file} + lkv-h@{file} ")
    assert method.scorer.gates is method.allocator.gates
    assert (type(method.scorer), type(method.allocator)) == (LKVT, LKVH)
    assert (method.sink, method.window, method.keeps_protected) == (2, 5, False)
    assert json.loads(json.dumps(method.provenance()))["window"] == 5


def test_parts_go_with_any_other_part(both):
    _, file = both
    assert type(Method.parse(f"lkv-t@{file}").allocator) is Uniform
    mixed = Method.parse(f"snapkv+lkv-h@{file}")
    assert (mixed.scorer, type(mixed.allocator)) == (SnapKV(), LKVH)
    assert Method.parse("lkv") == Method(scorer=ShippedLKVT(), allocator=ShippedContest())
    assert Method.parse(f"lkv-t+lkv-h@{file}").scorer == ShippedLKVT()


def test_a_path_may_hold_a_plus_sign(tmp_path):
    """As in fixed@a+b.safetensors."""
    file = tmp_path / "a+b.safetensors"
    gates_for(tiny_model()).save(file)
    method = Method.parse(f"lkv@{file}")
    assert method.scorer.gates is method.allocator.gates


@pytest.mark.parametrize("name", ["snapkv@x", "adakv@x", "pyramidkv@x", "kvzip@x", "snapkv+uniform@x"])
def test_other_names_take_no_file(name):
    with pytest.raises(BadInput, match=r"takes no file|It is an allocator|It is short for"):
        Method.parse(name)


@pytest.mark.parametrize("name", ["lkv@", "lkv-t@", "snapkv+lkv-h@", "lkv@nowhere", "lkv-t@nowhere+uniform"])
def test_a_file_that_is_not_named_or_not_there(name):
    with pytest.raises(BadInput, match=r"needs a file|nowhere is not a file"):
        Method.parse(name)


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("budgets", "lkv@{}", r"hold budgets only: use them as scorer\+lkv-h@FILE"),
        ("budgets", "lkv-t@{}", "hold budgets only"),
        ("scores", "lkv@{}", r"hold scores only: use them as lkv-t@FILE\+allocator"),
        ("scores", "snapkv+lkv-h@{}", "hold scores only"),
    ],
)
def test_gates_with_one_part_are_not_both(tmp_path, part, name, words):
    file = gates_file(tmp_path, tiny_model(), parts=(part,))
    with pytest.raises(BadInput, match=words):
        Method.parse(name.format(file))


@pytest.mark.parametrize("method", ["lkv", "lkv-t", "snapkv+lkv-h"])
def test_without_shipped_gates_the_message_says_what_to_do(method):
    with pytest.raises(BadInput, match=r"no gates are shipped for this model.*headwise train.*lkv@FILE"):
        headwise.compress(tiny_model(), random_ids(1, 60), method, keep=0.7)


def test_unresolved_shipped_gates_allocate_nothing():
    with pytest.raises(BadInput, match="must be resolved"):
        counts(ShippedLKVH(), [9], [9])


def test_gates_of_another_model_are_refused(both):
    _, file = both
    for method in (f"lkv@{file}", f"lkv-t@{file}", f"keydiff+lkv-h@{file}"):
        with pytest.raises(ArtifactMismatch, match="this model's is"):
            headwise.compress(tiny_model("qwen3"), random_ids(1, 60), method, keep=0.5)


# --- in a model ---


def test_a_cache_is_cut_by_what_its_own_first_layer_says():
    """Not by the text of its neighbours: budgets of gates whose traits are read off the summary of the first layer."""
    model = tiny_model()
    gates = gates_for(model, size=0.3)
    method = Method(scorer=SnapKV(), allocator=learned_budgets(gates))
    ids = torch.cat([random_ids(1, 80, seed=1), random_ids(1, 80, seed=2) % 7])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cut = headwise.compress(model, ids, method, keep=0.5)
    layer, at, seen = cache.layers[0], torch.arange(80).expand(2, -1), view(model)
    summary = context_summary(layer.keys, layer.values, at, torch.ones_like(at, dtype=torch.bool), seen.rotary(0))
    heads = seen.shape.num_heads
    for row in range(2):
        wanted = 80 * gates.fractions(0.5, summary[row]).view(-1, 2)
        assert (cut.lengths[:, row] - wanted).abs().max() <= 1.5
    assert int((cut.lengths[:, 0] - cut.lengths[:, 1]).abs().max()) > 5
    assert cut.lengths.sum((0, 2)).tolist() == [40 * heads] * 2


NAMES = ["lkv@{}", "snapkv+lkv-h@{}", "lkv-t@{}+uniform", "lkv-t@{}+adakv"]


def padded_batch(*tokens):
    ids, mask = random_ids(len(tokens), max(tokens)), torch.ones(len(tokens), max(tokens), dtype=torch.long)
    for row, length in enumerate(tokens):
        ids[row, : max(tokens) - length] = mask[row, : max(tokens) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def kept(cache, row):
    layers, _, heads = cache.lengths.shape
    return [[cache.positions(layer, row, head).tolist() for head in range(heads)] for layer in range(layers)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", NAMES)
def test_exact_totals_and_a_cut_of_a_reading_is_what_compress_makes(tmp_path, family, name):
    model = tiny_model(family)
    method, batch = name.format(gates_file(tmp_path, model)), padded_batch(90, 60)
    reading = read(model, batch["input_ids"], [Method.parse(method).scorer], attention_mask=batch["attention_mask"])
    for keep in (0.6, 1.0):
        cache, cut = headwise.compress(model, method=method, keep=keep, **batch), reading.cut(method, keep)
        heads = cache.lengths[:, 0].numel()
        assert cache.lengths.sum((0, 2)).tolist() == [round(keep * n * heads) for n in (90, 60)]
        assert cut.provenance == cache.provenance
        for layer, other in zip(cut.ragged_layers, cache.ragged_layers, strict=True):
            assert layer.segments.lengths == other.segments.lengths
            for part in ("keys", "values", "positions"):
                assert getattr(layer.segments, part).equal(getattr(other.segments, part))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_different_length_keep_what_they_keep_alone(tmp_path, name):
    model, lengths = tiny_model(), (90, 64, 77)
    method, batch = name.format(gates_file(tmp_path, model)), padded_batch(*lengths)
    together = headwise.compress(model, method=method, keep=0.55, **batch)
    for row, length in enumerate(lengths):
        alone = headwise.compress(model, batch["input_ids"][row : row + 1, -length:], method, keep=0.55)
        assert kept(together, row) == kept(alone, 0)


def test_pieces_of_prefill_change_nothing(both):
    model, file = both
    ids = random_ids(1, 90)
    pieces = headwise.compress(model, ids, f"lkv@{file}", keep=0.3, prefill_chunk_size=17)
    assert kept(pieces, 0) == kept(headwise.compress(model, ids, f"lkv@{file}", keep=0.3), 0)


@pytest.mark.parametrize("keep", ["1tok", "2tok", 0.05, 0.3])
def test_a_head_with_few_entries_has_the_first_tokens_then_the_latest(both, keep):
    """Contexts shorter than what is protected, too."""
    model, file = both
    for tokens in (90, 20, 6, 3):
        if not isinstance(keep, str) and keep * tokens < 1:
            continue
        cache = headwise.compress(model, random_ids(1, tokens), f"lkv@{file}", keep=keep)
        protected = [*range(min(2, tokens)), *range(tokens - 1, max(1, tokens - 6), -1)]
        for layer in kept(cache, 0):
            for positions in layer:
                assert sorted(protected[: len(positions)]) == [p for p in positions if p in protected]


def test_generation_goes_on_from_what_is_kept(both):
    model, file = both
    ids = random_ids(1, 60)
    whole = torch.cat([ids, random_ids(1, 5, seed=3)], dim=-1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cache = headwise.compress(model, ids, f"lkv@{file}", keep=0.3)
    assert model.generate(whole, past_key_values=cache, **options).shape == (1, 71)
    everything = headwise.compress(model, ids, f"lkv@{file}", keep=1.0)
    assert model.generate(whole, past_key_values=everything, **options).equal(model.generate(whole, **options))


def test_a_saved_cache_says_what_made_it(both, tmp_path):
    model, file = both
    cache = headwise.compress(model, random_ids(1, 60), f"lkv@{file}", keep=0.3)
    cache.save(tmp_path / "c")
    assert kept(headwise.load(tmp_path / "c", model), 0) == kept(cache, 0)
