"""An evaluation as one page that needs nothing else: figures inside, no script, no request."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from html import escape

from dspark_hf.evaluation.plots import Figure
from dspark_hf.evaluation.results import DrafterInfo, Evaluation
from dspark_hf.evaluation.tables import TextTable, all_tables, headline, recommendation, remarks

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5b6675; --paper: #ffffff; --line: #dde2e8;
  --tint: #f4f6f9; --alarm: #9a3b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a2adbb; --paper: #14181e; --line: #303845;
  --tint: #1c222b; --alarm: #ffb37a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.45rem; line-height: 1.35; margin: 0.25rem 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.25rem; }
p { margin: 0.25rem 0 0.75rem; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.alarm { color: var(--alarm); font-weight: 600; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem; text-align: right; white-space: nowrap; }
th { background: var(--tint); font-weight: 600; vertical-align: bottom; }
tbody tr + tr td { border-top: 1px solid var(--line); }
.label { text-align: left; }
figure { margin: 1rem 0 0; overflow-x: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; font-size: 0.9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def render_report(evaluation: Evaluation, figures: Sequence[Figure]) -> str:
    """Return the page: headline, remarks, figures, tables, and how to measure it again."""
    title = f"{evaluation.drafters[0].name}: evaluation"
    parts = [
        f'<p class="soft">Drafter {escape(evaluation.drafters[0].name)} for target {escape(evaluation.target)}</p>',
        f"<h1>{escape(headline(evaluation))}</h1>",
        *(f"<p>{escape(advice)}</p>" for advice in [recommendation(evaluation)] if advice is not None),
        *(f'<p class="alarm">{escape(remark)}</p>' for remark in remarks(evaluation)),
        *(_figure(figure) for figure in figures),
        *(_table(table) for table in all_tables(evaluation)),
        "<h2>How this was measured</h2>",
        _facts(evaluation),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    return (
        f'<h2>{escape(figure.title)}</h2>\n<p class="soft">{escape(figure.explanation)}</p>\n'
        f'<figure><img alt="{escape(figure.title)}" src="data:image/png;base64,{data}"></figure>'
    )


def _table(table: TextTable) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="label">{escape(cell)}</{tag}>'
            if index < table.num_labels
            else f"<{tag}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2>\n<p class="soft">{escape(table.explanation)}</p>\n<div class="wide"><table>\n'
        f"<thead><tr>{cells(table.headings, 'th')}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _facts(evaluation: Evaluation) -> str:
    facts = measuring_facts(evaluation)
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"


def measuring_facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return names and values of what decided the numbers."""
    settings, provenance = evaluation.settings, evaluation.provenance
    drafts = "the whole block" if settings.num_drafts is None else f"{settings.num_drafts}"
    return [
        ("target", f"{evaluation.target}, {evaluation.dtype}, on {evaluation.device}"),
        *(("drafter", _describe_drafter(drafter)) for drafter in evaluation.drafters),
        ("temperatures", ", ".join("0 (greedy)" if one == 0 else f"{one:g}" for one in settings.temperatures)),
        ("answers", f"{settings.max_new_tokens} new tokens at most, {settings.repeats} repeats, seed {settings.seed}"),
        ("drafts per round", drafts),
        ("hardware", f"{provenance.hardware}, {provenance.num_threads} threads"),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("date", provenance.date),
        ("commit", provenance.commit or "none: an installed package"),
        ("again", shlex.join([provenance.program, *provenance.arguments])),
    ]


def _describe_drafter(drafter: DrafterInfo) -> str:
    markov = "with a Markov head" if drafter.has_markov_head else "without a Markov head"
    confidence = "no confidence head"
    if drafter.has_confidence_head:
        confidence = f"{'calibrated' if drafter.is_calibrated else 'uncalibrated'} confidence"
    return f"{drafter.name}, blocks of {drafter.block_size}, {markov}, {confidence}"
