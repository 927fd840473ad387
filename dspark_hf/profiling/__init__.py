"""What steps cost on a machine: measured, interpolated, stored, drawn. Knows nothing of models."""

from dspark_hf.generation.scheduling.costs.keys import drafter_key, profile_key
from dspark_hf.generation.scheduling.costs.storing import load_profile, profile_path, save_profile
from dspark_hf.generation.scheduling.costs.table import CostTable

__all__ = [
    "CostTable",
    "drafter_key",
    "load_profile",
    "profile_key",
    "profile_path",
    "save_profile",
]
