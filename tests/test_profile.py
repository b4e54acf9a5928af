"""Profiles: what is pooled and summed, resuming, sharing the work between processes, and what is refused."""

import json
import os
from dataclasses import dataclass, replace
from itertools import count

import file_kinds
import numpy as np
import pytest
import torch
from families import random_ids, tiny_model
from importance import entry_importance
from killing import ended, forked, killed_at
from launching import fork
from random_gates import gates_file
from ranks import Rank

import headwise
from headwise.artifacts.hulls import concave_hulls, share
from headwise.artifacts.profile import Profile
from headwise.artifacts.tensors import describe, read_tensors, write_tensors
from headwise.cache.reading import read
from headwise.errors import ArtifactMismatch, BadInput
from headwise.methods.allocate.apportion import even_shares
from headwise.methods.registry import SCORERS
from headwise.models import loading as models
from headwise.models.families import view
from headwise.offline import profile as module
from headwise.offline.calibration import Example, encode
from headwise.offline.losses import RANKS, OutputLoss, keeping_order, marginal_utility
from headwise.offline.profile import CURVES, Lesson, Settings, measure, profile
from headwise.offline.solve import solve
from headwise.offline.watch import Sampling, decode

QUICK = Settings(steps=2, sink=1, window=3)
WORDS = "locker apple red stone. the key was under the old tower, near a river. "
EXAMPLES = [
    Example(context=WORDS * 2, questions=("? locker apple", "? the red tower"), domain="records"),
    Example(context=f"then {WORDS * 3}", questions=("? locker key",), domain="prose"),
    Example(context=f"she had a {WORDS * 3}"),
    Example(context=f"he saw a {WORDS * 2}", questions=("? old", "? river", "? who"), domain="records"),
]


@pytest.fixture(scope="session")
def loaded(model_folders):
    """Model and tokenizer."""
    return models.load(str(model_folders["qwen3"]), device="cpu")


def lesson(context, questions, texts=()):
    return Lesson(context=context, questions=tuple(questions), texts=tuple(texts))


def make(loaded, out, examples=EXAMPLES, scorers=("keydiff", "expected"), **options):
    profile(*loaded, examples, scorers, out, **{"settings": QUICK, **options})
    return Profile.load(out)


@pytest.fixture(scope="session")
def whole(loaded, tmp_path_factory):
    """A profile made at one go, and its path."""
    out = tmp_path_factory.mktemp("profile") / "p.safetensors"
    return make(loaded, out), out


def assert_same(found, expected):
    assert found.curves.keys() == expected.curves.keys()
    for name, curves in expected.curves.items():
        assert found.curves[name].keys() == curves.keys()
        assert all(found.curves[name][loss].equal(curve) for loss, curve in curves.items())
    assert found.published.keys() == expected.published.keys()
    assert all(found.published[name].equal(table) for name, table in expected.published.items())
    for name in ("domains", "contexts", "protection", "parameters", "settings", "origin"):
        assert getattr(found, name) == getattr(expected, name)


# --- for a learned scorer ---


def test_learned_scores_get_budgets_of_their_own(loaded, tmp_path):
    """lkv-t@FILE+lukv@BUDGET: profiled, solved, and used in a cache; refused for other gates."""
    model, _ = loaded
    gates, other = gates_file(tmp_path, model), gates_file(tmp_path, model, seed=1)
    found = make(loaded, tmp_path / "p", scorers=[f"lkv-t@{gates}"])
    solve(found, f"lkv-t@{gates}").save(tmp_path / "b.safetensors")
    ids, heads = random_ids(1, 60), view(model).shape.num_heads
    cut = headwise.compress(model, ids, f"lkv-t@{gates}+lukv@{tmp_path / 'b.safetensors'}", keep=0.5)
    assert int(cut.lengths.sum()) == 30 * heads
    assert cut.lengths.unique().numel() > 2
    with pytest.raises(ArtifactMismatch):
        headwise.compress(model, ids, f"lkv-t@{other}+lukv@{tmp_path / 'b.safetensors'}", keep=0.5)


# --- entries in fewer bits ---


