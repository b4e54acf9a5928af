"""Methods by name: aliases, pairs, files; what a wrong name is answered; provenance of everything registered."""

import json
import re

import pytest
import torch

from headwise.artifacts.budget import Budget
from headwise.artifacts.origin import Origin
from headwise.errors import ArtifactMismatch, BadInput
from headwise.interfaces import AbstractAllocator, AbstractScorer, StaticAllocator
from headwise.methods.allocate import LKVH, LUKV, AdaKV, Fixed, Global, Uniform
from headwise.methods.method import Method
from headwise.methods.names import paper_of
from headwise.methods.registry import ALIASES, ALLOCATORS, SCORERS
from headwise.methods.scores import KeyDiff, KVzip, SnapKV
from headwise.shapes import ModelShape


@pytest.fixture
def budget_file(tmp_path):
    shape = ModelShape(num_layers=2, layers=(0, 1), kv_heads=2, query_heads=4, head_dim=8)
    budget = Budget(ratios=torch.tensor([0.5]), fractions=torch.full((1, 2, 2), 0.5), origin=Origin(shape=shape))
    budget.save(tmp_path / "a+b.safetensors")
    return tmp_path / "a+b.safetensors"


def refusal(name: str) -> str:
    with pytest.raises(BadInput) as caught:
        Method.parse(name)
    return str(caught.value)


def test_a_scorer_alone_has_even_budgets():
    assert Method.parse("keydiff") == Method(scorer=KeyDiff(), allocator=Uniform())


@pytest.mark.parametrize("name", ["snapkv+adakv", " snapkv + adakv ", "adakv"])
def test_pairs_and_aliases(name):
    assert Method.parse(name) == Method(scorer=SnapKV(), allocator=AdaKV())


def test_an_alias_may_name_another_allocator_than_the_scorer_alone_would():
    assert Method.parse("kvzip") == Method(scorer=KVzip(), allocator=Global())
    assert Method.parse("kvzip+uniform") == Method(scorer=KVzip(), allocator=Uniform())


def test_a_method_is_its_own_name():
    method = Method(scorer=SnapKV(window_size=8), allocator=Uniform())
    assert Method.parse(method) is method


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_a_pair_of_registered_parts(alias):
    scorer, allocator = ALIASES[alias].split("+")
    assert scorer in SCORERS
    assert allocator in ALLOCATORS
    assert Method.parse(alias) == Method.parse(ALIASES[alias])


def test_every_scorer_is_a_method_by_itself():
    assert set(SCORERS) <= set(ALIASES)


def test_an_allocator_that_reads_a_file(budget_file):
    method = Method.parse(f"keydiff+fixed@{budget_file}")
    assert isinstance(method.allocator, Fixed)
    assert method.allocator.budget.ratios.tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("snapvk", "Did you mean 'snapkv'?"),
        ("SnapKV", "Did you mean 'snapkv'?"),
        ("pyramid-kv", "Did you mean 'pyramidkv'?"),
        ("keydiff+adakw", "Did you mean 'adakv'?"),
        ("uniform", "write scorer+uniform"),
        ("adakv+uniform", "write scorer+adakv"),
        ("fixed@budget.safetensors", "write scorer+fixed"),
        ("pyramidkv+adakv", "short for snapkv+pyramid"),
        ("keydiff+snapkv", "Known allocators: uniform"),
        ("keydiff+", "Known allocators: uniform"),
        ("", "Known scorers: random"),
        ("full", "Known scorers: random"),
        ("keydiff+fixed", "needs a file, as in fixed@FILE"),
        ("keydiff+fixed@", "needs a file, as in fixed@FILE"),
        ("keydiff+adakv@x", "takes no file"),
        ("keydiff@x", "takes no file"),
        ("keydiff+fixed@nowhere.safetensors", "nowhere.safetensors is not a file"),
    ],
)
def test_a_wrong_name_is_told_what_would_work(name, advice):
    message = refusal(name)
    assert advice in message
    assert "\n" not in message


def test_a_suggestion_is_never_the_rejected_name():
    for scorer in [*ALIASES, *ALLOCATORS]:
        if scorer not in SCORERS:
            assert f"Did you mean '{scorer}'" not in refusal(f"{scorer}+uniform")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing of ours")
    assert "damaged or no safetensors file" in refusal(f"keydiff+fixed@{tmp_path / 'x'}")


def test_a_budget_of_another_model_is_refused_when_it_is_used(budget_file):
    method = Method.parse(f"keydiff+fixed@{budget_file}")
    with pytest.raises(ArtifactMismatch, match="made for"):
        method.allocator.budget.require(
            ModelShape(num_layers=3, layers=(0, 1, 2), kv_heads=2, query_heads=4, head_dim=8)
        )


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.slow
def test_provenance_is_json(scorer, allocator, budget_file):
    method = Method.parse(f"{scorer}+{allocator}" + f"@{budget_file}" * (ALLOCATORS[allocator].file == "needed"))
    assert isinstance(method.scorer, AbstractScorer)
    assert isinstance(method.allocator, AbstractAllocator)
    found = method.provenance()
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, default=repr))
    assert found["scorer"]["name"] == type(method.scorer).__name__
    assert (found["sink"], found["window"]) == (method.scorer.sink, method.scorer.window)


def test_protection_given_by_hand_is_in_the_provenance():
    method = Method(scorer=SnapKV(), allocator=Uniform(), protect_sink=2, protect_window=0)
    assert (method.sink, method.window) == (2, 0)
    assert (method.provenance()["sink"], method.provenance()["window"]) == (2, 0)


def test_the_registry_says_what_everything_does_and_where_it_is_from():
    for name, entry in {**SCORERS, **ALLOCATORS}.items():
        assert entry.summary, name
        assert re.fullmatch(r"(\d{4}\.\d{5})?", entry.paper), name


@pytest.mark.parametrize(
    ("alias", "paper"), [("adakv", "2407.11550"), ("pyramidkv", "2406.02069"), ("kvzip", "2505.23416"), ("random", "")]
)
def test_the_paper_of_an_alias(alias, paper):
    assert paper_of(alias) == paper


def test_what_can_be_served_looks_at_no_scores():
    """lkv-c apart, for which a server takes the budgets of lkv-h."""
    of_files = {"fixed": Fixed, "lukv": LUKV, "lkv-h": LKVH}
    kinds = {name: of_files.get(name) or type(entry.make()) for name, entry in ALLOCATORS.items() if name != "lkv-c"}
    assert {name: issubclass(kind, StaticAllocator) for name, kind in kinds.items()} == {
        name: ALLOCATORS[name].served for name in kinds
    }
