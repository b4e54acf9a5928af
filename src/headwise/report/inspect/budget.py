"""Draw a Budget as one page: what every head keeps, the curves it was solved from, and where its scorer errs.

For `headwise inspect --plot`. First the numbers, then the drawing.
"""

import os
from textwrap import fill

import numpy as np
from jaxtyping import Float, Int

from headwise.artifacts.budget import Budget
from headwise.report.draw.drawing import (
    BLUE,
    ORANGE,
    Figure,
    SubFigure,
    draw_map,
    map_height,
    percent,
    require_ratio,
    write_page,
)

PANELS = 6  # heads whose curves are drawn
NOTES = (
    "a: the first {sink} and last {window} tokens are protected, kept first and not counted here; in d they are where "
    "a curve\nstarts. b, c: importance is attention times what a value writes (LU-KV). Compared are the scorer's order "
    "and the order\nof importance itself, each head keeping its share in a. Grey: it keeps nothing or everything, no "
    "order matters.\n"
    "d: utility is what keeping more takes off the loss {loss!r}, for which the budget was solved."
)
NO_CURVES = "No curves: this budget was imported or averaged,\nnot solved from curves by 'headwise solve'."


def kept_at(budget: Budget, ratio: float) -> Float[np.ndarray, "layers kv_heads"]:
    """Return kept fractions at one ratio. Raises BadInput unless it is within (0, 1)."""
    require_ratio(ratio)
    return budget.at(budget.ratios.new_tensor([ratio]))[0].double().numpy()


def retained(budget: Budget, name: str) -> Float[np.ndarray, "heads points"]:
    """Return the utility that every head retains, by one curve of the evidence.

    Points are equal shares of the tokens that are not protected, from none of them to all. The first is what the
    protected tokens retain; in a long context those are a negligible part of what is kept.
    """
    curve, protected = budget.evidence[name], budget.origin.sink + budget.origin.window
    gained = curve.flatten(0, 1).double().numpy().cumsum(-1)
    return np.pad(gained, ((0, 0), (1, 0)))[:, protected:]


def hull_edges(budget: Budget, head: int) -> tuple[Float[np.ndarray, " edges"], Float[np.ndarray, " edges"]]:
    """Return the corners of a head's hull in the file: kept fraction, and utility beyond the protected tokens."""
    width, slope = (budget.hull[name][head].double().numpy() for name in ("width", "slope"))
    return np.pad(width.cumsum(), (1, 0)), np.pad((width * slope).cumsum(), (1, 0))


def at_fraction(curves: Float[np.ndarray, "heads points"], kept: Float[np.ndarray, " heads"]) -> np.ndarray:
    """Return the curves' values at one fraction each, [heads]."""
    grid = np.linspace(0, 1, curves.shape[1])
    return np.array([np.interp(fraction, grid, curve) for fraction, curve in zip(kept, curves, strict=True)])


def missed(
    budget: Budget, kept: Float[np.ndarray, "layers kv_heads"]
) -> tuple[Float[np.ndarray, "layers kv_heads"], Float[np.ndarray, "layers kv_heads"]]:
    """Return the importance that the scorer's order misses and an ideal order would retain, at the heads' fractions.

    The first array is a share of the head's importance, the second a share of the model's.
    """
    ideal, scorer = retained(budget, "ideal"), retained(budget, "scorer")
    gap = (at_fraction(ideal, kept.flatten()) - at_fraction(scorer, kept.flatten())).clip(min=0)  # rounding
    return _shares(gap, ideal[:, -1]).reshape(kept.shape), _shares(gap, ideal[:, -1].sum()).reshape(kept.shape)


def heads_to_draw(
    kept: Float[np.ndarray, " heads"], utility: Float[np.ndarray, " heads"]
) -> Int[np.ndarray, " panels"]:
    """Return heads to draw: half with the largest budgets, half with the smallest, and most utility among equals."""
    by_most, by_least = np.lexsort((-utility, -kept)), np.lexsort((-utility, kept))
    half = min(PANELS, len(kept)) // 2
    largest = by_most[: min(PANELS, len(kept)) - half]
    smallest = by_least[~np.isin(by_least, largest)][:half]
    return np.concatenate([largest, smallest])