KINDS = ("int8", "k8v4", "int4")


@pytest.fixture(scope="module")
def with_kinds(loaded, tmp_path_factory):
    """A profile of all kinds of entries, in another order than theirs."""
    settings = replace(QUICK, entries=("int4", "native", "k8v4", "int8"))
    return make(loaded, tmp_path_factory.mktemp("profile") / "p", settings=settings, scorers=["keydiff"])


def test_curves_of_fewer_bits_lie_below_those_of_native_entries_and_leave_them_as_they_are(whole, with_kinds):
    native, found = whole[0].curves["keydiff"], with_kinds.curves["keydiff"]
    assert all(found[name].equal(curve) for name, curve in native.items())
    assert found.keys() - native.keys() == set(KINDS)
    assert with_kinds.kinds("keydiff") == KINDS
    totals = [float(found[kind].double().sum(dim=(1, 2, 3)).mean()) for kind in KINDS]
    assert 1 > totals[0] > totals[1] > totals[2] > 0.5
    assert totals[0] > 0.999
    # the first tokens are native in every kind
    assert all(found[kind][..., :1].equal(found["output"][..., :1]) for kind in KINDS)


def test_a_budget_knows_what_bits_cost_if_its_profile_does(loaded, whole, with_kinds, tmp_path):
    with pytest.raises(BadInput, match="needs a budget that knows what fewer bits cost"):
        headwise.compress(*used(loaded, whole[0], tmp_path), keep="30%bytes", entries="auto")
    assert solve(with_kinds, "keydiff", loss="raw").kinds == {}
    cache = headwise.compress(*used(loaded, with_kinds, tmp_path), keep="30%bytes", entries="auto")
    assert 0.28 < cache.nbytes / (60 * view(loaded[0]).shape.num_heads * 2 * view(loaded[0]).shape.head_dim * 4) <= 0.3
    assert any(layer.segments.quantised for layer in cache.frozen_layers)


def test_what_bits_lose_counts_as_much_as_asked(with_kinds):
    """Between the curve of native entries and that of the kind: less weight, more utility for entries in few bits."""
    made = {weight: solve(with_kinds, "keydiff", bits_weight=weight) for weight in (0.0, 0.1, 1.0, 2.0)}
    totals = []
    for weight, budget in made.items():
        assert all(budget.hull[name].equal(made[1].hull[name]) for name in budget.hull)
        hull = budget.kinds["int4"]
        totals.append(float(hull["protected"].sum() + (hull["width"] * hull["slope"]).sum()))
        lost = [float(with_kinds.curve("keydiff", loss=loss).sum()) for loss in ("output", "int4")]
        assert totals[-1] == pytest.approx(lost[0] + weight * (lost[1] - lost[0]), rel=1e-9)
    assert totals == sorted(totals, reverse=True)
    assert all(made[0].kinds["int4"][name].equal(tensor) for name, tensor in made[0].hull.items())
    plain = solve(with_kinds, "keydiff")
    assert all(plain.kinds["int4"][name].equal(tensor) for name, tensor in made[0.1].kinds["int4"].items())
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(BadInput, match=r"bits_weight=.*: choose a number from 0 on"):
            solve(with_kinds, "keydiff", bits_weight=wrong)


def used(loaded, found, folder):
    """A model, a context, and a method with the budget that is solved from a profile."""
    solve(found, "keydiff").save(folder / "b.safetensors")
    return loaded[0], random_ids(1, 60), f"keydiff+lukv@{folder / 'b.safetensors'}"


def test_the_bundled_model_loses_more_by_fewer_bits(tmp_path):
    settings = replace(QUICK, entries=KINDS)
    found = make(models.load("reference", device="cpu"), tmp_path / "p", EXAMPLES[:1], ["keydiff"], settings=settings)
    totals = [float(found.curves["keydiff"][name].double().sum()) for name in ("output", *KINDS)]
    assert totals[0] == pytest.approx(1, abs=1e-5)
    assert totals[0] > totals[1] > totals[2] > totals[3] > 0.8
    budget = solve(found, "keydiff")
    assert budget.kinds.keys() == set(KINDS)


