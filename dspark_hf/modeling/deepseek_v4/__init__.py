"""DeepSeek-V4 as a target, with its DSpark module."""
