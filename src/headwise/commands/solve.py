"""`headwise solve`: solve a budget from a profile (LU-KV, offline)."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.commands.console import print_json, print_table
from headwise.commands.options import AsJson
from headwise.errors import BadInput
from headwise.files.terminal import say, split
from headwise.files.writing import require_file

if TYPE_CHECKING:
    from headwise.artifacts.budget import Budget
    from headwise.artifacts.profile import Profile

ProfileFile = Annotated[Path, typer.Argument(help="A file written by 'headwise profile'.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Budget to write.")]
Scorer = Annotated[str | None, typer.Option(help="Which scorer; may be left out if the profile has one.")]
Ratios = Annotated[str | None, typer.Option(help="Kept fractions to tabulate, such as 0.0625,0.15,0.25.")]
DomainWeights = Annotated[str | None, typer.Option(help="Such as code=2,text=1; others 0.")]
Loss = Annotated[
    str, typer.Option(help="output, normalised (LU-KV's code), raw (its formula), or published (averaged).")
]
BitsWeight = Annotated[
    float | None,
    typer.Option(help="For --entries auto: how much of what fewer bits lose counts; left out: 0.1."),
]
Check = Annotated[bool, typer.Option("--check", help="Compare with exact dynamic programming.")]

AVERAGED = "published"  # the loss whose budgets are averages of solutions


def solve(
    path: ProfileFile,
    out: Out,
    scorer: Scorer = None,
    ratios: Ratios = None,
    domain_weights: DomainWeights = None,
    loss: Loss = "output",
    bits_weight: BitsWeight = None,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Solve any budget exactly, by the heads' marginal utility, and write it for lukv@FILE (LU-KV, offline)."""
    from headwise.artifacts.profile import Profile

    require_file(out, inputs=[path])
    profile = Profile.load(path)
    if scorer is None and len(profile.curves) > 1:
        raise BadInput(f"{path} holds {', '.join(profile.curves)}: choose one with --scorer.")
    name = scorer or next(iter(profile.curves))
    weights = None if domain_weights is None else dict(_weight(part) for part in split(domain_weights))
    grid = _grid(ratios, loss, check)
    if bits_weight is not None and (loss != "output" or not profile.kinds(name)):
        raise BadInput(
            "--bits-weight is for --entries auto: it needs --loss output and a profile made with --entries "
            "native,int8,k8v4,int4."
        )
    start = time.perf_counter()
    budget = _solved(profile, name, grid, weights, loss, bits_weight)
    seconds = time.perf_counter() - start
    budget.save(out)
    points = budget.ratios.tolist()
    rows = _checked(profile, name, points, weights, loss) if check else []
    if as_json:
        facts = {"budget": str(out), "scorer": name, "loss": loss, "ratios": points, "seconds": seconds, "check": rows}
        print_json(facts)
        return
    use = f"{name}+{'fixed' if loss == AVERAGED else 'lukv'}@{out}"
    say(f"{out}: {name}, {len(points)} ratios, solved in {seconds:.2f} s. Use it as {use}")
    if rows:
        header = ["ratio", "lukv", "optimum", "uniform", "adakv", "gap"]
        print_table("share of the utility retained", header, [[f"{row[k]:.4f}" for k in header] for row in rows])


def _weight(text: str) -> tuple[str, float]:
    """Return a domain and how much it counts. Raises BadInput if the text is not name=number."""
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise BadInput(f"domain weight {text!r}: write name=number, such as code=2.") from None


def _grid(ratios: str | None, loss: str, check: bool) -> Sequence[float | Fraction]:
    """Return the kept fractions to tabulate. Raises BadInput if one is wrong, or the loss has its own table."""
    from headwise.methods.keep import parse_fraction
    from headwise.offline.solve import RATIOS

    grid = RATIOS if ratios is None else [parse_fraction(part, "ratios") for part in split(ratios)]
    if loss == AVERAGED and (check or ratios is not None):
        raise BadInput("loss='published' is a table of 99 ratios without curves: leave out --ratios and --check.")
    return grid


def _solved(
    profile: "Profile",
    scorer: str,
    grid: Sequence[float | Fraction],
    weights: dict[str, float] | None,
    loss: str,
    bits_weight: float | None,
) -> "Budget":
    from headwise.offline.solve import published
    from headwise.offline.solve import solve as run

    if loss == AVERAGED:
        return published(profile, scorer, domain_weights=weights)
    bits = {} if bits_weight is None else {"bits_weight": bits_weight}
    return run(profile, scorer, ratios=grid, domain_weights=weights, loss=loss, **bits)


def _checked(
    profile: "Profile", scorer: str, ratios: list[float], weights: dict[str, float] | None, loss: str
) -> list[dict[str, Any]]:
    """Return what the budget retains at every ratio, beside the exact optimum and other allocators."""
    from headwise.offline.solve import check

    quality = check(profile, scorer, ratios, domain_weights=weights, loss=loss)
    return [{**asdict(at_ratio), "gap": at_ratio.gap} for at_ratio in quality]