def test_unknown_kinds_are_refused():
    for name in ("int3", "auto"):
        with pytest.raises(BadInput, match="choose native, int8, k8v4, int4"):
            Settings(entries=(name,))


# --- what is in it ---


def test_a_profile_says_what_it_was_made_from(loaded, whole):
    found, out = whole
    model, _ = loaded
    assert (found.domains, found.contexts) == (("records", "prose", "text"), (2, 1, 1))
    assert found.protection == {"keydiff": (1, 3), "expected": (4, 3)}  # the scorer's own, where it is more
    assert found.parameters["keydiff"] == SCORERS["keydiff"].make().provenance()
    assert found.settings == {
        "steps": 2,
        "sampling": {"temperature": 0.0, "seed": 0},
        "sink": 1,
        "window": 3,
        "published": False,
        "futures": ["answers"],
        "queries": 128,
        "entries": ["native"],
    }
    assert found.origin.shape == view(model).shape
    assert found.origin.config_hash == view(model).config_hash
    assert found.origin.model == "qwen3"
    assert found.published == {}
    for name, curves in found.curves.items():
        assert curves.keys() == set(CURVES)
        for loss, curve in curves.items():
            assert curve.shape == (3, 3, 2, sum(found.protection[name]) + RANKS)
            assert loss == "output" or (curve >= 0).all()
            torch.testing.assert_close(curve.sum(dim=(1, 2, 3)), torch.ones(3), rtol=1e-5, atol=0)
    assert describe(out)["kind"] == "profile"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.fixture(scope="module")
def single(loaded):
    """A context, its questions, a scorer, what is measured for it, and its reading."""
    model, tokenizer = loaded
    context, questions = encode(tokenizer, EXAMPLES[3], device="cpu")
    scorer = SCORERS["expected"].make()
    found = measure(model, lesson(context, questions), [scorer], replace(QUICK, published=True))[scorer]
    return context, questions, scorer, found, read(model, context, [scorer])


@pytest.mark.parametrize("loss", ["normalised", "raw", "ideal"])
def test_a_curve_is_the_pooled_importance_in_the_order_of_keeping(loaded, single, loss):
    """First tokens, last tokens backwards, then the scorer's order, or that of importance itself."""
    context, questions, scorer, found, reading = single
    normalization, tokens = "layer" if loss == "normalised" else "none", context.shape[1]
    pooled = torch.stack(
        [
            entry_importance(loaded[0], reading.whole, [question], steps=2, normalization=normalization)[0]
            for question in questions
        ]
    ).amax(0)
    ranking = pooled if loss == "ideal" else reading.scores[scorer][:, 0]
    first = [0, 1, 2, 3, tokens - 1, tokens - 2, tokens - 3]
    rest = 4 + ranking[..., 4:-3].argsort(dim=-1, descending=True)
    order = torch.cat([torch.tensor(first).expand(3, 2, -1), rest], dim=-1)
    gained = pooled.double().gather(-1, order).cumsum(-1).flatten(0, 1)
    at = [*range(1, 8), *np.linspace(7, tokens, RANKS + 1)[1:]]
    by_hand = np.stack([np.interp(at, range(tokens + 1), [0, *row]) for row in gained.tolist()])
    shares = by_hand / by_hand[:, -1].sum()
    np.testing.assert_allclose(found[loss].flatten(0, 1).cumsum(-1), shares, rtol=1e-3)


def test_changes_of_the_output_are_pooled_over_the_questions(loaded, single):
    """Not the sum of the questions' own losses: a change that all questions share counts in none of them."""
    _, questions, scorer, found, reading = single
    order = keeping_order(reading.scores[scorer][:, 0], 4, 3)
    pooled, alone = OutputLoss(reading.whole, order, 7), 0
    for question in questions:
        loss = OutputLoss(reading.whole, order, 7)
        list(decode(loaded[0], reading.whole, [question], [pooled, loss], steps=2))
        alone = alone + loss.loss()
    expected = pooled.marginal()
    torch.testing.assert_close(found["output"], expected / expected.sum(), rtol=1e-3, atol=1e-7)
    assert (pooled.loss() >= alone - 1e-6 * alone.max()).all()
    assert (pooled.loss() > 1.01 * alone).any()


