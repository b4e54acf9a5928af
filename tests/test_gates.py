"""Head budgets, entry scores, what they look at, and the file they are kept in."""

import json
import os
import resource

import pytest
import torch
from families import random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gates import PARTS, gates_for, make_gates, scatter
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers import DynamicCache

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import (
    KNOTS,
    EntryScores,
    Gates,
    HeadBudgets,
    context_summary,
    entry_features,
    load_gates,
    summary_width,
)
from headwise.artifacts.tensors import read_tensors, write_tensors
from headwise.errors import ArtifactMismatch, BadInput
from headwise.methods.allocate import learned_budgets
from headwise.methods.scores import learned_scorer
from headwise.models.families import view
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=4, layers=(0, 2, 3), kv_heads=2, query_heads=4, head_dim=8)
CASES = settings(max_examples=150, deadline=None, derandomize=True)


# --- budgets ---


@CASES
@given(keep=st.floats(0.001, 1), size=st.sampled_from([0.1, 1.0, 4.0]), seed=st.integers(0, 99))
def test_the_mean_is_the_keep_and_no_head_keeps_less_than_nothing_or_more_than_all(keep, size, seed):
    budgets = scatter(HeadBudgets(6, 4), seed, size)
    single, double = budgets(keep), budgets.double()(keep)
    for found, tolerance in ((single, 1e-3), (double, 1e-9)):
        assert ((found >= 0) & (found <= 1)).all()
        assert float(found.double().mean()) == pytest.approx(keep, rel=tolerance)


def test_heads_start_alike_and_keep_everything_when_asked():
    for keep in (0.01, 0.3, 0.999):
        torch.testing.assert_close(HeadBudgets(5, 4)(keep), torch.full((5,), keep))
    with torch.no_grad():
        assert scatter(HeadBudgets(5, 4))(1.0).tolist() == [1.0] * 5


