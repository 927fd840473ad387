"""Calibration of a drafter's confidence: Sequential Temperature Scaling, its metrics and its report."""
