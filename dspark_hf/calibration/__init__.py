"""Calibration of a drafter's confidence: Sequential Temperature Scaling, its metrics and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.calibration.observations import Observations, collect_observations
    from dspark_hf.calibration.report import CalibrationReport, calibrate
    from dspark_hf.calibration.saving import save_temperatures
    from dspark_hf.calibration.sts import fit_sts

__all__ = [
    "CalibrationReport",
    "Observations",
    "calibrate",
    "collect_observations",
    "fit_sts",
    "save_temperatures",
]

__getattr__ = lazy_names(
    __name__,
    {
        "CalibrationReport": "report",
        "Observations": "observations",
        "calibrate": "report",
        "collect_observations": "observations",
        "fit_sts": "sts",
        "save_temperatures": "saving",
    },
)
