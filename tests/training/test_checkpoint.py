"""A checkpoint is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_hf.training.checkpoint import read_if_there, write_whole


def test_round_trip(tmp_path: Path) -> None:
    """A run could not continue from what it saved."""
    path = tmp_path / "new" / "checkpoint.pt"
    assert read_if_there(path) is None
    write_whole(path, {"step": 3, "weight": torch.arange(4)})
    state = read_if_there(path)
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["weight"], torch.arange(4))


def test_a_crash_keeps_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while saving would cost the whole run."""
    path = tmp_path / "checkpoint.pt"
    write_whole(path, {"step": 3})
    save = torch.save

    def crash(state: object, file: object) -> None:
        save(state, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, {"step": 4})
    state = read_if_there(path)
    assert state is not None
    assert state["step"] == 3


def test_a_crash_at_the_first_one_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would try to continue from half a file."""
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") and (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        write_whole(tmp_path / "checkpoint.pt", {"step": 1})
    assert read_if_there(tmp_path / "checkpoint.pt") is None
