"""What all figures share: colours, style, PNG. matplotlib is imported where it is used (extra `eval`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind eyes too, without the yellow that paper swallows
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195")
GREY = "#6b7480"
_RESOLUTION = 160
# enough for ours and the shades between them
_NUM_COLORS = 128
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "figure.constrained_layout.use": True,
    # names are text, whatever dollar signs are in them
    "text.parse_math": False,
}


def check_plotting() -> None:
    """Raise a `ValueError` if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            '`matplotlib` must be installed to draw figures, got no such package. Run `pip install "dspark-hf[eval]"`.'
        )


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, sizes in inches; draw on it within `matplotlib.rc_context(STYLE)`."""
    # without pyplot: it keeps figures alive and may look for a screen
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_RESOLUTION)


def name_colors(figure: Any, names: Sequence[str], *, dashed: Sequence[str] = ()) -> None:
    """Write the names in their colours above the panels, if there is more than one; lines of `dashed` ones are so."""
    if len(names) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=COLORS[index % len(COLORS)],
            linewidth=2 if name in dashed else 4,
            linestyle="--" if name in dashed else "-",
            label=name,
        )
        for index, name in enumerate(names)
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=4,
        frameon=False,
        labelcolor="linecolor",
        handlelength=2 if dashed else 1,
        borderaxespad=0.2,
    )


def name_figure(figure: Any, text: str) -> None:
    """Write below the panels what the figure is of, so that the file alone tells it."""
    figure.supxlabel(escape_math(text), fontsize=9, color="#333333")


def escape_math(text: str) -> str:
    """Return text that matplotlib takes for no formula, whatever names of files are in it."""
    return text.replace("$", r"\$")


def show_percent(axis: Any) -> None:
    """Label an axis of shares with percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_trust(
    axes: Any, believed: Sequence[float], observed: Sequence[float], counts: Sequence[int], *, color: str = COLORS[0]
) -> None:
    """Draw bins of beliefs against what came of them: a dot each, its area after the number of cases in it.

    On the grey line belief and outcome agree; below it lies over-confidence.
    """
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    most = max(counts, default=1)
    areas = [15 + 235 * count / most for count in counts]
    axes.scatter(believed, observed, areas, color=color, alpha=0.7, linewidth=0, zorder=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        show_percent(axis)


def to_png(figure: Any) -> bytes:
    """Return a figure as PNG, in the few colours that it has: a third of the bytes of one in all of them."""
    # a requirement of matplotlib's own
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white")
    picture = Image.open(drawn).convert("RGB").quantize(_NUM_COLORS, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()
