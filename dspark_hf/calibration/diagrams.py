"""Reliability diagrams: what was believed against what came true, as it is or before and after a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_hf.calibration.metrics import NUM_BINS, expected_calibration_error, reliability_bins
from dspark_hf.calibration.observations import Observations
from dspark_hf.calibration.sts import survival_probabilities
from dspark_hf.figures import COLORS, STYLE, check_plotting, draw_trust, name_colors, name_figure, new_figure, to_png
from dspark_hf.files import write_whole

_NUM_COLUMNS = 4


def draw_reliability(
    path: Path,
    observations: Observations,
    temperatures: Sequence[float] | None = None,
    *,
    num_bins: int = NUM_BINS,
    title: str = "",
) -> None:
    """Write a PNG with one diagram per slot: survival believed and survival seen.

    Both are at temperature 1, and beside it at those `temperatures` that are given. A dot is a bin of predictions, its
    area after the number of blocks in it. Dots below the line are over-confidence. `title` says whose diagrams they
    are.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    check_plotting()
    import matplotlib

    curves = {"before": [1.0] * observations.block_size}
    if temperatures is not None:
        curves["after"] = list(temperatures)
    colors = COLORS[len(curves) - 1 :: -1]
    num_rows = -(-observations.block_size // _NUM_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3 * _NUM_COLUMNS, 0.9 + 3.3 * num_rows)
        grid = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False, sharex=True, sharey=True)
        for position, axes in enumerate(grid.flat):
            if position >= observations.block_size:
                axes.set_visible(False)
                continue
            errors = [
                _draw_slot(axes, observations, position, scale, num_bins, color)
                for scale, color in zip(curves.values(), colors, strict=True)
            ]
            drafts = "draft 1" if position == 0 else f"drafts 1 to {position + 1}"
            axes.set_title(f"{drafts}: ECE {' to '.join(f'{error:.1%}' for error in errors)}", fontsize=10)
            # a panel need not have another below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("believed survival")
        for row in grid:
            row[0].set_ylabel("observed survival")
        # the colours in the order of the names
        name_colors(figure, list(curves)[::-1])
        name_figure(figure, title)
        write_whole(path, to_png(figure))


def _draw_slot(
    axes: Any, observations: Observations, position: int, temperatures: Sequence[float], num_bins: int, color: str
) -> float:
    """Draw a slot's bins at those temperatures, and return their calibration error."""
    mask = observations.is_observed(position)
    predictions: Tensor = survival_probabilities(observations.confidence_logits[mask], temperatures)[:, position]
    outcomes = observations.num_accepted[mask] > position
    bins = reliability_bins(predictions, outcomes, num_bins)
    filled = bins.counts > 0
    columns = (bins.mean_predictions[filled], bins.mean_outcomes[filled], bins.counts[filled])
    draw_trust(axes, *(column.tolist() for column in columns), color=color)
    return expected_calibration_error(predictions, outcomes, num_bins)
