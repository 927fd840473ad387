"""Tables and figures of `benchmarks.throughput`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.loads import DEFAULT, FIXED, PLAIN, Measured
from dspark_hf.figures import COLORS, STYLE, check_plotting, name_colors, new_figure, to_png

# what was measured at each number of rows: ways by name
ByRows = Mapping[int, Mapping[str, Measured]]


def speed_table(by_rows: ByRows) -> list[str]:
    """Return the table of speeds, plain = 1, one line per number of rows."""
    ways = list(next(iter(by_rows.values())))
    others = [way for way in ways if way != PLAIN]
    fixed = [way for way in FIXED if way in ways]
    lines = [
        f"| rows | plain, tokens/s | {' | '.join(others)} | default / {fixed[0] if len(fixed) == 1 else 'best fixed'} "
        "| identical |",
        f"| ---: | ---: | {' | '.join('---:' for _ in others)} | ---: | ---: |",
    ]
    for rows, measured in by_rows.items():
        plain = measured[PLAIN]
        ratios = [f"{measured[way].ratio_to(plain):.2f}" for way in others[:-1]]
        same = [one for way in others for one in measured[way].is_identical]
        default = measured[DEFAULT]
        lines.append(
            f"| {rows} | {plain.speed:.1f} | {' | '.join(ratios)} | {ratio(default, plain)} "
            f"| {ratio(default, best_fixed(measured))} | {f'{sum(same)} of {len(same)}' if same else ''} |"
        )
    return lines


def ratio(one: Measured, other: Measured) -> str:
    """Return the ratio of speeds, with its standard error if there is more than one run."""
    error = one.error_of_ratio_to(other)
    return f"{one.ratio_to(other):.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def best_fixed(measured: Mapping[str, Measured]) -> Measured:
    """Return the fixed setting whose median speed is best."""
    return max((measured[way] for way in FIXED if way in measured), key=lambda one: one.speed)


def speculation_table(by_rows: ByRows) -> list[str]:
    """Return the table of tau and of verified drafts per row and round."""
    ways = [way for way in next(iter(by_rows.values())) if way != PLAIN]
    lines = [f"| rows | {' | '.join(ways)} |", f"| ---: | {' | '.join('---:' for _ in ways)} |"]
    for rows, measured in by_rows.items():
        cells = [f"{median(measured[way].tau):.2f} / {median(measured[way].verified):.2f}" for way in ways]
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    return lines


def draw(by_rows: ByRows, title: str, path: Path) -> None:
    """Draw throughput against rows, speed per row against throughput, and verified length against rows (PNG)."""
    check_plotting()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(15, 4.6)
        throughput, frontier, verified = figure.subplots(1, 3)
        rows, ways = list(by_rows), list(next(iter(by_rows.values())))
        for index, way in enumerate(ways):
            measured = [by_rows[count][way] for count in rows]
            speeds = [one.speed for one in measured]
            style: dict[str, Any] = {"color": COLORS[index], "marker": "o", "markersize": 4}
            style["linewidth"] = 2.4 if way in (PLAIN, DEFAULT) else 1.2
            throughput.plot(rows, speeds, **style)
            frontier.plot(speeds, [speed / count for speed, count in zip(speeds, rows, strict=True)], **style)
            if way != PLAIN:
                verified.plot(rows, [1 + median(one.verified) for one in measured], **style)
        throughput.set(title="Throughput", xlabel="rows", ylabel="tokens/s, all rows")
        frontier.set(title="Speed of a row", xlabel="tokens/s, all rows", ylabel="tokens/s per row")
        verified.set(title="Verified length", xlabel="rows", ylabel="tokens per row and pass")
        for axes in (throughput, verified):
            axes.set_xscale("log", base=2)
            axes.set_xticks(rows, labels=[str(count) for count in rows])
        name_colors(figure, ways)
        figure.supxlabel(title, fontsize=9, color="#333333")
        path.write_bytes(to_png(figure))


def summary(results: Mapping[str, ByRows], worst: Sequence[str]) -> list[str]:
    """Return one line per case: the smallest ratio of the default to plain and to the best fixed setting measured."""
    lines = ["| case | smallest default / plain | smallest default / best fixed |", "| --- | ---: | ---: |"]
    for case, by_rows in results.items():
        plain = _smallest([(measured[DEFAULT], measured[PLAIN]) for measured in by_rows.values()])
        fixed = _smallest([(measured[DEFAULT], best_fixed(measured)) for measured in by_rows.values()])
        lines.append(f"| {case}{' (worst case)' if case in worst else ''} | {plain} | {fixed} |")
    return lines


def _smallest(pairs: Sequence[tuple[Measured, Measured]]) -> str:
    return ratio(*min(pairs, key=lambda pair: pair[0].ratio_to(pair[1])))
