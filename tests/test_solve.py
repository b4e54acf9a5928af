"""From a Profile to a Budget: the table, the hulls, the comparison with the optimum, kvpress' table, the command."""

import json
import shlex
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from headwise import cli
from headwise.artifacts.budget import Budget
from headwise.artifacts.contents import LOSSES
from headwise.artifacts.hulls import Hulls, concave_hulls, share
from headwise.artifacts.origin import Origin
from headwise.artifacts.profile import Profile
from headwise.errors import ArtifactMismatch, BadInput
from headwise.methods.method import Method
from headwise.methods.registry import SCORERS
from headwise.offline.losses import RANKS
from headwise.offline.solve import CHECK_STEPS, GRID, RATIOS, Quality, check, published, solve
from headwise.shapes import ModelShape

SHAPE = ModelShape(num_layers=4, layers=(0, 1, 3), kv_heads=2, query_heads=4, head_dim=8)


PROTECTION = {"snapkv": (4, 32), "keydiff": (0, 0)}


def random_curves(scorer, seed):
    """Heads of very different need; the scorer is right more often than not, and every protected token is useful."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(2, 3, 2, sum(PROTECTION[scorer]), generator=generator) / RANKS
    noise = (torch.rand(2, 3, 2, RANKS, 16, generator=generator) ** 6).mean(-1)
    decay = torch.exp(-torch.linspace(0, 1, RANKS) * torch.tensor([1.0, 4, 16, 64, 2, 8]).view(1, 3, 2, 1))
    curves = torch.cat([first, noise * decay * torch.rand(2, 3, 2, 1, generator=generator)], dim=-1)
    return curves / curves.sum(dim=(1, 2, 3), keepdim=True)


def all_losses(scorer, seed):
    return {loss: random_curves(scorer, seed + number) for number, loss in enumerate((*LOSSES, "ideal"))}


def unprotected(profile, scorer, **options):
    """The marginal utilities of what is not protected, [heads, RANKS]."""
    return profile.curve(scorer, **options)[..., sum(profile.protection[scorer]) :].flatten(0, 1)


@pytest.fixture(scope="module")
def profile():
    return Profile(
        curves={"snapkv": all_losses("snapkv", 0), "keydiff": all_losses("keydiff", 10)},
        domains=("text", "code"),
        contexts=(3, 1),
        protection=PROTECTION,
        parameters={name: SCORERS[name].make().provenance() for name in ("snapkv", "keydiff")},
        settings={"steps": 64},
        origin=Origin(shape=SHAPE, model="a/b", config_hash="abc", calibration="data"),
        published={"keydiff": torch.rand(2, 99, 3, 2, generator=torch.Generator().manual_seed(0))},
    )


def with_curves(profile, change):
    """The curves of KeyDiff alone, changed."""
    changed = {loss: change(curve) for loss, curve in profile.curves["keydiff"].items()}
    return replace(profile, curves={"keydiff": changed}, protection={"keydiff": (0, 0)}, published={})


# --- the budget ---


def test_ratios_are_sorted_and_each_there_once(profile):
    found = solve(profile, "keydiff", ratios=[0.5, 0.125, Fraction(1, 8), 0.5, 0.9])
    assert found.ratios.tolist() == [0.125, 0.5, 0.9]
    assert solve(profile, "keydiff").ratios.tolist() == [float(ratio) for ratio in RATIOS]


def test_the_mean_of_a_row_is_its_ratio(profile):
    found = solve(profile, "snapkv", ratios=[0.001, 0.0625, 0.15, 0.3, 0.999])
    torch.testing.assert_close(found.fractions.mean(dim=(1, 2)), found.ratios, rtol=0, atol=1 / (6 * GRID))


@pytest.mark.parametrize("scorer", PROTECTION)
def test_rows_are_nested_and_each_of_the_greatest_utility(profile, scorer):
    """That of a long context, in which protected tokens do not count."""
    found = solve(profile, scorer)
    assert (found.fractions.diff(dim=0) >= 0).all()
    hulls = concave_hulls(unprotected(profile, scorer))
    for ratio, row in zip(found.ratios, found.fractions.flatten(1), strict=True):
        even = torch.full((6,), float(ratio), dtype=torch.float64)
        assert hulls.utility(row).sum() >= hulls.utility(even).sum()
        for _ in range(20):  # entries moved from one head to another
            a, b = torch.randperm(6)[:2]
            amount = torch.minimum(row[a], 1 - row[b]) * torch.rand(1, dtype=torch.float64)
            moved = row.clone()
            moved[a] -= amount[0]
            moved[b] += amount[0]
            assert hulls.utility(row).sum() >= hulls.utility(moved).sum() - 1e-9


def test_the_budget_knows_scorer_protection_and_data(profile):
    found = solve(profile, "snapkv")
    expected = Origin(
        shape=SHAPE,
        model="a/b",
        config_hash="abc",
        scorer="snapkv",
        scorer_parameters=SCORERS["snapkv"].make().provenance(),
        sink=4,
        window=32,
        calibration="data",
        loss="output",
    )
    assert found.origin == expected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scorer", PROTECTION)
def test_the_file_holds_hulls_and_evidence_of_the_loss_that_was_asked_for(profile, tmp_path, scorer, loss):
    solve(profile, scorer, loss=loss).save(tmp_path / "b")
    found = Budget.load(tmp_path / "b")
    assert found.origin.loss == loss
    expected = concave_hulls(unprotected(profile, scorer, loss=loss))
    assert found.hull["width"].equal(expected.width)
    assert found.hull["slope"].equal(expected.slope)
    protected = profile.curve(scorer, loss=loss)[..., : sum(PROTECTION[scorer])].flatten(0, 1)
    assert found.hull["protected"].equal(protected)
    assert found.evidence.keys() == {"curve", "scorer", "ideal"}
    for name, curve in (("curve", loss), ("scorer", "raw"), ("ideal", "ideal")):
        assert found.evidence[name].equal(profile.curve(scorer, loss=curve).float())


def test_losses_differ_and_the_change_of_the_output_is_the_default(profile):
    first, *others = [solve(profile, "keydiff", loss=loss).fractions for loss in LOSSES]
    assert LOSSES[0] == "output"
    assert first.equal(solve(profile, "keydiff").fractions)
    assert not any(first.equal(other) for other in others)
    found = [check(profile, "keydiff", [0.2], **options) for options in ({}, {"loss": "output"}, {"loss": "raw"})]
    assert found[0] == found[1] != found[2]


def test_an_unknown_loss_is_refused(profile):
    for verb in (solve, check):
        with pytest.raises(BadInput, match="loss='outputs': choose output, normalised, raw"):
            verb(profile, "keydiff", ratios=[0.5], loss="outputs")


def test_domain_weights_choose_the_curves(profile):
    def fractions(**options):
        return solve(profile, "keydiff", ratios=[0.2], **options).fractions

    weighted = fractions(domain_weights={"code": 1.0})
    alone = replace(with_curves(profile, lambda curve: curve[1:]), domains=("code",), contexts=(7,))
    assert weighted.equal(solve(alone, "keydiff", ratios=[0.2]).fractions)
    assert not weighted.equal(fractions())
    assert fractions().equal(fractions(domain_weights={"text": 6.0, "code": 2.0}))


@pytest.mark.parametrize("ratios", [[], [0.0], [1.0], [0.5, 1.5], [-0.1], [float("nan")]])
def test_ratios_must_lie_within_0_and_1(profile, ratios):
    with pytest.raises(BadInput, match="strictly between 0 and 1"):
        solve(profile, "keydiff", ratios=ratios)


# --- how good it is ---


@pytest.mark.parametrize("scorer", PROTECTION)
def test_the_optimum_is_that_of_plain_dynamic_programming(profile, scorer):
    gained = unprotected(profile, scorer).reshape(6, CHECK_STEPS, -1).sum(-1).cumsum(-1)
    gained = torch.nn.functional.pad(gained / gained[:, -1].sum(), (1, 0))
    best = [0.0]
    for curve in gained.tolist():
        best = [
            max(best[t - b] + curve[b] for b in range(CHECK_STEPS + 1) if 0 <= t - b < len(best))
            for t in range(len(best) + CHECK_STEPS)
        ]
    for ratio in (0.05, 0.2, 0.7):
        (found,) = check(profile, scorer, [ratio])
        assert found.optimum == pytest.approx(best[round(ratio * 6 * CHECK_STEPS)], rel=1e-9)


def test_nothing_is_above_the_optimum_and_the_hulls_are_near_it(profile):
    for scorer in ("snapkv", "keydiff"):
        for found in check(profile, scorer, [float(ratio) for ratio in RATIOS]):
            for value in (found.lukv, found.uniform, found.adakv):
                assert 0 <= value <= found.optimum * (1 + 1e-12) <= 1 + 1e-9
            assert found.lukv > found.uniform
            assert -1e-12 <= found.gap < 0.04


def test_on_concave_curves_there_is_no_gap(profile):
    falling = with_curves(profile, lambda curve: curve.sort(descending=True).values)
    for found in check(falling, "keydiff", [0.01, 0.1, 0.33, 0.9]):
        assert found.gap == pytest.approx(0, abs=1e-12)


def test_heads_alike_are_served_alike(profile):
    same = with_curves(profile, lambda curve: curve[:, :1, :1].expand(2, 3, 2, RANKS))
    assert solve(same, "keydiff", ratios=[0.25, 0.5]).fractions.std(dim=(1, 2)).max() < 0.1
    assert all(found.gap < 0.02 for found in check(same, "keydiff", [0.25, 0.5]))


def test_a_ratio_too_small_for_the_comparison_has_no_gap(profile):
    """It once ended in a division by zero."""
    (found,) = check(profile, "keydiff", [0.0001])
    assert (found.optimum, found.gap) == (0.0, 0.0)


def test_the_gap_is_relative():
    assert Quality(ratio=0.5, lukv=0.72, optimum=0.8, uniform=0.1, adakv=0.2).gap == pytest.approx(0.1)


# --- as the authors do it ---


def test_solutions_of_single_questions_are_a_table_without_hulls(profile, tmp_path):
    found, table = published(profile, "keydiff"), profile.published["keydiff"].double()
    torch.testing.assert_close(found.fractions, (3 * table[0] + table[1]) / 4)
    assert found.ratios.tolist() == pytest.approx([n / 100 for n in range(1, 100)])
    assert found.origin == replace(solve(profile, "keydiff").origin, loss="published")
    assert not found.hull
    text = published(profile, "keydiff", domain_weights={"text": 2.0})
    assert text.fractions.equal(table[0])
    found.save(tmp_path / "b")
    for name, taken in (("fixed", True), ("lukv", False)):
        method = Method.parse(f"keydiff+{name}@{tmp_path / 'b'}")
        if taken:
            assert method.for_model(SHAPE, "abc").allocator.budget.fractions.equal(found.fractions)
        else:
            with pytest.raises(ArtifactMismatch, match="no hulls: use it as fixed@FILE"):
                method.for_model(SHAPE, "abc")


def test_a_profile_without_them_says_how_to_make_one(profile):
    with pytest.raises(BadInput, match="make it with 'headwise profile --published'"):
        published(profile, "snapkv")
    with pytest.raises(BadInput, match="it has no scorer 'knorm'"):
        published(profile, "knorm")


# --- kvpress ---


def test_a_solved_budget_goes_to_kvpress_and_back(profile, tmp_path):
    solved = solve(profile, "keydiff", ratios=[Fraction(n, 100) for n in range(1, 100)])
    solved.to_kvpress(tmp_path / "table.npy")
    found = Budget.from_kvpress(tmp_path / "table.npy", shape=SHAPE)
    torch.testing.assert_close(found.ratios, solved.ratios)
    torch.testing.assert_close(found.fractions, solved.fractions, rtol=0, atol=1e-12)


def test_a_coarse_budget_is_interpolated_for_kvpress(profile, tmp_path):
    solve(profile, "keydiff").to_kvpress(tmp_path / "table.npy")
    found = Budget.from_kvpress(tmp_path / "table.npy", shape=SHAPE)
    torch.testing.assert_close(found.fractions.mean(dim=(1, 2)), found.ratios, rtol=0, atol=1e-4)
    rows = [round(float(ratio) * 100) - 1 for ratio in RATIOS]
    torch.testing.assert_close(found.fractions[rows], solve(profile, "keydiff").fractions, rtol=0, atol=1e-12)


# --- the command ---


@pytest.fixture
def run(profile, tmp_path, monkeypatch, capsys):
    """Run `headwise solve` on the profile in {dir}: exit code, stdout, stderr."""
    profile.save(tmp_path / "p.safetensors")
    one = with_curves(profile, lambda curve: curve)
    one.save(tmp_path / "one.safetensors")

    def call(line):
        words = [word.replace("{dir}", str(tmp_path)) for word in shlex.split(line)]
        monkeypatch.setattr(sys, "argv", ["headwise", "solve", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def test_the_command_writes_the_budget(run, profile, tmp_path):
    line = "{dir}/p.safetensors --scorer snapkv --out {dir}/b --ratios 0.0625,15%,0.25 --domain-weights code=2,text=1"
    code, out, err = run(f"{line} --check --json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"budget", "scorer", "loss", "ratios", "seconds", "check"}
    assert (found["scorer"], found["loss"], found["ratios"]) == ("snapkv", "output", [0.0625, 0.15, 0.25])
    assert [set(row) for row in found["check"]] == [{"ratio", "lukv", "optimum", "uniform", "adakv", "gap"}] * 3
    assert 0 <= found["seconds"] < 10
    budget = solve(profile, "snapkv", ratios=[0.0625, 0.15, 0.25], domain_weights={"code": 2.0, "text": 1.0})
    assert Budget.load(tmp_path / "b").fractions.equal(budget.fractions)
    code, out, err = run(line)
    assert "Use it as snapkv+lukv@" in out


def test_the_command_prints_a_table(run):
    code, out, err = run("{dir}/one.safetensors --out {dir}/b --check")
    assert (code, err) == (0, "")
    for word in ("keydiff, 19 ratios", "share of the utility retained", "optimum", "gap"):
        assert word in out


def test_the_command_solves_another_loss(run, profile, tmp_path):
    code, out, err = run("{dir}/p.safetensors --scorer snapkv --out {dir}/b --loss raw --ratios 0.25 --check --json")
    assert (code, err, json.loads(out)["loss"]) == (0, "", "raw")
    assert Budget.load(tmp_path / "b").fractions.equal(solve(profile, "snapkv", ratios=[0.25], loss="raw").fractions)
    (quality,) = check(profile, "snapkv", [0.25], loss="raw")
    assert json.loads(out)["check"][0]["lukv"] == quality.lukv


def test_the_command_writes_solutions_of_single_questions(run, profile, tmp_path):
    line = "{dir}/p.safetensors --scorer keydiff --out {dir}/b --loss published --domain-weights text=1"
    code, out, err = run(f"{line} --json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["loss"], len(found["ratios"]), found["check"]) == ("published", 99, [])
    expected = published(profile, "keydiff", domain_weights={"text": 1.0})
    assert Budget.load(tmp_path / "b").fractions.equal(expected.fractions)
    code, out, err = run(line)
    assert "keydiff, 99 ratios" in out
    assert "Use it as keydiff+fixed@" in out


WRONG = {
    "{dir}/p.safetensors --out {dir}/b": "holds keydiff, snapkv: choose one with --scorer",
    "{dir}/one.safetensors --out {dir}/b --scorer snapkv": "has no scorer 'snapkv'",
    "{dir}/one.safetensors --out {dir}/b --ratios 0.5,1": "strictly between 0 and 1",
    "{dir}/one.safetensors --out {dir}/b --ratios 100tok": "strictly between 0 and 1",
    "{dir}/one.safetensors --out {dir}/b --ratios x": "is not understood",
    "{dir}/one.safetensors --out {dir}/b --ratios ,": "is an empty list",
    "{dir}/one.safetensors --out {dir}/b --domain-weights code": "write name=number",
    "{dir}/one.safetensors --out {dir}/b --domain-weights code=x": "write name=number",
    "{dir}/one.safetensors --out {dir}/b --domain-weights code=nan": "must be finite",
    "{dir}/one.safetensors --out {dir}/b --domain-weights code=0": "not all of them 0",
    "{dir}/one.safetensors --out {dir}/b --domain-weights prose=1": "it has text, code",
    "{dir}/one.safetensors --out {dir}/b --loss outputs": "choose output, normalised, raw",
    "{dir}/p.safetensors --out {dir}/b --scorer keydiff --loss published --check": "and --check",
    "{dir}/p.safetensors --out {dir}/b --scorer keydiff --loss published --ratios 0.5": "leave out --ratios",
    "{dir}/p.safetensors --out {dir}/b --scorer snapkv --loss published": "headwise profile --published",
    "{dir}/one.safetensors --out {dir}/b --bits-weight 1": "a profile made with --entries",
    "{dir}/one.safetensors --out {dir}/nowhere/b": "does not exist; create it first",
    "{dir}/nowhere --out {dir}/b": "is not a file",
}


@pytest.mark.parametrize(("line", "words"), WRONG.items(), ids=WRONG)
def test_a_wrong_command_line_is_one_line_and_writes_nothing(run, tmp_path, line, words):
    code, out, err = run(line)
    assert words in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "b").exists()


def test_a_file_of_another_kind_is_refused(run, profile, tmp_path):
    solve(profile, "keydiff").save(tmp_path / "budget")
    code, out, err = run("{dir}/budget --out {dir}/b")
    assert (code, out) == (1, "")
    assert "expected a profile" in err


def test_hulls_read_from_a_budget_share_any_total(profile):
    """What the allocator does, by hand: no grid of ratios in between."""
    found = solve(profile, "keydiff", ratios=[0.5])
    hulls = Hulls(width=found.hull["width"], slope=found.hull["slope"])
    assert share(hulls, entries=777, total=1001).sum() == 1001