def test_published_is_the_mean_of_the_solutions_of_single_questions(loaded):
    model, tokenizer = loaded
    context, questions = encode(tokenizer, EXAMPLES[3], device="cpu")
    scorer, tokens = SCORERS["keydiff"].make(), context.shape[1]
    settings = replace(QUICK, sink=0, window=0, published=True)
    found = measure(model, lesson(context, questions), [scorer], settings)[scorer]["published"]
    reading, counts = read(model, context, [scorer]), []
    order = reading.scores[scorer][:, 0].argsort(dim=-1, descending=True, stable=True)
    for question in questions:
        importance = entry_importance(model, reading.whole, [question], steps=2)[0]
        hulls = concave_hulls(marginal_utility(importance, order, 0).flatten(0, 1))
        totals = [round(percent * 6 * tokens / 100) for percent in (1, 10, 50, 99)]
        rows = [share(hulls, entries=tokens, total=total, floor=1) for total in totals[1:]]
        counts.append(torch.stack([even_shares(torch.tensor(totals[0]), 6), *rows]))
    assert not counts[0].equal(counts[1])
    by_hand = torch.stack(counts).double().mean(0) / tokens
    torch.testing.assert_close(found[[0, 9, 49, 98]].flatten(1), by_hand)


def test_every_question_keeps_what_is_protected_or_shares_evenly(single):
    context, _, _, found, _ = single
    tokens, counts = context.shape[1], found["published"] * context.shape[1]
    for percent, row in enumerate(counts.flatten(1), start=1):
        total = round(percent * 6 * tokens / 100)
        assert float(row.sum()) == pytest.approx(total)
        assert float(row.min()) >= min(7, total // 6) - 1e-9


def test_published_solutions_are_stored_and_say_nothing_about_the_curves(loaded, whole, tmp_path):
    settings = replace(QUICK, published=True)
    found = make(loaded, tmp_path / "p", settings=settings)
    for name, curves in whole[0].curves.items():
        assert all(found.curves[name][loss].equal(curve) for loss, curve in curves.items())
        assert found.published[name].shape == (3, 99, 3, 2)
        assert (found.published[name].diff(dim=1) >= -1e-6).all()
    found.save(tmp_path / "again")
    assert_same(Profile.load(tmp_path / "again"), found)


def test_the_mean_of_a_domain_is_over_its_contexts(loaded, whole):
    model, tokenizer = loaded
    scorer = SCORERS["keydiff"].make()
    measured = [
        measure(model, lesson(*encode(tokenizer, example, device="cpu")), [scorer], QUICK)[scorer]
        for example in (EXAMPLES[0], EXAMPLES[3])
    ]
    for loss, curve in whole[0].curves["keydiff"].items():
        mean = sum(curves[loss].float().double() for curves in measured) / 2
        torch.testing.assert_close(curve[0], mean.float())


def test_settings_matter(loaded, whole, tmp_path):
    for number, settings in enumerate(
        [replace(QUICK, steps=3), replace(QUICK, sampling=Sampling(temperature=3.0, seed=1)), replace(QUICK, sink=4)]
    ):
        other = make(loaded, tmp_path / f"{number}", settings=settings, scorers=["keydiff"])
        for loss, curve in whole[0].curves["keydiff"].items():
            assert not other.curves["keydiff"][loss][..., -RANKS:].allclose(curve[..., -RANKS:], rtol=1e-3)
        assert other.origin.calibration != whole[0].origin.calibration


def test_scorers_do_not_change_each_other(loaded, whole, tmp_path):
    alone = make(loaded, tmp_path / "p", scorers=["expected"])
    for loss, curve in whole[0].curves["expected"].items():
        assert alone.curves["expected"][loss].equal(curve)


def test_domains_are_weighted_by_their_contexts_or_as_asked(whole):
    found = whole[0]
    for loss, curves in found.curves["keydiff"].items():
        curves = curves.double()
        expected = (2 * curves[0] + curves[1] + curves[2]) / 4
        torch.testing.assert_close(found.curve("keydiff", loss=loss), expected)
        weighted = found.curve("keydiff", {"prose": 3.0, "text": 1.0}, loss=loss)
        torch.testing.assert_close(weighted, (3 * curves[1] + curves[2]) / 4)


@pytest.mark.parametrize("weights", [{"records": 0.0}, {"records": -1.0, "text": 2.0}, {"text": float("nan")}])
def test_domain_weights_that_mean_nothing(whole, weights):
    with pytest.raises(BadInput, match="domain weights"):
        whole[0].curve("keydiff", weights)


def test_names_that_are_not_in_the_profile(whole):
    with pytest.raises(BadInput, match=r"no domain \['code'\]; it has records, prose, text"):
        whole[0].curve("keydiff", {"code": 1.0})
    with pytest.raises(BadInput, match="of expected, keydiff; it has no scorer 'snapkv'"):
        whole[0].curve("snapkv")
    with pytest.raises(BadInput, match="choose output, normalised, raw"):
        whole[0].curve("keydiff", loss="mean")
    with pytest.raises(BadInput, match="headwise profile --published"):
        whole[0].published_fractions("keydiff")


def test_save_and_load_give_back_every_bit(whole, tmp_path):
    whole[0].save(tmp_path / "again")
    assert_same(Profile.load(tmp_path / "again"), whole[0])


# --- futures that are read ---


def reread(loaded, example=EXAMPLES[0], **options):
    """A lesson and its curves for KeyDiff."""
    from headwise.offline.profile import _lesson

    scorer, settings = SCORERS["keydiff"].make(), replace(QUICK, **options)
    taught = _lesson(*loaded, example, [scorer], settings)
    return taught, measure(loaded[0], taught, [scorer], settings)[scorer]


def test_a_context_is_repeated_in_pieces(loaded, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 20)
    taught, _ = reread(loaded, futures=("repeat",))
    context = taught.context[0]
    assert taught.questions == ()
    assert torch.cat([piece.text for piece in taught.texts]).equal(context)
    assert len(taught.texts) == -(-len(context) // 20)
    at = 0
    for piece in taught.texts:  # the reference tokenizer does not know the instruction
        assert piece.opening.equal(context[max(0, at - 8) : at])
        at += len(piece.text)


def test_what_follows_is_read_after_the_context(loaded):
    @dataclass(frozen=True, kw_only=True)
    class Followed(Example):
        following: str = ""

    example = Followed(context=WORDS * 2, questions=("? who",), following="then the old red tower")
    taught, _ = reread(loaded, example, futures=("following",))
    (piece,) = taught.texts
    assert (taught.questions, len(piece.opening)) == ((), 0)
    assert loaded[1].decode(piece.text).split() == example.following.split()
    plain = replace(example, questions=())  # its last token is no part of the context
    taught, _ = reread(loaded, plain, futures=("following",))
    (piece,) = taught.texts
    whole = torch.cat([taught.context[0], piece.opening, piece.text])
    assert whole.tolist() == loaded[1](plain.context + plain.following)["input_ids"]


def test_all_futures_count(loaded):
    """Importance by its maximum, over the queries of answers and texts."""
    _, answers = reread(loaded)
    taught, both = reread(loaded, futures=("answers", "repeat"), queries=10_000)
    _, repeat = reread(loaded, futures=("repeat",), queries=10_000)
    assert len(taught.questions) == 2
    for loss in CURVES:
        assert not both[loss].allclose(answers[loss], rtol=1e-2)
        assert not both[loss].allclose(repeat[loss], rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"futures": ()}, "choose one or more of answers, repeat, following"),
        ({"futures": ("next",)}, "choose one or more of answers"),
        ({"queries": 0}, "at least one query"),
        ({"futures": ("repeat",), "published": True}, "needs the future 'answers'"),
    ],
)
def test_settings_that_mean_nothing(options, words):
    with pytest.raises(BadInput, match=words):
        Settings(**options)


