"""What steps cost here, and what to set for the acceptance that was measured."""

from __future__ import annotations

from dspark_hf.doctor.drafting import Outcome
from dspark_hf.doctor.results import Costs
from dspark_hf.generation.scheduling.costs.profile import measure_calls
from dspark_hf.generation.scheduling.costs.table import CostTable
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.profiling.break_even import break_even

_REPEATS = 2
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# a predicted speed has to be this many times another one to be worth a setting
_WORTH = 1.03


def measure_here(target: TargetAdapter, drafter: DSparkAssistantModel, context_length: int) -> CostTable:
    """Return what passes and drafts of one row cost here, in seconds; those over one token are plain `generate`'s."""
    drafts = sorted({1, (1 + drafter.block_size) // 2, drafter.block_size})
    return measure_calls(
        target,
        drafter,
        [(1, context_length, width) for width in sorted({1, *(1 + count for count in drafts)})],
        [(1, context_length, count) for count in drafts],
        repeats=_REPEATS,
    )


def summarise(table: CostTable, context_length: int, outcome: Outcome) -> Costs:
    """Return the costs in milliseconds, and by numbers of drafts from which tau on they pay, and what they promise."""
    pays_from = break_even(table, rows=1, context=context_length)
    speed = {count: _tau(outcome, count) / needed for count, needed in pays_from.items()}
    return Costs(
        context_length=context_length,
        pass_ms={width: 1e3 * seconds for (_, _, width), seconds in sorted(table.verify.points.items())},
        draft_ms={count: 1e3 * seconds for (_, _, count), seconds in sorted(table.draft.points.items())},
        break_even=pays_from,
        speed=speed,
    )


def _tau(outcome: Outcome, num_drafts: int) -> float:
    return 1 + float(outcome.num_accepted.clamp(max=num_drafts).float().mean())


def advise(costs: Costs, table: CostTable, outcome: Outcome) -> tuple[str, ...]:
    """Return what to set, in words: the number of drafts, and the threshold if one promises more."""
    count, speed = max(costs.speed.items(), key=lambda item: item[1])
    if speed <= 1:
        return (
            f"On this machine drafting promises {speed:.2f} times the speed of plain generate at best: leave the "
            "drafter out, or keep the default scheduler, which then hardly drafts.",
        )
    advice = [f"Set nothing: the default scheduler adapts. {speed:.2f} times the speed of plain generate is promised."]
    advice.append(f'With `scheduler="fixed"`, set `num_assistant_tokens={count}`.')
    threshold, reached = _best_threshold(costs, table, outcome)
    if reached > _WORTH * speed:
        advice.append(
            f'`scheduler="threshold"` with `assistant_confidence_threshold={threshold}` promises {reached:.2f} times.'
        )
    return tuple(advice)


def _best_threshold(costs: Costs, table: CostTable, outcome: Outcome) -> tuple[float, float]:
    """Return the threshold of the confidence that promises the highest speed, and that speed over plain steps'."""
    if outcome.confidence is None:
        return 0.0, 0.0
    plain = table.verify_seconds(1, 1, costs.context_length)
    drafting = table.draft_seconds(1, outcome.block_size, costs.context_length)
    speeds = {}
    for threshold in _THRESHOLDS:
        admitted = (outcome.confidence >= threshold).long().cumprod(-1).sum(-1)
        tau = 1 + float(outcome.num_accepted.minimum(admitted).float().mean())
        counts = admitted.bincount(minlength=outcome.block_size + 1).tolist()
        passes = sum(n * table.verify_seconds(1, 1 + k, costs.context_length) for k, n in enumerate(counts) if n)
        speeds[threshold] = tau * plain / (drafting + passes / len(admitted))
    return max(speeds.items(), key=lambda item: item[1])
