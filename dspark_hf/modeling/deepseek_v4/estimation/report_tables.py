"""A report in the terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark_hf.modeling.deepseek_v4.estimation.devices import GIB
from dspark_hf.modeling.deepseek_v4.estimation.report import ASSUMPTIONS, Estimate, Report, ratios
from dspark_hf.modeling.deepseek_v4.estimation.weights import PartWeights, Weights

NOTHING = "–"


def print_report(report: Report, console: Console) -> None:
    """Print the tables, what to know beside them, and the assumptions."""
    for table in (_memory(report), _weights(report), _cache(report), _flops(report)):
        console.print(table, "")
    if report.baseline is not None:
        console.print(_comparison(report, report.baseline), "")
    console.print(_devices(report), "")
    for remark in remarks(report):
        console.print(Text(remark, style="yellow"))
    for assumption in ASSUMPTIONS:
        console.print(Text(assumption, style="dim"))


def remarks(report: Report) -> list[str]:
    """Return what a reader must know beside the tables."""
    lines, context = [], report.settings.context
    for estimate in (report.model, report.baseline):
        if estimate is not None and context > estimate.max_context:
            lines.append(
                f"{estimate.name} has {estimate.max_context:,} positions; its numbers at {context:,} tokens are "
                "arithmetic."
            )
    drafter = report.model.drafter
    if drafter is not None and drafter.release is not None:
        lines.append(f"The drafter is the one of {drafter.release}, which has the same target.")
    if drafter is None:
        lines.append("This release has no DSpark module: no drafter is counted.")
    return lines


def _memory(report: Report) -> Table:
    settings, model = report.settings, report.model
    sequences = "1 sequence" if settings.batch_size == 1 else f"{settings.batch_size:,} sequences"
    table = _table(f"Memory of {model.name}", "", "GiB", "stored as")
    caches = model.cache.num_bytes
    table.add_row("target weights", _gib(model.weights.num_bytes), settings.weight_format.value)
    if model.drafter is not None:
        table.add_row("drafter weights", _gib(model.drafter.weights.num_bytes), settings.weight_format.value)
        caches += model.drafter.cache.num_bytes
    table.add_row(f"KV cache, {sequences} of {settings.context:,}", _gib(caches), settings.cache_format.value)
    table.add_row(Text("together", style="bold"), Text(_gib(model.num_bytes), style="bold"), "")
    return table


def _weights(report: Report) -> Table:
    model, claim = report.model, report.claim
    table = _table("Weights", "", "parameters", "active", "GiB")
    for name, part in model.weights.parts.items():
        table.add_row(name, *_weight_cells(part))
    table.add_section()
    table.add_row("target", *_weight_cells(model.weights))
    if claim is not None:
        table.add_row("  published", f"{claim.total:,.0f} B", f"{claim.active:,.0f} B", "")
    if model.drafter is not None:
        table.add_row(f"drafter, {model.drafter.num_stages} stages", *_weight_cells(model.drafter.weights))
    return table


def _weight_cells(weights: Weights | PartWeights) -> tuple[str, str, str]:
    return _billions(weights.num_parameters), _billions(weights.num_active_parameters), _gib(weights.num_bytes)


def _cache(report: Report) -> Table:
    model = report.model
    table = _table(f"KV cache of one sequence of {report.settings.context:,} tokens", "", "layers", "MiB", "B/token")
    for name, part in model.cache.parts.items():
        grows = f"{part.bytes_per_token:,.1f}" if part.bytes_per_token else NOTHING
        table.add_row(name, str(part.num_layers), _mib(part.num_bytes), grows)
    table.add_section()
    table.add_row("target", "", _mib(model.cache.bytes_per_sequence), f"{model.cache.bytes_per_token:,.1f}")
    if model.drafter is not None:
        cache = model.drafter.cache
        table.add_row("drafter windows", str(model.drafter.num_stages), _mib(cache.bytes_per_sequence), NOTHING)
    return table


def _flops(report: Report) -> Table:
    flops = report.model.flops
    table = _table(f"GFLOPs per token at {report.settings.context:,}", "", "plain", "FP8 equivalent")
    for name, part in flops.parts.items():
        table.add_row(name, _giga(part.plain), _giga(part.fp8_equivalent))
    table.add_section()
    table.add_row("target", _giga(flops.plain), _giga(flops.fp8_equivalent))
    return table


def _comparison(report: Report, baseline: Estimate) -> Table:
    shares, claim = ratios(report) or {}, report.claim if report.is_at_claimed_context else None
    published_cache = None if claim is None else claim.cache_ratio
    published_flops = None if claim is None else claim.flops_ratio
    table = _table("Beside DeepSeek-V3.2", "", "this model", "V3.2", "ratio", "published")
    rows: Sequence[tuple[str, str, float | None]] = (
        ("weights, GiB", "weights", None),
        ("KV cache, GiB", "cache", published_cache),
        ("GFLOPs, plain", "flops_plain", None),
        ("GFLOPs, FP8 equivalent", "flops_fp8_equivalent", published_flops),
    )
    for label, key, published in rows:
        ours, theirs = (_compared(estimate, key) for estimate in (report.model, baseline))
        told = NOTHING if published is None else f"{published:.0%}"
        table.add_row(label, ours, theirs, f"{shares[key]:.1%}", told)
    return table


def _compared(estimate: Estimate, key: str) -> str:
    if key == "weights":
        return _gib(estimate.weights.num_bytes)
    if key == "cache":
        return _gib(estimate.cache.num_bytes)
    return _giga(estimate.flops.plain if key == "flops_plain" else estimate.flops.fp8_equivalent)


def _devices(report: Report) -> Table:
    table = _table(f"Devices that hold {_gib(report.model.num_bytes)} GiB", "", "GiB each", "FP8", "needed")
    for one in report.devices:
        table.add_row(one.device.name, str(one.device.memory), "yes" if one.device.has_fp8 else "no", f"{one.count:,}")
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for index, heading in enumerate(headings):
        # the first column wraps, so that numbers are never cut
        table.add_column(Text(heading), justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f}"


def _billions(number: int) -> str:
    return f"{number / 1e9:,.3f} B" if number else NOTHING


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2f}"