# --- resuming ---


def interrupted_after(count, monkeypatch):
    """Let `measure` raise after so many contexts, as a kill would."""
    calls = []

    def limited(*arguments):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(module, "measure", limited)
    return calls


def test_a_killed_run_goes_on_where_it_was(loaded, whole, tmp_path, monkeypatch):
    out = tmp_path / "p"
    interrupted_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make(loaded, out)
    assert not out.exists()
    assert len(list((tmp_path / "p.parts").iterdir())) == 2
    calls = interrupted_after(99, monkeypatch)
    assert_same(make(loaded, out), whole[0])
    assert out.read_bytes() == whole[1].read_bytes()
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == [out]


def test_lost_parts_are_measured_again_and_reordered_data_reuses_them(loaded, tmp_path, monkeypatch):
    out = tmp_path / "p"
    interrupted_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make(loaded, out)
    min((tmp_path / "p.parts").iterdir()).unlink()
    calls = interrupted_after(99, monkeypatch)
    found = make(loaded, out, EXAMPLES[::-1])
    assert len(calls) == 2
    monkeypatch.undo()
    assert_same(found, make(loaded, tmp_path / "q", EXAMPLES[::-1]))


@pytest.mark.parametrize("change", ["model", "weights", "settings", "scorers"])
def test_parts_of_another_run_are_not_taken_up(loaded, whole, tmp_path, monkeypatch, model_folders, change):
    other, options = loaded, {}
    if change == "model":
        other = models.load(str(model_folders["base"]), device="cpu")
    elif change == "weights":
        model, tokenizer = models.load(str(model_folders["qwen3"]), device="cpu")
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)
        other = model, tokenizer
    else:
        options = {"settings": replace(QUICK, steps=1)} if change == "settings" else {"scorers": ["keydiff"]}
    out = tmp_path / "p"
    interrupted_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make(other, out, **options)
    calls = interrupted_after(99, monkeypatch)
    assert_same(make(loaded, out), whole[0])
    assert len(calls) == len(EXAMPLES)


