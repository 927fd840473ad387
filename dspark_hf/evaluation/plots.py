"""Figures of an evaluation, as PNG. matplotlib is imported where it is used (extra `eval`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_hf.evaluation.intervals import Estimate
from dspark_hf.evaluation.prediction import PredictedSpeed, best, speed_by_drafts, speed_by_threshold
from dspark_hf.evaluation.results import DrafterResult, Evaluation, SetResult
from dspark_hf.evaluation.sweep import SweepPoint
from dspark_hf.figures import (
    COLORS,
    GREY,
    STYLE,
    check_plotting,
    draw_trust,
    escape_math,
    name_colors,
    name_figure,
    new_figure,
    show_percent,
    to_png,
)

_PANELS_PER_ROW = 3
# inches, of every figure
_WIDTH = 11.5
# rounds below which a point says little
_FEW = 20


@dataclass(frozen=True)
class Figure:
    """A picture: the stem of its file, its title, how to read it in a sentence, and its bytes."""

    name: str
    title: str
    explanation: str
    png: bytes


@dataclass(frozen=True)
class _Line:
    """A line of a panel: its label, its points, their intervals, and how many rounds are behind each."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    bands: Sequence[Estimate] = ()
    counts: Sequence[int] = ()
    is_dashed: bool = False


def draw_figures(evaluation: Evaluation) -> list[Figure]:
    """Return all figures there are measurements for.

    Raises:
        ValueError: if matplotlib is missing.
    """
    check_plotting()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figures = [_accepted_length(evaluation)]
        for temperature in evaluation.settings.temperatures:
            sets = [one for one in evaluation.sets if one.temperature == temperature]
            figures += _of_temperature(evaluation, sets, temperature) if sets else []
    return figures


def _of_temperature(evaluation: Evaluation, sets: Sequence[SetResult], temperature: float) -> Iterator[Figure]:
    suffix, about = f"temperature_{temperature:g}", f"{_sampling(temperature)}, {_about(evaluation, sets)}"
    if any(result.acceptance.rate_by_position for one_set in sets for result in one_set.drafters):
        yield _acceptance_by_position(sets, suffix, about)
    for index, first in enumerate(sets[0].drafters):
        pairs = [(one_set.name, one_set.drafters[index]) for one_set in sets]
        # without a confidence head there is nothing to draw, and nothing without a round either
        pairs = [(name, result) for name, result in pairs if result.sweep and result.reliability]
        if pairs:
            of = f"{_file_stem(first.drafter)}_{suffix}"
            block_size = evaluation.settings.num_drafts or evaluation.drafters[index].block_size
            yield _threshold_sweep(pairs, of, f"{first.drafter}, {about}", block_size)
            yield _survival_by_position(pairs, of, f"{first.drafter}, {about}")
            yield _reliability(pairs, of, f"{first.drafter}, {about}")


