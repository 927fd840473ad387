"""The drafter as a model: backbone, heads, configuration."""
