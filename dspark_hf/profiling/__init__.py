"""What steps cost on a machine: measured, interpolated, stored, drawn. Knows nothing of models."""
