"""LUKV: counts from a Budget's hulls for any total; what it refuses; from a profile to an evaluation."""

import json
import shlex
import sys
from dataclasses import asdict, replace

import pytest
import torch
from families import random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise
from headwise import cli
from headwise.allocate.profiled import LUKV, ShippedLUKV
from headwise.artifacts import Budget, Origin
from headwise.errors import ArtifactMismatch, BadInput, BudgetInfeasible
from headwise.evals.lexicon import REFERENCE_LEXICON
from headwise.evals.ruler import generate
from headwise.hf.families import view
from headwise.hulls import concave_hulls, share
from headwise.interfaces import Demand
from headwise.method import SCORERS, Method
from headwise.reading import read
from headwise.select import protected_mask
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=4, layers=(0, 2, 3), kv_heads=2, query_heads=4, head_dim=8)
CASES = settings(max_examples=40, deadline=None, derandomize=True)


def hulls_for(heads, seed=0):
    return concave_hulls(torch.rand(heads, 64, generator=torch.Generator().manual_seed(seed)) ** 4)


def budget(shape=SHAPE, scorer="keydiff", seed=0, **origin):
    """Hulls that say something, and a table that is no use."""
    hulls, made = hulls_for(shape.num_heads, seed), SCORERS[scorer].make()
    return Budget(
        ratios=torch.tensor([0.5]),
        fractions=torch.full((1, len(shape.layers), shape.kv_heads), 0.5),
        origin=Origin(
            shape=shape,
            scorer=scorer,
            scorer_parameters=made.provenance(),
            sink=made.sink,
            window=made.window,
            **origin,
        ),
        hull=asdict(hulls),
    )


def counts(allocator, tokens, totals, *, sink=0, window=0, size=None):
    """Counts [L, B, H] of a left-padded batch, asked layer by layer."""
    size = size or max(tokens)
    valid = torch.arange(size) >= size - torch.tensor(tokens)[:, None]
    demand = Demand(
        shape=allocator.budget.origin.shape,
        tokens=tuple(tokens),
        totals=tuple(totals),
        floors=tuple(max(1, min(length, sink + window)) for length in tokens),
    )
    candidates, scores = valid & ~protected_mask(valid, sink, window), torch.zeros(1, len(tokens), 2, size)
    return torch.cat([allocator.allocate(scores, candidates, [at], demand) for at in range(len(demand.shape.layers))])


# --- counts ---


def test_counts_are_the_share_of_the_candidates_on_top_of_the_protected():
    found = counts(LUKV(budget=budget()), [500], [700], sink=4, window=16)[:, 0]
    by_hand = 20 + share(hulls_for(6), entries=480, total=700 - 6 * 20)
    assert found.flatten().tolist() == by_hand.tolist()
    assert int(found.min()) == 20


def test_every_head_keeps_one_percent():
    found = counts(LUKV(budget=budget()), [1000], [120])
    assert found.flatten().tolist() == share(hulls_for(6), entries=1000, total=120, floor=10).tolist()
    assert int(found.min()) == 10
    assert int(found.max()) > 20


def test_a_larger_protection_replaces_the_one_percent():
    assert int(counts(LUKV(budget=budget()), [1000], [240], sink=4, window=16).min()) == 20


def test_a_budget_of_less_than_one_percent_is_shared_evenly():
    assert counts(LUKV(budget=budget()), [1000], [33]).flatten().tolist() == [6, 6, 6, 5, 5, 5]


