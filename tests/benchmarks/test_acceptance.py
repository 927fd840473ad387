"""The repository's table of accepted lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import acceptance
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.evaluation.results import Evaluation


def test_texts_are_those_that_tau_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table sets the accepted length of whole blocks beside the texts of another scheduler."""
    write_tiny_pair(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    evaluate, evaluations = acceptance.evaluate, list[Evaluation]()

    def keep(*arguments: Any, **options: Any) -> Evaluation:
        evaluations.append(evaluate(*arguments, **options))
        return evaluations[-1]

    monkeypatch.setattr(acceptance, "evaluate", keep)
    table = tmp_path / "table.md"
    models = {"target": str(tmp_path / "target"), "drafter": str(tmp_path / "drafter")}
    acceptance.main([prompts], num_prompts=2, max_new_tokens=8, output=table, **models)
    [drafter] = evaluations[0].sets[0].drafters
    assert [speed.scheduler for speed in drafter.speeds] == ["fixed"]
    assert "2 of 2" in table.read_text(encoding="utf-8")
