"""Profiles on disk."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from dspark_hf.generation.scheduling.costs import storing
from dspark_hf.generation.scheduling.costs.storing import ProfileKey, load_profile, profile_path, save_profile
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable

KEY = ProfileKey("Model-0123456789", "float32", "Some CPU, 2 threads", "sdpa")
TABLE = CostTable(
    CostCurves({(1, 128, 1): 0.01, (1, 128, 8): 0.0123456789, (4, 128, 1): 0.02}), CostCurves({(1, 128, 7): 0.004})
)
MEASURED = {"date": "2026-01-01"}


def test_round_trip(profiles):
    """Costs that are stored come back as others."""
    path = save_profile(KEY, "drafter", TABLE, MEASURED)
    assert path.parent == profiles
    loaded = load_profile(KEY, "drafter")
    assert loaded.verify.points == pytest.approx(TABLE.verify.points, abs=1e-7)
    assert loaded.draft.points == TABLE.draft.points
    assert load_profile(KEY, None).draft.points == {}


def test_the_file_can_be_read(profiles):
    """A person who opens the file does not see what was measured, where, or in which unit."""
    fields = json.loads(save_profile(KEY, "drafter", TABLE, MEASURED).read_text(encoding="utf-8"))
    assert {name: fields[name] for name in ("model", "dtype", "device", "attention")} == {
        "model": KEY.model,
        "dtype": KEY.dtype,
        "device": KEY.device,
        "attention": KEY.attention,
    }
    assert fields["verify"]["measured"] == MEASURED
    assert fields["verify"]["curves"][0] == {
        "rows": 1,
        "context": 128,
        "seconds_by_width": {"1": 0.01, "8": 0.0123457},
    }
    assert fields["drafters"]["drafter"]["curves"][0]["seconds_by_drafts"] == {"7": 0.004}


def test_other_drafters_stay(profiles):
    """Measuring a target anew, or with another drafter, loses what was known of a drafter."""
    save_profile(KEY, "drafter", TABLE, MEASURED)
    newer = CostTable(CostCurves({(1, 128, 1): 0.5}), CostCurves({(1, 128, 7): 0.9}))
    save_profile(KEY, "other", newer, MEASURED)
    save_profile(KEY, None, newer, MEASURED)
    assert load_profile(KEY, "drafter").draft.points == TABLE.draft.points
    assert load_profile(KEY, "other").draft.points == newer.draft.points
    assert load_profile(KEY, "drafter").verify.points == newer.verify.points


@pytest.mark.parametrize(
    "change", [{"model": "Model-1"}, {"dtype": "bfloat16"}, {"device": "Some CPU, 1 threads"}, {"attention": "eager"}]
)
def test_every_part_of_the_key_counts(profiles, change):
    """Costs of another machine, dtype or model are taken for these."""
    save_profile(KEY, None, TABLE, MEASURED)
    assert load_profile(replace(KEY, **change), None) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 0}',
        '{"format": 1}',
        '{"format": 1, "verify": [], "drafters": []}',
        '{"format": 1, "verify": {"curves": [{"rows": 1}]}, "drafters": {}}',
        '{"format": 1, "verify": {"curves": [{"rows": 1, "context": 1, "seconds_by_width": {"a": 1}}]}}',
        '{"format": 1, "verify": {"curves": []}, "drafters": 3}',
        '{"format": 1, "verify": {"curves": [{"rows": Infinity, "context": 1, "seconds_by_width": {"1": 1}}]},'
        ' "drafters": {}}',
        '{"format": 1, "verify": {"curves": [{"rows": -1, "context": 1, "seconds_by_width": {"1": 1}}]},'
        ' "drafters": {}}',
        '{"format": 1, "verify": {"curves": [{"rows": 1.5, "context": 1, "seconds_by_width": {"1": 1}}]},'
        ' "drafters": {}}',
        '{"format": 1, "verify": {"curves": [{"rows": 1, "context": 1, "seconds_by_width": {"0": 1}}]},'
        ' "drafters": {}}',
        '{"format": 1, "verify": {"curves": [{"rows": 1, "context": 1, "seconds_by_width": {"1": 1e999}}]},'
        ' "drafters": {}}',
        "[" * 200_000,
    ],
)
def test_other_files_are_passed_over(profiles, text):
    """A damaged file, or one of another version, stops `generate`, or cannot be replaced."""
    path = profile_path(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert load_profile(KEY, "drafter") is None
    save_profile(KEY, "drafter", TABLE, MEASURED)
    assert load_profile(KEY, "drafter").draft.points == TABLE.draft.points


def _in_the_cache(monkeypatch, folder):
    monkeypatch.delenv(storing.FOLDER_VARIABLE)
    monkeypatch.setattr(storing, "_cache_folder", lambda: folder)


@pytest.mark.skipif(os.name != "posix", reason="owners are POSIX's")
@pytest.mark.parametrize("change", ["another's", "everybody's"])
def test_a_shared_cache_is_not_believed_blindly(profiles, tmp_path, monkeypatch, change):
    """Another user of a shared cache decides how this one's calls are scheduled."""
    _in_the_cache(monkeypatch, tmp_path / "cache")
    path = save_profile(KEY, "drafter", TABLE, MEASURED)
    assert load_profile(KEY, "drafter") is not None
    if change == "everybody's":
        path.chmod(0o666)
    else:
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        # a file of root's is believed
        if path.stat().st_uid == 0:
            os.chown(path, 12345, -1)
    assert load_profile(KEY, "drafter") is None
    # a folder that was named is one to trust
    monkeypatch.setenv(storing.FOLDER_VARIABLE, str(tmp_path / "cache"))
    assert load_profile(KEY, "drafter") is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_is_no_profile(profiles):
    """Every call of `generate` waits for ever."""
    path = profile_path(KEY)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert load_profile(KEY, None) is None


