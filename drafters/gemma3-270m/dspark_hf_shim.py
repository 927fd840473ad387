"""Load the installed `dspark_hf` package's classes; `pip install dspark-hf` provides them."""

from dspark_hf import DSparkAssistantModel, DSparkConfig

__all__ = ["DSparkAssistantModel", "DSparkConfig"]
