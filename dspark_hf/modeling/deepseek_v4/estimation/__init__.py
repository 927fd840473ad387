"""Memory and FLOPs of DeepSeek-V4 and DeepSeek-V3.2 from the configuration alone; loads neither torch nor weights."""