def _accepted_length(evaluation: Evaluation) -> Figure:
    """Draw tau and the speed of every drafter on every set, one row each."""
    drafters = [drafter.name for drafter in evaluation.drafters]
    num_rows = len(evaluation.sets)
    spacing = len(drafters) + 0.7
    figure = new_figure(_WIDTH, 1.7 + 0.34 * spacing * num_rows)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, one_set in enumerate(evaluation.sets):
        for index, result in enumerate(one_set.drafters):
            y, color = row * spacing + index, _color(index)
            tau, speed = result.acceptance.tau, result.speeds[0]
            if tau is not None:
                _dot(left, tau.value, y, tau.low, tau.high, color, f"{tau.value:.2f}")
            _dot(right, speed.ratio, y, speed.lowest_ratio, speed.highest_ratio, color, f"{speed.ratio:.2f}x")
    middle = (len(drafters) - 1) / 2
    has_several = len(evaluation.settings.temperatures) > 1
    names = [f"{one.name}, {_sampling(one.temperature)}" if has_several else one.name for one in evaluation.sets]
    left.set_yticks([row * spacing + middle for row in range(num_rows)], names)
    left.set_ylim(num_rows * spacing - 0.7 - 0.2, -0.8)
    for axes, title, label in (
        (left, "Accepted length", "tau, tokens per target pass"),
        (right, "Speed", "times the speed of plain generate"),
    ):
        axes.axvline(1, color=GREY, linewidth=1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set(title=title, xlabel=label)
    _fix_scale(left, 1.0)
    # a few per cent must look like a few per cent
    _fix_scale(right, 0.0)
    name_colors(figure, drafters)
    return _finish(
        figure,
        "accepted_length",
        f"Accepted length and speed, {_about(evaluation, evaluation.sets)}",
        "Left: tokens per target pass with 95% intervals over prompts. Right: speed against plain generate with the "
        "range of the repeats. The grey line at 1 is plain generate.",
    )


def _fix_scale(axes: Any, start: float) -> None:
    """Let an axis begin at `start`, or below where a point lies there, with room for the numbers beside the points."""
    low, high = axes.dataLim.intervalx
    high = max(high, 1.1)
    axes.set_xlim(min(low, start) - 0.04 * (high - start), high + 0.25 * (high - min(low, start)))


def _dot(axes: Any, x: float, y: float, low: float | None, high: float | None, color: str, text: str) -> None:
    axes.plot([x if low is None else low, x if high is None else high], [y, y], color=color, linewidth=2, alpha=0.5)
    axes.plot([x], [y], "o", color=color, markersize=7)
    axes.annotate(text, (max(x, high or x), y), (8, 0), textcoords="offset points", va="center", color=color)


def _acceptance_by_position(sets: Sequence[SetResult], suffix: str, about: str) -> Figure:
    def draw(axes: Any, one_set: SetResult) -> None:
        lines = []
        for index, result in enumerate(one_set.drafters):
            rates = result.acceptance.rate_by_position
            positions = range(1, len(rates) + 1)
            color = _color(index)
            values, counts = [rate.value for rate in rates], result.acceptance.verified_by_position
            lines.append(_Line(result.drafter, color, positions, values, rates, counts))
        _draw_lines(axes, lines)
        _format_positions(axes, one_set.name)

    figure = _small_multiples(sets, draw, "accepted, if those before it were", y_limits=(0, 1))
    name_colors(figure, [result.drafter for result in sets[0].drafters])
    return _finish(
        figure,
        f"acceptance_by_position_{suffix}",
        f"Acceptance by position, {about}",
        "Share of the drafts at each position that the target takes, of the times it took all before them; shaded: "
        f"95% intervals over prompts; hollow: fewer than {_FEW} rounds came so far. Drafters without a sequential "
        "head fall towards the right.",
    )


def _threshold_sweep(pairs: Sequence[tuple[str, DrafterResult]], of: str, title: str, block_size: int) -> Figure:
    values: list[tuple[str, str, Callable[[SweepPoint], float | None]]] = [
        ("Accepted length", "tau, tokens per target pass", lambda point: point.tau.value),
        ("Verified", "share of drafts that are verified", lambda point: point.verified_share.value),
        ("Accepted", "share of verified drafts accepted", lambda point: _value(point.verify_rate)),
    ]
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(_WIDTH, 7.6)
    panels = figure.subplots(2, _PANELS_PER_ROW)
    for axes, (heading, label, value) in zip(panels[0], values, strict=True):
        lines = []
        for index, (name, result) in enumerate(pairs):
            points = [(point.threshold, value(point)) for point in result.sweep or ()]
            known = [(x, y) for x, y in points if y is not None]
            lines.append(_Line(name, _color(index), [x for x, _ in known], [y for _, y in known]))
        _draw_lines(axes, lines)
        axes.set(title=heading, xlabel="confidence threshold", ylabel=label)
        if heading == "Accepted length":
            # from the tau without drafts; noise must not fill the panel
            axes.set_ylim(1, max(1.1, axes.get_ylim()[1]))
        else:
            axes.set_ylim(0, 1)
            show_percent(axes.yaxis)
    _draw_speeds(panels[1, 0], [speed_by_threshold(result) for _, result in pairs])
    panels[1, 0].set(title="Speed at best, by threshold", xlabel="confidence threshold")
    _draw_speeds(panels[1, 1], [speed_by_drafts(result, block_size) for _, result in pairs])
    panels[1, 1].set(title="Speed, by drafts a round", xlabel="num_assistant_tokens")
    panels[1, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1, 2].set_visible(False)
    name_colors(figure, [name for name, _ in pairs])
    return _finish(
        figure,
        f"threshold_sweep_{of}",
        f"Confidence threshold: {title}",
        "A higher threshold verifies fewer drafts, of which more are taken, and commits fewer tokens per pass. Worked "
        "out from the rounds that verified every draft: exact for each round, an estimate for a whole run. Speeds are "
        "predicted from the time of plain steps and of whole blocks, plain generate being 1: by threshold as if "
        "drafting took no time, so at best; by number of drafts as if time grew evenly with it. Rings mark the best.",
    )


def _draw_speeds(axes: Any, lines: Sequence[tuple[PredictedSpeed, ...]]) -> None:
    """Draw predicted speeds from 0 on, and mark the best of each line."""
    axes.axhline(1, color=GREY, linewidth=1)
    for index, points in enumerate(lines):
        if not points:
            continue
        _draw_lines(axes, [_Line("", _color(index), [one.setting for one in points], [one.speed for one in points])])
        top = best(points)
        axes.plot([top.setting], [top.speed], "o", color=_color(index), markersize=11, mfc="none", clip_on=False)
        # in a corner, since rings may lie close to each other
        text = f"best: {top.setting:g}, {top.speed:.2f}x"
        axes.text(0.97, 0.05 + 0.08 * index, text, transform=axes.transAxes, ha="right", color=_color(index))
    highest = max((one.speed for points in lines for one in points), default=1.0)
    axes.set(ylabel="times plain generate", ylim=(0, 1.1 * max(highest, 1.0)))


def _survival_by_position(pairs: Sequence[tuple[str, DrafterResult]], of: str, title: str) -> Figure:
    def draw(axes: Any, pair: tuple[str, DrafterResult]) -> None:
        reliability = pair[1].reliability
        assert reliability is not None
        positions = range(1, len(reliability.believed_by_position) + 1)
        lines = [
            _Line("believed", COLORS[1], positions, reliability.believed_by_position, is_dashed=True),
            _Line("observed", COLORS[0], positions, reliability.observed_by_position),
        ]
        _draw_lines(axes, lines)
        _format_positions(axes, pair[0])

    figure = _small_multiples(pairs, draw, "drafts 1 to here all accepted", y_limits=(0, 1))
    name_colors(figure, ["observed", "believed"], dashed=["believed"])
    return _finish(
        figure,
        f"survival_by_position_{of}",
        f"Survival by position: {title}",
        "How often the drafts up to each position were all taken, and how often the confidence head said they would "
        "be. A dashed line above the solid one is over-confidence.",
    )


def _reliability(pairs: Sequence[tuple[str, DrafterResult]], of: str, title: str) -> Figure:
    def draw(axes: Any, pair: tuple[str, DrafterResult]) -> None:
        reliability = pair[1].reliability
        assert reliability is not None
        survival = reliability.survival
        bins = [one for one in survival.bins if one.num_drafts]
        x, y = [one.believed for one in bins], [one.observed for one in bins]
        draw_trust(axes, x, y, [one.num_drafts for one in bins])
        auc = "" if survival.auc is None else f"\nAUC {survival.auc:.2f}"
        axes.text(0.04, 0.96, f"ECE {survival.ece:.1%}{auc}", transform=axes.transAxes, va="top")
        axes.set(title=escape_math(pair[0]), xlabel="believed survival")

    figure = _small_multiples(pairs, draw, "observed survival", y_limits=(-0.03, 1.03))
    return _finish(
        figure,
        f"reliability_{of}",
        f"Reliability: {title}",
        "Drafts grouped by the believed chance that they and all before them are taken, against how often they were; "
        "larger dots hold more drafts. On the grey line belief and outcome agree; below it, it is over-confident.",
    )


def _small_multiples(
    items: Sequence[Any], draw: Callable[[Any, Any], None], y_label: str, *, y_limits: tuple[float, float]
) -> Any:
    """Draw one panel per item, at most three in a row, on one scale."""
    # as wide with few panels as with many, or letters would be of another size on the page
    num_rows = -(-len(items) // _PANELS_PER_ROW)
    figure = new_figure(_WIDTH, 0.9 + 3.6 * num_rows)
    grid = figure.subplots(num_rows, _PANELS_PER_ROW, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axes, item in zip(panels, items, strict=False):
        draw(axes, item)
        axes.set_ylim(*y_limits)
        show_percent(axes.yaxis)
        # a panel need not have another below it
        axes.tick_params(labelbottom=True)
    for axes in panels[len(items) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(y_label)
    return figure


def _draw_lines(axes: Any, lines: Sequence[_Line]) -> None:
    for line in lines:
        style = "--" if line.is_dashed else "-"
        # not clipped: a dot at 0% or 100% is a whole dot
        axes.plot(line.x, line.y, style, color=line.color, linewidth=2, marker="o", markersize=5, clip_on=False)
        rare = [(x, y) for x, y, count in zip(line.x, line.y, line.counts, strict=False) if count < _FEW]
        if rare:
            axes.plot(*zip(*rare, strict=True), "o", color=line.color, markersize=5, mfc="white", clip_on=False)
        bands = [(x, one.low, one.high) for x, one in zip(line.x, line.bands, strict=False) if one.low is not None]
        if bands:
            axes.fill_between(*zip(*bands, strict=True), color=line.color, alpha=0.13, linewidth=0)


def _format_positions(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(title=escape_math(title), xlabel="draft position")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(figure: Any, name: str, title: str, explanation: str) -> Figure:
    name_figure(figure, title)
    return Figure(name, title, explanation, to_png(figure))


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _about(evaluation: Evaluation, sets: Sequence[SetResult]) -> str:
    """Return the target's name and the number of different prompts."""
    count = sum({one.name: one.num_prompts for one in sets}.values())
    return f"target {Path(evaluation.target).name}, {count} prompt{'s' * (count != 1)}"


def _sampling(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _file_stem(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "_" for character in name)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
