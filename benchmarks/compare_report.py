"""The tables and the figure of `benchmarks.compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.loads import DEFAULT
from dspark_hf.figures import COLORS, GREY, STYLE, check_plotting, name_colors, name_figure, new_figure, to_png

# the control
AGAIN = "plain again"
# of every process: once with nothing learnt, then once more
STATES = ("cold", "warm")
# target, dtype, temperature
Key = tuple[str, str, float]
# by set and way, a measurement a run
Measurements = dict[str, dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class Case:
    """What a process measures."""

    model: str
    dtype: str
    temperature: float
    set: str
    way: str
    run: int


@dataclass(frozen=True)
class Results:
    """What was measured, by target, dtype and temperature."""

    found: dict[Key, Measurements]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], cases: Sequence[Case]) -> Results:
        """Return those of the wanted cases."""
        by_case = {Case(**record["case"]): record["found"] for record in records}
        found: dict[Key, Measurements] = {}
        for case in cases:
            by_set = found.setdefault((case.model, case.dtype, case.temperature), {})
            by_set.setdefault(case.set, {}).setdefault(case.way, []).append(by_case[case])
        return cls(found)

    def lines(self, bytes_per_second: float) -> Iterator[str]:
        """Give the tables."""
        for key, sets in self.found.items():
            yield from ("", f"## {_name(key, sets)}", "", *_HEAD)
            for name, ways in sets.items():
                yield from (_row(name, way, runs) for way, runs in ways.items())
        yield from ("", f"The limit, were weights read at {bytes_per_second / 1e9:.1f} GB/s and all else free:", "")
        for key, sets in self.found.items():
            for name, ways in sets.items():
                yield from _limit(f"{_name(key, sets)}, {name}", ways, bytes_per_second)


_HEAD = (
    "| set | way | cold, plain = 1 | warm, plain = 1 | tau | passes per token | draft / verify / rest | peak memory "
    "| identical |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def _name(key: Key, sets: Measurements) -> str:
    model, dtype, temperature = key
    title = next(iter(next(iter(sets.values())).values()))[0]["title"] if sets else model
    return f"{title}, {dtype}, {f'temperature {temperature:g}' if temperature else 'greedy'}"


def _row(name: str, way: str, runs: list[dict[str, Any]]) -> str:
    cells = [_with_error(*spread(runs, state)) for state in STATES]
    parts = [sum(run["parts"][place] for run in runs) for place in range(3)]
    shares = " / ".join(f"{part / sum(parts):.0%}" for part in parts) if sum(parts) else ""
    same, all_texts = (sum(run["identical"][place] for run in runs) for place in range(2))
    cells += [f"{mean(run[column] for run in runs):.2f}" for column in ("tau", "passes_per_token")]
    cells += [shares, f"{max(run['peak_bytes'] for run in runs) / 1e9:.2f} GB", f"{same} of {all_texts}"]
    return f"| {name} | {way} | {' | '.join(cells)} |"


def spread(runs: Sequence[dict[str, Any]], state: str) -> tuple[float, float | None]:
    """Return the mean ratio over the runs and its standard error, None for a single run."""
    ratios = [run["ratios"][STATES.index(state)] for run in runs]
    return mean(ratios), stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _limit(name: str, ways: dict[str, list[dict[str, Any]]], bytes_per_second: float) -> Iterator[str]:
    for way, runs in ways.items():
        if way == DEFAULT:
            tau, size = mean(run["tau"] for run in runs), runs[0]["weight_bytes"]
            measured = mean(run["speeds"][STATES.index("warm")] for run in runs)
            yield f"- {name}: {bytes_per_second / size * tau:.0f} tokens/s at tau {tau:.2f}; measured {measured:.0f}."


def draw(results: Results) -> bytes:
    """Return the figure as PNG: speed relative to plain by set, warm ones filled, cold ones hollow."""
    check_plotting()
    import matplotlib

    ways = [way for way in _ways_of(results) if way != AGAIN]
    with matplotlib.rc_context(STYLE):
        keys = list(results.found)
        columns = min(len(keys), 2)
        rows = -(-len(keys) // columns)
        figure = new_figure(11.5, 1 + 3.2 * rows)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for panel, key in zip(panels, keys, strict=False):
            _draw_panel(panel, key, results.found[key], ways)
        # at last: it keeps the top of what is drawn so far, and panels share it
        panels[0].set_ylim(bottom=0)
        for panel in panels[len(keys) :]:
            panel.set_axis_off()
        name_colors(figure, ways)
        bars = "" if _num_runs(results) == 1 else "; bars: standard errors of runs"
        name_figure(figure, f"speed of generate, plain = 1; filled: warm, hollow: cold{bars}")
        return to_png(figure)


def _ways_of(results: Results) -> list[str]:
    return list(dict.fromkeys(way for sets in results.found.values() for ways in sets.values() for way in ways))


def _num_runs(results: Results) -> int:
    return max(len(runs) for sets in results.found.values() for ways in sets.values() for runs in ways.values())


def _draw_panel(panel: Any, key: Key, sets: Measurements, ways: Sequence[str]) -> None:
    panel.axhline(1, color=GREY, linewidth=1)
    for index, way in enumerate(ways):
        shift = 0.6 * (index / max(len(ways) - 1, 1) - 0.5)
        for place, by_way in enumerate(sets.values()):
            for state in STATES if way in by_way else ():
                value, error = spread(by_way[way], state)
                color = COLORS[index % len(COLORS)]
                fill = color if state == "warm" else "white"
                panel.errorbar(place + shift, value, error, fmt="o", color=color, markerfacecolor=fill, capsize=2)
    panel.set(title=_name(key, sets), xticks=range(len(sets)), xlim=(-0.5, len(sets) - 0.5))
    panel.set_xticklabels(sets)