def test_heads_start_from_given_fractions_and_between_them():
    fractions = torch.rand(5, len(KNOTS), generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    fractions = fractions / fractions.mean(0) * torch.tensor(KNOTS)
    budgets = HeadBudgets(5, 4)
    budgets.start_from(fractions)
    with torch.no_grad():
        for at, keep in enumerate(KNOTS):
            torch.testing.assert_close(budgets(keep), fractions[:, at].clamp(1e-3), rtol=1e-2, atol=1e-4)
        between, (low, high) = budgets(0.12), fractions[:, [4, 5]].unbind(-1)
        outside = budgets(0.7)
    assert KNOTS[4] < 0.12 < KNOTS[5]
    assert ((between >= 0.95 * torch.minimum(low, high)) & (between <= 1.05 * torch.maximum(low, high))).all()
    assert outside.argsort().equal(fractions[:, -1].argsort())


def test_trained_heads_differ_and_follow_the_keep():
    with torch.no_grad():
        budgets = scatter(HeadBudgets(6, 4))
        orders = {tuple(budgets(keep).argsort().tolist()) for keep in (0.01, 0.1, 0.9)}
        assert budgets(0.05).std() > 0.005
    assert len(orders) > 1  # not the same heads at every keep


def test_traits_are_what_sets_a_context_apart_from_those_of_training():
    """The mean of them has none; a difference that all of them show does not count."""
    summaries = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * 3 + torch.tensor([9.0, 0, -5, 0])
    summaries[:, 3] = 2.0
    budgets = scatter(HeadBudgets(5, 4), size=0.3)
    budgets.get_used_to(summaries)
    with torch.no_grad():
        plain, mean = budgets(0.1), budgets(0.1, summaries.mean(0))
        shifts = torch.stack([budgets(0.1, summary) - plain for summary in summaries])
    torch.testing.assert_close(mean, plain, rtol=1e-3, atol=1e-5)
    assert shifts.abs().amax(0).min() > 0.005
    torch.testing.assert_close(shifts.sum(-1), torch.zeros(20), rtol=0, atol=1e-4)


@pytest.mark.parametrize("summary", [None, torch.tensor([0.3, -2.0, 1.0, 0.1]).double()], ids=["none", "some"])
@pytest.mark.parametrize("keep", [0.01, 0.15, 0.8])
def test_gradients_of_the_budgets(keep, summary):
    budgets = scatter(HeadBudgets(3, 4)).double()
    names, parameters = zip(*budgets.named_parameters(), strict=True)

    def fractions(*values):
        return functional_call(budgets, dict(zip(names, values, strict=True)), (keep, summary))

    assert gradcheck(fractions, [p.clone().requires_grad_() for p in parameters], fast_mode=True)


# --- features ---


def states_at(model, ids, positions):
    """Keys and values of the first layer, tokens at these positions; rotation by position 0 is none."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, position_ids=positions, past_key_values=cache)
    return cache.layers[0].keys, cache.layers[0].values


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_features_are_unrotated_key_and_value_their_norms_and_the_place(family):
    """The key as the model makes it for position 0; Phi3 rotates half of a head. Two query heads share each KV head."""
    model, ids, at = tiny_model(family), random_ids(1, 12), torch.arange(12)[None] + 5
    plain, values = states_at(model, ids, torch.zeros_like(at))
    keys, _ = states_at(model, ids, at)
    found = entry_features(keys, values, at, view(model).rotary(0))
    assert found.shape[:3] == (1, 2, 12)
    assert found.dtype == torch.float32
    key, key_norm, value, value_norm, place = found.split([16, 1, 16, 1, found.shape[-1] - 34], dim=-1)
    for unit, norm, states in ((key, key_norm, plain), (value, value_norm, values)):
        size = states.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(unit, states / size, rtol=1e-3, atol=1e-4)
        ratios = (norm - norm[:, :1, :1]).exp()
        torch.testing.assert_close(ratios, size / size[:, :1, :1], rtol=1e-3, atol=1e-4)
    from_first, from_last, even = place[0, 0].unbind(-1)
    assert from_first[0] == from_last[-1] == 0
    assert (from_first.diff() > 0).all()
    torch.testing.assert_close(from_last.flip(0), from_first)
    assert place[0, 0].equal(place[0, 1])
    assert even.unique().numel() == 12


def test_a_part_of_a_context_that_is_chosen_by_the_even_number_is_fair():
    """Of any 64 tokens in a row about as many lie above any threshold; far into a long context, too."""
    model, positions = tiny_model(), torch.arange(120_000)[None]
    states = torch.zeros(1, 1, 120_000, 16)
    even = entry_features(states, states, positions, view(model).rotary(0))[0, 0, :, -1]
    for share in (0.1, 0.25, 0.7):
        above = (even > even.quantile(1 - share)).float().unfold(0, 64, 64).mean(-1)
        assert ((above - share).abs() < 0.06).all()


def test_the_same_entry_looks_alike_wherever_the_context_begins():
    model, ids = tiny_model(), random_ids(1, 12)
    found = []
    for start in (0, 300):
        at = torch.arange(start, start + 12)[None]
        keys, values = states_at(model, ids, at)
        found.append(entry_features(keys, values, at, view(model).rotary(0)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_a_summary_is_the_mean_of_unit_keys_and_values_of_real_tokens():
    """Wherever the context begins, and whatever the padding holds."""
    model, ids = tiny_model(), random_ids(2, 12)
    keys, values = states_at(model, ids, torch.zeros(2, 12, dtype=torch.long))
    at, valid = torch.arange(12).expand(2, -1) + torch.tensor([[0], [300]]), torch.ones(2, 12, dtype=torch.bool)
    rotated, _ = states_at(model, ids, at)
    valid[1, :5] = False
    rotated[1, :, :5] = float("nan")
    found = context_summary(rotated, values, at, valid, view(model).rotary(0))
    assert found.shape == (2, summary_width(view(model).shape))
    for row, first in enumerate((0, 5)):
        unit = [x[row, :, first:] / x[row, :, first:].square().mean(-1, keepdim=True).sqrt() for x in (keys, values)]
        expected = torch.cat([x.mean(1).flatten() for x in unit])
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


# --- scores ---


def width_of(shape):
    """Of the features of an entry."""
    states, positions = torch.zeros(1, shape.kv_heads, 1, shape.head_dim), torch.zeros(1, 1, dtype=torch.long)
    model = tiny_model(head_dim=shape.head_dim)
    return entry_features(states, states, positions, view(model).rotary(0)).shape[-1]


def test_every_head_has_a_network_of_its_own():
    features = torch.randn(2, 2, 7, width_of(SHAPE))
    with torch.no_grad():
        networks = scatter(EntryScores(3, 2, 8))
        before = networks(features, 1)
        for parameter in networks.parameters():
            parameter[0] += 1.0  # another layer
            parameter[1, 0] += 1.0  # another head
        after = networks(features, 1)
        alone = networks(features[1:, :, 3:5], 1)
    assert after[:, 1].equal(before[:, 1])
    assert not after[:, 0].allclose(before[:, 0])
    torch.testing.assert_close(alone, after[1:, :, 3:5])


# --- files ---


def tensors_of(gates):
    modules = {"budgets": gates.budgets, "scores": gates.scores}
    return {f"{n}.{k}": t for n, m in modules.items() if m is not None for k, t in m.state_dict().items()}


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], PARTS[1:]], ids="+".join)
def test_save_and_load_give_back_every_bit(tmp_path, parts):
    made = make_gates(SHAPE, "abc", parts=parts)
    made.save(tmp_path / "g")
    found = Gates.load(tmp_path / "g")
    assert [found.budgets is not None, found.scores is not None] == [part in parts for part in PARTS]
    assert tensors_of(found).keys() == tensors_of(made).keys()
    assert all(tensors_of(found)[name].equal(tensor) for name, tensor in tensors_of(made).items())
    assert (found.origin, found.settings) == (made.origin, made.settings)
    assert found.provenance() == made.provenance()
    if "budgets" in parts:
        assert found.fractions(0.2).equal(made.fractions(0.2))
    assert not any(p.requires_grad for m in (found.budgets, found.scores) if m is not None for p in m.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_provenance_is_json_and_names_the_weights():
    made = make_gates(SHAPE, "abc").provenance()
    assert json.loads(json.dumps(made))["config_hash"] == "abc"
    assert len(json.dumps(made)) < 1000
    others = [make_gates(SHAPE, "abc", seed=1), make_gates(SHAPE, "abc", parts=("scores",)), make_gates(SHAPE, "abd")]
    assert all(other.provenance() != made for other in others)
    assert make_gates(SHAPE, "abc").provenance() == made


def test_another_model_is_refused_and_both_are_named():
    made = make_gates(SHAPE, "abc")
    made.require(SHAPE, "abc")
    made.require(SHAPE)
    other = ModelShape(num_layers=4, layers=(0, 2, 3), kv_heads=1, query_heads=4, head_dim=8)
    with pytest.raises(
        ArtifactMismatch, match=r"a/b with 3 layers of 2 KV heads; this model has 3 layers of 1 KV heads"
    ):
        made.require(other)
    with pytest.raises(ArtifactMismatch, match=r"a/b \(configuration abc\).* is abd"):
        made.require(SHAPE, "abd")


def test_a_part_that_is_missing_is_named():
    with pytest.raises(BadInput, match=r"hold budgets only: use them as scorer\+lkv-h@FILE"):
        learned_scorer(make_gates(SHAPE, parts=("budgets",)))
    with pytest.raises(BadInput, match=r"hold scores only: use them as lkv-t@FILE\+allocator"):
        learned_budgets(make_gates(SHAPE, parts=("scores",)))


def damage(kind, path):
    """Write gates that are not whole, or hold what no gates hold."""
    make_gates(SHAPE).save(path)
    content, (tensors, metadata) = path.read_bytes(), read_tensors(path, "gates")
    first, odd = next(iter(tensors)), torch.zeros(2)
    if kind == "cut short":
        path.write_bytes(content[: len(content) // 2])
        return
    tensors, metadata = {
        "a tensor is missing": ({name: t for name, t in tensors.items() if name != first}, metadata),
        "a tensor of another shape": ({**tensors, first: odd}, metadata),
        "a tensor too many": ({**tensors, "scores.more": odd}, metadata),
        "neither part": ({"more": odd}, metadata),
        "no origin": (tensors, {"settings": {}}),
    }[kind]
    write_tensors(path, "gates", tensors, metadata)


DAMAGE = [
    "cut short",
    "a tensor is missing",
    "a tensor of another shape",
    "a tensor too many",
    "neither part",
    "no origin",
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(tmp_path, kind):
    damage(kind, tmp_path / "g.safetensors")
    for load in (Gates.load, load_gates):
        with pytest.raises(BadInput, match=r"g\.safetensors"):
            load(tmp_path / "g.safetensors")


def test_no_file_and_files_of_another_kind_are_refused(tmp_path):
    fractions = torch.full((1, 3, 2), 0.5)
    Budget(ratios=torch.tensor([0.5]), fractions=fractions, origin=make_gates(SHAPE).origin).save(tmp_path / "b")
    make_gates(SHAPE).save(tmp_path / "g")
    for load in (Gates.load, load_gates):
        with pytest.raises(BadInput, match="nowhere is not a file"):
            load(tmp_path / "nowhere")
        with pytest.raises(ArtifactMismatch, match="is a budget of format 2, expected a gates of format 2"):
            load(tmp_path / "b")
    with pytest.raises(ArtifactMismatch, match="is a gates of format 2, expected a budget"):
        Budget.load(tmp_path / "g")


def test_one_file_is_one_object_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "g"
    make_gates(SHAPE).save(path)
    first = load_gates(path)
    monkeypatch.chdir(tmp_path)
    assert load_gates("g") is load_gates(str(path)) is first
    os.utime(path)
    touched = load_gates(path)
    assert touched.provenance() == first.provenance()
    make_gates(SHAPE, seed=1).save(path)
    os.utime(path)  # clocks are coarse
    assert load_gates(path).provenance() == make_gates(SHAPE, seed=1).provenance()
    assert learned_scorer(load_gates(path)) == learned_scorer(load_gates(path)) != learned_scorer(first)


def test_saved_gates_of_a_model_are_for_that_model():
    model, other = tiny_model(), tiny_model("qwen3")
    made = gates_for(model)
    made.require(view(model).shape, view(model).config_hash)
    assert view(model).shape == view(other).shape
    with pytest.raises(ArtifactMismatch, match="this model's"):
        made.require(view(other).shape, view(other).config_hash)


def test_a_file_that_claims_to_be_of_a_huge_model_takes_no_memory(tmp_path):
    """Modules are made when the tensors are as large as they say."""
    path, before = tmp_path / "g.safetensors", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make_gates(SHAPE).save(path)
    tensors, metadata = read_tensors(path, "gates")
    huge = {"num_layers": 4096, "layers": list(range(4096)), "kv_heads": 4096, "query_heads": 4096, "head_dim": 65536}
    write_tensors(path, "gates", tensors, {**metadata, "origin": {**metadata["origin"], "shape": huge}})
    with pytest.raises(BadInput, match=r"'budgets.embedding' has shape \(6, 64\), but its sizes need \(16777216, 64\)"):
        Gates.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("budgets.hidden.weight", float("nan"), "'budgets.hidden.weight' holds numbers from nan"),
        ("scores.weight_in", float("inf"), "'scores.weight_in' holds numbers from .* to inf"),
        ("budgets.start", 1e7, "'budgets.start' holds numbers from .* to 1e"),
        ("budgets.usual", 0.0, "the spread of usual contexts"),
    ],
)
def test_weights_that_give_no_number_are_refused(tmp_path, name, value, words):
    path = tmp_path / "g.safetensors"
    make_gates(SHAPE).save(path)
    tensors, metadata = read_tensors(path, "gates")
    tensors[name][-1] = value
    write_tensors(path, "gates", tensors, metadata)
    with pytest.raises(BadInput, match=rf"g\.safetensors.*{words}"):
        Gates.load(path)
