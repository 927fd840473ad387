"""Text for training, written by the target itself: sources, writers, and the file they fill."""