def test_long_names_can_be_stored(profiles):
    """A model or a device with a long name has no profile, and two of them have the same."""
    first, second = (replace(KEY, model="Model" * 100 + end) for end in "ab")
    save_profile(first, None, TABLE, MEASURED)
    assert load_profile(first, None) is not None
    assert load_profile(second, None) is None


BUSY = {1: 0.147, 2: 0.264, 3: 0.303, 4: 0.234, 6: 0.186, 8: 0.138}


@pytest.mark.parametrize(
    "by_width",
    [BUSY, {1: 0.1, 8: float("nan")}, {1: -0.1}, {1: 0}],
    ids=["falling", "not a number", "negative", "zero"],
)
@pytest.mark.parametrize("part", ["verify", "draft"])
def test_costs_that_cannot_be_true_are_passed_over(profiles, monkeypatch, by_width, part):
    """A profile from a busy moment decides in all later processes, and nobody is told which file to delete."""
    path = save_profile(KEY, "drafter", TABLE, MEASURED)
    fields = json.loads(path.read_text(encoding="utf-8"))
    curves = (fields["verify"] if part == "verify" else fields["drafters"]["drafter"])["curves"]
    curves[0]["seconds_by_width" if part == "verify" else "seconds_by_drafts"] = by_width
    path.write_text(json.dumps(fields), encoding="utf-8")
    told: list[str] = []
    monkeypatch.setattr(storing.logger, "warning_once", told.append)
    assert load_profile(KEY, "drafter") is None
    [message] = told
    assert str(path) in message
    assert "Delete that file" in message
    save_profile(KEY, "drafter", TABLE, MEASURED)
    assert load_profile(KEY, "drafter") is not None
    assert len(told) == 1


def test_no_step_is_stored_as_free(profiles):
    """A step that takes less than a clock can tell is stored as zero, and the whole file is passed over."""
    save_profile(KEY, None, CostTable(CostCurves({(1, 1, 1): 1e-9})), MEASURED)
    assert load_profile(KEY, None) is not None


def test_a_failed_write_leaves_the_old_file(profiles, monkeypatch):
    """Half a file is left behind."""
    save_profile(KEY, "drafter", TABLE, MEASURED)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_profile(KEY, "drafter", CostTable(CostCurves({(1, 1, 1): 9.0})), MEASURED)
    assert load_profile(KEY, "drafter").draft.points == TABLE.draft.points
    assert [path.name for path in profiles.iterdir()] == [KEY.file_name]


def test_a_folder_that_is_given_goes_first(profiles, tmp_path):
    """A profile is written elsewhere than asked."""
    assert save_profile(KEY, None, TABLE, MEASURED, tmp_path / "mine").parent == tmp_path / "mine"
    assert load_profile(KEY, None) is None
    assert load_profile(KEY, None, tmp_path / "mine") is not None
