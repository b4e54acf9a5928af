"""LUKV: counts from a Budget's hulls for any total; what it refuses; from a profile to an evaluation."""

import heapq
import json
import shlex
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from families import random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

import headwise
from headwise import cli
from headwise.artifacts.budget import Budget
from headwise.artifacts.hulls import concave_hulls
from headwise.artifacts.origin import Origin
from headwise.cache.reading import read
from headwise.errors import ArtifactMismatch, BadInput, BudgetInfeasible
from headwise.interfaces import Demand
from headwise.methods.allocate.profiled import LUKV, ShippedLUKV, published_counts
from headwise.methods.method import Method
from headwise.methods.registry import SCORERS
from headwise.methods.select import protected_mask
from headwise.models.families import view
from headwise.shapes import ModelShape
from headwise.tasks.mini_ruler.lexicon import REFERENCE_LEXICON
from headwise.tasks.mini_ruler.suite import generate

SHAPE = ModelShape(num_layers=4, layers=(0, 2, 3), kv_heads=2, query_heads=4, head_dim=8)
CASES = settings(max_examples=40, deadline=None, derandomize=True)


RANKS = 64
PROTECTED = 5  # one sink, a window of four


def curves_for(heads, seed=0, protected=PROTECTED):
    """Marginal utilities of `protected` tokens and of 64 shares; some heads need no protected tokens at all."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(heads, protected, generator=generator, dtype=torch.float64) ** 4 / RANKS
    first *= torch.rand(heads, 1, generator=generator) < 0.7
    return first, torch.rand(heads, RANKS, generator=generator, dtype=torch.float64) ** 4 / 8


def budget(shape=SHAPE, scorer="keydiff", seed=0, sink=1, window=4, **origin):
    """Hulls that say something, and a table that is no use."""
    (first, rest), made = curves_for(shape.num_heads, seed, sink + window), SCORERS[scorer].make()
    return Budget(
        ratios=torch.tensor([0.5]),
        fractions=torch.full((1, len(shape.layers), shape.kv_heads), 0.5),
        origin=Origin(
            shape=shape,
            scorer=scorer,
            scorer_parameters=made.provenance(),
            sink=sink,
            window=window,
            **origin,
        ),
        hull={"protected": first, **asdict(concave_hulls(rest))},
    )


def counts(allocator, tokens, totals, *, size=None, hard=False):
    """Counts [L, B, H] of a left-padded batch, asked layer by layer; if hard, protection is a floor."""
    size = size or max(tokens)
    valid, origin = torch.arange(size) >= size - torch.tensor(tokens)[:, None], allocator.budget.origin
    protected = protected_mask(valid, origin.sink, origin.window)
    demand = Demand(
        shape=origin.shape,
        tokens=tuple(tokens),
        totals=tuple(totals),
        floors=tuple(max(1, min(length, origin.sink + origin.window) * hard) for length in tokens),
        protected=tuple(protected.sum(-1).tolist()),
    )
    candidates = valid & ~protected
    scores = torch.zeros(1, len(tokens), 2, size)
    return torch.cat([allocator.allocate(scores, candidates, [at], demand) for at in range(len(demand.shape.layers))])


def by_heap(heads, tokens, total, *, floor=1, seed=0, protected=PROTECTED):
    """Entry by entry: the largest marginal utility on any head's hull, again and again; the first head wins ties.

    `tokens` beyond the protected ones must be a multiple of the ranks, so that a share is a whole number of entries.
    """
    waiting, found, wide = [], [floor] * heads, max(0, tokens - protected) // RANKS
    for first, rest in zip(*(curves.numpy() for curves in curves_for(heads, seed, protected)), strict=True):
        entries = np.concatenate([first[:tokens], np.repeat(rest / max(wide, 1), wide)])
        assert len(entries) == tokens
        waiting.append(list(IsotonicRegression(increasing=False).fit_transform(np.arange(tokens), entries)))
    tops = [(-row[floor], head) for head, row in enumerate(waiting) if floor < tokens]
    heapq.heapify(tops)
    for _ in range(total - heads * floor):
        _, head = heapq.heappop(tops)
        found[head] += 1
        if found[head] < tokens:
            heapq.heappush(tops, (-waiting[head][found[head]], head))
    return found


# --- counts ---


@pytest.mark.parametrize("shares", [1, 3, 7], ids="{} entries per share".format)
def test_any_total_is_what_a_heap_on_the_hulls_would_share(shares):
    """Whatever the length of the context: protected tokens are worth what they are, the others share the profile's."""
    allocator, tokens = LUKV(budget=budget()), PROTECTED + RANKS * shares
    least = max(1, tokens // 100)
    for total in {6 * least, *range(6 * least, 6 * tokens, 1 + 17 * shares), 6 * tokens}:
        found = counts(allocator, [tokens], [total]).flatten().tolist()
        assert found == by_heap(6, tokens, total, floor=least)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_in_a_context_that_is_protected_whole_its_tokens_compete_one_by_one(tokens):
    for total in range(6, 6 * tokens + 1):
        assert counts(LUKV(budget=budget()), [tokens], [total]).flatten().tolist() == by_heap(6, tokens, total)


def test_a_head_may_keep_fewer_than_the_protected():
    found = counts(LUKV(budget=budget()), [197], [120]).flatten()
    assert found.min() < PROTECTED < found.max()


def test_protection_that_is_named_is_a_floor():
    found = counts(LUKV(budget=budget()), [197], [120], hard=True).flatten()
    assert found.min() == PROTECTED
    assert int(found.sum()) == 120


def test_every_head_keeps_one_percent():
    tokens = PROTECTED + RANKS * 16
    found = counts(LUKV(budget=budget()), [tokens], [120]).flatten().tolist()
    assert found == by_heap(6, tokens, 120, floor=10)
    assert min(found) == 10
    assert max(found) > 20


def test_a_larger_protection_replaces_the_one_percent():
    assert int(counts(LUKV(budget=budget(window=19)), [1000], [240], hard=True).min()) == 20


def test_a_budget_of_less_than_one_percent_is_shared_evenly():
    assert counts(LUKV(budget=budget()), [1000], [33]).flatten().tolist() == [6, 6, 6, 5, 5, 5]


@CASES
@given(
    tokens=st.integers(1, 900),
    sink=st.integers(0, 3),
    window=st.integers(0, 9),
    seed=st.integers(0, 9),
    hard=st.booleans(),
)
def test_exact_totals_within_bounds_and_more_never_takes(tokens, sink, window, seed, hard):
    """Nested from the bare floors to everything: floors that grew with the total once took entries back below 1%."""
    allocator, floor = LUKV(budget=budget(seed=seed, sink=sink, window=window)), max(1, min(tokens, sink + window))
    floor = floor if hard else 1
    least, most = 6 * floor, 6 * tokens
    before = torch.full((3, 1, 2), floor)
    for total in sorted({*range(least, min(least + 30, most)), *range(least, most, 1 + most // 40), most}):
        found = counts(allocator, [tokens], [total], hard=hard)
        assert int(found.sum()) == total
        assert (found >= before).all()
        assert (found <= tokens).all()
        before = found


def test_rows_of_a_batch_do_not_see_each_other():
    allocator, rows = LUKV(budget=budget()), [(300, 500), (40, 200), (1, 6), (3, 9), (299, 1794)]
    tokens, totals = zip(*rows, strict=True)
    together = counts(allocator, tokens, totals)
    for row, (length, total) in enumerate(rows):
        assert counts(allocator, [length], [total], size=300).equal(together[:, row : row + 1])


def test_infeasible_totals_are_refused():
    for hard, total, words in (
        (True, 50, "sink and window need 20"),
        (False, 5, "every head needs 1 of 100 tokens"),
        (False, 601, "hold only 600"),
    ):
        with pytest.raises(BudgetInfeasible, match=words):
            counts(LUKV(budget=budget(sink=4, window=16)), [100], [total], hard=hard)


# --- in a model ---


def method_for(model, scorer="expected", sink=4, window=4, **protection):
    made = budget(view(model).shape, scorer, sink=sink, window=window, config_hash=view(model).config_hash)
    return Method(scorer=SCORERS[scorer].make(), allocator=LUKV(budget=made), **protection)


def padded_batch(*tokens):
    ids, mask = random_ids(len(tokens), max(tokens)), torch.ones(len(tokens), max(tokens), dtype=torch.long)
    for row, length in enumerate(tokens):
        ids[row, : max(tokens) - length] = mask[row, : max(tokens) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def protected_that_stay(cache, row, tokens, sink, window):
    """Of each head: how many it keeps, and which protected positions are among them."""
    protected = {*range(sink), *range(tokens - window, tokens)}
    layers, _, heads = cache.lengths.shape
    kept = [cache.positions(layer, row, head).tolist() for layer in range(layers) for head in range(heads)]
    return [(len(positions), set(positions) & protected) for positions in kept]


def test_a_model_s_heads_keep_what_the_hulls_say():
    """Left padding and sliding layers included; a head with few entries has first tokens, then the latest."""
    lengths = (8 + RANKS, 8, 8 + 2 * RANKS)  # the second row is protected whole
    model, batch = tiny_model("gemma3_text"), padded_batch(*lengths)
    method, few = method_for(model), 0
    cache = headwise.compress(model, method=method, keep=0.15, **batch)
    for row, tokens in enumerate(lengths):
        total = round(0.15 * tokens * 4)
        assert cache.lengths[:, row].flatten().tolist() == by_heap(4, tokens, total, protected=8)
        order = [0, 1, 2, 3, tokens - 1, tokens - 2, tokens - 3, tokens - 4]
        for count, protected in protected_that_stay(cache, row, tokens, 4, 4):
            assert protected == set(order[:count])
            few += count < 8
    assert 4 < few < 12
    cut = read(model, batch["input_ids"], [method.scorer], attention_mask=batch["attention_mask"]).cut(method, 0.15)
    assert cut.lengths.equal(cache.lengths)
    assert all(cut.positions(1, row, head).equal(cache.positions(1, row, head)) for row in range(3) for head in (0, 1))


@pytest.mark.parametrize(
    ("protection", "sink", "window"),
    [({"protect_sink": 4}, 4, 4), ({"protect_window": 6}, 4, 6), ({"protect_sink": 1, "protect_window": 0}, 1, 0)],
)
def test_protection_that_a_method_names_is_kept_by_every_head(protection, sink, window):
    model, batch = tiny_model(), padded_batch(90, 40)
    cache = headwise.compress(model, method=method_for(model, **protection), keep=0.3, **batch)
    for row, tokens in enumerate((90, 40)):
        assert int(cache.lengths[:, row].sum()) == round(0.3 * tokens * 6)
        for _, protected in protected_that_stay(cache, row, tokens, sink, window):
            assert len(protected) == sink + window


@pytest.mark.parametrize("allocator", ["uniform", "adakv", "pyramid", "global", "fixed"])
def test_under_every_other_allocator_all_heads_keep_what_is_protected(tmp_path, allocator):
    model, batch = tiny_model(), padded_batch(90, 60)
    if allocator == "fixed":
        starved = replace(method_for(model, "snapkv", 4, 32).allocator.budget, hull={})
        starved.save(tmp_path / "b")
        allocator = f"fixed@{tmp_path / 'b'}"
    cache = headwise.compress(model, method=f"snapkv+{allocator}", keep=0.61, **batch)
    sink = 4 if allocator.startswith("fixed") else 0
    for row, tokens in enumerate((90, 60)):
        assert int(cache.lengths[:, row].sum()) == round(0.61 * tokens * 6)
        for _, protected in protected_that_stay(cache, row, tokens, sink, 32):
            assert len(protected) == sink + 32


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
        ({"shape": replace(SHAPE, layers=(0, 1, 2))}, r"3 layers \(0, 2, 3\) of 2 KV heads.*3 layers \(0, 1, 2\) of"),
        ({"shape": replace(SHAPE, kv_heads=1)}, "3 layers of 2 KV heads.*3 layers of 1 KV heads"),
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
    demand = Demand(shape=replace(SHAPE, kv_heads=1), tokens=(9,), totals=(9,), floors=(1,), protected=(0,))
    with pytest.raises(ArtifactMismatch, match="3 layers of 1 KV heads"):
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
    monkeypatch.setattr("headwise.artifacts.shipped.files", lambda package: tmp_path)
    found = ShippedLUKV().resolve(SCORERS["keydiff"].make(), SHAPE, "abc")
    assert found.budget.origin.calibration == "mine"
    with pytest.raises(BadInput, match="no budget of Knorm is shipped"):
        ShippedLUKV().resolve(SCORERS["knorm"].make(), SHAPE, "abc")


def test_an_unresolved_shipped_budget_allocates_nothing():
    demand = Demand(shape=SHAPE, tokens=(9,), totals=(9,), floors=(1,), protected=(0,))
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


def test_protection_comes_from_profile_and_scorer():
    method = Method(scorer=SCORERS["snapkv"].make(), allocator=LUKV(budget=budget(scorer="snapkv")))
    assert (method.sink, method.window) == (1, 32)  # the scorer's own window is longer than the budget's
    assert not method.keeps_protected
    assert replace(method, protect_window=8).keeps_protected


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
        "profile -m {qwen3} --scorer keydiff,snapkv --data {dir} --steps 3 --sink 2 --window 8 --temperature 0.7 "
        "--seed 5 --published --entries native,int8,int4 -o {dir}/p.safetensors --json"
    )
    assert made == {"profile": str(tmp_path / "p.safetensors"), "contexts": 2, "scorers": ["keydiff", "snapkv"]}
    for scorer in ("keydiff", "snapkv"):
        solved = run(f"solve {{dir}}/p.safetensors --scorer {scorer} -o {{dir}}/{scorer} --check --json")
        assert all(row["uniform"] <= row["optimum"] for row in solved["check"])
        assert np.mean([row["gap"] for row in solved["check"]]) < 0.05
        paper = run(f"solve {{dir}}/p.safetensors --scorer {scorer} -o {{dir}}/paper --loss normalised --check --json")
        assert all(row["gap"] < 0.2 for row in paper["check"])
    run("solve {dir}/p.safetensors --scorer snapkv -o {dir}/averaged --loss published --json")
    line = "eval -m {qwen3} --tasks mini-ruler:niah_single --samples 1 --length 200 --keep 0.3 --json --methods "
    rows = run(
        line + "keydiff+lukv@{dir}/keydiff,snapkv+lukv@{dir}/snapkv,keydiff+fixed@{dir}/keydiff,"
        "snapkv+fixed@{dir}/averaged"
    )
    assert len(rows) == 4
    for row in rows:
        assert row["kv_fraction"] == pytest.approx(0.3, abs=0.005)
    line = line.replace("0.3", "30%bytes --entries int4,auto")
    (small, auto) = run(line + "keydiff+lukv@{dir}/keydiff")
    assert (small["entries"], auto["entries"]) == ("int4", "auto")
    assert small["kv_fraction"] <= 0.3 + 1e-9
    assert 0.25 < auto["kv_fraction"] <= 0.3 + 1e-9


def test_protected_tokens_that_are_a_floor_are_paid_for():
    """A head that does not need its protected tokens has them anyway: that must not make it look dear."""
    rest = torch.tensor([[0.5, 0.1, 0.1, 0, 0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2, 0, 0, 0]])
    first = torch.tensor([[0.0, 0.0], [0.1, 0.1]])
    found = published_counts(torch.cat([first, rest], dim=-1)[None], 2, 10)
    assert found[29].tolist() == [[3, 3]]
