"""Whole reports: totals, devices, JSON, and what they import."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dspark_hf import hubs
from dspark_hf.modeling.deepseek_v4 import estimation
from dspark_hf.modeling.deepseek_v4.estimation.devices import DEVICES, GIB, USABLE_SHARE, count_devices
from dspark_hf.modeling.deepseek_v4.estimation.formats import CacheFormat, WeightFormat
from dspark_hf.modeling.deepseek_v4.estimation.known import CONFIGURATIONS
from dspark_hf.modeling.deepseek_v4.estimation.report import EstimationSettings, make_report, to_json
from dspark_hf.modeling.deepseek_v4.estimation.report_tables import print_report, remarks

FILES = [*sorted(Path(estimation.__file__).parent.glob("*.py")), Path(hubs.__file__)]
PRO, V32 = "deepseek-ai/DeepSeek-V4-Pro", "deepseek-ai/DeepSeek-V3.2"


def test_totals_are_the_sums_of_their_parts():
    """The table says another number of devices than its own rows do."""
    settings = EstimationSettings(context=10_000, batch_size=7)
    model = make_report(PRO, settings).model
    fields = json.loads(to_json(make_report(PRO, settings)))["model"]
    weights = sum(part["num_bytes"] for part in fields["weights"]["parts"].values())
    cache = 7 * sum(part["num_bytes"] for part in fields["cache"]["parts"].values())
    drafter = fields["drafter"]["weights"]["num_bytes"] + fields["drafter"]["cache"]["num_bytes"]
    assert model.num_bytes == fields["num_bytes"] == weights + cache + drafter
    flops = sum(part["plain"] for part in fields["flops"]["parts"].values())
    assert flops == fields["flops"]["plain"] == model.flops.plain


def test_json_holds_ratios_and_what_is_published():
    """A script that reads the file finds no comparison."""
    fields = json.loads(to_json(make_report(PRO, EstimationSettings())))
    assert fields["settings"] == {
        "context": 2**20,
        "batch_size": 1,
        "weight_format": "released",
        "cache_format": "released",
    }
    assert fields["ratios"]["cache"] == pytest.approx(0.105, abs=5e-4)
    assert fields["ratios"]["flops_plain"] == pytest.approx(0.262, abs=5e-4)
    assert fields["ratios"]["flops_fp8_equivalent"] == pytest.approx(0.274, abs=5e-4)
    assert fields["published"] == {"total": 1600, "active": 49, "flops_ratio": 0.27, "cache_ratio": 0.10}
    assert fields["baseline"]["name"] == V32
    assert fields["devices"][0]["count"] >= 1


def test_the_baseline_is_not_compared_with_itself():
    """DeepSeek-V3.2 stands beside itself with ratios of 100%."""
    report = make_report(V32, EstimationSettings())
    assert report.baseline is None
    assert json.loads(to_json(report))["ratios"] is None


@pytest.mark.parametrize(
    ("context", "cache_format", "expected"),
    [
        (1_000_000, CacheFormat.released, True),
        (2**20, CacheFormat.released, True),
        (2**20, CacheFormat.bf16, False),
        (128_000, CacheFormat.released, False),
    ],
)
def test_published_ratios_stand_only_beside_their_like(context, cache_format, expected):
    """The ratio at 1M tokens is printed beside the estimate for another context or format."""
    settings = EstimationSettings(context=context, cache_format=cache_format)
    assert make_report(PRO, settings).is_at_claimed_context is expected


@pytest.mark.parametrize("num_bytes", [1, 10 * GIB, 72 * GIB, 836 * GIB, int(836.12 * GIB)])
def test_the_fewest_devices_that_suffice(num_bytes):
    """One device too few, so that the model does not fit, or one too many."""
    assert [one.device for one in count_devices(num_bytes)] == list(DEVICES)
    for one in count_devices(num_bytes):
        usable = USABLE_SHARE * one.device.memory * GIB
        assert (one.count - 1) * usable < num_bytes <= one.count * usable


# every model, and every format
@pytest.mark.parametrize(
    ("name", "weight_format"),
    [(name, list(WeightFormat)[number % len(WeightFormat)]) for number, name in enumerate(CONFIGURATIONS)]
    + [(PRO, weight_format) for weight_format in WeightFormat],
)
def test_fits_80_columns(name, weight_format):
    """A number is cut or a table is torn on a usual terminal."""
    console = Console(width=80, record=True, file=io.StringIO())
    report = make_report(name, EstimationSettings(weight_format=weight_format, batch_size=1000))
    print_report(report, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert f"{report.model.num_bytes / GIB:,.2f}" in text


def test_remarks_tell_what_is_beyond_a_model():
    """Numbers of a model that cannot do it, or of another release's drafter, go unremarked."""
    lines = remarks(make_report(PRO, EstimationSettings(context=2_000_000)))
    assert [line.split(" ")[0] for line in lines] == [PRO, V32, "The"]
    assert remarks(make_report(f"{PRO}-DSpark", EstimationSettings(context=1000))) == []
    assert "no DSpark module" in remarks(make_report(f"{PRO}-Base", EstimationSettings(context=1000)))[0]


@pytest.mark.parametrize(("field", "value"), [("context", 0), ("context", -5), ("batch_size", 0)])
def test_numbers_that_are_too_small_are_told(field, value):
    """A negative context gives negative memory."""
    with pytest.raises(ValueError, match=f"`--{field.replace('_', '-')}` must be at least 1, got {value}"):
        EstimationSettings(**{field: value})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_heavy_is_imported(path):
    """An estimate needs torch, or waits for it."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    # what is imported within a function waits until it is called
    modules = {node.module or "" for node in nodes if node.col_offset == 0 or path in FILES[:-1]}
    roots = {module.split(".")[0] for module in modules} - {"dspark_hf"}
    assert not roots & {"torch", "transformers", "accelerate", "safetensors"}
    # names that come when they are asked for cost nothing before
    ours = {module for module in modules if module.startswith("dspark_hf")} - {"dspark_hf.lazy", "dspark_hf.hubs"}
    assert all(module.startswith("dspark_hf.modeling.deepseek_v4.estimation.") for module in ours)
