"""Tiny checkpoints in the released formats, written once."""

from __future__ import annotations

import pytest

from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Return the folders of tiny checkpoints, by the format of their experts."""
    root = tmp_path_factory.mktemp("checkpoints")
    for experts in ("fp4", "fp8", "bf16"):
        write_tiny_checkpoint(root / experts, experts=experts)
    return {folder.name: folder for folder in root.iterdir()}