@CASES
@given(tokens=st.integers(1, 900), sink=st.integers(0, 3), window=st.integers(0, 9), seed=st.integers(0, 9))
def test_exact_totals_within_bounds_and_more_never_takes(tokens, sink, window, seed):
    """Nested from the bare floors to everything: floors that grew with the total once took entries back below 1%."""
    allocator, floor = LUKV(budget=budget(seed=seed)), max(1, min(tokens, sink + window))
    least, most = 6 * floor, 6 * tokens
    before = torch.full((3, 1, 2), floor)
    for total in sorted({*range(least, min(least + 30, most)), *range(least, most, 1 + most // 40), most}):
        found = counts(allocator, [tokens], [total], sink=sink, window=window)
        assert int(found.sum()) == total
        assert (found >= before).all()
        assert (found <= tokens).all()
        before = found


def test_rows_of_a_batch_do_not_see_each_other():
    allocator, rows = LUKV(budget=budget()), [(300, 500), (40, 200), (1, 6), (299, 1794)]
    tokens, totals = zip(*rows, strict=True)
    together = counts(allocator, tokens, totals)
    for row, (length, total) in enumerate(rows):
        assert counts(allocator, [length], [total], size=300).equal(together[:, row : row + 1])


def test_infeasible_totals_are_refused():
    for total, words in ((50, "sink and window need 20"), (601, "hold only 600")):
        with pytest.raises(BudgetInfeasible, match=words):
            counts(LUKV(budget=budget()), [100], [total], sink=4, window=16)


def test_a_model_s_heads_keep_what_the_hulls_say():
    """Left padding, sliding layers and protection included."""
    model, ids, mask = tiny_model("gemma3_text"), random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    ids[1, :30], mask[1, :30] = 0, 0
    made = budget(view(model).shape, "expected", config_hash=view(model).config_hash)
    method = Method(scorer=SCORERS["expected"].make(), allocator=LUKV(budget=made))
    cache = headwise.compress(model, ids, method, keep=0.3, attention_mask=mask)
    for row, tokens in enumerate((90, 60)):
        rest = share(hulls_for(4), entries=tokens - 4, total=round(0.3 * tokens * 4) - 16)
        assert cache.lengths[:, row].flatten().tolist() == (4 + rest).tolist()
        assert all(cache.positions(1, row, head)[:4].tolist() == [0, 1, 2, 3] for head in range(2))
    cut = read(model, ids, [method.scorer], attention_mask=mask).cut(method, 0.3)
    assert cut.lengths.equal(cache.lengths)


# --- what it refuses ---


def resolve(made, scorer="keydiff", shape=SHAPE, config_hash="abc", **parameters):
    chosen = replace(SCORERS[scorer].make(), **parameters)
    return Method(scorer=chosen, allocator=LUKV(budget=made)).for_model(shape, config_hash)


def test_its_own_scorer_and_model_are_taken(tmp_path):
    for scorer in ("keydiff", "snapkv", "expected"):
        made = budget(scorer=scorer, config_hash="abc")
        assert resolve(made, scorer).allocator == LUKV(budget=made)
        made.save(tmp_path / "b")
        resolve(Budget.load(tmp_path / "b"), scorer)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scorer": "knorm"}, "solved for .*KeyDiff.*but the scorer is .*Knorm"),
        ({"config_hash": "abd"}, r"made for a model \(configuration abc\); this model's is abd"),
        ({"shape": replace(SHAPE, layers=(0, 1, 2))}, r"layers=\(0, 2, 3\).*layers=\(0, 1, 2\)"),
        ({"shape": replace(SHAPE, kv_heads=1)}, "kv_heads=2.*kv_heads=1"),
    ],
)
def test_another_scorer_or_model_is_refused(wrong, words):
    with pytest.raises(ArtifactMismatch, match=words):
        resolve(budget(config_hash="abc"), **wrong)


def test_other_parameters_of_the_scorer_are_refused():
    with pytest.raises(ArtifactMismatch, match=r"window_size': 32.*window_size': 16.*Profile and solve"):
        resolve(budget(scorer="snapkv"), "snapkv", window_size=16)


def test_a_budget_without_hulls_is_refused():
    with pytest.raises(ArtifactMismatch, match="no hulls: use it as fixed@FILE"):
        resolve(replace(budget(), hull={}))


def test_a_demand_of_another_shape_is_refused():
    demand = Demand(shape=replace(SHAPE, kv_heads=1), tokens=(9,), totals=(9,), floors=(1,))
    with pytest.raises(ArtifactMismatch, match="kv_heads=1"):
        LUKV(budget=budget()).allocate(torch.zeros(1, 1, 1, 9), torch.ones(1, 9, dtype=torch.bool), [0], demand)


def test_compress_refuses_a_budget_of_another_model():
    model, other = tiny_model(), tiny_model("qwen3")
    assert view(model).shape == view(other).shape
    made = budget(view(model).shape, config_hash=view(model).config_hash)
    method = Method(scorer=SCORERS["keydiff"].make(), allocator=LUKV(budget=made))
    headwise.compress(model, random_ids(1, 40), method, keep=0.5)
    with pytest.raises(ArtifactMismatch, match="this model's is"):
        headwise.compress(other, random_ids(1, 40), method, keep=0.5)


def test_without_a_shipped_budget_the_message_says_what_to_do():
    model = tiny_model()
    with pytest.raises(BadInput, match=r"no budget of KeyDiff .*headwise profile.*headwise solve.*scorer\+lukv@FILE"):
        headwise.compress(model, random_ids(1, 40), "keydiff+lukv", keep=0.5)


def test_a_shipped_budget_is_found_by_scorer_and_model(tmp_path, monkeypatch):
    folder = tmp_path / "reference" / "budgets"
    folder.mkdir(parents=True)
    budget(scorer="snapkv", config_hash="abc").save(folder / "a.safetensors")
    budget(config_hash="other").save(folder / "b.safetensors")
    budget(config_hash="abc", calibration="mine").save(folder / "c.safetensors")
    monkeypatch.setattr("headwise.allocate.profiled.files", lambda package: tmp_path)
    found = ShippedLUKV().resolve(SCORERS["keydiff"].make(), SHAPE, "abc")
    assert found.budget.origin.calibration == "mine"
    with pytest.raises(BadInput, match="no budget of Knorm is shipped"):
        ShippedLUKV().resolve(SCORERS["knorm"].make(), SHAPE, "abc")


def test_an_unresolved_shipped_budget_allocates_nothing():
    demand = Demand(shape=SHAPE, tokens=(9,), totals=(9,), floors=(1,))
    with pytest.raises(BadInput, match="must be resolved"):
        ShippedLUKV().allocate(torch.zeros(1, 1, 2, 9), torch.ones(1, 9, dtype=torch.bool), [0], demand)


def test_provenance_names_the_hulls_and_not_the_table():
    made = budget()
    found = LUKV(budget=made).provenance()
    assert json.loads(json.dumps(found))["name"] == "LUKV"
    assert found["budget"]["scorer"] == "keydiff"
    assert len(json.dumps(found)) < 500
    assert found == LUKV(budget=replace(made, fractions=made.fractions / 2)).provenance()
    assert found != LUKV(budget=budget(seed=1)).provenance()


def test_protection_comes_from_the_profile():
    method = Method(scorer=SCORERS["snapkv"].make(), allocator=LUKV(budget=budget(scorer="snapkv")))
    assert (method.sink, method.window) == (0, 32)


# --- end to end ---


@pytest.fixture
def run(model_folders, tmp_path, monkeypatch, capsys):
    """Run a command: what it printed as JSON."""

    def call(line):
        names = {**model_folders, "dir": tmp_path}
        monkeypatch.setattr(sys, "argv", ["headwise", *(part.format(**names) for part in shlex.split(line))])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert not caught.value.code, err
        return json.loads(out)

    return call


def test_from_a_profile_to_an_evaluation_on_the_command_line(run, tmp_path):
    sample = generate("niah_multikey_dense", lexicon=REFERENCE_LEXICON, length=200, seed=0, index=0, split="demo")
    record = {"context": sample.context, "questions": [q.prompt for q in sample.questions[:3]], "domain": "records"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    (tmp_path / "more.txt").write_text(sample.context[:600])
    made = run(
        "profile -m {qwen3} --scorer keydiff,snapkv --data {dir} --steps 3 --normalization none --temperature 0.7 "
        "--seed 5 -o {dir}/p.safetensors --json"
    )
    assert made == {"profile": str(tmp_path / "p.safetensors"), "contexts": 2, "scorers": ["keydiff", "snapkv"]}
    for scorer in ("keydiff", "snapkv"):
        solved = run(f"solve {{dir}}/p.safetensors --scorer {scorer} -o {{dir}}/{scorer} --check --json")
        assert all(row["uniform"] <= row["optimum"] and row["gap"] < 0.2 for row in solved["check"])
    line = "eval -m {qwen3} --tasks mini-ruler:niah_single --samples 1 --length 200 --keep 0.3 --json --methods "
    rows = run(line + "keydiff+lukv@{dir}/keydiff,snapkv+lukv@{dir}/snapkv,keydiff+fixed@{dir}/keydiff")
    for row in rows:
        assert row["kv_fraction"] == pytest.approx(0.3, abs=0.005)
