"""Small copies: sizes, what stays the same, and what half precision cannot hold."""

import json
from dataclasses import replace

import pytest
import torch
from families import tiny_model
from mixed_budgets import mixed_budget
from random_gates import gates_for, make_gates

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import Gates
from headwise.artifacts.tensors import describe
from headwise.errors import ArtifactMismatch, BadInput
from headwise.kernels.quantised import ENTRIES
from headwise.models.families import view
from headwise.models.loading import reference_path
from headwise.offline.shrink import shrink
from headwise.shapes import ModelShape

SMOLLM2 = ModelShape(num_layers=30, layers=tuple(range(30)), kv_heads=3, query_heads=9, head_dim=64)
QWEN_CODER = ModelShape(num_layers=24, layers=tuple(range(24)), kv_heads=2, query_heads=14, head_dim=64)


def test_gates_in_half_precision_choose_as_before(tmp_path):
    path, out = reference_path() / "gates" / "lkv.safetensors", tmp_path / "lkv.safetensors"
    found = shrink(path, out, model="org/name")
    assert found.bytes_after < 0.52 * found.bytes_before
    assert out.stat().st_size == found.bytes_after
    assert {tensor["dtype"] for tensor in describe(out)["tensors"].values()} == {"F16"}
    assert found.changed < 0.002
    assert found.shared > 0.98
    before, after = Gates.load(path), Gates.load(out)
    assert after.origin == replace(before.origin, model="org/name")
    assert after.settings == before.settings
    assert after.scores.weight_in.dtype == torch.float32
    for name, tensor in after.budgets.state_dict().items():
        assert torch.allclose(tensor, before.budgets.state_dict()[name], rtol=1e-3, atol=1e-6), name


def test_a_budget_loses_its_curves_and_keeps_its_counts(tmp_path):
    path, out = reference_path() / "budgets" / "keydiff.safetensors", tmp_path / "keydiff.safetensors"
    found = shrink(path, out)
    assert found.bytes_after < 0.3 * found.bytes_before
    assert found.changed < 0.001
    before, after = Budget.load(path), Budget.load(out)
    assert after.origin == before.origin
    assert not after.evidence
    assert torch.allclose(after.fractions.double(), before.fractions, atol=1e-6)


def test_hulls_of_fewer_bits_are_kept_in_float32(tmp_path):
    model = tiny_model()
    budget = mixed_budget(model)
    budget.save(tmp_path / "b.safetensors")
    found = shrink(tmp_path / "b.safetensors", tmp_path / "out.safetensors")
    assert found.bytes_after < 0.7 * found.bytes_before
    assert found.changed < 0.001
    after = Budget.load(tmp_path / "out.safetensors")
    assert after.kinds.keys() == budget.kinds.keys()
    for kind, hull in after.kinds.items():
        assert all(tensor.dtype == torch.float32 for tensor in hull.values())
        assert all(
            torch.allclose(hull[name].double(), tensor, rtol=1e-6) for name, tensor in budget.kinds[kind].items()
        )


def test_a_budget_in_half_precision_is_read_as_float32(tmp_path):
    budget = Budget.load(reference_path() / "budgets" / "keydiff.safetensors")
    replace(budget, fractions=budget.fractions.half(), evidence={}).save(tmp_path / "b.safetensors")
    assert Budget.load(tmp_path / "b.safetensors").fractions.dtype == torch.float32


@pytest.mark.parametrize("part", ["budgets", "scores"])
def test_numbers_beyond_half_precision_are_refused_and_nothing_is_written(tmp_path, part):
    gates = gates_for(tiny_model(), parts=(part,))
    with torch.no_grad():
        next(getattr(gates, part).parameters()).view(-1)[3] = 7e4
    gates.save(tmp_path / "gates.safetensors")
    with pytest.raises(BadInput, match=rf"'{part}\.\w+' holds numbers beyond 65504"):
        shrink(tmp_path / "gates.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_gates_that_would_choose_otherwise_are_refused(tmp_path):
    """Weights between the smallest numbers of half precision: what tells entries apart is lost in the rounding."""
    gates = gates_for(tiny_model(), parts=("scores",))
    with torch.no_grad():
        gates.scores.bias_in.zero_()
        gates.scores.weight_in.mul_(1e-7)
    gates.save(tmp_path / "gates.safetensors")
    with pytest.raises(BadInput, match="Share the file as it is"):
        shrink(tmp_path / "gates.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_only_gates_and_budgets(tmp_path):
    from headwise.artifacts.tensors import write_tensors

    write_tensors(tmp_path / "x.safetensors", "cache", {"a": torch.zeros(1)}, {})
    with pytest.raises(ArtifactMismatch, match="is a cache: only gates and budgets"):
        shrink(tmp_path / "x.safetensors", tmp_path / "out.safetensors")


def test_what_is_shipped_for_two_models_is_small(tmp_path):
    """Two gates and six budgets fit in 4 MB: these gates, and budgets of a hull with 150 steps in every head."""
    sizes = []
    for shape in (SMOLLM2, QWEN_CODER):
        make_gates(shape, size=0.05).save(tmp_path / "gates.safetensors", dtype=torch.float16)
        sizes += [(tmp_path / "gates.safetensors").stat().st_size, 3 * 4 * shape.num_heads * (2 * 150 + 36 + 19)]
    assert sum(sizes) < 3.5e6


def test_what_is_shipped_is_below_4_mb():
    files = list((reference_path().parent / "ready").glob("*/*.safetensors"))
    assert len(files) == 8
    assert sum(file.stat().st_size for file in files) <= 4e6
    knowing = [file for file in files if file.stem != "lkv" and Budget.load(file).kinds.keys() == set(ENTRIES)]
    assert [file.stem for file in knowing] == ["keydiff", "keydiff"]  # for --entries auto


def test_the_small_file_says_what_it_was_made_for(tmp_path):
    model = tiny_model()
    gates_for(model).save(tmp_path / "gates.safetensors")
    shrink(tmp_path / "gates.safetensors", tmp_path / "out.safetensors", model="org/name")
    found = json.loads(json.dumps(describe(tmp_path / "out.safetensors")))["origin"]
    assert (found["model"], found["config_hash"]) == ("org/name", view(model).config_hash)