def test_a_damaged_part_is_named_and_the_old_profile_stays(loaded, tmp_path, monkeypatch):
    out = tmp_path / "p"
    out.write_text("old")
    interrupted_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make(loaded, out)
    (part,) = (tmp_path / "p.parts").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    monkeypatch.undo()
    with pytest.raises(BadInput, match=part.name):
        make(loaded, out)
    assert out.read_text() == "old"


def test_the_same_example_twice_counts_twice(loaded, tmp_path, monkeypatch):
    calls = interrupted_after(99, monkeypatch)
    found = make(loaded, tmp_path / "p", [EXAMPLES[0], EXAMPLES[1], EXAMPLES[0]])
    assert (found.contexts, len(calls)) == ((2, 1), 2)


def test_progress_is_told_from_nothing_to_everything(loaded, tmp_path):
    seen = []
    make(loaded, tmp_path / "p", progress=lambda done, total: seen.append((done, total)))
    assert (seen[0], seen[-1]) == ((0, 4), (4, 4))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {done for done, _ in seen} > set(range(5))  # and parts of contexts
    assert {total for _, total in seen} == {4}


def test_progress_of_a_run_that_goes_on_begins_with_what_is_there(loaded, tmp_path, monkeypatch):
    seen = []
    interrupted_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make(loaded, tmp_path / "p", EXAMPLES[::-1])
    monkeypatch.undo()
    make(loaded, tmp_path / "p", progress=lambda done, total: seen.append(done))
    assert (seen[0], seen[-1]) == (2, 4)


# --- several processes ---


def test_processes_share_the_contexts(loaded, whole, tmp_path, monkeypatch):
    """Rank 1 measures every second context and leaves writing to rank 0, which measures the others."""
    out, second = tmp_path / "p", Rank(1, 2)
    calls = interrupted_after(99, monkeypatch)
    profile(*loaded, EXAMPLES, ["keydiff", "expected"], out, settings=QUICK, processes=second)
    assert (len(calls), second.waits, out.exists()) == (2, 2, False)
    assert_same(make(loaded, out, processes=Rank(0, 2)), whole[0])
    assert len(calls) == 4


