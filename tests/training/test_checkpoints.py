"""A run goes on from its newest whole checkpoint, and leaves alone what no run has made."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.training.checkpoints import check_output, check_same_drafter, last_whole_checkpoint


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "dspark"}')
    save_file({"weight": torch.zeros(30)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"number": torch.ones(9)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": [], "epoch": 0.5}))
    return path


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    """A run goes on from an older checkpoint, or clears away what it has not made."""
    _checkpoint(tmp_path, 90)
    newest = _checkpoint(tmp_path, 100)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-110").mkdir()
    (tmp_path / "checkpoint-110" / "model.safetensors").write_text("of another trainer")
    assert last_whole_checkpoint(tmp_path) == newest
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint-90", "checkpoint-100", "checkpoint-110", "checkpoint-of-mine")
    }


@pytest.mark.parametrize("size", [0, 0.5, None], ids=["empty", "cut", "absent"])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_damaged_one_is_passed_over(
    name: str, size: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk or a power cut stops a run for good, although an older checkpoint is whole."""
    older, newer = _checkpoint(tmp_path, 2), _checkpoint(tmp_path, 4)
    path = newer / name
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    with caplog.at_level(logging.WARNING, "dspark_hf"):
        found = last_whole_checkpoint(tmp_path)
    if size is None and name.endswith((".pt", ".pth")):
        # saved without them, as `save_only_model` does
        assert found == newer
        return
    assert found == older
    assert not newer.exists() and (tmp_path / "damaged-checkpoint-4" / "config.json").exists()
    assert name in caplog.text and "Passed over the checkpoint" in caplog.text


@pytest.mark.parametrize(
    "state",
    [
        {"global_step": 3},
        {"global_step": "4"},
        {"global_step": 4, "log_history": 7},
        {"global_step": 4, "log_history": [3]},
        {"global_step": 4, "best_metric": "x"},
        {"global_step": 4, "is_hyper_param_search": 1},
        {"global_step": 4, "unknown": 1},
        [4],
    ],
)
def test_a_state_that_is_none_is_passed_over(state: object, tmp_path: Path) -> None:
    """A state that can be read but says nonsense stops every run."""
    older, newer = _checkpoint(tmp_path, 2), _checkpoint(tmp_path, 4)
    (newer / "trainer_state.json").write_text(json.dumps(state))
    assert last_whole_checkpoint(tmp_path) == older


def test_there_may_be_none(tmp_path: Path) -> None:
    """A first run fails."""
    check_output(tmp_path / "not there")
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "not there") is None


def test_what_a_run_has_left_is_gone_on_from(tmp_path: Path) -> None:
    """A run that a crash stopped at the very start of a checkpoint is refused for ever."""
    _checkpoint(tmp_path, 4)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "config.json").write_text("")
    _checkpoint(tmp_path / "elsewhere", 1).rename(tmp_path / "drafter")
    check_output(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-500", "checkpoint-of-mine", "drafter"])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "dead link"])
def test_what_no_run_has_made_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    """Somebody's folder is written over or removed because of its name."""
    path, elsewhere = tmp_path / "run" / name, tmp_path / "elsewhere"
    path.parent.mkdir()
    elsewhere.mkdir()
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("years")
    elif kind == "file":
        path.write_text("years")
    else:
        path.symlink_to(elsewhere if kind == "link" else tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"must be a folder that only training writes to, got '.*{name}'"):
        check_output(path.parent)


def test_another_drafter_does_not_go_on(tmp_path: Path) -> None:
    """Weights of another shape end in PyTorch's error, and those of the same shape go on with other layers."""
    fields: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_target_layers": 6}
    config = DSparkConfig(**fields, num_hidden_layers=2, target_layer_ids=[1, 3])
    check_same_drafter(tmp_path, config)
    config.save_pretrained(_checkpoint(tmp_path, 2))
    # what is learned on the way, and defaults that the file leaves out
    check_same_drafter(tmp_path, DSparkConfig(**{**config.to_dict(), "accept_rates": [0.5] * 7}))
    for name, value, held in (("num_hidden_layers", 3, "2"), ("target_layer_ids", [1, 4], r"\[1, 3\]")):
        other = DSparkConfig(**{**config.to_dict(), name: value})
        with pytest.raises(ValueError, match=f"`--output` must be a folder .* got one with `{name}` {held} in"):
            check_same_drafter(tmp_path, other)
    # nothing goes on from what is damaged
    (tmp_path / "checkpoint-2" / "config.json").write_text("{")
    check_same_drafter(tmp_path, other)
