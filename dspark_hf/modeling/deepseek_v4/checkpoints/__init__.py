"""Released DeepSeek-V4 checkpoints: loading, placing, saving."""
