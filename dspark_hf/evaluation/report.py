"""An evaluation as one page that needs nothing else: figures inside, no script, no request."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dspark_hf.evaluation.plots import Figure
from dspark_hf.evaluation.results import DrafterInfo, Evaluation
from dspark_hf.evaluation.tables import all_tables, headline, recommendation, remarks

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_report(evaluation: Evaluation, figures: Sequence[Figure]) -> str:
    """Return the page: headline, what to set, remarks, an answer, figures, tables, and how to measure it again."""
    # escapes whatever names of files and folders hold
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template(_TEMPLATE.name).render(
        drafter=evaluation.drafters[0].name,
        target=evaluation.target,
        headline=headline(evaluation),
        recommendation=recommendation(evaluation),
        remarks=remarks(evaluation),
        sample=evaluation.sample,
        figures=figures,
        tables=all_tables(evaluation),
        facts=measuring_facts(evaluation),
    )


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
