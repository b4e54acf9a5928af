"""Draw the common parts of pages of budgets and gates: style, maps of layers and heads, and the file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise.errors import BadInput, HeadwiseError
from headwise.files.writing import replacing

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise HeadwiseError(f"plots need matplotlib ({error}): pip install 'headwise[plot]'.") from error

FORMATS = (".png", ".svg", ".pdf")
WRITTEN = 12  # layers and heads up to which a map has its numbers written in
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "figure.titlesize": 11,
    "figure.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a model's name may hold a dollar sign
}
BLUE, ORANGE = "#0072b2", "#d55e00"


def require_ratio(ratio: float) -> None:
    """Raise BadInput unless a retained ratio is within (0, 1)."""
    if not 0 < ratio < 1:
        raise BadInput(f"ratio {ratio} must lie strictly between 0 and 1.")


def write_page(path: str | os.PathLike[str], make: Callable[[], Figure]) -> None:
    """Write a page as .png, .svg or .pdf, at once or not at all. Raises BadInput or WriteFailed."""
    out = Path(path)
    if out.suffix.lower() not in FORMATS:
        raise BadInput(f"{out}: a plot is a {', '.join(FORMATS)} file; name one.")
    with matplotlib.rc_context(STYLE), replacing(out) as temporary:
        make().savefig(temporary, format=out.suffix.lower()[1:], dpi=120, facecolor="white")


def map_height(layers: int) -> float:
    """Return the height in inches of a map of so many layers, with its scale and title."""
    return float(np.clip(0.32 * layers, 1.8, 7.5)) + 1.3


def draw_map(
    figure: Figure | SubFigure,
    axes: Axes,
    layers: tuple[int, ...],
    values: Float[np.ndarray, "layers kv_heads"],
    title: str,
    largest: float,
) -> None:
    """Draw a map, layers down and heads across. The numbers are written in where there is room."""
    largest = max(largest, 1e-3)  # nothing at all would have no scale
    axes.set_facecolor("#dddddd")
    image = axes.imshow(values, cmap="magma_r", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set(title=title, xlabel="KV head", ylabel="layer")
    rows, columns = (range(0, size, -(-size // 20)) for size in values.shape)
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    axes.set_xticks(columns)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10])
    bar = figure.colorbar(image, ax=axes, location="bottom", format=percent(), ticks=ticks, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    if max(values.shape) <= WRITTEN:
        decimals = 0 if largest > 0.1 else 1 if largest > 0.01 else 2
        for (row, column), value in np.ndenumerate(np.nan_to_num(values, nan=-1)):
            text = f"{100 * value:.{decimals}f}" if value >= 0 else ""
            colour = "white" if value > 0.5 * largest else "black"
            axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)


def percent() -> FuncFormatter:
    """Return the format of ticks of a share."""
    return FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
