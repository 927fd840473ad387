"""What is wrong between a target and a drafter: every reading of the drafter is tried on the target's own text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.doctor.diagnosing import diagnose
    from dspark_hf.doctor.display import print_diagnosis
    from dspark_hf.doctor.results import Diagnosis

__all__ = ["Diagnosis", "diagnose", "print_diagnosis"]

__getattr__ = lazy_names(__name__, {"Diagnosis": "results", "diagnose": "diagnosing", "print_diagnosis": "display"})
