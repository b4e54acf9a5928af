"""Draw gates as one page: what every head keeps, another file's budgets beside it, and how training went.

For `headwise inspect --plot`. First the numbers, then the drawing.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from jaxtyping import Float

from headwise.artifacts.budget import Budget
from headwise.artifacts.gates import Gates
from headwise.artifacts.tensors import describe
from headwise.errors import BadInput
from headwise.files import strict_json
from headwise.files.bounded import MOST_BYTES, read_bytes
from headwise.report.draw.drawing import (
    BLUE,
    ORANGE,
    Axes,
    Figure,
    SubFigure,
    draw_map,
    map_height,
    percent,
    require_ratio,
    write_page,
)

Row = dict[str, float]
Fractions = Float[np.ndarray, "layers kv_heads"]
MAP_WIDTH, CURVES_WIDTH, CURVES_HEIGHT = 3.4, 4.2, 4.8  # inches
MEANS = 20  # independent means that a curve of all steps is smoothed to
MAPS_NOTE = "Maps: the share of the context that every head keeps; all of them on one colour scale."
CURVES_NOTE = "Every step of training draws its own keep, so its numbers scatter; those of validation compare."


def log_of(path: str | os.PathLike[str]) -> list[Row]:
    """Read the log of a training beside the gates; empty if there is none. Raises BadInput, naming the line."""
    log = Path(f"{os.fspath(path)}.log.jsonl")
    if not log.is_file():
        return []
    try:
        lines = read_bytes(log, MOST_BYTES).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the log {log}: {error}. Move it away to draw the gates alone.") from error
    return [_row(line, f"{log}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _row(line: str, place: str) -> Row:
    try:
        fields = strict_json.mapping(strict_json.loads(line, values=False))  # a loss may have become NaN
        row = {name: float(value) for name, value in fields.items()}
        return {**row, "step": row["step"]}
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadInput(f"{place} is no line of a training log; move the log away to draw the gates alone.") from error


def series(log: Sequence[Row], name: str) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Return the steps at which one of the log's values was measured, and the values."""
    rows = [(row["step"] + 1, row[name]) for row in log if name in row]
    return np.array([step for step, _ in rows], dtype=float), np.array([value for _, value in rows], dtype=float)


