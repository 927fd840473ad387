"""Reliability diagrams: what was believed against what came true."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspark_hf.calibration.metrics import NUM_BINS, expected_calibration_error, reliability_bins
from dspark_hf.calibration.observations import Observations
from dspark_hf.calibration.sts import survival_probabilities

_NUM_COLUMNS = 4


def check_matplotlib() -> None:
    """Raise a `ValueError` unless diagrams can be drawn."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "`matplotlib` must be installed to draw reliability diagrams, got no such package. "
            'Run `pip install "dspark-hf[eval]"`.'
        )


def draw_reliability(
    path: Path, observations: Observations, temperatures: Sequence[float], *, num_bins: int = NUM_BINS
) -> None:
    """Write a PNG with one diagram per slot: survival believed and survival seen, at temperature 1 and at the given.

    A point is a bin of predictions, its area the number of blocks in it. Points below the diagonal are
    over-confidence.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    check_matplotlib()
    # the object interface: no global state, no window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = -(-observations.block_size // _NUM_COLUMNS)
    figure = Figure(figsize=(3.2 * _NUM_COLUMNS, 3.3 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False, sharex=True, sharey=True).flat
    curves = (("before", "tab:orange", [1.0] * observations.block_size), ("after", "tab:blue", list(temperatures)))
    for position, axes in enumerate(all_axes):
        if position >= observations.block_size:
            axes.set_axis_off()
            continue
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
        for name, color, scale in curves:
            _draw_slot(axes, observations, position, scale, num_bins, label=name, color=color)
        axes.set_title(f"drafts 1 to {position + 1}", fontsize=10)
        axes.legend(fontsize=8, loc="lower right")
    figure.supxlabel("believed chance that all are accepted")
    figure.supylabel("share in which all were")
    figure.savefig(path, dpi=120, format="png")


def _draw_slot(
    axes: Any,
    observations: Observations,
    position: int,
    temperatures: Sequence[float],
    num_bins: int,
    *,
    label: str,
    color: str,
) -> None:
    mask = observations.is_observed(position)
    predictions = survival_probabilities(observations.confidence_logits[mask], temperatures)[:, position]
    outcomes = observations.num_accepted[mask] > position
    bins = reliability_bins(predictions, outcomes, num_bins)
    is_filled = bins.counts > 0
    x, y = bins.mean_predictions[is_filled].numpy(), bins.mean_outcomes[is_filled].numpy()
    shares = bins.counts[is_filled].numpy() / max(len(predictions), 1)
    error = expected_calibration_error(predictions, outcomes, num_bins)
    axes.plot(x, y, color=color, linewidth=1, alpha=0.6)
    axes.scatter(x, y, s=8 + 160 * shares, color=color, alpha=0.7, label=f"{label}, ECE {error:.3f}")
