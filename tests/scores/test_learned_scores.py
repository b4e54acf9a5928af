"""LKV-T as a scorer: what it looks at, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from random_gates import make_gates

from headwise.errors import ArtifactMismatch, BadInput
from headwise.methods.scores import LKVT, ShippedLKVT, learned_scorer
from headwise.shapes import ModelShape


def scorer_for(layer, **options):
    return learned_scorer(make_gates(layer.shape, "abc", **options))


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 3), (4, 1), (1, 4)])
def test_real_tokens_score_as_in_their_row_alone(make_layer, kv_heads, group):
    """The padding holds NaN."""
    layer = make_layer(lengths=(23, 14, 23, 1), kv_heads=kv_heads, group=group)
    scorer = scorer_for(layer)
    together = scorer.score(layer.observe(scorer))
    assert together.dtype == torch.float32
    assert not together.requires_grad
    for row in range(4):
        alone = layer.row(row)
        found = scorer.score(alone.observe(scorer))
        assert found.isfinite().all()
        torch.testing.assert_close(together[row : row + 1, :, layer.valid[row]], found, rtol=1e-4, atol=1e-5)


def test_it_looks_at_keys_values_and_places_only(make_layer):
    layer = make_layer(lengths=(23,))
    scorer = scorer_for(layer)
    expected = scorer.score(layer.observe(scorer))
    blind = replace(layer, queries=layer.queries * torch.nan, output_weight=layer.output_weight * torch.nan)
    assert scorer.score(blind.observe(scorer, cuts=(7, 15), keep=0.1)).equal(expected)
    for changed in (
        replace(layer, keys=layer.keys.roll(1, dims=-1)),
        replace(layer, values=2 * layer.values),
        replace(layer, positions=2 * layer.positions),
        replace(layer, layer=0),
    ):
        assert not scorer.score(changed.observe(scorer)).allclose(expected, rtol=1e-2)


def test_an_entry_s_score_does_not_depend_on_other_entries(make_layer):
    layer = make_layer(lengths=(23,))
    scorer, keys = scorer_for(layer), layer.keys.clone()
    keys[:, :, 5] += 1.0
    expected, found = scorer.score(layer.observe(scorer)), scorer.score(replace(layer, keys=keys).observe(scorer))
    same = torch.arange(23) != 5
    torch.testing.assert_close(found[..., same], expected[..., same])
    assert (found[..., 5] != expected[..., 5]).all()


def test_keys_of_lower_precision_are_scored_in_float32(make_layer):
    layer = make_layer(lengths=(23,))
    scorer = scorer_for(layer)
    halves = replace(layer, keys=layer.keys.bfloat16(), values=layer.values.bfloat16())
    rounded = replace(layer, keys=halves.keys.float(), values=halves.values.float())
    assert scorer.score(halves.observe(scorer)).equal(scorer.score(rounded.observe(scorer)))


def test_one_gates_object_is_one_scorer_and_needs_no_second_look(make_layer):
    layer = make_layer()
    gates = make_gates(layer.shape, sink=3, window=6)
    assert learned_scorer(gates) == LKVT(gates=gates)
    assert hash(learned_scorer(gates)) == hash(LKVT(gates=gates))
    assert learned_scorer(gates) != scorer_for(layer)
    scorer = learned_scorer(gates)
    assert (scorer.sink, scorer.window) == (3, 6)
    assert (scorer.replay, scorer.needs_budget, scorer.query_window) == (None, False, 0)


def test_provenance_is_json_and_names_the_gates(make_layer):
    layer = make_layer()
    found = scorer_for(layer).provenance()
    assert json.loads(json.dumps(found))["name"] == "LKVT"
    assert found == scorer_for(layer).provenance() != scorer_for(layer, seed=1).provenance()


def test_another_model_is_refused(make_layer):
    layer = make_layer()
    scorer = scorer_for(layer)
    assert scorer.resolve(layer.shape, "abc") is scorer
    with pytest.raises(ArtifactMismatch, match=r"configuration abc.* is abd"):
        scorer.resolve(layer.shape, "abd")
    with pytest.raises(ArtifactMismatch, match=r"3 layers in all.*9 layers in all"):
        scorer.resolve(replace(layer.shape, num_layers=9), "abc")


def test_shipped_gates_are_found_by_model(tmp_path, monkeypatch, make_layer):
    layer = make_layer()
    folder = tmp_path / "reference" / "gates"
    folder.mkdir(parents=True)
    make_gates(layer.shape, "other").save(folder / "a.safetensors")
    made = make_gates(layer.shape, "abc", seed=1)
    made.save(folder / "b.safetensors")
    monkeypatch.setattr("headwise.artifacts.shipped.files", lambda package: tmp_path)
    found = ShippedLKVT().resolve(layer.shape, "abc")
    assert found.provenance() == learned_scorer(made).provenance()
    assert ShippedLKVT().resolve(layer.shape, "abc") == found
    with pytest.raises(BadInput, match=r"no gates are shipped for this model.*headwise train.*lkv@FILE"):
        ShippedLKVT().resolve(layer.shape, "abd")


def test_a_shipped_file_without_scores_is_no_scorer(tmp_path, monkeypatch, make_layer):
    folder, shape = tmp_path / "reference" / "gates", make_layer().shape
    folder.mkdir(parents=True)
    make_gates(shape, "abc", parts=("budgets",)).save(folder / "a.safetensors")
    monkeypatch.setattr("headwise.artifacts.shipped.files", lambda package: tmp_path)
    with pytest.raises(BadInput, match="hold budgets only"):
        ShippedLKVT().resolve(shape, "abc")


def test_unresolved_shipped_gates_score_nothing(make_layer):
    layer = make_layer()
    with pytest.raises(BadInput, match="must be resolved"):
        ShippedLKVT().score(layer.observe(ShippedLKVT()))


def test_a_model_shape_is_that_of_the_compressible_layers():
    shape = ModelShape(num_layers=6, layers=(1, 5), kv_heads=2, query_heads=4, head_dim=8)
    learned_scorer(make_gates(shape)).resolve(shape, "")
