"""What a step costs: learned while decoding, measured, stored, and read as curves."""
