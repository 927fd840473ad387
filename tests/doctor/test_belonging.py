"""What the doctor says of a pair before it drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_hf import DSparkAssistantModel
from dspark_hf.doctor.belonging import check_belonging
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.provenance import fingerprint
from tests.tiny import tiny_target


@pytest.mark.parametrize(("name", "is_right"), [("me/model", True), ("you/model-2", False)])
def test_a_target_is_known_by_its_fingerprint_too(name: str, is_right: bool, own_drafters: Path) -> None:
    """A packaged target, which lies in a folder of another name, is called another model than the drafter's."""
    target = tiny_target()
    target.config.name_or_path = "/cache/packaged-0.1.2"
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    drafter.config.base_model_name_or_path = name
    adapter = TargetAdapter(target)
    entry = {"target": "me/model", "drafter": "me/drafter", "fingerprint": fingerprint(adapter)}
    own_drafters.write_text(json.dumps({"drafters": [entry]}), encoding="utf-8")
    (check,) = (one for one in check_belonging(adapter, drafter, None, None) if one.name == "name")
    assert check.is_right is is_right