def lines(path):
    records = [{"context": e.context, "questions": e.questions, "domain": e.domain} for e in EXAMPLES]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.slow
def test_two_processes_give_what_one_gives(model_folders, whole, tmp_path):
    """Without a GPU accelerate once took both for the only one: each did all the work and wrote the file."""
    out = tmp_path / "p.safetensors"
    command = f"profile --model {model_folders['qwen3']} --data {lines(tmp_path / 'data.jsonl')} --out {out}"
    said = fork(f"{command} --scorer keydiff,expected --steps 2 --sink 1 --window 3 --device cpu --json")
    assert json.loads(said) == {"profile": str(out), "contexts": 4, "scorers": ["keydiff", "expected"]}
    assert_same(Profile.load(out), whole[0])
    assert not out.with_name("p.safetensors.parts").exists()


# --- what is refused, before anything is measured or written ---

LONG = Example(context=WORDS * 80, questions=("? who",))
REFUSED = {
    "no examples": ({"examples": []}, "at least one example"),
    "no scorers": ({"scorers": []}, "at least one scorer"),
    "unknown scorer": ({"scorers": ["keydif"]}, "Did you mean 'keydiff'"),
    "an allocator": ({"scorers": ["adakv"]}, "no scorer 'adakv'"),
    "a method": ({"scorers": ["keydiff+uniform"]}, "no allocator"),
    "reads twice": ({"scorers": ["keydiff", "kvzip"]}, "kvzip cannot be profiled"),
    "needs the keep": ({"scorers": ["criticalkv"]}, "criticalkv cannot be profiled"),
    "too long": ({"examples": [EXAMPLES[0], LONG]}, "this model was made for 1024"),
    "too long with the answer": ({"settings": replace(QUICK, steps=1000)}, "1000 decoded tokens need"),
    "too short": (
        {"examples": [Example(context="the red stone. " * 8)], "scorers": ["snapkv"]},
        "no longer than the 33 that are protected",
    ),
    "no text that follows": ({"settings": replace(QUICK, futures=("following",))}, "give it a text under 'following'"),
    "an empty question": ({"examples": [Example(context=WORDS, questions=("? who", " "))]}, "a question is empty"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_nothing_written(loaded, tmp_path, monkeypatch, options, words):
    calls = interrupted_after(99, monkeypatch)
    with pytest.raises(BadInput, match=words):
        make(loaded, tmp_path / "p", **options)
    assert not calls
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_place_for_a_profile(loaded, tmp_path):
    with pytest.raises(BadInput, match="is a folder"):
        make(loaded, tmp_path)


def test_no_steps_are_refused(loaded, tmp_path):
    with pytest.raises(BadInput, match="at least one step"):
        make(loaded, tmp_path / "p", settings=replace(QUICK, steps=0))
    assert not (tmp_path / "p").exists()


def test_other_files_are_no_profiles(loaded, whole, tmp_path):
    from headwise.offline.solve import solve

    solve(whole[0], "keydiff").save(tmp_path / "b")
    with pytest.raises(ArtifactMismatch, match="is a budget of format 2, expected a profile of format 2"):
        Profile.load(tmp_path / "b")


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "gpt_oss"])
def test_sliding_layers_have_no_curve(family):
    model = tiny_model(family)
    scorer = SCORERS["keydiff"].make()
    found = measure(model, lesson(random_ids(1, 40), [random_ids(1, 3)[0]]), [scorer], QUICK)[scorer]
    assert {curve.shape for curve in found.values()} == {(2, 2, 4 + RANKS)}


@pytest.mark.parametrize("how", ["another run", "another domain", "NaN", "a curve too few", "another shape"])
def test_an_altered_part_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.setattr(file_kinds, "FOLDER", [tmp_path])
    path = tmp_path / "part.safetensors"
    path.write_bytes(file_kinds.make_part())
    file_kinds.read_part(path)
    tensors, metadata = read_tensors(path, "part")
    name = "keydiff.raw"
    if how.startswith("another r"):
        metadata["run"] = "b"
    elif how.startswith("another d"):
        metadata["domain"] = "code"
    else:
        changed = {"NaN": tensors[name] * torch.nan, "another shape": tensors[name][:1]}
        tensors = {n: t for n, t in {**tensors, name: changed.get(how)}.items() if t is not None}
    write_tensors(path, "part", tensors, metadata)
    with pytest.raises(BadInput, match=r"part\.safetensors is damaged.*Remove it, and it is measured again"):
        file_kinds.read_part(path)


