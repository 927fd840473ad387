"""One round of DSpark, and all that `generate` promises around it."""
