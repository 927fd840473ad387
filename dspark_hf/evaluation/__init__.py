"""Evaluation of drafters: accepted length, speed, and what their confidence is worth."""
