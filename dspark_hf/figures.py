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


def name_colors(figure: Any, names: Sequence[str]) -> None:
    """Write the names in their colours above the panels, if there is more than one."""
    if len(names) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[index % len(COLORS)], linewidth=4, label=name) for index, name in enumerate(names)
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=4,
        frameon=False,
        labelcolor="linecolor",
        handlelength=1,
        borderaxespad=0.2,
    )


def to_png(figure: Any) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
