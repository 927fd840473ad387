"""Memory and FLOPs of DeepSeek-V4 and DeepSeek-V3.2 from the configuration alone, without weights.

Nothing in here imports PyTorch or Transformers, so `dspark-hf estimate` loads neither. From Python, `dspark_hf` itself
loads both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.modeling.deepseek_v4.estimation.formats import CacheFormat, WeightFormat
    from dspark_hf.modeling.deepseek_v4.estimation.report import EstimationSettings, Report, make_report

__all__ = ["CacheFormat", "EstimationSettings", "Report", "WeightFormat", "make_report"]

__getattr__ = lazy_names(
    __name__,
    {
        "CacheFormat": "formats",
        "EstimationSettings": "report",
        "Report": "report",
        "WeightFormat": "formats",
        "make_report": "report",
    },
)
