"""Tables and figures of `benchmarks.throughput`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.loads import DEFAULT, FIXED, PLAIN, Measured
from dspark_hf.figures import COLORS, GREY, STYLE, check_plotting, name_colors, name_figure, new_figure, to_png

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
    """Draw the speed of fixed drafts and of the default, plain = 1, by rows, with standard errors (PNG)."""
    check_plotting()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(8, 4.8)
        axes = figure.subplots()
        rows = list(by_rows)
        # the others are in the table: more lines than four cannot be told apart
        ways = [way for way in next(iter(by_rows.values())) if way in (*FIXED, DEFAULT)]
        axes.axhline(1, color=GREY, linewidth=1)
        for index, way in enumerate(ways):
            pairs = [(by_rows[count][way], by_rows[count][PLAIN]) for count in rows]
            ratios = [one.ratio_to(plain) for one, plain in pairs]
            errors = [one.error_of_ratio_to(plain) for one, plain in pairs]
            # side by side, so that bars do not hide each other
            places = [count * 2 ** (0.06 * (index - (len(ways) - 1) / 2)) for count in rows]
            axes.errorbar(
                places,
                ratios,
                [0.0 if math.isnan(error) else error for error in errors],
                color=COLORS[index],
                marker="o",
                markersize=5,
                linewidth=2.4 if way == DEFAULT else 1.2,
                capsize=2,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, labels=[str(count) for count in rows])
        axes.set(xlabel="rows", ylabel="times the speed of plain generate", ylim=(0, None))
        name_colors(figure, ways)
        name_figure(figure, f"{title}; bars: standard error; the grey line is plain generate")
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
