"""An evaluation as tables of text, the same for terminal and page, and its headline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dspark_hf.evaluation.intervals import Estimate
from dspark_hf.evaluation.prediction import speed_by_drafts, speed_by_threshold
from dspark_hf.evaluation.results import DrafterResult, Evaluation, SetResult
from dspark_hf.generation.scheduling import AdaptiveScheduler

NOTHING = "–"


@dataclass(frozen=True)
class TextTable:
    """A table: what it shows, how to read it in a sentence, and its cells; the first `num_labels` columns are text."""

    title: str
    explanation: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int


def headline(evaluation: Evaluation) -> str:
    """Return the result in one sentence: the drafter in question at the first temperature."""
    results = list(_results_of_first_drafter(evaluation))
    taus = [result.acceptance.tau.value for _, result in results if result.acceptance.tau is not None]
    names = _listed([one_set.name for one_set, _ in results])
    drafter = evaluation.drafters[0].name
    if not taus:
        return f"{drafter} had no round on {names}: every answer ended with its first token."
    parts = [f"{drafter} commits {_mean(taus):.2f} tokens per target pass on {names}{_range(taus)}"]
    ratios = [result.speeds[0].ratio for _, result in results]
    parts.append(f"{_mean(ratios):.2f}x of plain speed{_range(ratios)}")
    counts = [result.speeds[0] for _, result in results if result.speeds[0].num_identical is not None]
    if counts:
        same = sum(speed.num_identical or 0 for speed in counts)
        parts.append(f"{same} of {sum(speed.num_outputs for speed in counts)} outputs identical")
    return "; ".join(parts) + "."


def recommendation(evaluation: Evaluation) -> str | None:
    """Return what to set for the drafter in question, in a sentence; None where it had no round."""
    results = list(_results_of_first_drafter(evaluation))
    drafter = evaluation.drafters[0]
    block_size = evaluation.settings.num_drafts or drafter.block_size
    # over all sets alike: a user sets one thing for all questions
    measured: dict[str, list[float]] = {}
    predicted: dict[float, list[float]] = {}
    for _, result in results:
        for speed in result.speeds:
            if speed.batch_size == 1:
                measured.setdefault(speed.scheduler, []).append(speed.ratio)
        for point in speed_by_drafts(result, block_size):
            predicted.setdefault(point.setting, []).append(point.speed)
    if not measured or not predicted:
        return None
    speeds = {name: _mean(ratios) for name, ratios in measured.items()}
    fastest = max(speeds, key=lambda name: speeds[name])
    count = max(predicted, key=lambda number: _mean(predicted[number]))
    fixed = f"of fixed numbers of drafts, num_assistant_tokens={count:g} is predicted to be best, "
    fixed += f"{_mean(predicted[count]):.2f}x"
    if speeds[fastest] <= 1:
        return f"Recommended here: no drafter; the fastest scheduler, {fastest}, has {speeds[fastest]:.2f}x; {fixed}."
    how = "leave the scheduler out" if fastest == AdaptiveScheduler.name else f'scheduler="{fastest}"'
    return f"Recommended here: {how}, {speeds[fastest]:.2f}x measured; {fixed}."


def remarks(evaluation: Evaluation) -> list[str]:
    """Return what a reader must know beside the headline, the gravest first."""
    lines = []
    if evaluation.ended_by is not None:
        lines.append(f"This is a partial result: the run ended early ({evaluation.ended_by}).")
    if evaluation.has_mismatch:
        lines.append("Greedy outputs differ from plain generate, which must not happen in fp32. Please report this.")
    if not evaluation.is_exact and any(one_set.is_greedy for one_set in evaluation.sets):
        lines.append(
            f"Greedy outputs can differ in {evaluation.dtype}: a pass over several tokens rounds otherwise than a "
            "pass over one, which decides near ties. In fp32 they are identical."
        )
    return lines


def all_tables(evaluation: Evaluation) -> list[TextTable]:
    """Return every table that has rows."""
    makers = (acceptance_table, position_table, speed_table, reliability_table, sweep_table)
    return [table for table in (make(evaluation) for make in makers) if table.rows]


def acceptance_table(evaluation: Evaluation) -> TextTable:
    """Return the accepted length of every drafter on every set."""
    labels, rows = _label_headings(evaluation), []
    for one_set, result in _results(evaluation):
        acceptance = result.acceptance
        rows.append(
            (
                *_labels(evaluation, one_set, result),
                interval(acceptance.tau),
                NOTHING if acceptance.verify_rate is None else share(acceptance.verify_rate.value),
                str(acceptance.num_rounds),
                _count(one_set.num_prompts, one_set.num_wanted),
            )
        )
    return TextTable(
        "Accepted length",
        "tau, of decoding: tokens a target pass commits, its own bonus token included, with the 95% interval over "
        "prompts. Accepted: share of all drafts that the target took.",
        (*labels, "tau", "accepted", "passes", "prompts"),
        tuple(rows),
        len(labels),
    )


def position_table(evaluation: Evaluation) -> TextTable:
    """Return the acceptance of every draft position."""
    width = max((len(result.acceptance.rate_by_position) for _, result in _results(evaluation)), default=0)
    labels, rows = _label_headings(evaluation), []
    for one_set, result in _results(evaluation):
        rates = [share(rate.value) for rate in result.acceptance.rate_by_position]
        rows.append((*_labels(evaluation, one_set, result), *rates, *[NOTHING] * (width - len(rates))))
    return TextTable(
        "Acceptance by position",
        "How often the target took the draft at each position, of the times it took all drafts before it.",
        (*labels, *(str(position + 1) for position in range(width))),
        tuple(rows) if width else (),
        len(labels),
    )


def speed_table(evaluation: Evaluation) -> TextTable:
    """Return tokens per second, against plain `generate`; columns that would say the same everywhere are left out."""
    labels, rows = _label_headings(evaluation), []
    repeats, has_batches = evaluation.settings.repeats, evaluation.settings.batch_size > 1
    for one_set, result in _results(evaluation):
        for speed in result.speeds:
            same = NOTHING if speed.num_identical is None else f"{speed.num_identical} of {speed.num_outputs}"
            cells = {
                "scheduler": speed.scheduler,
                "batch": str(speed.batch_size) if has_batches else None,
                "plain": f"{speed.plain_tokens_per_second:.1f}",
                "assisted": f"{speed.tokens_per_second:.1f}",
                "ratio": f"{speed.ratio:.2f}x",
                "range": f"{speed.lowest_ratio:.2f} to {speed.highest_ratio:.2f}" if repeats > 1 else None,
                "identical": same,
            }
            rows.append(_labels(evaluation, one_set, result) + tuple(cell for cell in cells.values() if cell))
    wanted = (
        "scheduler",
        "batch" if has_batches else "",
        "plain",
        "assisted",
        "ratio",
        "range" if repeats > 1 else "",
        "identical",
    )
    medians = f"; medians of {repeats} repeats, and the range of the repeats' ratios" if repeats > 1 else ""
    return TextTable(
        "Speed",
        f"Tokens per second of all variants, which answered in turns{medians}. The scheduler decides how many drafts "
        "are made and verified; fixed takes whole blocks. Identical: greedy outputs equal to those of plain generate, "
        "token for token.",
        (*labels, *(heading for heading in wanted if heading)),
        tuple(rows),
        len(labels),
    )


def reliability_table(evaluation: Evaluation) -> TextTable:
    """Return how far the confidence can be trusted."""
    labels, rows = _label_headings(evaluation), []
    for one_set, result in _results(evaluation):
        if result.reliability is None:
            continue
        for what, one in (("survival", result.reliability.survival), ("draft", result.reliability.conditional)):
            auc = NOTHING if one.auc is None else f"{one.auc:.3f}"
            cells = (f"{one.ece:.1%}", auc, f"{one.brier:.3f}", str(one.num_drafts))
            rows.append((*_labels(evaluation, one_set, result), what, *cells))
    return TextTable(
        "Reliability of the confidence",
        "Survival: a draft and all before it are taken. Draft: it is taken, given that all before it were. ECE: mean "
        "gap between belief and outcome (0% is best). AUC: how well it ranks (0.5 is chance, 1 is best). Brier: mean "
        "squared error (0 is best).",
        (*labels, "belief", "ECE", "AUC", "Brier", "drafts"),
        tuple(rows),
        len(labels) + 1,
    )


def sweep_table(evaluation: Evaluation) -> TextTable:
    """Return what every confidence threshold would have done."""
    labels, rows = _label_headings(evaluation), []
    for one_set, result in _results(evaluation):
        speeds = {point.setting: f"{point.speed:.2f}x" for point in speed_by_threshold(result)}
        for point in result.sweep or ():
            rate = NOTHING if point.verify_rate is None else share(point.verify_rate.value)
            rows.append(
                (
                    *_labels(evaluation, one_set, result),
                    f"{point.threshold:.1f}",
                    f"{point.tau.value:.2f}",
                    share(point.verified_share.value),
                    rate,
                    speeds.get(point.threshold, NOTHING),
                )
            )
    return TextTable(
        "Confidence threshold",
        "What assistant_confidence_threshold would have done, worked out from the rounds that verified every draft: "
        "exact for each round, an estimate for a whole run, whose rounds would start at other tokens. The speed is "
        "predicted, plain generate being 1, as if drafting took no time: at best.",
        (*labels, "threshold", "tau", "drafts verified", "verified accepted", "speed at best"),
        tuple(rows),
        len(labels),
    )


def interval(estimate: Estimate | None) -> str:
    """Return a value with its interval, if there is one."""
    if estimate is None:
        return NOTHING
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def share(value: float) -> str:
    """Return a share as a percentage."""
    return f"{value:.0%}"


def _results(evaluation: Evaluation) -> Iterator[tuple[SetResult, DrafterResult]]:
    for one_set in evaluation.sets:
        for result in one_set.drafters:
            yield one_set, result


def _results_of_first_drafter(evaluation: Evaluation) -> Iterator[tuple[SetResult, DrafterResult]]:
    temperature = evaluation.sets[0].temperature
    for one_set in evaluation.sets:
        if one_set.temperature == temperature:
            yield one_set, one_set.drafters[0]


def _label_headings(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the headings that tell rows apart: what is the same everywhere is said once, below the tables."""
    headings = ("set", "temperature", "drafter")
    wanted = (True, len(evaluation.settings.temperatures) > 1, len(evaluation.drafters) > 1)
    return tuple(heading for heading, is_wanted in zip(headings, wanted, strict=True) if is_wanted)


def _labels(evaluation: Evaluation, one_set: SetResult, result: DrafterResult) -> tuple[str, ...]:
    labels = {
        "set": one_set.name,
        "temperature": "0 (greedy)" if one_set.is_greedy else f"{one_set.temperature:g}",
        "drafter": result.drafter,
    }
    return tuple(labels[heading] for heading in _label_headings(evaluation))


def _count(done: int, wanted: int) -> str:
    return str(done) if done == wanted else f"{done} of {wanted}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _range(values: Sequence[float]) -> str:
    return "" if len(values) == 1 else f" ({min(values):.2f} to {max(values):.2f})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