def smoothed(steps: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"]) -> Float[np.ndarray, "4 means"]:
    """Return steps, means, and the 10% and 90% quantiles of a moving window, so wide that MEANS of them fit."""
    if not len(steps):
        return np.empty((4, 0))
    width = max(1, len(steps) // MEANS)
    centres, windows = (np.lib.stride_tricks.sliding_window_view(numbers, width) for numbers in (steps, values))
    return np.array([centres.mean(-1), windows.mean(-1), *np.quantile(windows, [0.1, 0.9], axis=-1)])


def budgets_at(path: str | os.PathLike[str], gates: Gates, ratio: float) -> tuple[str, Fractions]:
    """Return what another file is, and its fractions [layers, kv_heads] at a ratio. It may be a budget or gates.

    Raises ArtifactMismatch if it is of another kind, or for another model than `gates`; BadInput if it is damaged.
    """
    shape, config_hash = gates.origin.shape, gates.origin.config_hash
    if describe(path).get("kind") == "gates":
        other_gates = Gates.load(path)
        other_gates.require(shape, config_hash)
        return _kind(other_gates), fractions(other_gates, ratio, path)
    budget = Budget.load(path)
    budget.require(shape, config_hash)
    kept = budget.at(torch.tensor([ratio], dtype=torch.float64, device="cpu"))[0]
    solved = ", solved (LU-KV)" if budget.hull else ""
    return f"budget for {budget.origin.scorer or 'an unknown scorer'}{solved}", kept.double().numpy()


def fractions(gates: Gates, ratio: float, path: str | os.PathLike[str]) -> Fractions:
    """Return what every head keeps. Raises BadInput if the gates have no budgets."""
    if gates.budgets is None:
        raise BadInput(f"{path} holds scores only: there are no budgets to draw.")
    return gates.fractions(ratio).unflatten(0, (-1, gates.origin.shape.kv_heads)).double().numpy()


def plot(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ratio: float = 0.15,
    beside: str | os.PathLike[str] | None = None,
) -> None:
    """Draw a file of gates, with the log beside it if there is one, as .png, .svg or .pdf, at once or not at all.

    `beside` is a file of a budget or of gates for the same model. Gates that hold scores only have no budgets to draw,
    only a log. Raises BadInput, ArtifactMismatch.
    """
    require_ratio(ratio)
    gates, log = Gates.load(path), log_of(path)
    maps = {}
    if gates.budgets is not None or beside is not None or not log:
        maps[f"a  {Path(path).name}\n{_kind(gates)}"] = fractions(gates, ratio, path)
    if beside is not None:
        kind, kept = budgets_at(beside, gates, ratio)
        maps[f"b  {Path(beside).name}\n{kind}"] = kept
    write_page(out, lambda: _page(gates, maps, log, ratio))


def _kind(gates: Gates) -> str:
    return f"learned for {gates.origin.scorer} (LKV-H)" if gates.origin.scorer else "learned (LKV)"


def _page(gates: Gates, maps: dict[str, Fractions], log: Sequence[Row], ratio: float) -> Figure:
    layers = gates.origin.shape.layers
    widths = [MAP_WIDTH] * len(maps) + [CURVES_WIDTH] * bool(log)
    height = max(map_height(len(layers)) if maps else 0, CURVES_HEIGHT if log else 0) + 1
    width = sum(widths) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    keep_text = f", {ratio:.4g} of the KV cache kept" if maps else ""
    title = fill(f"{gates.origin.model or 'model unknown'}{keep_text}", int(8 * width), break_on_hyphens=False)
    figure.suptitle(title, fontweight="bold")
    parts = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]
    largest = max((float(kept.max()) for kept in maps.values()), default=0.0)
    for part, (title, kept) in zip(parts, maps.items(), strict=False):
        draw_map(part, part.subplots(), layers, kept, title, largest)
    if log:
        _curves(parts[-1], log)
    notes = [MAPS_NOTE] * (len(maps) > 1) + [CURVES_NOTE] * bool(log)
    figure.supxlabel("\n".join(fill(note, int(13 * width)) for note in notes), x=0.01, ha="left")
    return figure


def _curves(figure: SubFigure, log: Sequence[Row]) -> None:
    """Draw loss above, agreement below, by steps of joint training."""
    loss, agreement = figure.subplots(2, 1, sharex=True)
    _curve(loss, log, "loss", "validation")
    _curve(agreement, log, "agreement", "validation_agreement")
    steps, losses = series(log, "validation")
    if len(steps):
        best = steps[int(np.nanargmin(losses))] if np.isfinite(losses).any() else steps[0]
        loss.axvline(best, color="#999999", linewidth=0.8, linestyle=":", label="gates in the file", zorder=0)
        agreement.axvline(best, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    loss.set(title="Loss: unexplained share of the full cache's logits")
    loss.set_ylim(bottom=0)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    agreement.set(title="Answer tokens on which full and cut cache agree", xlabel="steps of joint training")
    agreement.yaxis.set_major_formatter(percent())


def _curve(axes: Axes, log: Sequence[Row], name: str, validation: str) -> None:
    steps, values = series(log, name)
    centres, mean, low, high = smoothed(steps, values)
    width = max(1, len(steps) // MEANS)
    axes.plot(centres, mean, color=BLUE, linewidth=1.6, label=f"training, mean of {width} steps")
    axes.fill_between(centres, low, high, color=BLUE, alpha=0.15, linewidth=0, label="the middle 8 of 10 of them")
    axes.plot(*series(log, validation), "o-", color=ORANGE, markersize=4, linewidth=1.4, label="validation")
