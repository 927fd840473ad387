"""The benchmark of throughput: what it counts, what it simulates, and that it goes on where it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import throughput, throughput_store
from benchmarks.loads import DEFAULT, PLAIN, WAYS, Measured, make_load, num_new_tokens, random_prompts
from benchmarks.simulation import SimulatedDrafter, random_target
from benchmarks.throughput_report import best_fixed, ratio, speed_table
from benchmarks.throughput_store import Store
from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.scheduling.costs import profile
from tests.pictures import drawn_share

RATES = [0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
ARGUMENTS = ["--shape", "tiny", "--runs", "1", "--max-new-tokens", "6"]


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The command, with profiles of its own."""
    monkeypatch.setenv("DSPARK_HF_PROFILES", str(tmp_path / "profiles"))
    app = typer.Typer()
    app.command()(throughput.main)
    return app


def test_tokens_count_up_to_each_rows_end():
    """Padding counts as text, or an end does not."""
    new = torch.tensor([[5, 6, 2, 0], [2, 0, 0, 0], [5, 6, 7, 8], [5, 6, 7, 2]])
    assert num_new_tokens(new, 2) == 3 + 1 + 4 + 4
    assert num_new_tokens(new, [2, 7]) == 3 + 1 + 3 + 3
    assert num_new_tokens(new, None) == 16


def test_prompts_are_padded_on_the_left():
    """A benchmark measures rows that attend to padding."""
    load = make_load([torch.tensor([3, 4]), torch.tensor([5, 6, 7])], 0, torch.device("cpu"), {})
    assert load.token_ids.tolist() == [[0, 3, 4], [5, 6, 7]]
    assert load.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_simulated_drafts_are_accepted_at_the_stated_rates():
    """A page says another acceptance than the one that was measured with."""
    target = random_target("tiny", torch.float32, "cpu")
    model = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=7)
    drafter = SimulatedDrafter(model, RATES)
    load = make_load(random_prompts(12, 256, seed=0), 0, target.device, {"do_sample": False})
    options = {"attention_mask": load.attention_mask, "max_new_tokens": 80, **load.options}
    drafter.script = target.generate(load.token_ids, **options)
    drafter.num_padded = (load.attention_mask == 0).sum(1).tolist()
    torch.manual_seed(0)
    output = target.generate(load.token_ids, assistant_model=drafter, scheduler="fixed", **options)
    assert torch.equal(output, drafter.script)
    statistics = drafter.last_statistics
    for position in range(3):
        count = statistics.verified_by_position[position]
        rate = statistics.accept_rate_by_position[position]
        deviation = math.sqrt(RATES[position] * (1 - RATES[position]) / count)
        assert abs(rate - RATES[position]) < 4.5 * deviation


@pytest.mark.slow
def test_a_page_is_written_and_an_interrupted_run_goes_on(app, tmp_path, monkeypatch):
    """Hours of measurements are lost, or measured twice."""
    runner, folder = CliRunner(), tmp_path / "results"
    arguments = [*ARGUMENTS, "--output", str(folder)]
    result = runner.invoke(app, [*arguments, "--rows", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    measured = []
    measure = throughput.measure

    def recorded(case, num_rows, *rest):
        measured.append(num_rows)
        return measure(case, num_rows, *rest)

    monkeypatch.setattr(throughput, "measure", recorded)
    result = runner.invoke(app, [*arguments, "--rows", "1,2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert measured == [2]
    page = (folder / "throughput-tiny-fp32.md").read_text(encoding="utf-8")
    assert "Acceptance is simulated" in page
    assert [line.split("|")[1].strip() for line in page.splitlines() if line.endswith("6 of 6 |")] == ["1", "2"]
    assert drawn_share(folder / "throughput-tiny-fp32-simulated-acceptance.png") > 0.01


def test_numbers_of_two_machines_are_told_apart(tmp_path, monkeypatch):
    """An interrupted run goes on elsewhere, and its page names the first machine for all numbers."""
    for rows, machine in ((1, "laptop"), (4, "server"), (8, "laptop")):
        monkeypatch.setattr(throughput_store, "describe_run", lambda machine=machine: [f"- hardware: {machine}"])
        store = Store(tmp_path, "throughput", {"runs": 1})
        store.add("prompts", rows, {PLAIN: Measured([1.0], [10])})
    expected = ["- hardware: laptop (rows 1, 8)", "- hardware: server (rows 4)"]
    assert store.provenance("prompts") == Store(tmp_path, "throughput", {"runs": 1}).provenance("prompts") == expected
    assert list(store.results()["prompts"]) == [1, 4, 8]


def test_the_default_has_no_profile(app, tmp_path, monkeypatch):
    """The default is measured with what other schedulers have found out, which users do not have."""
    has_profile = []
    covering_profile = profile._covering_profile

    def recorded(*args):
        found = covering_profile(*args)
        has_profile.append(found is not None)
        return found

    monkeypatch.setattr(profile, "_covering_profile", recorded)
    arguments = [*ARGUMENTS, "--rows", "1", "--output", str(tmp_path / "results")]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    # hardware_aware, which measures at first, asynchronous and the default: while warming up, and in the run
    assert has_profile[1:] == [True, False, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--shape", "huge"], "--shape"), (["--shape", "tiny", "--cases", "prompt"], "--cases")]
)
def test_names_must_exist(app, arguments, name):
    """A mistyped name ends in a traceback, or in an empty page."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"`{name}` must be" in result.output.replace("\n", " ")


def test_rates_must_be_chances(app):
    """A run of minutes ends in an error, or with a drafter that is right more often than always."""
    result = CliRunner().invoke(app, ["--shape", "tiny", "--rates", "0.9,1.2,0.5,0.5,0.5,0.5,0.5"])
    assert result.exit_code == 2
    assert "7 chances between 0 and 1" in result.output.replace("\n", " ")


def test_speeds_are_compared_run_by_run():
    """A slow minute of the machine makes one way look slower than another."""
    # the second run was three times as slow for all
    by_way = {way: Measured([1.0, 3.0], [10, 10], [2.0, 2.0], [3.0, 3.0], [True, True]) for way in WAYS}
    by_way[PLAIN] = Measured([2.0, 6.0], [10, 10])
    by_way[DEFAULT] = Measured([0.8, 2.4], [10, 10], [2.0, 2.0], [3.0, 3.0], [True, False])
    assert by_way[DEFAULT].ratio_to(by_way[PLAIN]) == pytest.approx(2.5)
    assert ratio(by_way[DEFAULT], best_fixed(by_way)) == "1.25 ± 0.00"
    row = speed_table({4: by_way})[-1]
    assert row.startswith("| 4 | 3.3 | 2.00 |")
    assert row.endswith("| 2.50 ± 0.00 | 1.25 ± 0.00 | 11 of 12 |")


def test_ratios_say_how_sure_they_are():
    """A page claims a difference that is noise."""
    draw = np.random.default_rng(0)
    others = Measured([1.0] * 9, [10] * 9)
    medians, errors = [], []
    for _ in range(2000):
        ours = Measured((1 / draw.normal(1.0, 0.1, size=9)).tolist(), [10] * 9)
        medians.append(ours.ratio_to(others))
        errors.append(ours.error_of_ratio_to(others))
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.1)
    # one run says nothing of that
    assert ratio(Measured([2.0], [10]), Measured([1.0], [10])) == "0.50"
