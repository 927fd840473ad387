"""Memory and FLOPs of DeepSeek-V4 and DeepSeek-V3.2 from the configuration alone, without weights.

Nothing in here imports PyTorch or Transformers, so `dspark-hf estimate` loads neither. From Python, `dspark_hf` itself
loads both.
"""