def _shares(parts: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Return shares of a total, 0 where that is 0."""
    total = np.broadcast_to(total, parts.shape)
    return np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)


def plot(budget: Budget, path: str | os.PathLike[str], *, ratio: float = 0.15) -> None:
    """Write the page as .png, .svg or .pdf, at once or not at all. Raises BadInput.

    A budget without evidence (imported, or averaged as published) gets the map of kept fractions only.
    """
    write_page(path, lambda: _page(budget, kept_at(budget, ratio), ratio))


def _page(budget: Budget, kept: Float[np.ndarray, "layers kv_heads"], ratio: float) -> Figure:
    origin, height = budget.origin, map_height(len(kept))
    solved = {"curve", "scorer", "ideal", "width", "slope"} <= {*budget.evidence, *budget.hull}
    figure = Figure(figsize=(10.5, height + 5.4) if solved else (5.5, height + 0.9), layout="constrained")
    name = f"{origin.model or 'model unknown'}, {origin.scorer or 'scorer unknown'}, {ratio:.4g} of the KV cache kept"
    figure.suptitle(fill(name, 85 if solved else 45), fontweight="bold")
    title = "a  Share of a long context\nthat each head keeps"
    if not solved:
        draw_map(figure, figure.subplots(), origin.shape.layers, kept, title, 1.0)
        figure.supxlabel(NO_CURVES)
        return figure
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[height, 4.2])
    own, of_model = (np.where((kept > 0) & (kept < 1), part, np.nan) for part in missed(budget, kept))
    maps = {
        title: (kept, 1.0),
        "b  Importance that the scorer's order misses,\nas a share of the head's": (own, np.nanmax(own, initial=0)),
        f"c  The same, as a share of the\nwhole model's: {np.nansum(of_model):.1%} in all": (
            of_model,
            np.nanmax(of_model, initial=0),
        ),
    }
    for axes, (heading, (values, largest)) in zip(top.subplots(1, 3), maps.items(), strict=True):
        draw_map(top, axes, origin.shape.layers, values, heading, largest)
    _curves(bottom, budget, kept, ratio)
    figure.supxlabel(NOTES.format(sink=origin.sink, window=origin.window, loss=origin.loss), x=0.01, ha="left")
    return figure


def _curves(figure: SubFigure, budget: Budget, kept: Float[np.ndarray, "layers kv_heads"], ratio: float) -> None:
    """Draw curve, hull and budget of some heads, as shares of their own utility."""
    curves, shape, fractions = retained(budget, "curve"), budget.origin.shape, kept.flatten()
    totals = curves[:, -1]
    panels, share = heads_to_draw(fractions, totals), _shares(totals, totals.sum())
    columns = min(3, len(panels))
    grid = figure.subplots(-(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes, head in zip(grid.flat, panels, strict=False):
        layer, column = divmod(int(head), shape.kv_heads)
        x, gained = hull_edges(budget, int(head))
        points = np.linspace(0, 1, curves.shape[1])
        value, scale = at_fraction(curves[[head]], fractions[[head]]), totals[head]
        axes.plot(x, _shares(curves[head, 0] + gained, scale), color=BLUE, linewidth=3.5, alpha=0.45, label="its hull")
        axes.plot(points, _shares(curves[head], scale), color="black", linewidth=0.9, label="measured")
        axes.plot(
            fractions[head], _shares(value, scale), "o", color=ORANGE, label=f"budget at {ratio:.4g}", clip_on=False
        )
        axes.set_title(f"layer {shape.layers[layer]}, head {column}: {share[head]:.1%} of all utility")
        axes.xaxis.set_major_formatter(percent())
        axes.yaxis.set_major_formatter(percent())
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    low, high = grid[0, 0].get_ylim()
    grid[0, 0].set_ylim(min(0, low), max(1.04, high))
    grid[0, 0].legend(loc="lower right", frameon=False)
    title = "d  Utility retained, of the head's own: the largest budgets, then the smallest"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.supxlabel("share kept of the tokens that are not protected")
