"""A run goes on from its newest whole checkpoint, whatever a crash left behind."""

from __future__ import annotations

from pathlib import Path

from dspark_hf.training.progress import last_whole_checkpoint


def _checkpoint(folder: Path, step: int, *, is_whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    if is_whole:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    """A run would go on from an older checkpoint, or crash on a torn one at every start."""
    _checkpoint(tmp_path, 90)
    newest = _checkpoint(tmp_path, 100)
    torn = _checkpoint(tmp_path, 110, is_whole=False)
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert last_whole_checkpoint(tmp_path) == newest
    assert not torn.exists()
    assert (tmp_path / "checkpoint-of-mine").exists()


def test_there_may_be_none(tmp_path: Path) -> None:
    """A first run would fail."""
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "not there") is None