# --- files ---


@pytest.fixture
def at_once(monkeypatch):
    """What a context gives, measured once: the tests below are of files."""
    known = {}

    def told(model, taught, *given):
        key = (tuple(taught.context.flatten().tolist()), len(taught.questions))
        if key not in known:
            known[key] = measure(model, taught, *given)
        return dict(zip(given[0], known[key].values(), strict=True))

    monkeypatch.setattr(module, "measure", told)


def test_a_profile_that_is_killed_at_any_step_of_its_writing_is_finished_later(loaded, whole, tmp_path, at_once):
    make(loaded, tmp_path / "once")
    for step in count(0, 3):
        folder = tmp_path / str(step)
        folder.mkdir()
        if not killed_at(step, folder, lambda folder=folder: make(loaded, folder / "p")):
            break
        make(loaded, folder / "p")
        assert (folder / "p").read_bytes() == whole[1].read_bytes()
        assert [*folder.iterdir()] == [folder / "p"]
    assert step > 30


def test_two_runs_at_once_are_refused(loaded, whole, tmp_path, at_once):
    (begun, ready), (wait, end), held = os.pipe(), os.pipe(), []

    def hold(done, total):
        if done == 2 and not held:  # a context that is done is told again when the next one begins
            held.append(done)
            os.write(ready, b"!")
            os.read(wait, 1)

    process = forked(lambda: make(loaded, tmp_path / "p", progress=hold))
    os.read(begun, 1)
    for processes in (None, Rank(0, 2)):
        with pytest.raises(BadInput, match=r"another process is writing .*p\. Wait"):
            make(loaded, tmp_path / "p", processes=processes)
    os.write(end, b"!")
    assert ended(process) == 0
    assert (tmp_path / "p").read_bytes() == whole[1].read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]


@pytest.mark.parametrize("name", ["thesis.tex", f"{'0' * 24}.safetensors", "folder"])
def test_a_folder_of_the_user_s_own_is_not_removed(loaded, whole, tmp_path, monkeypatch, name):
    mine = tmp_path / "p.parts" / name
    mine.parent.mkdir()
    if name == "folder":
        (mine / "deep").mkdir(parents=True)
    elif name == "thesis.tex":
        mine.write_text("mine")
    else:  # the name of a part, but a profile
        mine.write_bytes(whole[1].read_bytes())
    calls = interrupted_after(99, monkeypatch)
    with pytest.raises(BadInput, match=f"p.parts holds {name}, which is no part of a profile. Move it away"):
        make(loaded, tmp_path / "p")
    assert (calls, [*mine.parent.iterdir()], [*tmp_path.iterdir()]) == ([], [mine], [mine.parent])


def test_what_the_user_puts_there_meanwhile_stays(loaded, tmp_path, at_once):
    make(loaded, tmp_path / "p", progress=lambda done, total: done == 2 and (tmp_path / "p.parts" / "x").touch())
    assert [*(tmp_path / "p.parts").iterdir()] == [tmp_path / "p.parts" / "x"]


def test_parts_in_no_folder_and_linked_ones(loaded, whole, tmp_path, at_once):
    (tmp_path / "p.parts").touch()
    with pytest.raises(BadInput, match=r"p\.parts is no folder"):
        make(loaded, tmp_path / "p")
    (tmp_path / "p.parts").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "p.parts").symlink_to(tmp_path / "elsewhere")
    make(loaded, tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == whole[1].read_bytes()
    assert [*(tmp_path / "elsewhere").iterdir()] == []


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**5000], ids=["above", "below", "far above"])
def test_seeds_beyond_what_there_is(seed):
    with pytest.raises(BadInput, match="the seed is out of range"):
        Sampling(temperature=0.7, seed=seed)
